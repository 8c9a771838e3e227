"""Row losses, forward and backward through the public calls, and curvature products, against PyTorch and the memory."""

import pytest
import torch
from baselines.eager_row_divergence import eager_divergence, eager_kd_loss

from kdaif_fast.ops import kd_loss, row_divergence, row_hvp

ALPHA = 0.5
SHAPES = [
    (512, 100, torch.float32, 2.0),
    (4096, 1000, torch.float32, 1.0),
    (4096, 1000, torch.float32, 2.0),
    (4096, 1000, torch.float32, 2.5),
    (4096, 1000, torch.bfloat16, 2.0),
    (2048, 32000, torch.float32, 2.0),
    (2048, 32000, torch.bfloat16, 2.0),
]


def fused_kd_loss(student, teacher, labels, weight, T, alpha):
    return kd_loss(student, teacher, labels, weight=weight, temperature=T, alpha=alpha, reduction="mean")


IMPLEMENTATIONS = {
    "kdaif_fast": lambda: fused_kd_loss,
    "eager": lambda: eager_kd_loss,
    "torch.compile": lambda: torch.compile(eager_kd_loss, fullgraph=True, dynamic=False),
}


def inputs(N, V, dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, N, V).mul_(3).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher, torch.randint(V, (N,)), torch.rand(N)


def step(loss, arguments, T):
    return torch.autograd.grad(loss(*arguments, T, ALPHA), arguments[0])[0]


def case(parameters):
    N, V, dtype, T = parameters
    return f"[{N}, {V}] {str(dtype).removeprefix('torch.')} T={T:g}"


def assert_right(ours, arguments, T, tolerance, rows=256):
    """On the first rows only, in float64; the mean is over all of them."""
    exact = (arguments[0].detach()[:rows].double().requires_grad_(), arguments[1][:rows].double())
    exact += tuple(x[:rows] for x in arguments[2:])
    expected = step(eager_kd_loss, exact, T) * (min(rows, len(ours)) / len(ours))
    assert (ours[:rows].double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "triad: 2 reads, 1 write"])
@pytest.mark.parametrize("shape", SHAPES, ids=case)
def bench_kd_loss(measure, shape, name):
    """The triad writes to memory that is there; the others' gradients are fresh memory, as in training."""
    N, V, dtype, T = shape
    arguments = inputs(N, V, dtype)
    group = f"CE + KL forward + backward {case(shape)}"
    if name not in IMPLEMENTATIONS:
        student, teacher, out = arguments[0].detach(), arguments[1], torch.zeros(N, V, dtype=dtype)
        measure(group, name, lambda: torch.add(student, teacher, out=out))
        return
    torch.compiler.reset()
    loss = IMPLEMENTATIONS[name]()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1 if name != "kdaif_fast" else 3e-3}[dtype]
    assert_right(step(loss, arguments, T), arguments, T, tolerance)
    measure(group, name, lambda: step(loss, arguments, T))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "total_variation", "decoupled"])
def bench_divergences(measure, divergence, name):
    student, teacher, labels, _ = inputs(4096, 1000, torch.float32)

    def eager(student):
        return eager_divergence(divergence, student, teacher, labels, 2.0)

    def fused(student):
        options = {"other_weight": 1.0} if divergence == "decoupled" else {}
        return row_divergence(
            student, teacher, labels, divergence=divergence, temperature=2.0, ce_weight=0.0, reduction="mean", **options
        )

    torch.compiler.reset()
    loss = {"kdaif_fast": fused, "eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}[name]
    expected = torch.autograd.grad(eager(student), student)[0]
    assert (torch.autograd.grad(loss(student), student)[0] - expected).norm() < 1e-3 * expected.norm()
    measure(
        f"{divergence} forward + backward [4096, 1000] float32 T=2",
        name,
        lambda: torch.autograd.grad(loss(student), student)[0],
    )


@pytest.mark.parametrize("name", ["kdaif_fast", "eager"])
def bench_double_backward(measure, name):
    student, teacher, labels, weight = inputs(4096, 1000, torch.float32)
    tangent = torch.randn_like(student)
    loss = {"kdaif_fast": fused_kd_loss, "eager": eager_kd_loss}[name]

    def product():
        value = loss(student, teacher, labels, weight, 2.0, ALPHA)
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        return torch.autograd.grad(gradient, student, tangent)[0]

    measure("loss, gradient and Hessian-vector product by double backward [4096, 1000] float32", name, product)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", ["kdaif_fast", "eager"])
def bench_row_hvp(measure, name, count):
    """Products alone: the eager graph is kept, and each tangent is a backward pass of its own."""
    student, teacher, labels, weight = inputs(4096, 1000, torch.float32)
    tangents = torch.randn(count, *student.shape)
    (gradient,) = torch.autograd.grad(
        eager_kd_loss(student, teacher, labels, weight, 2.0, ALPHA), student, create_graph=True
    )

    def eager():
        return torch.stack([torch.autograd.grad(gradient, student, u, retain_graph=True)[0] for u in tangents])

    def fused():
        options = {"weight": weight / 4096, "temperature": 2.0, "ce_weight": ALPHA, "kd_weight": 1 - ALPHA}
        return row_hvp(tangents, student.detach(), teacher, labels, **options)

    assert (fused() - eager()).norm() < 1e-4 * eager().norm()
    group = f"row_hvp, K = {count}, [4096, 1000] float32"
    measure(group, name, {"kdaif_fast": fused, "eager": eager}[name])
