"""The public row_divergence: what its arguments mean, how it reduces, what can be learned, and bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast import backend
from kdaif_fast.ops import row_divergence
from tests.ops.row_cases import HAS_KERNELS, relative_error

N, V, T = 6, 7, 2.0


@pytest.fixture
def data():
    student, teacher, second = torch.randn(3, N, V, dtype=torch.float64)
    return student.requires_grad_(), teacher, second, torch.randint(V, (N,))


def kl(p, q):
    safe = p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()
    return (p * safe).sum(-1)


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]


def same(ours, expected, student):
    """Value and gradient."""
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(ours, student), gradient(expected, student), rtol=1e-9, atol=1e-12)


class TestMeaning:
    def test_cross_entropy_is_torchs(self, data):
        student, _, _, labels = data
        labels[2] = -100
        weights = torch.rand(V, dtype=torch.float64)
        for options in ({}, {"label_smoothing": 0.2}):
            ours = row_divergence(student, None, labels, class_weight=weights, **options)
            same(ours, F.cross_entropy(student, labels, weights, reduction="none", **options), student)
            mean = row_divergence(student, None, labels, reduction="mean", **options)
            same(mean, F.cross_entropy(student, labels, **options), student)
        soft = torch.rand(N, V, dtype=torch.float64)
        ours = row_divergence(student, None, soft_labels=soft, label_smoothing=0.1)
        same(ours, F.cross_entropy(student, soft, reduction="none", label_smoothing=0.1), student)

    def test_defaults(self, data):
        """CE + tau^2 KL with labels, tau^2 KL without."""
        student, teacher, _, labels = data
        divergence = T**2 * kl((teacher / T).softmax(-1), (student / T).softmax(-1))
        same(row_divergence(student, teacher, temperature=T), divergence, student)
        ce = F.cross_entropy(student, labels, reduction="none")
        same(row_divergence(student, teacher, labels, temperature=T), ce + divergence, student)
        unscaled = row_divergence(student, teacher, temperature=T, scale_by_temperature=False)
        same(unscaled, divergence / T**2, student)

    def test_settings_by_row(self, data):
        student, teacher, _, labels = data
        taus, ce, kd, other = torch.rand(4, N, dtype=torch.float64) + 0.5
        p, q = (teacher / taus[:, None]).softmax(-1), (student / taus[:, None]).softmax(-1)
        expected = ce * F.cross_entropy(student, labels, reduction="none") + taus**2 * (
            kd * kl(p, q) + other * kl(q, p)
        )
        settings = {"temperature": taus, "ce_weight": ce, "kd_weight": kd, "other_weight": other}
        same(row_divergence(student, teacher, labels, **settings), expected, student)
        one_by_one = [
            row_divergence(student[i], teacher[i], labels[i], **{k: float(v[i]) for k, v in settings.items()})
            for i in range(N)
        ]
        torch.testing.assert_close(torch.stack(one_by_one), expected)

    def test_class_slice(self, data):
        """The divergence over old classes, the cross-entropy over all; the teacher may know the old ones only."""
        student, teacher, _, labels = data
        ce = F.cross_entropy(student, labels, reduction="none")
        expected = ce + kl(teacher[:, 1:5].softmax(-1), student[:, 1:5].softmax(-1))
        for classes in ((1, 5), slice(1, 5)):
            same(row_divergence(student, teacher, labels, classes=classes), expected, student)
            same(row_divergence(student, teacher[:, 1:5], labels, classes=classes), expected, student)

    @pytest.mark.parametrize("shape", [(V,), (N, V)])
    def test_class_mask(self, data, shape):
        student, teacher, _, _ = data
        mask = torch.rand(shape) > 0.4
        mask[..., 0] = True
        p, q = (x.masked_fill(~mask, -math.inf).softmax(-1) for x in (teacher, student))
        same(row_divergence(student, teacher, class_mask=mask), kl(p, q), student)

    def test_without_the_label(self, data):
        student, teacher, _, labels = data
        is_label = F.one_hot(labels, V).bool()
        p, q = (x.masked_fill(is_label, -math.inf).softmax(-1) for x in (teacher, student))
        same(row_divergence(student, teacher, labels, exclude_label=True, ce_weight=0.0), kl(p, q), student)

    def test_label_of_a_soft_label(self, data):
        student, teacher, _, labels = data
        soft = 0.5 * F.one_hot(labels, V).double() + 0.5 / V
        for options in ({"exclude_label": True}, {"divergence": "decoupled", "other_weight": 2.0}):
            ours = row_divergence(student, teacher, soft_labels=soft, ce_weight=0.0, **options)
            same(ours, row_divergence(student, teacher, labels, ce_weight=0.0, **options), student)

    def test_top_k(self, data):
        student, teacher, _, _ = data
        p = teacher.softmax(-1)
        values, indices = p.topk(3)
        rest = (1 - values.sum(-1, keepdim=True)) / (V - 3)
        target = rest.expand(N, V).scatter(-1, indices, values)
        same(row_divergence(student, values, teacher_indices=indices), kl(target, student.softmax(-1)), student)
        all_values, all_indices = p.topk(V)
        full = row_divergence(student, all_values, teacher_indices=all_indices)
        same(full, row_divergence(student, teacher), student)

    def test_targets(self, data):
        """Probabilities of any mass, a gate between teachers, revised labels, and interpolated logits."""
        student, teacher, second, labels = data
        q = student.softmax(-1)
        mass = torch.rand(N, V, dtype=torch.float64)
        ours = row_divergence(student, mass, teacher_form="probabilities", divergence="cross_entropy")
        same(ours, -(mass * q.log()).sum(-1), student)
        gate = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.0, 1.0], dtype=torch.float64)
        p = (1 - gate[:, None]) * teacher.softmax(-1) + gate[:, None] * second.softmax(-1)
        same(row_divergence(student, teacher, second_teacher=second, gate=gate), kl(p, q), student)
        beta = torch.rand(N, dtype=torch.float64)
        p = (1 - beta[:, None]) * teacher.softmax(-1) + beta[:, None] * F.one_hot(labels, V)
        same(row_divergence(student, teacher, labels, label_mix=beta, ce_weight=0.0), kl(p, q), student)
        p = (0.3 * teacher + 0.7 * student.detach()).softmax(-1)
        same(row_divergence(student, teacher, interpolation=0.3), kl(p, q), student)

    def test_standardize(self, data):
        student, teacher, _, labels = data
        s, t = student / student.std(-1, keepdim=True), teacher / teacher.std(-1, keepdim=True)
        same(row_divergence(student, teacher, labels, standardize=True), row_divergence(s, t, labels), student)

    def test_reverse_kl_has_one_part(self, data):
        student, teacher, _, _ = data
        ours = row_divergence(student, teacher, divergence="reverse_kl", kd_weight=0.7)
        same(ours, 0.7 * kl(student.softmax(-1), teacher.softmax(-1)), student)

    def test_leading_dimensions(self, data):
        student, teacher, second, labels = data
        mask, gate, soft = torch.rand(N, V) > 0.3, torch.rand(N, dtype=torch.float64), torch.rand(N, V).double()
        mask[:, 0] = True
        options = {
            "class_mask": mask,
            "gate": gate,
            "soft_labels": soft,
            "second_teacher": second,
            "temperature": gate + 1,
        }
        expected = row_divergence(student, teacher, labels, **options)
        cubes = {k: v.view(2, 3, *v.shape[1:]) for k, v in options.items()}
        ours = row_divergence(student.view(2, 3, V), teacher.view(2, 3, V), labels.view(2, 3), **cubes)
        assert torch.equal(ours, expected.view(2, 3))
        single = row_divergence(student[0], teacher[0], labels[0], **{k: v[0] for k, v in options.items()})
        assert single.shape == ()
        torch.testing.assert_close(single, expected[0])
        shared = row_divergence(student.view(2, 3, V), teacher.view(2, 3, V), class_mask=mask[0])
        assert torch.equal(shared.flatten(), row_divergence(student, teacher, class_mask=mask[0]))

    def test_dtypes(self):
        """The wider of the two logits' dtypes; probabilities and weights are never narrowed."""
        student, teacher = torch.randn(2, N, V)
        narrow = teacher.to(torch.bfloat16)
        assert torch.equal(row_divergence(student, narrow), row_divergence(student, narrow.float()))
        half = student.half()
        soft = torch.rand(N, V)
        ours = row_divergence(half, soft, teacher_form="probabilities", divergence="cross_entropy", soft_labels=soft)
        assert ours.dtype == torch.float32
        expected = -2 * (soft.double() * half.double().log_softmax(-1)).sum(-1)
        assert relative_error(ours, expected) < 1e-6


