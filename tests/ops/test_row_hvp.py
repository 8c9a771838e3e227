"""row_hvp against double backward."""

import pytest
import torch

from kdaif_fast.ops import row_divergence, row_hvp

N, V = 4, 6


@pytest.fixture
def data():
    student, teacher = torch.randn(2, N, V, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(V, (N,))


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jensen_shannon", "decoupled", "logit_mse"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_is_double_backward(data, divergence, count):
    student, teacher, labels = data
    options = {"divergence": divergence, "temperature": 2.0, "weight": torch.rand(N, dtype=torch.float64)}
    tangents = torch.randn(count, N, V, dtype=torch.float64)
    ours = row_hvp(tangents, student.detach(), teacher, labels, **options)
    loss = row_divergence(student, teacher, labels, reduction="sum", **options)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    for u, product in zip(tangents, ours, strict=True):
        torch.testing.assert_close(product, torch.autograd.grad(grad, student, u, retain_graph=True)[0])
    assert ours.shape == (count, N, V)


def test_shapes_and_single_tangents(data):
    student, teacher, labels = (x.detach() for x in data)
    u = torch.randn(3, N, V, dtype=torch.float64)
    products = row_hvp(u, student, teacher, labels)
    torch.testing.assert_close(row_hvp(u[0], student, teacher, labels), products[0])
    cube = row_hvp(u.view(3, 2, 2, V), student.view(2, 2, V), teacher.view(2, 2, V), labels.view(2, 2))
    assert torch.equal(cube, products.view(3, 2, 2, V))


def test_gauss_newton_is_never_negative(data):
    student, teacher, _ = (x.detach() for x in data)
    u = torch.randn(50, N, V, dtype=torch.float64)
    hessian = row_hvp(u, student, teacher, divergence="reverse_kl")
    gauss_newton = row_hvp(u, student, teacher, divergence="reverse_kl", curvature="gauss_newton")
    assert ((u * gauss_newton).sum(-1) >= 0).all()
    assert not torch.allclose(hessian, gauss_newton)


def test_is_differentiable(data):
    student, teacher, labels = data
    u = torch.randn(2, N, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, s: row_hvp(u, s, teacher, labels, temperature=2.0), (u, student))


@pytest.mark.parametrize(
    ("tangents", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 5), {}, ValueError, r"tangents have shape \(2, 3, 5\), expected \[K, \*\(3, 4\)\]"),
        (torch.zeros(2, 3, 4).double(), {}, TypeError, "tangents have dtype torch.float64, expected torch.float32"),
        (None, {}, TypeError, "tangents is None"),
        (torch.zeros(2, 3, 4), {"curvature": "fisher"}, ValueError, "curvature is 'fisher', expected one of 'hessian'"),
        (torch.zeros(2, 3, 4), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
    ],
)
def test_bad_input(tangents, options, error, message):
    with pytest.raises(error, match=message):
        row_hvp(tangents, torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2]), **options)


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="teacher and labels are None"):
        row_hvp(torch.zeros(2, 3, 4), torch.zeros(3, 4))
