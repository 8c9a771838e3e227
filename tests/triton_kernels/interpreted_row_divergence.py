"""The Triton kernels of row_divergence under Triton's interpreter: run by test_row_divergence.py in its own process."""

import dataclasses
import math

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import row_ops
from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference.row_terms import (
    CROSS_ENTROPY,
    DECOUPLED,
    JENSEN_SHANNON,
    KINDS,
    KL,
    LOG_COSH,
    LOGIT_MSE,
    LOGITS,
    PROBABILITIES,
    SKEW_FORWARD,
    SKEW_REVERSE,
    TOP_K,
)

# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
IGNORE = -100


@dataclasses.dataclass
class Case:
    """The arguments of an op. Settings are those of the reference's Rows."""

    kind: int = KL
    form: int = LOGITS
    shape: tuple = (2, 37)
    dtype: torch.dtype = torch.float32
    temperature: float = 2.0
    ce: float = 0.3
    kd: float = 0.7
    other: float = 0.0
    label_mix: float = 0.0
    interpolation: float = 1.0
    gate: float = 0.0
    smoothing: float = 0.0
    skew: float = 0.35
    second: bool = False
    soft: bool = False
    labels: bool = True
    class_weight: bool = False
    mask_rows: int | None = None  # 1 or "a row each": -1
    weight: bool = True
    rows: bool = False
    exclude: bool = False
    classes: tuple | None = None  # first, count
    top_k: int = 3

    def __post_init__(self):
        N, V = self.shape
        self.first, self.count = self.classes or (0, V)
        self.student = self.logits(V)
        self.indices = None
        if self.form == TOP_K:
            k = min(self.top_k, self.count)
            self.indices = torch.stack([torch.randperm(self.count)[:k] for _ in range(N)]) if N else torch.empty(0, k)
            self.indices = self.indices.long().reshape(N, k)
            given = torch.rand(N, k)
            self.teacher = given / (given.sum(-1, keepdim=True) + 0.3)
        else:
            self.teacher = self.target()
        self.second_teacher = self.target() if self.second else None
        self.label_values = torch.randint(V, (N,)) if self.labels else None
        self.soft_labels = torch.randn(N, V).softmax(-1) if self.soft else None
        self.class_weights = torch.rand(V) + 0.1 if self.class_weight else None
        self.mask = None
        if self.mask_rows is not None:
            self.mask = torch.rand(1 if self.mask_rows == 1 else N, self.count) < 0.7
        self.row_weights = torch.randn(N) if self.weight else None
        self.row_settings = torch.rand(7, N) + torch.tensor([0.5, 0, 0, 0, 0, 0, 0])[:, None] if self.rows else None

    def logits(self, columns):
        return (3 * torch.randn(self.shape[0], columns, dtype=torch.float64)).to(self.dtype)

    def target(self):
        logits = self.logits(self.count)
        return logits if self.form == LOGITS else logits.float().softmax(-1)

    def args(self):
        numbers = [self.temperature, self.ce, self.kd, self.other, self.label_mix, self.interpolation, self.gate]
        mixes = self.label_mix != 0 or (self.second and self.form == LOGITS)
        choices = [self.kind, self.form, int(mixes), int(self.exclude), self.first, self.count, IGNORE]
        return (
            self.student,
            self.teacher,
            self.indices,
            self.second_teacher,
            self.label_values,
            self.soft_labels,
            self.class_weights,
            self.mask,
            self.row_weights,
            self.row_settings,
            [*numbers, self.smoothing, self.skew],
            choices,
        )


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def error(ours, expected):
    """Relative to the expected values, or to 0.03: what is all rounding has no relative error."""
    assert ours.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    assert ours.isfinite().all()
    return ((ours.double() - expected).norm() / expected.norm().clamp(min=0.03)).item()


@pytest.fixture
def kernels():
    from kdaif_fast.triton_kernels import row_divergence

    return row_divergence