class TestReduction:
    def test_normalizers(self, data):
        student, teacher, _, labels = data
        labels[:2] = -100
        weight = torch.rand(N, dtype=torch.float64)
        rows = row_divergence(student, teacher, labels, weight=weight)
        assert (rows[:2] == 0).all()
        total = rows.sum()
        for normalizer, divisor in (
            ("rows", N - 2),
            ("weights", weight[2:].sum()),
            ("elements", (N - 2) * V),
            (3.5, 3.5),
        ):
            mean = row_divergence(student, teacher, labels, weight=weight, reduction="mean", normalizer=normalizer)
            same(mean, total / divisor, student)
        unweighted = row_divergence(student, teacher, labels, reduction="mean", normalizer="weights")
        same(unweighted, row_divergence(student, teacher, labels, reduction="mean"), student)
        without_labels = row_divergence(student, teacher, reduction="mean", normalizer="elements")
        same(without_labels, row_divergence(student, teacher).sum() / (N * V), student)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("normalizer", ["rows", "weights", "elements"])
    def test_all_rows_ignored(self, data, reduction, normalizer):
        student, teacher, _, labels = data
        labels[:] = -100
        loss = row_divergence(
            student, teacher, labels, weight=torch.ones(N), reduction=reduction, normalizer=normalizer
        )
        assert (loss == 0).all()
        assert (gradient(loss, student) == 0).all()

    def test_no_rows(self):
        empty = torch.zeros(0, V, requires_grad=True)
        loss = row_divergence(empty, empty.detach(), reduction="mean")
        assert loss == 0
        assert gradient(loss, empty).shape == (0, V)

    def test_another_ignore_index(self, data):
        student, teacher, _, labels = data
        expected = row_divergence(student, teacher, labels)
        kept = labels != 3
        ours = row_divergence(student, teacher, labels, ignore_index=3)
        torch.testing.assert_close(ours, expected * kept)


