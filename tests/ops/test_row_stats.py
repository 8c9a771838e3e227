"""row_stats: the reference against the textbook, the public call, transforms, and bad input."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from kdaif_fast import backend
from kdaif_fast.ops import RowStats, row_stats
from kdaif_fast.reference import row_stats as reference
from tests.ops.row_stats_cases import DTYPES, HAS_KERNELS, inputs

DEPENDS_ON_LABEL = {f"{side}_{name}" for side in ("student", "teacher") for name in ("label", "margin", "ce")}


@pytest.fixture(params=["default", "reference"], autouse=True)
def answered_by(request):
    if request.param == "reference" and request.cls is TestCompiled:
        pytest.skip("torch.compile does not look into dispatch modes")
    with backend("reference") if request.param == "reference" else backend("cpu" if HAS_KERNELS else "reference"):
        yield


def textbook(student, teacher, labels, T, classes):
    """By other means than the reference: torch.distributions, sorting, loops."""
    q, p = Categorical(logits=student / T), Categorical(logits=teacher / T)
    fields = {}
    for name, logits, distribution in (("student", student, q), ("teacher", teacher, p)):
        margins = []
        for row, label in zip((logits / T).log_softmax(-1).tolist(), labels.tolist(), strict=True):
            margins.append(row[label] - max(row[:label] + row[label + 1 :], default=-math.inf))
        fields |= {
            f"{name}_max": distribution.probs.sort(-1).values[:, -1],
            f"{name}_label": distribution.log_prob(labels).exp(),
            f"{name}_margin": torch.tensor(margins, dtype=torch.float64),
            f"{name}_entropy": distribution.entropy(),
            f"{name}_argmax": torch.tensor([row.index(max(row)) for row in logits.tolist()]),
            f"{name}_ce": F.cross_entropy(logits / T, labels, reduction="none"),
            f"{name}_mass": sum(distribution.probs[:, c] for c in range(*classes)),
        }
    fields |= {"forward_kl": kl_divergence(p, q), "reverse_kl": kl_divergence(q, p)}
    return fields | {"agreement": fields["student_argmax"] == fields["teacher_argmax"]}


def same(ours: RowStats, expected: RowStats):
    for name, a, b in zip(RowStats._fields, ours, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    return True


class TestStatistics:
    @pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
    def test_are_the_textbooks(self, T):
        student, teacher, labels = inputs(12, 9)
        teacher[::2] = student[::2] + 0.01 * teacher[::2]  # so that some agree
        ours = row_stats(student, teacher, labels, temperature=T, classes=(2, 5))._asdict()
        expected = textbook(student, teacher, labels, T, (2, 5))
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                ours[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert 0 < ours["agreement"].sum() < 12

    def test_margin_without_labels_is_between_the_two_largest(self):
        student, teacher, _ = inputs(12, 9)
        stats = row_stats(student, teacher, temperature=2.0)
        for margin, logits in ((stats.student_margin, student), (stats.teacher_margin, teacher)):
            two = (logits / 2).log_softmax(-1).topk(2).values
            torch.testing.assert_close(margin, two[:, 0] - two[:, 1])
        assert row_stats(torch.tensor([[1.0, 3.0, 3.0]])).student_margin == 0
        assert row_stats(torch.tensor([[1.0]])).student_margin == math.inf

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        student, teacher, labels = inputs(5, 7, dtype)
        stats = row_stats(student, teacher, labels, classes=(0, 1))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, value in stats._asdict().items():
            expected = torch.int64 if name.endswith("argmax") else torch.bool if name == "agreement" else wide
            assert value.dtype == expected, name

    def test_what_is_not_given_is_none(self):
        student, teacher, labels = inputs(5, 7)

        def missing(*args, **options):
            return {name for name, value in row_stats(*args, **options)._asdict().items() if value is None}

        no_teacher = {name for name in RowStats._fields if name.startswith("teacher")}
        no_teacher |= {"forward_kl", "reverse_kl", "agreement"}
        no_labels = {"student_label", "student_ce", "teacher_label", "teacher_ce"}
        no_classes = {"student_mass", "teacher_mass"}
        assert missing(student, teacher, labels, classes=(0, 2)) == set()
        assert missing(student, teacher, labels) == no_classes
        assert missing(student, teacher, classes=(0, 2)) == no_labels
        assert missing(student, None, labels, classes=(0, 2)) == no_teacher
        assert missing(student) == no_teacher | no_labels | no_classes

    def test_leading_dimensions(self):
        student, teacher, labels = inputs(12, 5)
        expected = row_stats(student, teacher, labels, classes=(1, 3))
        cubes = row_stats(student.view(3, 4, 5), teacher.view(3, 4, 5), labels.view(3, 4), classes=(1, 3))
        single = row_stats(student[0], teacher[0], labels[0], classes=(1, 3))
        for all_rows, cube, one in zip(expected, cubes, single, strict=True):
            assert torch.equal(cube, all_rows.view(3, 4))
            assert one.shape == ()
            torch.testing.assert_close(one, all_rows[0])
        no_rows = vmap(lambda s: row_stats(s, s, labels[:0], classes=(1, 3)))(torch.zeros(3, 0, 5))
        assert all(value.shape == (3, 0) for value in no_rows)
        for empty in (torch.zeros(0, 5), torch.zeros(3, 0, 5)):
            stats = row_stats(empty, empty, torch.zeros(empty.shape[:-1], dtype=torch.int64), classes=(1, 3))
            assert all(value.shape == empty.shape[:-1] for value in stats)

    def test_class_slices(self):
        student, _, _ = inputs(5, 7)
        q = student.softmax(-1)
        for classes in (slice(2, 5), slice(None, 3), slice(4, None), slice(None), slice(0, 7, 1)):
            mass = row_stats(student, classes=classes).student_mass
            torch.testing.assert_close(mass, q[:, classes].sum(-1))
        assert torch.equal(row_stats(student, classes=slice(2, 5)).student_mass, row_stats(student, classes=(2, 5))[6])

    @pytest.mark.parametrize("ignore", [-100, 3])
    def test_ignored_rows(self, ignore):
        student, teacher, labels = inputs(6, 7)
        labels[:] = torch.tensor([0, ignore, 1, ignore, 2, 6])
        ours = row_stats(student, teacher, labels, classes=(0, 2), ignore_index=ignore)
        expected = row_stats(student, teacher, labels.clamp(min=0), classes=(0, 2))
        for name, a, b in zip(RowStats._fields, ours, expected, strict=True):
            if name in DEPENDS_ON_LABEL:
                assert a.isnan().tolist() == [False, True, False, True, False, False]
                a, b = a[[0, 2, 4, 5]], b[[0, 2, 4, 5]]
            assert torch.equal(a, b), name

    def test_rows_without_a_softmax_agree_with_nobody(self):
        student = torch.tensor([[math.nan, 0.0], [-math.inf, -math.inf], [1.0, 0.0]])
        stats = row_stats(student, student.clone())
        assert stats.agreement.tolist() == [False, False, True]
        assert stats.student_entropy.isnan().tolist() == [True, True, False]

    def test_mixed_dtypes_take_the_wider(self):
        student, teacher, labels = inputs(5, 4, torch.float32)
        narrow = teacher.to(torch.bfloat16)
        assert same(row_stats(student, narrow, labels), row_stats(student, narrow.float(), labels))
        assert same(row_stats(narrow, student, labels), row_stats(narrow.float(), student, labels))


class TestWithoutGradient:
    """The statistics are measurements: they work wherever gradients are at work, and have none."""

    def test_inputs_that_require_grad(self):
        student, teacher, labels = inputs(4, 5)
        expected = row_stats(student, teacher, labels, classes=(0, 2))
        student.requires_grad_()
        ours = row_stats(student * 1, teacher.requires_grad_(), labels, classes=(0, 2))
        assert same(ours, expected)
        assert not any(value.requires_grad for value in ours)
        F.cross_entropy(student, labels, reduction="none").mul(ours.student_entropy).sum().backward()
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modes(self, mode):
        student, teacher, labels = inputs(4, 5)
        expected = row_stats(student, teacher, labels)
        with mode():
            assert same(row_stats(student * 1, teacher * 1, labels * 1), expected)

    def test_logits_from_inference_mode(self):
        student, teacher, labels = inputs(4, 5)
        with torch.inference_mode():
            made_there = teacher * 1
        assert same(row_stats(student.requires_grad_(), made_there, labels), row_stats(student, teacher, labels))

    def test_inside_grad_and_jvp(self):
        """A weight made of statistics is a constant to the loss it weighs."""
        student, teacher, labels = inputs(4, 5)
        weight = row_stats(student, teacher, labels).forward_kl

        def loss(s, weight_of=lambda s: row_stats(s, teacher, labels).forward_kl):
            return (weight_of(s) * F.cross_entropy(s, labels, reduction="none")).sum()

        expected = grad(lambda s: loss(s, lambda s: weight))(student)
        torch.testing.assert_close(grad(loss)(student), expected)
        tangent = torch.randn_like(student)
        torch.testing.assert_close(jvp(loss, (student,), (tangent,))[1], (expected * tangent).sum())

    @pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 0), (None, 2, None), (0, 0, 1)])
    def test_vmap(self, dims):
        student, teacher, labels = (x.view(3, 4, *x.shape[1:]) for x in inputs(12, 5))
        arguments = [
            x.movedim(0, dim) if dim is not None else x[0]
            for x, dim in zip((student, teacher, labels), dims, strict=True)
        ]

        def fields(*args):
            return tuple(row_stats(*args, classes=(1, 3), temperature=2.0))

        ours = vmap(fields, in_dims=dims)(*arguments)
        expected = [
            fields(*(x[b if dim is not None else 0] for x, dim in zip((student, teacher, labels), dims, strict=True)))
            for b in range(3)
        ]
        for batch, rows in zip(ours, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(batch, torch.stack(rows))

    def test_vmap_over_single_rows_and_without_options(self):
        student, teacher, labels = inputs(6, 5)
        for arguments in ((student, teacher, labels), (student,), (student, teacher)):
            expected = [x for x in row_stats(*arguments) if x is not None]
            ours = vmap(lambda *row: tuple(x for x in row_stats(*row) if x is not None))(*arguments)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b)

    def test_vmap_of_grad(self):
        model = torch.nn.Linear(3, 5).double()
        parameters = dict(model.named_parameters())
        inputs_, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 5

        def loss(parameters, x, label, weighted=True):
            logits = functional_call(model, parameters, (x,))
            weight = row_stats(logits, None, label).student_entropy if weighted else 1
            return weight * F.cross_entropy(logits, label)

        ours = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs_, labels)
        plain = vmap(grad(lambda *args: loss(*args, weighted=False)), in_dims=(None, 0, 0))(parameters, inputs_, labels)
        entropy = row_stats(model(inputs_)).student_entropy
        torch.testing.assert_close(ours["bias"], entropy[:, None] * plain["bias"])


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_fullgraph(self, dynamic):
        compiled = torch.compile(row_stats, fullgraph=True, dynamic=dynamic)
        for N in (6, 4, 9):
            student, teacher, labels = inputs(N, 7, torch.float32)
            options = {"temperature": 2.0, "classes": (1, 4)}
            student.requires_grad_()
            ours = compiled(student, teacher, labels, **options)
            assert same(ours, row_stats(student, teacher, labels, **options))
            assert not ours.forward_kl.requires_grad

    def test_as_a_weight(self):
        student, teacher, labels = inputs(6, 7, torch.float32)
        student.requires_grad_()

        def step(s):
            stats = row_stats(s, teacher, classes=slice(0, 2))
            return ((1 - stats.student_mass) * F.cross_entropy(s, labels, reduction="none")).sum()

        (expected,) = torch.autograd.grad(step(student), student)
        (ours,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(student), student)
        torch.testing.assert_close(ours, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"student_logits": [[1.0]]},
                TypeError,
                r"student_logits is \[\[1.0\]\] \(list\), expected a torch.Tensor",
            ),
            ({"student_logits": torch.zeros(3, 4).long()}, TypeError, "student_logits has dtype torch.int64"),
            ({"student_logits": torch.zeros(3, 0)}, ValueError, r"student_logits has shape \(3, 0\)"),
            ({"teacher_logits": torch.zeros(3, 4).cfloat()}, TypeError, "teacher_logits has dtype torch.complex64"),
            (
                {"teacher_logits": torch.zeros(3, 5)},
                ValueError,
                r"teacher_logits has shape \(3, 5\), expected \(3, 4\)",
            ),
            ({"teacher_logits": torch.zeros(3, 4, device="meta")}, ValueError, "teacher_logits is on device meta"),
            ({"labels": torch.zeros(2).long()}, ValueError, r"labels has shape \(2,\), expected \(3,\)"),
            ({"labels": torch.zeros(3)}, TypeError, "labels have dtype torch.float32, expected torch.int64"),
            ({"labels": [0, 1, 2]}, TypeError, r"labels is \[0, 1, 2\]"),
            ({"labels": torch.tensor([0, 4, -1])}, ValueError, r"labels\[1\] is 4, expected 0 <= label < 4"),
            ({"labels": torch.tensor([0, 0, -1])}, ValueError, r"labels\[2\] is -1"),
            ({"labels": torch.tensor([0, -100, 1]), "ignore_index": -1}, ValueError, r"labels\[1\] is -100"),
            ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive finite number"),
            ({"temperature": math.nan}, ValueError, "temperature is nan"),
            ({"temperature": math.inf}, ValueError, "temperature is inf"),
            ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
            ({"ignore_index": 1.5}, TypeError, r"ignore_index is 1.5 \(float\), expected an integer"),
            ({"ignore_index": None}, TypeError, "ignore_index is None"),
            ({"classes": 3}, TypeError, r"classes is 3 \(int\), expected a slice or \(start, stop\)"),
            ({"classes": (0, 1, 2)}, TypeError, r"classes is \(0, 1, 2\)"),
            ({"classes": (0.0, 1)}, TypeError, "classes.start is 0.0"),
            ({"classes": (0, True)}, TypeError, "classes.stop is True"),
            ({"classes": (2, 2)}, ValueError, r"classes is \(2, 2\), expected 0 <= start < stop <= 4"),
            ({"classes": (-1, 2)}, ValueError, r"classes is \(-1, 2\)"),
            ({"classes": slice(0, 5)}, ValueError, r"classes is slice\(0, 5, None\)"),
            ({"classes": slice(0, 4, 2)}, ValueError, r"slice\(0, 4, 2\), expected a slice with step 1"),
        ],
    )
    def test_message(self, change, error, message):
        arguments = {
            "student_logits": torch.zeros(3, 4),
            "teacher_logits": torch.zeros(3, 4),
            "labels": torch.tensor([0, 1, 2]),
            **change,
        }
        with pytest.raises(error, match="^row_stats: .*" + message):
            row_stats(**arguments)

    def test_labels_of_many_dimensions_are_counted_through(self):
        labels = torch.zeros(2, 3).long()
        labels[1, 2] = 9
        with pytest.raises(ValueError, match=r"labels\[5\] is 9"):
            row_stats(torch.zeros(2, 3, 4), labels=labels)

    def test_bad_labels_under_vmap_raise_too(self):
        with pytest.raises((RuntimeError, ValueError), match=r"labels\[5\] is 4"):
            vmap(lambda s, y: row_stats(s, labels=y).student_ce)(
                torch.zeros(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 4]])
            )

    def test_labels_that_nobody_looks_at(self):
        """Off the CPU what depends on an illegal label is NaN, and nothing else."""
        student, teacher, labels = inputs(4, 5)
        wrong = labels.clone()
        wrong[1], wrong[3] = 5, -1
        ours, argmax = reference.row_stats(student, teacher, wrong, 2.0, 0, 3, -100)
        expected, same_argmax = reference.row_stats(student, teacher, labels, 2.0, 0, 3, -100)
        depends = [
            at
            for at, name in enumerate((*reference.SIDE, *reference.SIDE, "", ""))
            if name in ("label", "margin", "ce")
        ]
        assert ours[depends][:, [1, 3]].isnan().all()
        expected[depends] = torch.where(torch.tensor([False, True, False, True]), math.nan, expected[depends])
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(argmax, same_argmax)