def compare(kernels, case, tangent_count=1):
    """All four functions against the reference in float64."""
    args, dtype = case.args(), case.dtype
    tolerance = TOLERANCE[dtype]
    loss, grad = kernels.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*wide(args))
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    assert error(loss, expected_loss) < 3e-6
    assert error(grad, expected_grad) < tolerance
    torch.testing.assert_close(kernels.row_divergence(*args), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kernels.row_divergence_grad(*args), grad, rtol=tolerance, atol=1e-6)
    tangents = torch.randn(tangent_count, *case.shape).to(dtype)
    for gauss_newton in (False, True):
        product = kernels.row_divergence_hvp(tangents, gauss_newton, *args)
        expected = reference.row_divergence_hvp(tangents.double(), gauss_newton, *wide(args))
        assert product.dtype == dtype
        # u - <q, u> cancels where one class has all the probability: the tangent is what rounding is measured by.
        assert error(product, expected) < tolerance or (product - expected).norm() < tolerance * tangents.norm() / 10


OPTIONS = {
    "no ce": dict(ce=0.0),
    "no divergence": dict(kd=0.0),
    "soft labels": dict(soft=True, labels=False),
    "smoothing": dict(smoothing=0.1),
    "smoothing and class weights": dict(smoothing=0.1, class_weight=True),
    "class weights": dict(class_weight=True),
    "one mask": dict(mask_rows=1),
    "a mask a row": dict(mask_rows=-1),
    "rows": dict(rows=True),
    "exclude label": dict(exclude=True),
    "slice": dict(classes=(9, 20)),
    "slice and mask": dict(classes=(9, 20), mask_rows=-1),
    "interpolation": dict(interpolation=0.6),
    "student's own logits": dict(interpolation=0.0),
    "label mix": dict(label_mix=0.3),
    "soft label mix": dict(label_mix=0.3, soft=True),
    "two teachers": dict(second=True, gate=0.25),
    "two teachers, label mix, exclude": dict(second=True, gate=0.25, label_mix=0.3, exclude=True),
    "no weight": dict(weight=False),
    "everything": dict(
        second=True, gate=0.25, label_mix=0.3, soft=True, exclude=True, class_weight=True, mask_rows=-1, smoothing=0.1,
        classes=(9, 20), rows=True,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestAgainstReference:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 50.0])
    @pytest.mark.parametrize("kind", [KL, CROSS_ENTROPY])
    @pytest.mark.parametrize("shape", [(2, 37), (1, 1100)])
    def test_temperatures(self, kernels, kind, temperature, shape):
        """The common case has shorter ways to the softmax at temperature 1 from some of them."""
        for dtype, parts in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, dict(labels=False, ce=0.0))):
            case = Case(kind=kind, temperature=temperature, shape=shape, dtype=dtype, **parts)
            loss, grad = kernels.row_divergence_with_grad(*case.args())
            expected = reference.row_divergence_with_grad(*wide(case.args()))
            assert error(loss, expected[0]) < 3e-6
            assert error(grad, expected[1]) < TOLERANCE[dtype]
            assert torch.equal(kernels.row_divergence(*case.args()), loss)
            assert torch.equal(kernels.row_divergence_grad(*case.args()), grad)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, kernels, kind, dtype):
        compare(kernels, Case(kind=kind, other=0.4, dtype=dtype))

    @pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 2), (1, 31), (1, 130), (1, 700), (1, 1100)])
    @pytest.mark.parametrize("kind", [KL, JENSEN_SHANNON, LOGIT_MSE, DECOUPLED])
    def test_sizes(self, kernels, kind, shape):
        compare(kernels, Case(kind=kind, shape=shape, dtype=torch.float16))

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("kind", [KL, SKEW_FORWARD, DECOUPLED])
    def test_options(self, kernels, kind, options):
        compare(kernels, Case(kind=kind, **OPTIONS[options]))

    @pytest.mark.parametrize("options", ["rows", "exclude label", "slice and mask", "interpolation", "class weights"])
    @pytest.mark.parametrize("kind", [LOGIT_MSE, LOG_COSH])
    def test_options_between_logits(self, kernels, kind, options):
        compare(kernels, Case(kind=kind, **OPTIONS[options]))

    def test_equal_infinities_between_logits(self, kernels):
        for kind in (LOGIT_MSE, LOG_COSH):
            case = Case(kind=kind, shape=(1, 40), ce=0.0)
            case.student[0, 3] = case.teacher[0, 3] = -math.inf
            compare(kernels, case)

    @pytest.mark.parametrize("kind", set(KINDS) - {LOGIT_MSE, LOG_COSH})
    def test_every_kind_with_everything_in_more_than_one_block(self, kernels, kind):
        compare(kernels, Case(kind=kind, **{**OPTIONS["everything"], "classes": (90, 500)}, shape=(2, 600)))

    @pytest.mark.parametrize("options", ["no ce", "exclude label", "slice and mask", "label mix", "class weights"])
    @pytest.mark.parametrize("form", [PROBABILITIES, TOP_K])
    @pytest.mark.parametrize("kind", [KL, DECOUPLED, SKEW_REVERSE])
    def test_forms(self, kernels, kind, form, options):
        compare(kernels, Case(kind=kind, form=form, **OPTIONS[options]))

    @pytest.mark.parametrize("exclude", [False, True])
    def test_two_teachers_of_probabilities(self, kernels, exclude):
        compare(kernels, Case(form=PROBABILITIES, second=True, gate=0.25, exclude=exclude))

    @pytest.mark.parametrize("top_k", [0, 1, 5, 37])
    def test_top_k(self, kernels, top_k):
        compare(kernels, Case(form=TOP_K, top_k=top_k, shape=(1, 37)))

    @pytest.mark.parametrize("tangent_count", [0, 1, 3, 5])
    @pytest.mark.parametrize("kind", [CROSS_ENTROPY, SKEW_REVERSE, DECOUPLED])
    def test_tangents(self, kernels, kind, tangent_count):
        compare(kernels, Case(kind=kind, shape=(2, 530)), tangent_count)

    def test_strides(self, kernels):
        case = Case(second=True, gate=0.25, soft=True, label_mix=0.2, mask_rows=-1, class_weight=True, rows=True)
        tangents = torch.randn(2, *case.shape)
        expected = kernels.row_divergence_with_grad(*case.args())
        expected_product = kernels.row_divergence_hvp(tangents, False, *case.args())

        def apart(x, fill=math.nan):
            rows = torch.full((2 * x.shape[0], x.shape[1] + 5), fill, dtype=x.dtype)
            rows[::2, : x.shape[1]] = x
            return rows[::2, : x.shape[1]]

        def every_second(x):
            return torch.stack([x, x], -1).flatten(-2)[..., ::2]

        case.student, case.soft_labels = apart(case.student), apart(case.soft_labels)
        case.teacher, case.second_teacher = apart(case.teacher), every_second(case.second_teacher)
        case.mask = apart(case.mask, True)
        case.label_values, case.row_settings = every_second(case.label_values), every_second(case.row_settings)
        case.row_weights, case.class_weights = every_second(case.row_weights), every_second(case.class_weights)
        ours = kernels.row_divergence_with_grad(*case.args())
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        for u in (every_second(tangents), tangents.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(kernels.row_divergence_hvp(u, False, *case.args()), expected_product)

    def test_offsets_beyond_int32(self, kernels):
        """Two rows 2^31 elements apart, in memory of which little more than they is ever touched."""
        case = Case(shape=(2, 40), dtype=torch.float16)
        expected = kernels.row_divergence_with_grad(*case.args())
        far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 40), (2**31, 1))
        far.copy_(case.student)
        case.student = far
        ours = kernels.row_divergence_with_grad(*case.args())
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        product = kernels.row_divergence_hvp(far[None], False, *case.args())
        assert torch.equal(product, kernels.row_divergence_hvp(far[None].contiguous(), False, *case.args()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestRows:
    @pytest.mark.parametrize("kind", [KL, JENSEN_SHANNON, LOGIT_MSE, DECOUPLED])
    @pytest.mark.parametrize("V", [40, 600])
    def test_ignored_rows_are_written_and_not_looked_at(self, kernels, poisoned_memory, kind, V):
        case = Case(kind=kind, shape=(2, V))
        case.label_values[1] = IGNORE
        case.student[1] = case.teacher[1] = math.nan
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        product = kernels.row_divergence_hvp(torch.randn(3, 2, V), False, *case.args())
        assert loss[1] == 0
        assert (grad[1] == 0).all()
        assert (product[:, 1] == 0).all()
        expected = reference.row_divergence_with_grad(*wide(case.args()))
        assert error(loss[:1], expected[0][:1]) < 3e-6
        assert error(grad[:1], expected[1][:1]) < 3e-6

    @pytest.mark.parametrize("label", [-1, 40, 2**31, -(2**40)])
    def test_wrong_labels_make_the_row_nan(self, kernels, label):
        case = Case(shape=(2, 40))
        case.label_values[1] = label
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        assert loss.isnan().tolist() == [False, True]
        assert grad.isnan().all(-1).tolist() == [False, True]
        assert not grad[0].isnan().any()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["student", "teacher"])
    def test_nan_stays_in_its_row(self, kernels, kind, name):
        case = Case(kind=kind, shape=(2, 600), ce=0.0, other=0.4)
        getattr(case, name)[1, 550] = math.nan
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        assert loss.isnan().tolist() == [False, True]
        assert not grad[0].isnan().any()
        assert grad[1].isnan().any()

    def test_a_part_without_weight_is_not_looked_at(self, kernels):
        for parts in (dict(kd=0.0), dict(kd=0.0, rows=True)):
            case = Case(shape=(1, 40), **parts)
            case.teacher[:] = math.inf
            if case.rows:
                case.row_settings[2:4] = 0
            assert kernels.row_divergence(*case.args()).isfinite().all()
            assert kernels.row_divergence_grad(*case.args()).isfinite().all()

    def test_an_infinite_cross_entropy_without_weight(self, kernels):
        for rows in (False, True):
            case = Case(shape=(1, 40), ce=0.0, rows=rows)
            if rows:
                case.row_settings[1] = 0
                case.row_settings[5] = 1
            case.student[0, case.label_values[0]] = case.teacher[0, case.label_values[0]] = -math.inf
            compare(kernels, case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestNumbers:
    @pytest.mark.parametrize("kind", set(KINDS) - {LOGIT_MSE, LOG_COSH})
    def test_excluded_classes(self, kernels, kind):
        """-inf on both sides, and a whole first block of it: a maximum that was not guarded would give NaN."""
        case = Case(kind=kind, shape=(1, 700), other=0.0)
        case.student[0, :600] = case.teacher[0, :600] = -math.inf
        case.label_values[:] = 690
        compare(kernels, case)

    @pytest.mark.parametrize("kind", [KL, CROSS_ENTROPY])
    def test_classes_only_the_student_excludes(self, kernels, kind):
        """The loss is infinite, or nothing: the reference says which."""
        case = Case(kind=kind, shape=(1, 600), ce=0.0)
        case.student[0, 5:9] = -math.inf
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        expected = reference.row_divergence_with_grad(*wide(case.args()))
        torch.testing.assert_close(loss, expected[0].float(), rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(grad, expected[1].float(), rtol=1e-5, atol=1e-6, equal_nan=True)

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
    def test_classes_masked_by_the_lowest_number(self, kernels, temperature):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(shape=(1, 1100), temperature=temperature, dtype=dtype)
            case.student[0, :800] = case.teacher[0, :800] = torch.finfo(dtype).min
            case.label_values[:] = 900
            loss, grad = kernels.row_divergence_with_grad(*case.args())
            expected = reference.row_divergence_with_grad(*wide(case.args()))
            assert error(loss, expected[0]) < 3e-6
            assert error(grad, expected[1]) < TOLERANCE[dtype]

    @pytest.mark.parametrize("kind", [KL, CROSS_ENTROPY, JENSEN_SHANNON, DECOUPLED])
    def test_classes_only_the_teacher_excludes(self, kernels, kind):
        case = Case(kind=kind, shape=(1, 40))
        case.teacher[0, 5:9] = -math.inf
        compare(kernels, case)

    @pytest.mark.parametrize("kind", [KL, JENSEN_SHANNON, DECOUPLED])
    def test_the_label_has_all_of_the_target(self, kernels, kind):
        case = Case(kind=kind, form=PROBABILITIES, shape=(1, 40), other=0.4 * (kind == DECOUPLED), exclude=True)
        case.teacher = torch.nn.functional.one_hot(case.label_values, 40).float()
        compare(kernels, case)

    def test_no_class_is_allowed(self, kernels):
        case = Case(shape=(1, 40), mask_rows=1, ce=0.0)
        case.mask[:] = False
        compare(kernels, case)

    @pytest.mark.parametrize("mix", [{}, dict(other=0.4)])
    @pytest.mark.parametrize("kind", [KL, JENSEN_SHANNON, DECOUPLED])
    def test_equal_logits(self, kernels, kind, mix):
        case = Case(kind=kind, shape=(2, 600), ce=0.0, weight=False, **mix)
        case.teacher = case.student.clone()
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        assert (loss >= 0).all()
        assert loss.max() < (1e-6 if kind == JENSEN_SHANNON else 1e-13)
        assert grad.abs().max() < 1e-7

    @pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
    @pytest.mark.parametrize("other", [0.0, 1.0])
    def test_nearly_equal_logits(self, kernels, size, other):
        case = Case(shape=(2, 600), ce=0.0, kd=1 - other, other=other, weight=False)
        case.teacher = case.student + size * torch.randn(case.shape)
        loss = kernels.row_divergence(*case.args())
        expected = reference.row_divergence(*wide(case.args()))
        # The logarithms of the sums are off by some 1e-7, whose square counts.
        assert ((loss - expected).abs() < 1e-6 * expected + 1e-13).all()

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 1e4])
    @pytest.mark.parametrize("kind", [KL, LOG_COSH, SKEW_FORWARD, DECOUPLED])
    def test_large_logits_and_extreme_temperatures(self, kernels, kind, temperature):
        case = Case(kind=kind, shape=(2, 40), temperature=temperature, weight=False)
        case.student = 1e4 * (2 * torch.rand(2, 40) - 1)
        case.teacher = 1e4 * (2 * torch.rand(2, 40) - 1)
        loss, grad = kernels.row_divergence_with_grad(*case.args())
        expected = reference.row_divergence_with_grad(*wide(case.args()))
        assert error(loss, expected[0]) < 1e-6
        assert error(grad, expected[1]) < 1e-4

    @pytest.mark.parametrize("size", [1e-3, 0.1, 0.3, 1.0, 30.0])
    def test_log_cosh_near_and_far(self, kernels, size):
        case = Case(kind=LOG_COSH, shape=(1, 40), ce=0.0)
        case.teacher = case.student + size * torch.randn(1, 40)
        args = case.args()
        loss, grad = kernels.row_divergence_with_grad(*args)
        expected = reference.row_divergence_with_grad(*wide(args))
        assert ((loss - expected[0]) / expected[0]).abs().max() < 1e-5
        assert (grad - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_forced_through_the_ops():
    case = Case(other=0.4)
    tangents = torch.randn(2, *case.shape)
    expected = reference.row_divergence_with_grad(*wide(case.args()))
    product = reference.row_divergence_hvp(tangents.double(), True, *wide(case.args()))
    with kdaif_fast.backend("triton"):
        loss, grad = row_ops.row_divergence_with_grad(*case.args())
        assert error(row_ops.row_divergence(*case.args()), expected[0]) < 1e-6
        assert error(row_ops.row_divergence_grad(*case.args()), expected[1]) < 1e-6
        assert error(row_ops.row_divergence_hvp(tangents, True, *case.args()), product) < 1e-6
    assert error(loss, expected[0]) < 1e-6
    assert error(grad, expected[1]) < 1e-6
