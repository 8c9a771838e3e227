"""K-FAC and EK-FAC against dense matrices made from the samples' gradients, in float64."""

import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast._model import DistillationLoss
from kdaif_fast.curvature import EKFAC, KFAC, GaussNewton, hvp
from kdaif_fast.solvers import ConvergenceWarning, solve
from tests.cases import CLASSES, MODELS, Dense, N, make

TIGHT = dict(rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """A table that is also the last layer, a layer used twice, a bare parameter, and one that takes no part."""

    def __init__(self):
        super().__init__()
        self.table, self.twice = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.scale, self.idle = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.ones(2))

    def forward(self, tokens):
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.table(tokens))))) * self.scale
        return x.mean(1) @ self.table.weight[:CLASSES].T


class Flipped(nn.Module):
    """x @ W with W [inputs, outputs], and a convolution without a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, CLASSES))
        self.first = nn.Conv1d(2, 3, 2, bias=False)

    def forward(self, x):
        return torch.tanh(self.first(x)).flatten(1) @ self.weight


def tokens(n):
    return torch.randint(5, (n, 3))


def convolution(*args, dims=2, size=5, head=None, **options):
    """A convolution of two channels, its outputs' means over the positions and a fixed head."""
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **options)

    class Means(nn.Module):
        def forward(self, x):
            return torch.tanh(x).flatten(2).sum(2)[:, :CLASSES]

    return nn.Sequential(layer, Means()), lambda n: torch.randn(n, args[0], *[size] * dims)


LAYERS = {
    "conv 1d": lambda: convolution(2, 4, 3, dims=1, stride=2, padding=1),
    "conv 2d": lambda: convolution(2, 3, 2, dilation=2, padding=(1, 0)),
    "conv 2d, few positions": lambda: convolution(2, 9, 3, size=4),
    "conv 3d": lambda: convolution(1, 3, 2, dims=3, size=3),
    "grouped conv": lambda: convolution(4, 6, 3, groups=2, padding=1, size=3),
    "depthwise conv, no bias": lambda: convolution(3, 3, 2, groups=3, bias=False, size=3),
    "flipped": lambda: (Flipped(), lambda n: torch.randn(n, 2, 3)),
    "tied": lambda: (Tied(), tokens),
    "transposed conv": lambda: (
        nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        lambda n: torch.randn(n, 2, 4),
    ),
}
EVERY = [*MODELS, *LAYERS]


def case(name):
    if name in MODELS:
        model, batch, _ = make(name)
        return model, batch
    model, inputs = LAYERS[name]()
    x = inputs(N)
    return model.double(), ((x.double() if x.is_floating_point() else x), torch.randint(CLASSES, (N,)))


def roots(model, batch, loss=None):
    """[N, V, P]: gradients of the samples whose squares add up to each sample's Gauss-Newton matrix."""
    dense = Dense(model)
    loss = loss or (lambda z, y: F.cross_entropy(z, y, reduction="none"))
    jacobian = dense.flat(jacrev(lambda p: dense.outputs(p, batch[0]))(dense.parameters), 2)
    z = dense.outputs(dense.parameters, batch[0])
    H = vmap(hessian(lambda z, *rest: loss(z[None], *(r[None] for r in rest))[0]))(z, *batch[1:])
    values, vectors = torch.linalg.eigh(H)
    return torch.einsum("nvp,nvc->ncp", jacobian, vectors * values.clamp(min=0).sqrt()[:, None])


def squares(operator, gradients):
    """E[(Q^T g)^2] of the operator's eigenvectors Q, over [N, V, P]; and Q, block by block, as [P, P]."""
    state = {entry["shape"][0]: entry for entry in operator.state_dict()["blocks"] if "shape" in entry}
    start, at = {}, 0
    for name, parameter in operator.parameters.items():
        start[name] = at
        at += parameter.numel()
    Q = torch.eye(at, dtype=torch.float64)
    for weight, entry in state.items():
        _, bias, groups, rows, columns, flipped = entry["shape"]
        for g in range(groups):
            basis = torch.kron(entry["grad_basis"][g], entry["input_basis"][g])
            index = torch.arange(rows * columns).view(rows, columns)
            if flipped:
                index = torch.arange(rows * columns).view(columns, rows).T
            index = index + g * rows * columns + start[weight]
            if bias is not None:
                index = torch.cat([index, (torch.arange(rows) + g * rows + start[bias])[:, None]], 1)
            Q[index.reshape(-1, 1), index.reshape(1, -1)] = basis
    return ((gradients @ Q).square().sum(1).mean(0)), Q


