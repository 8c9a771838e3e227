"""The CPU kernels of row_divergence against the reference: every kind, option and dtype, awkward shapes, extremes."""

import math

import pytest
import torch

from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference import row_terms as terms
from tests.ops.row_cases import (
    ALL,
    BETWEEN_LOGITS,
    CASES,
    DTYPES,
    EVERY,
    KIND_NAMES,
    LOSS_TOLERANCE,
    TOLERANCE,
    Case,
    arguments,
    inputs,
    needs_kernels,
    ops,
    plain_arguments,
    relative_error,
    widened,
)
from tests.properties import given, settings, st

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]


def check(args, slack=1.0):
    dtype = args[0].dtype
    wide = widened(args)
    loss, grad = ops.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*wide)
    assert loss.dtype == reference.accumulation_dtype(args[0])
    assert grad.dtype == dtype
    assert relative_error(loss, expected_loss) < LOSS_TOLERANCE[dtype] * slack
    assert relative_error(grad, expected_grad) < TOLERANCE[dtype] * slack
    assert torch.equal(ops.row_divergence(*args), loss)
    assert torch.equal(ops.row_divergence_grad(*args), grad)
    tangents = torch.randn(3, *args[0].shape, dtype=torch.float64).to(dtype)
    for gauss_newton in (False, True):
        products = ops.row_divergence_hvp(tangents, gauss_newton, *args)
        expected = reference.row_divergence_hvp(tangents.double(), gauss_newton, *wide)
        assert products.dtype == dtype
        assert relative_error(products, expected) < 3 * TOLERANCE[dtype] * slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_kind_with_every_option(kind, name, dtype):
    check(arguments(kind, ALL[name], N=6, V=37, dtype=dtype), slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 2), (5, 3), (4, 15), (4, 16), (4, 17), (3, 64), (2, 1000), (33, 31)])
@pytest.mark.parametrize(
    "name", ["plain, T = 2", "all parts", "divergence alone", "cross-entropy alone", "soft labels"]
)
def test_shapes(shape, name, dtype):
    check(arguments("KL", CASES[name], *shape, dtype=dtype), slack=4)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("name", ["all parts", "without the label", "class mask"])
def test_one_class(kind, name):
    """Zero loss and gradient, but for the kinds that compare logits or masses."""
    args = arguments(kind, CASES[name], 4, 1, torch.float32)
    loss, grad = ops.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 40),
    V=st.integers(1, 200),
    kind=st.sampled_from(KIND_NAMES),
    name=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from(DTYPES),
    T=st.floats(0.1, 20),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, V, kind, name, dtype, T, scale, seed):
    torch.manual_seed(seed)
    case = Case(**{**vars(CASES[name]), "temperature": T})
    case.first_class = min(case.first_class, V - 1)
    args = arguments(kind, case, N, V, dtype, scale)
    loss, grad = ops.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
    size = expected_loss[expected_loss.isfinite()].abs().amax().item() if N and expected_loss.isfinite().any() else 1.0
    atol = 1e-5 * max(1.0, size) * (1e-7 if dtype == torch.float64 else 1)
    torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-5, atol=atol)
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=rtol, atol=max(1.0, 1 / T) * atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_and_wide_rows_take_the_same_numbers(dtype):
    """The issue's figures: logits of scale up to 30, loss to 2e-6 and gradient to 2e-7 in float32."""
    for scale in (1.0, 5.0, 30.0):
        for T in (1.0, 2.0, 2.5, 4.0):
            student, teacher, labels, weight = inputs(64, 1000, dtype, scale)
            args = plain_arguments(student, teacher, labels, weight, T)
            loss, grad = ops.row_divergence_with_grad(*args)
            expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
            assert relative_error(loss, expected_loss) < 2e-6
            assert relative_error(grad, expected_grad) < (2e-7 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kind, dtype):
    args = arguments(
        kind, Case(second=kind not in BETWEEN_LOGITS, mixes=kind not in BETWEEN_LOGITS, mask=True), 6, 10, dtype
    )
    expected = ops.row_divergence_with_grad(*args)
    padded = torch.full((6, 14), math.nan, dtype=dtype)
    padded[:, 2:12] = args[0]
    layouts = [args[0].t().contiguous().t(), padded[:, 2:12], args[0].repeat_interleave(2, 0)[::2]]
    others = [x.t().contiguous().t() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in args[1:8]]
    every_other = [x.repeat_interleave(2)[::2] for x in (args[4], args[8])]
    for view in layouts:
        assert torch.equal(view, args[0])
        changed = [view, *others, *args[8:]]
        changed[4], changed[8] = every_other
        ours = ops.row_divergence_with_grad(*changed)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        u = torch.randn(6, 10, 2).to(dtype).movedim(-1, 0)
        dense = ops.row_divergence_hvp(u.contiguous(), False, *args)
        assert torch.equal(ops.row_divergence_hvp(u, False, *changed), dense)