class TestLearned:
    """Everything that can be learned gets the reference's gradient, by autograd in plain torch."""

    @pytest.mark.parametrize("divergence", ["kl", "jensen_shannon", "decoupled", "log_cosh"])
    def test_gradients(self, data, divergence):
        student, teacher, second, labels = data
        between_logits = divergence == "log_cosh"
        leaves = {
            "teacher": teacher.requires_grad_(),
            "weight": torch.rand(N, dtype=torch.float64, requires_grad=True),
            "temperature": (torch.rand(N, dtype=torch.float64) + 1).requires_grad_(),
            "ce_weight": torch.rand(N, dtype=torch.float64, requires_grad=True),
            "kd_weight": torch.rand(N, dtype=torch.float64, requires_grad=True),
            "class_weight": torch.rand(V, dtype=torch.float64, requires_grad=True),
        }
        if not between_logits:
            leaves |= {
                "second_teacher": second.requires_grad_(),
                "gate": torch.rand(N, dtype=torch.float64, requires_grad=True),
                "label_mix": torch.rand(N, dtype=torch.float64, requires_grad=True),
                "soft_labels": torch.rand(N, V, dtype=torch.float64, requires_grad=True),
            }

        def loss():
            return row_divergence(student, labels=labels, divergence=divergence, reduction="sum", **leaves)

        ours = torch.autograd.grad(loss(), [student, *leaves.values()])
        moved = 1e-6
        for (name, leaf), grad in zip([("student", student), *leaves.items()], ours, strict=True):
            along = torch.randn_like(leaf)
            with torch.no_grad():
                leaf += moved * along
                above = loss()
                leaf -= 2 * moved * along
                below = loss()
                leaf += moved * along
            torch.testing.assert_close(
                (grad * along).sum(), (above - below) / (2 * moved), rtol=1e-6, atol=1e-8, msg=name
            )

    def test_row_weights_are_learned_by_their_parts(self, data):
        student, teacher, _, labels = data
        ce, kd = torch.rand(2, N, dtype=torch.float64).requires_grad_().unbind()
        loss = row_divergence(student, teacher, labels, temperature=T, ce_weight=ce, kd_weight=kd)
        d_ce, d_kd = torch.autograd.grad(loss.sum(), (ce, kd))
        torch.testing.assert_close(d_ce, F.cross_entropy(student, labels, reduction="none").detach())
        torch.testing.assert_close(d_kd, row_divergence(student, teacher, temperature=T).detach())