@pytest.mark.parametrize("name", EVERY)
def test_ekfac_is_the_exact_diagonal_in_its_eigenbasis(name):
    model, batch = case(name)
    for fisher, gradients in [("ggn", roots(model, batch)), ("empirical", Dense(model).grads(batch)[:, None])]:
        operator = EKFAC(model, batch, fisher=fisher)
        values, Q = squares(operator, gradients)
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64), **TIGHT)
        torch.testing.assert_close(operator.dense(), (Q * values) @ Q.T, **TIGHT)
        assert values.max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_closed_forms(name, kind):
    model, batch = case(name)
    operator = kind(model, batch)
    dense = operator.dense()
    torch.testing.assert_close(dense, dense.T, **TIGHT)
    torch.testing.assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
    assert operator.mean_eigenvalue() == pytest.approx(dense.trace().item() / len(dense), rel=1e-10)
    b = torch.randn(3, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(b), b @ dense, **TIGHT)
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    x = operator.solve(b, 0.1)
    torch.testing.assert_close(x @ damped, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.stack([operator.solve(row, 0.1) for row in b]), x, **TIGHT)
    torch.testing.assert_close(torch.stack([operator.matvec(row) for row in b]), operator.matmat(b), **TIGHT)
    as_dict = {n: p.detach() for n, p in operator.parameters.items()}
    flat = torch.cat([p.flatten() for p in as_dict.values()])
    solved = operator.solve(as_dict, 0.1)
    torch.testing.assert_close(torch.cat([p.flatten() for p in solved.values()]), operator.solve(flat, 0.1), **TIGHT)


@pytest.mark.parametrize("name", ["linear", "conv", "grouped conv", "tied"])
def test_kfac_factors_by_hand(name):
    """A is the mean over samples, and B the mean over samples and positions, of what the layer sees."""
    model, batch = case(name)
    operator = KFAC(model, batch, fisher="empirical")
    assert operator.blocks  # computed before the layers are watched
    calls = []
    layers = {m: n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0].detach(), output)))
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    grads = torch.autograd.grad(loss, [output for _, _, output in calls])
    seen = {layer: [] for layer in layers}
    for (layer, x, _), b in zip(calls, grads, strict=True):
        seen[layer].append(positions(layer, x, b))
    for layer, name in layers.items():
        a, b = (torch.cat(parts, 1) for parts in zip(*seen[layer], strict=True))
        if layer.bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
        A, B = operator.factors(f"{name}.weight" if name else "weight")
        torch.testing.assert_close(A, a.mT @ a / N, **TIGHT)
        torch.testing.assert_close(B, b.mT @ b / b.shape[1], **TIGHT)
    assert len(layers) > 0