def test_one_teacher_row_for_all():
    student, teacher, labels, weight = inputs(6, 10, torch.float32)
    shared = teacher[:1].expand(6, 10)
    ours = ops.row_divergence(*plain_arguments(student, shared, labels, weight, 2.0))
    assert torch.equal(ours, ops.row_divergence(*plain_arguments(student, shared.contiguous(), labels, weight, 2.0)))


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_zero_whatever_they_hold(kind, dtype):
    args = arguments(kind, Case(ignored=False), 4, 9, dtype)
    args[4][2] = -100
    args[0][2] = args[1][2] = math.nan
    loss, grad = ops.row_divergence_with_grad(*args)
    assert loss.isfinite().all()
    assert loss[2] == 0
    assert (grad[2] == 0).all()
    products = ops.row_divergence_hvp(torch.randn(2, 4, 9).to(dtype), False, *args)
    assert (products[:, 2] == 0).all()
    args[4][:] = -100
    loss, grad = ops.row_divergence_with_grad(*args)
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_classes(kind, T, dtype):
    """-inf on the student, the teacher or both: such a class has probability 0 there, and no NaN appears."""
    args = arguments(kind, Case(temperature=T, other=0.0 if kind == "KL" else 0.5), 6, 20, dtype)
    student, teacher, labels = args[0], args[1], args[4]
    labels[:] = 0
    student[:, 3] = teacher[:, 3] = -math.inf
    if kind not in BETWEEN_LOGITS and kind != "SWAPPED_CROSS_ENTROPY":
        teacher[:, 5] = -math.inf
    student[2:4, 2:] = teacher[2:4, 2:] = -math.inf  # all but two classes
    loss, grad = ops.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[:, 3] == 0).all()
    torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=2e-2, atol=1e-5)
    products = ops.row_divergence_hvp(torch.ones(1, 6, 20, dtype=dtype), False, *args)
    assert products.isfinite().all()


def test_classes_that_only_one_side_excludes_cost_infinity():
    for other_side, numbers in ((0, (1.0, 0.0)), (1, (0.0, 1.0))):  # forward KL, reverse KL
        args = arguments(
            "KL", Case(ce=0.0, kd=numbers[0], other=numbers[1], weight=False, ignored=False), 2, 6, torch.float32
        )
        args[other_side][0, 2] = -math.inf
        loss = ops.row_divergence(*args)
        assert loss[0] == math.inf
        assert loss[1].isfinite()