class TestFoundByReview:
    """Each was wrong once."""

    def test_loss_scalers_in_float16(self):
        """A scale of 65536 fits no float16, and gradients that float16 rounds away come back with it."""
        student, teacher = torch.randn(2, 64, 1000)
        half = student.half().requires_grad_()
        for normalizer in ("rows", 4096 * 1024.0):
            options = {"reduction": "mean", "normalizer": normalizer}
            (ours,) = torch.autograd.grad(row_divergence(half, teacher.half(), **options) * 65536, half)
            wide = half.detach().double().requires_grad_()
            expected = torch.autograd.grad(row_divergence(wide, teacher.half().double(), **options) * 65536, wide)[0]
            assert relative_error(ours, expected) < 2e-3

    def test_one_tensor_as_student_and_teacher(self, data):
        student = data[0]
        (ours,) = torch.autograd.grad(row_divergence(student, student, divergence="cross_entropy").sum(), student)
        p = student.softmax(-1)
        (expected,) = torch.autograd.grad(-(p * p.log()).sum(), student)
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_temperatures_are_widened_before_they_are_squared(self, data, dtype):
        student, teacher = data[0].detach().float(), data[1].float()
        taus = torch.tensor([300.0, 2.3, 1.0, 1.0, 1.0, 1.0]).to(dtype)
        ours = row_divergence(student, teacher, temperature=taus)
        assert torch.equal(ours, row_divergence(student, teacher, temperature=taus.float()))

    def test_learned_weight_of_zero_on_an_infinite_part(self):
        student, teacher = torch.tensor([[-math.inf, 1.0, 2.0], [1.0, 2.0, 3.0]]), torch.randn(2, 3)
        teacher[0, 0] = -math.inf
        labels, ce = torch.tensor([0, 1]), torch.tensor([0.0, 1.0])
        expected = row_divergence(student, teacher, labels, ce_weight=ce)
        student.requires_grad_()
        ours = row_divergence(student, teacher, labels, ce_weight=ce.clone().requires_grad_())
        torch.testing.assert_close(ours, expected)
        assert gradient(ours, student).isfinite().all()

    def test_weights_that_sum_to_zero(self, data):
        student, teacher, _, _ = data
        weight = torch.tensor([1.0, -1.0, 0, 0, 0, 0], dtype=torch.float64, requires_grad=True)
        loss = row_divergence(student, teacher, weight=weight, reduction="mean", normalizer="weights")
        assert loss == 0
        assert torch.autograd.grad(loss, weight)[0].isfinite().all()

    @pytest.mark.parametrize("options", [{}, {"interpolation": 0.5}, {"divergence": "jensen_shannon"}])
    def test_nan_in_ignored_rows_reaches_no_gradient(self, data, options):
        student, teacher, _, labels = data
        labels[1] = -100
        student = student.detach().clone()
        student[1] = teacher[1] = math.nan
        teacher.requires_grad_()
        taus = torch.ones(N, dtype=torch.float64, requires_grad=True)
        loss = row_divergence(student, teacher, labels, temperature=taus, reduction="sum", **options)
        d_teacher, d_taus = torch.autograd.grad(loss, (teacher, taus))
        assert d_teacher.isfinite().all()
        assert (d_teacher[1] == 0).all()
        assert d_taus.isfinite().all()

    def test_standardize_without_spread(self):
        constant = torch.zeros(1, 3)
        assert row_divergence(constant, torch.tensor([[1.0, 2.0, 4.0]]), standardize=True).isfinite().all()
        assert row_divergence(torch.zeros(2, 1), torch.ones(2, 1), standardize=True).isfinite().all()
        masked = torch.tensor([[1.0, 2.0, -math.inf]])
        assert row_divergence(masked, masked + 1, standardize=True).isfinite().all()

    @pytest.mark.parametrize("shape", [(N,), ()])
    def test_learned_temperature_without_labels(self, data, shape):
        student, teacher, _, _ = data
        tau = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
        loss = row_divergence(student, teacher, temperature=tau, reduction="sum")
        above, below = (row_divergence(student, teacher, temperature=2.0 + h, reduction="sum") for h in (1e-5, -1e-5))
        slope = torch.autograd.grad(loss, tau)[0].sum()
        torch.testing.assert_close(slope, (above - below) / 2e-5, rtol=1e-6, atol=1e-8)

    def test_student_from_outside_a_transform(self, data):
        student, teacher, _, labels = data
        loss = row_divergence(student, teacher, labels, reduction="mean")
        scaled = torch.func.vmap(lambda x: x * row_divergence(student, teacher, labels, reduction="mean"))(
            torch.ones(3, dtype=torch.float64)
        )
        torch.testing.assert_close(scaled, loss.expand(3))

    def test_class_weight_of_zero_on_an_infinite_term(self):
        student, teacher = torch.tensor([[-math.inf, 1.0, 2.0]]), torch.randn(1, 3)
        weights = torch.tensor([0.0, 1.0, 1.0])
        ours = row_divergence(student, teacher, class_weight=weights)
        with backend("reference"):
            expected = row_divergence(student, teacher, class_weight=weights)
        assert expected.isfinite().all()
        torch.testing.assert_close(ours, expected)


