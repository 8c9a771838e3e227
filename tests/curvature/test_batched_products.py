"""Products with K vectors at once, against one vector at a time and against a loop of plain double backward.

Not against torch.func.hessian, which was seen wrong on the attention model (torch 2.13).
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast import _objective
from kdaif_fast._model import twice_differentiable
from kdaif_fast.batched import kept
from kdaif_fast.curvature import EmpiricalFisher, GaussNewton, Hessian, MonteCarloFisher
from kdaif_fast.ops import kd_loss
from tests.cases import CLASSES, MODELS, make
from tests.per_sample import zoo_layers, zoo_modules, zoo_parameters, zoo_sequences  # noqa: F401 (they fill the zoo)
from tests.per_sample.zoo import CASES, run

CLOSE = dict(rtol=1e-10, atol=1e-12)
OPERATORS = (Hessian, GaussNewton)


def cross_entropy(outputs, *targets):
    return F.cross_entropy(outputs, targets[0], reduction="none")


def plain_products(operator, model, batch, vectors, loss=None):
    """A loop over vectors, by PyTorch alone."""
    loss, parameters = loss or cross_entropy, [p for p in model.parameters() if p.requires_grad]
    with twice_differentiable(model):
        outputs = run(model, batch[0])
    count = len(batch[1])

    def gradient(of, at, along):
        """Zeros where there is no derivative."""
        present = [(x, v) for x, v in zip(of, along, strict=True) if x is not None and x.requires_grad]
        if not present:
            return [torch.zeros_like(x) for x in at]
        found = torch.autograd.grad(
            [x for x, _ in present], at, [v for _, v in present], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True)]

    rows = []
    for vector in vectors:
        pieces = [
            x.reshape(p.shape).clone()
            for x, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        if operator is Hessian:
            total = loss(outputs, *batch[1:]).sum() / count
            grads = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
            row = gradient(grads, parameters, pieces)
        else:
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, parameters, dummy, create_graph=True, allow_unused=True)
            (tangent,) = gradient(pulled, [dummy], pieces)
            cut = outputs.detach().requires_grad_()
            (at_outputs,) = torch.autograd.grad(loss(cut, *batch[1:]).sum() / count, cut, create_graph=True)
            row = gradient([outputs], parameters, gradient([at_outputs], [cut], [tangent]))
        rows.append(torch.cat([x.detach().to_dense().flatten() for x in row]))
    return torch.stack(rows)


def assert_right(operator, model, batch, counts=(1, 3, 17), loss=None, **options):
    curvature = operator(model, batch, loss=loss, **options)
    vectors = torch.randn(max(counts), curvature.size, dtype=curvature.dtype)
    expected = plain_products(operator, model, batch, vectors, loss)
    assert expected.abs().max() > 1e-6
    for count in counts:
        torch.testing.assert_close(curvature.matmat(vectors[:count]), expected[:count], **CLOSE)
    torch.testing.assert_close(torch.stack([curvature.matvec(v) for v in vectors[:3]]), expected[:3], **CLOSE)
    return curvature


def walked(model):
    """Whether all graphs of the model were walked with several vectors at once."""
    known = _objective._walkable[model]
    assert known
    return all(known.values())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
def test_against_one_by_one_and_double_backward(name, operator):
    model, batch, _ = make(name)
    assert_right(operator, model, batch)
    assert walked(model)


# PyTorch has no second derivative of bags of embeddings and of cdist, and views vectors of odd offset not as complex.
UNDERIVED = ("bag", "distances from centres", "filter of a spectrum")
ZOO = [name for name, case in CASES.items() if case.loss is None and not any(x in name for x in UNDERIVED)]
QUICK = ZOO[::12]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", QUICK)
def test_zoo(name, operator):
    model = CASES[name].model()
    assert_right(operator, model, CASES[name].batch(4), counts=(3,))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", sorted(set(ZOO) - set(QUICK)))
def test_the_rest_of_the_zoo(name, operator):
    test_zoo(name, operator)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, EmpiricalFisher, MonteCarloFisher])
@pytest.mark.parametrize("cached", [1, 1 << 30])
def test_vectors_in_chunks(operator, cached, monkeypatch):
    """Borders between the chunks of the memory budget, and of a processor's caches, change nothing."""
    monkeypatch.setattr("kdaif_fast.batched.backward.CACHED", cached)
    model, batch, _ = make("conv")
    vectors = torch.randn(17, operator(model, batch).size, dtype=torch.float64)
    expected = torch.stack([operator(model, batch).matvec(v) for v in vectors])
    for memory in (1, 20_000, 1 << 30):
        torch.testing.assert_close(operator(model, batch, memory=memory).matmat(vectors), expected, **CLOSE)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_vectors(operator):
    model, batch, _ = make("mlp")
    curvature = operator(model, batch)
    assert curvature.matmat(torch.zeros(0, curvature.size, dtype=torch.float64)).shape == (0, curvature.size)


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_vectors(operator):
    model, batch, _ = make("conv")
    curvature = operator(model, batch)
    columns = torch.randn(curvature.size, 3, dtype=torch.float64)
    torch.testing.assert_close(curvature.matmat(columns.T), curvature.matmat(columns.T.contiguous()), **CLOSE)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fused_losses(operator):
    model, (x, targets), _ = make("mlp")
    teacher = torch.randn(len(x), CLASSES, dtype=torch.float64)

    def plain(outputs, targets, teacher):
        """Source: docs/method.md, the distillation loss."""
        hard = F.cross_entropy(outputs, targets, reduction="none")
        soft = F.kl_div(F.log_softmax(outputs / 3, 1), F.softmax(teacher / 3, 1), reduction="none").sum(1)
        return 0.2 * hard + 0.8 * 9 * soft

    def fused(outputs, targets, teacher):
        return kd_loss(outputs, teacher, targets, temperature=3.0, alpha=0.2)

    batch = (x, targets, teacher)
    curvature = operator(model, batch, loss=fused)
    vectors = torch.randn(3, curvature.size, dtype=torch.float64)
    torch.testing.assert_close(
        curvature.matmat(vectors), plain_products(operator, model, batch, vectors, plain), rtol=1e-9, atol=1e-10
    )
    assert walked(model)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision(operator, name):
    model, (x, targets), _ = make(name)
    model = model.to(torch.bfloat16)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    curvature = operator(model, (x, targets))
    vectors = torch.randn(3, curvature.size)
    product = curvature.matmat(vectors)
    assert product.dtype == torch.float32
    expected = torch.stack([curvature.matvec(v) for v in vectors])
    assert (product - expected).norm() < 0.03 * expected.norm()