def test_part_without_weight_is_not_looked_at():
    student, teacher, labels, _ = inputs(2, 4, torch.float32)
    student[torch.arange(2), labels] = -math.inf  # infinite cross-entropy
    teacher[torch.arange(2), labels] = -math.inf
    assert ops.row_divergence(*plain_arguments(student, teacher, labels, alpha=0.0)).isfinite().all()
    student, teacher, labels, _ = inputs(2, 4, torch.float32)
    assert ops.row_divergence(*plain_arguments(student, teacher * math.nan, labels, alpha=1.0)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [0.01, 0.1, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_extreme_temperatures_and_logits(T, size, dtype):
    student, teacher, labels, weight = inputs(8, 50, dtype)
    student, teacher = (x * (size / x.abs().max()) for x in (student, teacher))
    args = plain_arguments(student, teacher, labels, weight, T, alpha=0.0)
    loss, grad = ops.row_divergence_with_grad(*args)
    expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
    # At small size / T it is the float64 reference that loses digits, since it forms log p and log q first.
    assert relative_error(loss, expected_loss) < (1e-4 if dtype == torch.float32 else 1e-7)
    # The gradient is a difference of probabilities, which are nearly equal when size / T is small.
    lost_digits = max(1.0, T / size)
    assert relative_error(grad, expected_grad) < lost_digits * (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype):
    for kind in KIND_NAMES:
        args = arguments(kind, Case(temperature=2.0), 8, 50, dtype)
        args[0], args[1] = (x * (1e4 / x.abs().max()) for x in args[:2])
        loss, grad = ops.row_divergence_with_grad(*args)
        expected_loss, expected_grad = reference.row_divergence_with_grad(*widened(args))
        torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-5, atol=1e-3)
        # Reverse KL's gradient is a difference of terms as large as the logits.
        assert relative_error(grad, expected_grad) < max(1e-4, TOLERANCE[dtype])


@pytest.mark.parametrize("T", [1.0, 1.5, 1e4])
def test_identical_logits_never_go_below_zero(T):
    student, _, labels, _ = inputs(200, 300, torch.float32)
    for kind, other in (("KL", 0.0), ("KL", 1.0), ("DECOUPLED", 1.0)):
        args = plain_arguments(student, student, labels, None, T, alpha=0.0)
        args[10][3], args[11][0] = other, getattr(terms, kind)
        loss = ops.row_divergence(*args)
        assert (loss >= 0).all()
        assert (loss <= 1e-6 * T * T).all()


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_small_divergences_keep_their_digits(distance):
    student = torch.randn(50, 300)
    teacher = student + distance * torch.randn(50, 300)
    args = plain_arguments(student, teacher, torch.zeros(50, dtype=torch.int64), None, 2.0, alpha=0.0)
    assert relative_error(ops.row_divergence(*args), reference.row_divergence(*widened(args))) < 1e-7 / distance


def test_shift_invariance():
    student, teacher, labels, weight = inputs(5, 20)
    loss = ops.row_divergence(*plain_arguments(student, teacher, labels, weight, 2.0))
    shifted = ops.row_divergence(*plain_arguments(student + 100, teacher - 70, labels, weight, 2.0))
    torch.testing.assert_close(loss, shifted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain, T = 2", "all parts"])
def test_result_does_not_depend_on_threads(threads, name):
    args = arguments("KL", CASES[name], 300, 257, torch.float32)
    ours = ops.row_divergence_with_grad(*args)
    u = torch.randn(2, 300, 257)
    product = ops.row_divergence_hvp(u, False, *args)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    single, single_product = ops.row_divergence_with_grad(*args), ops.row_divergence_hvp(u, False, *args)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, single, strict=True))
    assert torch.equal(product, single_product)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(kind, dtype):
    for case in (Case(ignored=False), Case(ignored=False, other=0.0)):
        args = arguments(kind, case, 5, 30, dtype)
        args[0][2, 7] = math.nan
        args[1][4, 29] = math.nan
        loss, grad = ops.row_divergence_with_grad(*args)
        assert loss.isnan().tolist() == [False, False, True, False, True]
        assert grad[[0, 1, 3]].isfinite().all()
        assert grad[2].isnan().any()
        assert grad[4].isnan().any()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, -0x400000 + 1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_nan_is_a_nan(bits, alpha):
    """Its low bits must not be taken for an exponent."""
    student, teacher, labels, _ = inputs(2, 40, torch.float32)
    student[0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert student[0, 3].isnan()
    loss, grad = ops.row_divergence_with_grad(*plain_arguments(student, teacher, labels, None, 2.5, alpha))
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().any()
    student, teacher, labels, weight = inputs(2, 40, torch.float64)
    student[0, 3] = torch.tensor(0x7FF8000000000123).view(torch.float64)
    loss, grad = ops.row_divergence_with_grad(*plain_arguments(student, teacher, labels, weight, 2.5, alpha))
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().any()


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("name", ["plain, T = 1", "plain, T = 2", "no second part", "all parts", "class slice"])
def test_tangents_at_once_are_tangents_one_by_one(count, name):
    args = arguments("KL", CASES[name], 5, 40, torch.float32)
    tangents = torch.randn(count, 5, 40)
    together = ops.row_divergence_hvp(tangents, False, *args)
    assert together.shape == tangents.shape
    for u, product in zip(tangents, together, strict=True):
        assert torch.equal(ops.row_divergence_hvp(u[None], False, *args)[0], product)


class TestRefusals:
    """What would read or write outside a tensor is refused by the kernel itself."""

    def test_labels_and_indices(self):
        args = arguments("KL", Case(ignored=False), 3, 4)
        for function in (ops.row_divergence, ops.row_divergence_grad, ops.row_divergence_with_grad):
            with pytest.raises(RuntimeError, match=r"labels\[1\] = 4, expected 0 <= label < 4"):
                function(*args[:4], torch.tensor([0, 4, 1]), *args[5:])
        with pytest.raises(RuntimeError, match=r"labels\[0\] = -1"):
            ops.row_divergence_hvp(args[0][None], False, *args[:4], torch.tensor([-1, 0, 1]), *args[5:])
        args = arguments("KL", Case(form=terms.TOP_K, top_k=2, ignored=False), 3, 4)
        args[2][2, 1] = 9
        with pytest.raises(RuntimeError, match=r"indices\[2, 1\] = 9, expected 0 <= index < 4"):
            ops.row_divergence(*args)

    @pytest.mark.parametrize(
        ("position", "value", "message"),
        [
            (1, torch.zeros(2, 4), "teacher has the wrong shape"),
            (1, torch.zeros(3, 4, dtype=torch.float64), "teacher has the wrong dtype"),
            (3, torch.zeros(3, 5), "second has the wrong shape"),
            (4, torch.zeros(2, dtype=torch.int64), "labels has the wrong shape"),
            (4, torch.zeros(3, dtype=torch.int32), "labels has the wrong dtype"),
            (5, torch.zeros(3, 3), "soft_labels has the wrong shape"),
            (6, torch.zeros(3), "class_weight has the wrong shape"),
            (7, torch.zeros(2, 4, dtype=torch.bool), "mask must be bool"),
            (8, torch.zeros(3, dtype=torch.float64), "weight has the wrong dtype"),
            (9, torch.zeros(7, 2), "rows must be"),
            (10, [1.0], "9 numbers"),
            (11, [99, 0, 0, 0, 0, -1, -100], "unknown kind"),
            (11, [0, 0, 0, 0, 2, 4, -100], "not among the student's"),
            (11, [0, 2, 0, 0, 0, -1, -100], "indices are for the top-k form"),
        ],
    )
    def test_arguments(self, position, value, message):
        args = arguments("KL", Case(weight=True, ignored=False), 3, 4, torch.float32)
        args[position] = value
        with pytest.raises(RuntimeError, match=message):
            ops.row_divergence(*args)

    def test_missing_labels(self):
        args = arguments("KL", Case(ignored=False), 3, 4, torch.float32)
        args[4] = None
        with pytest.raises(RuntimeError, match="labels or soft_labels are needed"):
            ops.row_divergence(*args)
        args[10][1], args[11][3] = 0.0, 1
        with pytest.raises(RuntimeError, match="labels are needed to leave them out"):
            ops.row_divergence(*args)

    def test_tangents(self):
        args = arguments("KL", Case(), 3, 4, torch.float32)
        with pytest.raises(RuntimeError, match="tangents must be"):
            ops.row_divergence_hvp(torch.zeros(2, 3, 5), False, *args)


@pytest.mark.parametrize("name", ["all parts", "settings by row", "two teachers", "top-k", "soft labels", "class mask"])
def test_opcheck(name):
    args = arguments("JENSEN_SHANNON", ALL[name], 4, 8)
    torch.library.opcheck(ops.row_divergence_with_grad, tuple(args), test_utils=("test_schema", "test_faketensor"))
    args[0].requires_grad_()
    torch.library.opcheck(ops.row_divergence, tuple(args))
    torch.library.opcheck(ops.row_divergence_grad, tuple(args))
    torch.library.opcheck(ops.row_divergence_hvp, (torch.randn(2, 4, 8, dtype=torch.float64), False, *args))
