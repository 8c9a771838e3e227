"""kd_loss, forward and backward through the public call, and its Hessian-vector product, against PyTorch."""

import pytest
import torch
from baselines.eager_kd_loss import eager_kd_loss

from kdaif_fast.ops import kd_loss

ALPHA = 0.5
SHAPES = [
    (512, 100, torch.float32, 2.0),
    (4096, 1000, torch.float32, 1.0),
    (4096, 1000, torch.float32, 2.0),
    (4096, 1000, torch.float32, 2.5),
    (4096, 1000, torch.bfloat16, 2.0),
    (1024, 32000, torch.float32, 2.0),
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
    student, teacher = torch.randn(2, N, V).mul(3).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher, torch.randint(V, (N,)), torch.rand(N)


def step(loss, arguments, T):
    return torch.autograd.grad(loss(*arguments, T, ALPHA), arguments[0])[0]


def case(parameters):
    N, V, dtype, T = parameters
    return f"[{N}, {V}] {str(dtype).removeprefix('torch.')} T={T:g}"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=case)
def bench_kd_loss(measure, shape, name):
    N, V, dtype, T = shape
    arguments = inputs(N, V, dtype)
    torch.compiler.reset()
    loss = IMPLEMENTATIONS[name]()
    exact = (arguments[0].detach().double().requires_grad_(), arguments[1].double(), *arguments[2:])
    expected = step(eager_kd_loss, exact, T)
    error = (step(loss, arguments, T).double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1 if name != "kdaif_fast" else 3e-3}[dtype]
    measure(f"kd_loss forward + backward {case(shape)}", name, lambda: step(loss, arguments, T))


@pytest.mark.parametrize("name", ["kdaif_fast", "eager"])
def bench_kd_loss_hvp(measure, name):
    student, teacher, labels, weight = inputs(4096, 1000, torch.float32)
    tangent = torch.randn_like(student)
    loss = {"kdaif_fast": fused_kd_loss, "eager": eager_kd_loss}[name]

    def product():
        value = loss(student, teacher, labels, weight, 2.0, ALPHA)
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        return torch.autograd.grad(gradient, student, tangent)[0]

    measure("loss, gradient and Hessian-vector product by double backward [4096, 1000] float32", name, product)


@pytest.mark.parametrize("name", ["kdaif_fast", "eager"])
def bench_kd_loss_hvp_alone(measure, name):
    student, teacher, labels, weight = inputs(4096, 1000, torch.float32)
    tangent = torch.randn_like(student)
    loss = {"kdaif_fast": fused_kd_loss, "eager": eager_kd_loss}[name]
    value = loss(student, teacher, labels, weight, 2.0, ALPHA)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    measure(
        "Hessian-vector product alone, graph kept [4096, 1000] float32",
        name,
        lambda: torch.autograd.grad(gradient, student, tangent, retain_graph=True)[0],
    )