class TestBadInput:
    """Every message names the argument and what it was, before any kernel runs."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"student_logits": "logits"}, TypeError, "student_logits is 'logits'"),
            ({"teacher": [1.0]}, TypeError, r"teacher is \[1.0\] \(list\), expected a torch.Tensor"),
            ({"teacher": torch.zeros(3, 5)}, ValueError, r"teacher has shape \(3, 5\), expected \(3, 4\)"),
            ({"teacher": torch.zeros(3, 4, device="meta")}, ValueError, "teacher is on device meta"),
            ({"teacher": None, "second_teacher": torch.zeros(3, 4)}, ValueError, "teacher is None, expected"),
            (
                {"divergence": "kld"},
                ValueError,
                "divergence is 'kld', expected one of 'kl', 'reverse_kl'",
            ),
            (
                {"teacher_form": "probs"},
                ValueError,
                "teacher_form is 'probs', expected one of 'logits'",
            ),
            ({"teacher_form": "probabilities", "divergence": "log_cosh"}, ValueError, "teacher_form is not 'logits'"),
            (
                {"teacher_indices": torch.zeros(3, 5, dtype=torch.int64)},
                ValueError,
                "expected 1 <= k <= 4",
            ),
            (
                {"teacher_indices": torch.zeros(3, 2, dtype=torch.int64)},
                ValueError,
                r"expected \(3, 2\) as",
            ),
            ({"teacher_indices": torch.zeros(3, 2)}, TypeError, "teacher_indices have dtypes"),
            ({"second_teacher": torch.zeros(3, 3)}, ValueError, r"second_teacher has shape \(3, 3\)"),
            (
                {"second_teacher": torch.zeros(3, 4, dtype=torch.int64)},
                TypeError,
                "second_teacher has dtype",
            ),
            ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels has shape \(2,\), expected \(3,\)"),
            ({"labels": torch.zeros(3)}, TypeError, "labels have dtype torch.float32"),
            ({"labels": torch.tensor([0, 4, 0])}, ValueError, r"labels\[1\] is 4, expected 0 <= label < 4"),
            ({"labels": torch.tensor([0, 0, -1])}, ValueError, r"labels\[2\] is -1"),
            ({"labels": None, "ce_weight": 1.0}, ValueError, "labels is None, expected class indices"),
            ({"labels": None, "exclude_label": True}, ValueError, "labels is None"),
            ({"labels": None, "label_mix": 0.5}, ValueError, "labels is None"),
            ({"teacher": torch.zeros(3, 2)}, ValueError, r"knows fewer classes, say which: classes=\(start, stop\)"),
            ({"gate": 0.5}, ValueError, "gate is 0.5, expected a second_teacher"),
            ({"other_weight": 2.0, "divergence": "jensen_shannon"}, ValueError, "other_weight is 2.0, but 'jensen_"),
            ({"teacher_form": "probabilities", "interpolation": 0.5}, ValueError, "interpolation is 0.5, expected"),
            ({"label_mix": 0.5, "divergence": "logit_mse"}, ValueError, "'logit_mse' mixes no targets"),
            ({"teacher": None, "classes": (0, 2)}, ValueError, "teacher is None"),
            ({"classes": range(3)}, ValueError, "classes is range"),
            (
                {"teacher": torch.full((3, 2), 3.0), "teacher_indices": torch.tensor([[0, 1]] * 3)},
                ValueError,
                r"teacher\[0, 0\] is 3.0, expected a probability",
            ),
            (
                {"teacher": torch.full((3, 2), 0.3), "teacher_indices": torch.tensor([[0, 1], [2, 7], [0, 1]])},
                ValueError,
                r"teacher_indices\[3\] is 7, expected 0 <= label < 4",
            ),
            ({"soft_labels": torch.zeros(3, 3)}, ValueError, r"soft_labels has shape \(3, 3\)"),
            ({"class_weight": torch.zeros(3)}, ValueError, r"class_weight has shape \(3,\), expected \(4,\)"),
            ({"class_mask": torch.zeros(4)}, TypeError, "class_mask has dtype torch.float32, expected torch.bool"),
            ({"class_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"class_mask has shape \(2, 4\)"),
            ({"classes": (2, 5)}, ValueError, r"classes is \(2, 5\), expected 0 <= start < stop <= 4"),
            ({"classes": slice(0, 4, 2)}, ValueError, "classes is slice"),
            ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\)"),
            ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
            ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive"),
            ({"temperature": -2.0}, ValueError, "temperature is -2.0"),
            ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
            ({"temperature": torch.ones(4)}, ValueError, r"temperature has shape \(4,\), expected \(3,\)"),
            ({"ce_weight": math.nan}, ValueError, "ce_weight is nan, expected a finite number"),
            ({"kd_weight": torch.ones(3, dtype=torch.int64)}, TypeError, "kd_weight has dtype torch.int64"),
            ({"interpolation": 1.5}, ValueError, "interpolation is 1.5, expected a number from 0 to 1"),
            ({"label_mix": -0.5}, ValueError, "label_mix is -0.5"),
            ({"gate": 2.0}, ValueError, "gate is 2.0"),
            ({"skew": 1.5}, ValueError, "skew is 1.5"),
            ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
            ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of 'none', 'sum', 'mean'"),
            ({"reduction": "mean", "normalizer": "batch"}, ValueError, "normalizer is 'batch', expected one of 'rows'"),
            ({"reduction": "mean", "normalizer": 0.0}, ValueError, "normalizer is 0.0, expected a positive"),
        ],
    )
    @pytest.mark.parametrize("name", ["default", "reference"])
    def test_message(self, change, error, message, name):
        arguments = {
            "student_logits": torch.zeros(3, 4),
            "teacher": torch.zeros(3, 4),
            "labels": torch.tensor([0, 1, 2]),
            **change,
        }
        forced = backend("reference") if name == "reference" else backend("cpu" if HAS_KERNELS else "reference")
        with forced, pytest.raises(error, match=message):
            row_divergence(**arguments)

    def test_negative_temperatures_in_a_tensor(self, data):
        student, teacher, _, _ = data
        taus = torch.ones(N, dtype=torch.float64)
        taus[4] = -1.0
        with pytest.raises(ValueError, match=r"temperature\[4\] is -1.0, expected a positive finite number"):
            row_divergence(student, teacher, temperature=taus)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_check_finite(self, value):
        student, teacher = torch.zeros(2, 3, 4).unbind()
        teacher = teacher.clone()
        teacher[1, 2] = value
        with pytest.raises(ValueError, match=rf"teacher\[1, 2\] is {value}"):
            row_divergence(student, teacher, check_finite=True)