def positions(layer, x, b):
    """Inputs and output gradients of every position, [groups, N T, ...]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]), b.reshape(1, -1, b.shape[-1])
    x, b = (y.unsqueeze(2) if y.dim() == 3 else y for y in (x, b))
    kernel, padding = layer.kernel_size, layer.padding
    if len(kernel) == 1:
        kernel, padding = (1, *kernel), (0, *padding)
    patches = F.unfold(x, kernel, padding=padding)  # [N, C * kernel, T]
    return tuple(y.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2) for y in (patches, b.flatten(2)))


def test_is_exact_for_one_sample_or_one_input():
    """With one sample, or the same input for all, the block of a linear layer is a Kronecker product."""
    model, (x, y), _ = make("linear")
    for inputs, targets in [(x[:1], y[:1]), (x[:1].repeat(N, 1), y)]:
        for fisher in ("ggn", "empirical"):
            if fisher == "ggn":
                expected = Dense(model).gauss_newton((inputs, targets))
            else:
                G = Dense(model).grads((inputs, targets))
                expected = G.T @ G / len(G)
            for kind in (KFAC, EKFAC):
                torch.testing.assert_close(kind(model, (inputs, targets), fisher=fisher).dense(), expected, **TIGHT)


def test_ekfac_is_nearer_to_the_block_than_kfac():
    model, batch, _ = make("linear")
    exact = Dense(model).gauss_newton(batch)
    near, far = ((kind(model, batch, fisher="ggn").dense() - exact).norm() for kind in (EKFAC, KFAC))
    assert 0.01 < near < far
    assert EKFAC(model, batch, fisher="ggn").mean_eigenvalue() == pytest.approx(exact.diagonal().mean().item())


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation", "distillation, temperature 1", "squared error"])
def test_draws_approach_the_gauss_newton_matrix(loss):
    """The exact columns have its trace; random ones do in the mean, and their error falls with their number."""
    model, (x, y), _ = make("mlp")
    teacher = torch.randn(N, CLASSES, dtype=torch.float64)
    batch, function = (x, y), None
    if "distillation" in loss:
        batch = (x, y, teacher)
        function = DistillationLoss(1.0 if "1" in loss else 3.0, alpha=0.3)
    elif loss == "squared error":
        batch = (x, teacher)

        def function(z, t):
            return (z - t).square().sum(1)

    expected = roots(model, batch, function).square().sum((1, 2)).mean().item()
    blocks = EKFAC(model, batch, loss=function, fisher="ggn")
    assert blocks.mean_eigenvalue() * blocks.size == pytest.approx(expected, rel=1e-10)
    drawn = EKFAC(model, batch, loss=function, draws=400)
    assert drawn.mean_eigenvalue() * drawn.size == pytest.approx(expected, rel=0.05)
    again, other = (EKFAC(model, batch, loss=function, seed=seed).diagonal() for seed in (0, 1))
    assert torch.equal(EKFAC(model, batch, loss=function).diagonal(), again)
    assert not torch.allclose(other, again)


def test_ignored_rows_count_as_samples_without_curvature():
    model, (x, y), _ = make("mlp")
    ignored = y.clone()
    ignored[N // 2 :] = -100
    half = EKFAC(model, (x[: N // 2], y[: N // 2]), fisher="ggn")
    assert EKFAC(model, (x, ignored), fisher="ggn").mean_eigenvalue() == pytest.approx(half.mean_eigenvalue() / 2)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "tied"])
@pytest.mark.parametrize("fisher", ["monte_carlo", "ggn", "empirical"])
def test_a_loader_is_one_batch(name, fisher):
    model, batch = case(name)
    loader = DataLoader(TensorDataset(*batch), batch_size=5)
    one = EKFAC(model, batch, fisher=fisher).dense()
    for options in ({}, {"keep_graphs": True}, {"keep_graphs": True, "memory": 1}):
        operator = EKFAC(model, loader, fisher=fisher, **options)
        torch.testing.assert_close(operator.dense(), one, rtol=1e-8, atol=1e-10)
        assert operator.samples == N


def test_which_parameters_get_what():
    model, batch = case("tied")
    assert EKFAC(model, batch).blocks == {
        "scale": "diagonal",
        "idle": "diagonal",
        "table.weight": "diagonal",
        "twice.weight": "kronecker",
        "twice.bias": "kronecker",
    }
    idle = EKFAC(model, batch).solve(torch.ones(EKFAC(model, batch).size, dtype=torch.float64), 0.5)[4:6]
    assert idle.tolist() == [2.0, 2.0]  # no curvature: damping alone
    model.twice.bias.requires_grad_(False)
    frozen = EKFAC(model, batch)
    assert "twice.bias" not in frozen.blocks
    assert frozen.factors("twice.weight")[0].shape == (1, 4, 4)
    model, batch = case("mlp")
    head = KFAC(model, batch, params="2")
    assert list(head.blocks) == ["2.weight", "2.bias"]
    whole = KFAC(model, batch).dense()
    torch.testing.assert_close(head.dense(), whole[-head.size :, -head.size :], **TIGHT)


class Changing(nn.Module):
    """Its layer is used in another way for batches with large inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES := 4, FEATURES)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        hidden = self.layer(x) if x.max() < 10 else x / 10 * self.layer.weight.diagonal() + self.layer.bias
        return self.head(torch.tanh(hidden))


def test_a_layer_that_batches_use_in_different_ways_is_diagonal():
    model = Changing().double()
    batches = [(torch.rand(4, 4).double() * size, torch.randint(CLASSES, (4,))) for size in (1, 30)]
    operator = EKFAC(model, batches, fisher="empirical")
    assert operator.blocks["layer.weight"] == operator.blocks["layer.bias"] == "diagonal"
    assert operator.blocks["head.weight"] == "kronecker"
    G = torch.cat([Dense(model).grads(batch) for batch in batches])
    torch.testing.assert_close(operator.diagonal()[:20], G[:, :20].square().mean(0), **TIGHT)