class Cube(torch.autograd.Function):
    """What no batching rule is known for, and vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert grad.shape == x.shape, "one vector at a time"
        return 3 * x**2 * grad


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.second(Cube.apply(self.first(x)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_operations_without_a_batching_rule(operator, recwarn):
    model = WithFunction().double()
    assert_right(operator, model, (torch.randn(6, 4, dtype=torch.float64), torch.randint(CLASSES, (6,))))
    assert walked(model)
    assert not recwarn.list


class Reversed(WithFunction):
    """A hook that changes gradients on the way, which a graph does not show."""

    def forward(self, x):
        hidden = self.first(x)
        hidden.register_hook(lambda grad: -grad)
        return self.second(torch.tanh(hidden))


class Mutating(WithFunction):
    """Writes into a view, whose node only the engine can call."""

    def forward(self, x):
        hidden = self.first(x).clone()
        hidden[:, :2] = torch.tanh(hidden[:, 2:4])
        return self.second(hidden)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("build", [Reversed, Mutating])
def test_what_only_the_engine_can_do(build, operator, recwarn):
    model = build().double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randint(CLASSES, (6,))
    curvature = operator(model, batch) if build is Mutating else None
    if curvature is None:  # reversed gradients are no derivatives: require_second_derivatives has its say elsewhere
        objective = _objective.Objective(model, batch)
        vectors = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        for walk in (objective.pull, objective.full_hessian):
            given = torch.randn(3, *objective.outputs.shape).double() if walk == objective.pull else vectors
            torch.testing.assert_close(walk(given), torch.cat([walk(v[None]) for v in given]), **CLOSE)
        assert not walked(model)
        return
    assert_right(operator, model, batch)
    assert not recwarn.list


def test_a_wrong_rule_would_be_found(monkeypatch):
    """Graphs are compared with the engine's answer before the first product."""
    monkeypatch.setitem(kept.BatchedBackward.__call__.__globals__["RULES"], "AddmmBackward0", lambda *_: [None] * 3)
    model, batch, _ = make("mlp")
    assert_right(Hessian, model, batch)
    assert not walked(model)


def test_graphs_are_freed():
    model, batch, _ = make("mlp")
    objective = _objective.Objective(model, batch)
    objective.full_hessian(torch.ones(3, 43, dtype=torch.float64))
    objective.push(torch.ones(3, 43, dtype=torch.float64))
    outputs = weakref.ref(objective.outputs)
    del objective
    assert outputs() is None, gc.get_referrers(outputs())


class SmallAttention(nn.Module):
    """Adding the same to every key changes nothing: in float32 the gradient of their bias is all rounding."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.queries(x), self.keys(x), self.values(x)).mean(1)


def test_gradients_that_are_rounding_do_not_keep_a_model_from_being_walked():
    model = SmallAttention()
    data = torch.randn(6, 5, 8), torch.randint(0, CLASSES, (6,))
    for operator in OPERATORS:
        curvature = operator(model, data)
        V = torch.randn(3, curvature.size)
        products = curvature.matmat(V)
        torch.testing.assert_close(products, torch.stack([curvature.matvec(v) for v in V]), rtol=1e-3, atol=1e-5)
    assert all(_objective._walkable[model].values())
