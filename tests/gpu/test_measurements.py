"""Per-sample gradients, curvature, solvers, influence and training on the device: the numbers that the CPU has."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kdaif_fast
from kdaif_fast import solvers
from kdaif_fast.distill import Distiller, InfluenceWeighting, with_indices
from tests.cases import MODELS
from tests.distill.cases import SOLVE, adam, network, samples

from .test_behaviour import waits_are_errors

NAMES = ["mlp", "conv", "attention", "lstm"]
FLOAT32 = 2e-4  # of whole gradients: a network's products and sums, forwards and backwards


def model_and_batches(name, device):
    """In float32 on the device; and the same in float64 on the CPU."""
    build, inputs = MODELS[name]
    model = build().eval()
    batches = [(inputs(n), torch.randint(3, (n,))) for n in (12, 7)]
    wide = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    there = [(x.to(device), y.to(device)) for x, y in batches]
    return (copy.deepcopy(model).to(device), *there), (model.double(), *wide)


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def assert_close(ours, exact, tolerance=FLOAT32):
    ours, exact = ours.detach().cpu().double(), exact.detach().double()
    assert ours.shape == exact.shape
    assert float((ours - exact).norm() / exact.norm().clamp(min=1e-30)) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_calls(name, device):
    (model, batch, other), (exact, wide, wide_other) = model_and_batches(name, device)
    direction = torch.randn(size_of(model), dtype=torch.float64)
    there = direction.float().to(device)
    assert_close(
        kdaif_fast.per_sample_grad_dots(model, batch, there), kdaif_fast.per_sample_grad_dots(exact, wide, direction)
    )
    assert_close(kdaif_fast.per_sample_grad_norms(model, batch), kdaif_fast.per_sample_grad_norms(exact, wide))
    ours, wanted = (kdaif_fast.per_sample_grads(m, b) for m, b in ((model, batch), (exact, wide)))
    for key, value in wanted.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert float((ours[key].cpu().double() - value).abs().max() / scale) <= FLOAT32
    assert_close(
        kdaif_fast.pairwise_grad_dots(model, batch, other), kdaif_fast.pairwise_grad_dots(exact, wide, wide_other)
    )


@pytest.mark.parametrize("name", NAMES)
def test_weighted_step(name, device):
    (model, batch, _), (exact, wide, _) = model_and_batches(name, device)
    direction = torch.randn(size_of(model), dtype=torch.float64)

    def step(model, batch, direction):
        model.zero_grad()
        found = kdaif_fast.weighted_step(model, batch, weight_fn=kdaif_fast.sigmoid_weights, direction=direction)
        return found.phi, found.weights, torch.cat([p.grad.flatten() for p in model.parameters()])

    there = direction.float().to(device)
    step(model, batch, there)
    with waits_are_errors(device):
        ours = step(model, batch, there)
    for x, y in zip(ours, step(exact, wide, direction), strict=True):
        assert_close(x, y, 5 * FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_weighted_step_in_a_graph(name, device):
    """Forward, backward and weights: captured once, replayed with another batch."""
    (model, (x, y), _), _ = model_and_batches(name, device)
    exact = copy.deepcopy(model).cpu().double()
    there = torch.randn(size_of(model), device=device)

    def step(model, batch, direction):
        model.zero_grad(set_to_none=True)
        found = kdaif_fast.weighted_step(model, batch, weight_fn=kdaif_fast.sigmoid_weights, direction=direction)
        return found.phi, found.weights, *(p.grad for p in model.parameters())

    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(model, (x, y), there)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours = step(model, (x, y), there)
    for order in (torch.arange(len(y), device=device).flip(0), torch.zeros_like(y)):
        new_x, new_y = x[order].clone(), y[order.flip(0)].clone()
        x.copy_(new_x)
        y.copy_(new_y)
        if device.type == "cuda":
            graph.replay()
        else:
            ours = step(model, (x, y), there)
        wide = x.cpu().double() if x.is_floating_point() else x.cpu()
        wanted = step(exact, (wide, y.cpu()), there.cpu().double())
        assert_close(ours[0], wanted[0], 5 * FLOAT32)
        assert_close(ours[1], wanted[1], 5 * FLOAT32)
        flat = [torch.cat([g.flatten() for g in grads[2:]]) for grads in (ours, wanted)]
        assert_close(*flat, 5 * FLOAT32)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_products(name, curvature, device):
    (model, batch, _), (exact, wide, _) = model_and_batches(name, device)
    vectors = torch.randn(2, size_of(model), dtype=torch.float64)
    ours = kdaif_fast.hvp(model, batch, vectors.float().to(device), curvature=curvature)
    assert_close(ours, kdaif_fast.hvp(exact, wide, vectors, curvature=curvature), 5 * FLOAT32)


@pytest.mark.parametrize("method", ["cg", "minres", "lissa", "nystrom", "lanczos", "arnoldi"])
def test_solvers(method, device):
    """Three right-hand sides, which are done at different times."""
    matrix = torch.diag(torch.linspace(1, 4, 30)).to(device)
    b = torch.randn(3, 30).to(device)
    b[1] = 0
    b[1, 0] = 1.0
    options = {"rank": 30} if method in ("nystrom", "lanczos", "arnoldi") else {"max_iter": 400}
    found = solvers.solve(lambda v: v @ matrix, b, method, damping=0.5, tol=1e-4, **options)
    assert bool(torch.as_tensor(found.converged).all())
    assert_close(found.x, b.cpu().double() / (torch.linspace(1, 4, 30).double() + 0.5), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_influence(name, device):
    (model, batch, val), (exact, wide, wide_val) = model_and_batches(name, device)
    options = {"damping": 0.1, "tol": 1e-5}
    assert_close(
        kdaif_fast.influence_scores(model, batch, val, **options),
        kdaif_fast.influence_scores(exact, wide, wide_val, **options),
        5e-3,
    )
    assert_close(
        kdaif_fast.influence_weights(model, batch, val, **options),
        kdaif_fast.influence_weights(exact, wide, wide_val, **options),
        1e-2,
    )


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_influence_by_factors(curvature, device):
    (model, batch, val), (exact, wide, wide_val) = model_and_batches("conv", device)
    options = {"damping": 0.1, "curvature": curvature}
    ours = kdaif_fast.influence_scores(model, batch, val, **options)
    assert_close(ours, kdaif_fast.influence_scores(exact, wide, wide_val, **options), 1e-2)


def test_steps_of_a_weighting(device):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(device)
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    loader = with_indices(DataLoader(data, batch_size=8))
    val = [(torch.randn(9, 4).to(device), torch.randint(3, (9,)).to(device))]
    weighting = InfluenceWeighting(model, loader, val, refresh="step", influence={"damping": 0.1})
    weighting.start_epoch(0)
    on_device = [(indices.to(device), (x.to(device), y.to(device))) for indices, (x, y) in loader]
    for indices, batch in on_device:
        weighting.step(batch, indices)
    with waits_are_errors(device):
        for indices, batch in on_device:
            weighting.step(batch, indices)
            weighting(indices)
    assert weighting.weights.device.type == device.type
    assert bool(((weighting.weights > 0) & (weighting.weights < 2)).all())


@pytest.mark.parametrize(("mechanism", "refresh"), [("M3", "epoch"), ("M1", "step"), ("vanilla", "epoch")])
def test_an_epoch_of_distillation(mechanism, refresh, device):
    """The device's losses are the CPU's."""
    found = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        teacher, student = network(16).to(where), network(8).to(where)
        distiller = Distiller(
            *(teacher, student, None if mechanism == "vanilla" else adam, adam),
            **{"mechanism": mechanism, "refresh": refresh, "warmup_epochs": 0, "influence": SOLVE, "progress": False},
        )
        x, y, _ = samples(48, flip=0.2)
        train = DataLoader(TensorDataset(x, y), batch_size=16)
        history = distiller.fit(train, [samples(24, seed=1)[:2]], 2)
        found.append([record["student_loss"] for record in history])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=2e-3, atol=1e-4)