def test_factored_damping():
    model, batch, _ = make("linear")
    operator = KFAC(model, batch)
    A, B = (factor[0] for factor in operator.factors("weight"))
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    root = 0.1**0.5
    damped = torch.kron(
        B + root / pi * torch.eye(len(B), dtype=torch.float64), A + root * pi * torch.eye(len(A), dtype=torch.float64)
    )
    b = torch.randn(CLASSES, 5, dtype=torch.float64)
    flat = torch.cat([b[:, :4].flatten(), b[:, 4]])
    x = operator.solve(flat, 0.1, factored=True)
    expected = torch.linalg.solve(damped, b.flatten()).view(CLASSES, 5)
    torch.testing.assert_close(x, torch.cat([expected[:, :4].flatten(), expected[:, 4]]), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="use KFAC"):
        EKFAC(model, batch).solve(flat, 0.1, factored=True)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_statistics_can_be_kept(kind, tmp_path):
    model, batch = case("conv")
    operator = kind(model, batch)
    b = torch.randn(operator.size, dtype=torch.float64)
    torch.save(operator.state_dict(), tmp_path / "state.pt")
    fresh = kind(model, (batch[0][:1], batch[1][:1]))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.solve(b, 0.1), operator.solve(b, 0.1))
    assert fresh.samples == N
    assert fresh.blocks == operator.blocks
    other = KFAC if kind is EKFAC else EKFAC
    with pytest.raises(ValueError, match=f"statistics of {kind.__name__}, expected {other.__name__}"):
        other(model, batch).load_state_dict(operator.state_dict())
    with pytest.raises(ValueError, match=r"other parameters: 4\.weight differ"):
        kind(model, batch, params=["0", "1", "4.bias"]).load_state_dict(operator.state_dict())


def test_leaves_everything_as_it_was():
    model, batch = case("conv")
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        operator = EKFAC(model, batch)
        assert not operator.matvec(torch.ones(operator.size, dtype=torch.float64)).requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_low_precision_models_have_float32_statistics():
    model, batch = case("mlp")
    low = model.to(torch.bfloat16)
    values = EKFAC(low, (batch[0].to(torch.bfloat16), batch[1]), fisher="ggn").diagonal()
    assert values.dtype == torch.float32
    exact = EKFAC(low.double(), (batch[0].to(torch.bfloat16).double(), batch[1]), fisher="ggn").diagonal()
    assert (values - exact).norm() < 0.05 * exact.norm()


def test_in_one_call():
    model, batch = case("mlp")
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    product = hvp(model, batch, direction, curvature="ekfac")
    expected = EKFAC(model, batch).matvec(direction)
    assert all(torch.equal(product[name], expected[name]) for name in direction)


def test_with_the_solvers():
    """By itself, as the inverse of another curvature, and as a preconditioner."""
    model, batch = case("conv")
    b = torch.randn(2, 51, dtype=torch.float64)
    operator, exact = EKFAC(model, batch), GaussNewton(model, batch)
    alone = solve(operator, b, "ekfac", damping=0.1)
    assert alone.converged
    assert alone.residual.max() < 1e-10
    with pytest.warns(ConvergenceWarning):
        instead = solve(exact, b, "ekfac", damping=0.1)
    torch.testing.assert_close(instead.x, alone.x, **TIGHT)
    assert 0.01 < instead.residual.max() < 1
    inside = solve(exact, b, "cg", damping=0.1, tol=1e-10, preconditioner=operator)
    torch.testing.assert_close(inside.x, solve(exact, b, "exact", damping=0.1).x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "fisher is 'true', expected one of 'monte_carlo', 'ggn', 'empirical'"),
        ({"draws": 0}, "draws is 0, expected an int >= 1"),
        ({"memory": 0}, "memory is 0, expected a positive number"),
    ],
)
def test_bad_options(options, message):
    model, batch = case("mlp")
    with pytest.raises(ValueError, match=message):
        EKFAC(model, batch, **options)


def test_bad_input():
    model, (x, y) = case("mlp")
    operator = EKFAC(model, (x, y))
    with pytest.raises(ValueError, match=r"b has shape \(3,\)"):
        operator.solve(torch.ones(3), 0.1)
    for damping in (-1.0, float("nan"), True):
        with pytest.raises(ValueError, match="damping is"):
            operator.solve(torch.ones(43, dtype=torch.float64), damping)
    with pytest.raises(ValueError, match="eigenvalues of 0"):  # softmax's curvature has a null direction
        EKFAC(model, (x[:1], y[:1]), fisher="ggn").solve(torch.ones(43, dtype=torch.float64), 0.0)
    with pytest.raises(ValueError, match=r"weight is '7', expected one of '0\.weight', '2\.weight'"):
        operator.factors("7")
    with pytest.raises(ValueError, match="data is empty"):
        EKFAC(model, []).diagonal()
    bad = x.clone()
    bad[2] = float("nan")
    with pytest.raises(ValueError, match="batch 1 of data: sample 2 has the loss nan"):
        EKFAC(model, [(x, y), (bad, y)]).diagonal()
    with pytest.raises(ValueError, match=r"Call model\.eval"):
        EKFAC(nn.Sequential(nn.Dropout(0.5), model), (x, y))
    with pytest.raises(ValueError, match="fisher='empirical'"):
        EKFAC(model, (x, y), loss=lambda z, y: F.cross_entropy(z, y, reduction="none") + model[0].bias.sum()).diagonal()
