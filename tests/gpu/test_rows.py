"""The row kernels' options, widths and sizes, by every backend, against the reference in float64 on the CPU."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.reference import row_divergence as reference
from tests.ops import row_stats_cases
from tests.ops.row_cases import (
    ALL,
    BETWEEN_LOGITS,
    EVERY,
    KIND_NAMES,
    LOSS_TOLERANCE,
    TOLERANCE,
    arguments,
    ops,
    relative_error,
    widened,
)

from .calls import backends_of

HERE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = [b for b in backends_of(HERE) if b != "triton"]
TRITON = [b for b in backends_of(HERE) if b == "triton"]
# Triton compiles each set of options anew: a few that together have all of them.
FOR_TRITON = [
    ("KL", "all parts"),
    ("KL", "cross-entropy alone"),
    ("KL", "everything by row"),
    ("JENSEN_SHANNON", "two masked probabilities"),
    ("DECOUPLED", "top-k with label, without label"),
    ("LOGIT_MSE", "settings by row"),
]
# A GPU's mathematical functions are good to some units in the last place, and its sums are added in another order.
FURTHER = 4


def on(device, args):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]


def wrong(args, device, what):
    """What is further from the reference than rounding: (what, by how much) for values, gradients and products."""
    there, wide = on(device, args), widened(args)
    dtype = args[0].dtype
    tangents = torch.randn(3, *args[0].shape, dtype=torch.float64).to(dtype)
    found = {}
    losses = ops.row_divergence(*there)
    loss, grad = ops.row_divergence_with_grad(*there)
    exact_loss, exact_grad = reference.row_divergence_with_grad(*wide)
    found["loss"] = relative_error(losses.cpu(), exact_loss) / LOSS_TOLERANCE[dtype]
    found["loss with gradient"] = relative_error(loss.cpu(), exact_loss) / LOSS_TOLERANCE[dtype]
    found["gradient"] = relative_error(grad.cpu(), exact_grad) / TOLERANCE[dtype]
    found["gradient alone"] = relative_error(ops.row_divergence_grad(*there).cpu(), exact_grad) / TOLERANCE[dtype]
    for gauss_newton in (False, True):
        ours = ops.row_divergence_hvp(tangents.to(device), gauss_newton, *there).cpu()
        exact = reference.row_divergence_hvp(tangents.double(), gauss_newton, *wide)
        found["Gauss-Newton" if gauss_newton else "Hessian"] = relative_error(ours, exact) / TOLERANCE[dtype] / 2
    return [(what, name, by) for name, by in found.items() if not by <= FURTHER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("backend", COMPILED)
def test_kinds_and_options(backend, kind, dtype, device, poisoned_memory):
    names = [name for k, name in EVERY if k == kind]
    names = names if device.type == "cuda" else names[:: 5 if dtype == torch.float32 else 11]
    with kdaif_fast.backend(backend):
        assert [w for name in names for w in wrong(arguments(kind, ALL[name], dtype=dtype), device, name)] == []


@pytest.mark.parametrize(("kind", "name"), FOR_TRITON)
@pytest.mark.parametrize("backend", TRITON)
def test_kinds_and_options_in_triton(backend, kind, name, device, poisoned_memory):
    dtype = torch.bfloat16 if kind in BETWEEN_LOGITS or name == "everything by row" else torch.float32
    with kdaif_fast.backend(backend):
        assert wrong(arguments(kind, ALL[name], V=37, dtype=dtype), device, name) == []


WIDTHS = [1, 2, 31, 32, 33, 255, 1000, 1001, 4097, 50257, 131075]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", COMPILED)
def test_widths(backend, dtype, device, poisoned_memory):
    """The usual loss has kernels of its own for rows of a warp, of a block, and of several."""
    widths = WIDTHS if device.type == "cuda" else WIDTHS[:7]
    with kdaif_fast.backend(backend):
        for name in ("plain, T = 2", "cross-entropy alone"):
            for V in widths:
                assert wrong(arguments("KL", ALL[name], N=3, V=V, dtype=dtype), device, (name, V)) == []


@pytest.mark.parametrize("V", [1001, 50257])
@pytest.mark.parametrize("backend", TRITON)
def test_widths_in_triton(backend, V, device, poisoned_memory):
    with kdaif_fast.backend(backend):
        assert wrong(arguments("KL", ALL["plain, T = 2"], N=3, V=V, dtype=torch.bfloat16), device, V) == []


@pytest.mark.parametrize("N", [0, 1, 70_000 if HERE == "cuda" else 700])
@pytest.mark.parametrize("backend", backends_of(HERE))
def test_numbers_of_rows(backend, N, device, poisoned_memory):
    """More rows than a grid's second axis could have."""
    with kdaif_fast.backend(backend):
        assert wrong(arguments("KL", ALL["all parts"], N=N, V=5, dtype=torch.float32), device, N) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", backends_of(HERE))
def test_row_stats(backend, dtype, device, poisoned_memory):
    for N, V in row_stats_cases.SHAPES[:: 1 if backend != "triton" else 3]:
        student, teacher, labels = row_stats_cases.inputs(N, V, dtype)
        for other, T in ((teacher, 2.0), (None, 0.3)):
            there = on(device, [student, other, labels])
            with kdaif_fast.backend(backend):
                stats, argmax = torch.ops.kdaif_fast.row_stats(*there, T, 0, V, row_stats_cases.IGNORED)
            exact, exact_argmax = row_stats_cases.expected_of(student, other, labels, T, 0, V)
            row_stats_cases.assert_close(stats.cpu(), exact, dtype)
            assert torch.equal(argmax.cpu(), exact_argmax)


@pytest.mark.parametrize("backend", [b for b in backends_of(HERE) if b != "reference"])
def test_offsets_past_2_to_the_31(backend, device):
    """The last rows of more elements than 32 bits count: 4 GiB for each of three matrices of bfloat16."""
    if device.type != "cuda":
        pytest.skip("on the CPU tests/ops has this")
    if torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("less than 32 GiB are free")
    V = 65_537
    N = 2**31 // V + 40
    student = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    teacher = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(N, dtype=torch.int64, device=device)
    last = arguments("KL", ALL["plain, T = 2"], N=7, V=V, dtype=torch.bfloat16)
    student[-7:], teacher[-7:], labels[-7:] = last[0].to(device), last[1].to(device), last[4].to(device)
    weight = torch.ones(N, device=device)
    weight[-7:] = last[8].to(device)
    args = [student, teacher, None, None, labels, None, None, None, weight, None, *last[-2:]]
    with kdaif_fast.backend(backend):
        losses, grad = ops.row_divergence(*args), ops.row_divergence_grad(*args)
    exact_loss, exact_grad = reference.row_divergence_with_grad(*widened(last))
    assert relative_error(losses[-7:].cpu(), exact_loss) <= FURTHER * LOSS_TOLERANCE[torch.bfloat16]
    assert relative_error(grad[-7:].cpu(), exact_grad) <= FURTHER * TOLERANCE[torch.bfloat16]
