"""Nothing waits for a GPU unseen: ops never, measurements in steady state never, solvers once in ten iterations.

A wait is a value that Python asks for, a shape that depends on values, or a copy from memory that is not pinned. tests/
waits.py says how they are found without a GPU; tests/gpu asks torch itself.
"""

import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils.data import DataLoader, TensorDataset

import kdaif_fast
from kdaif_fast import curvature, ops, solvers
from kdaif_fast.distill import InfluenceWeighting, with_indices
from kdaif_fast.distill.clock import Clock
from kdaif_fast.distill.finite import FiniteWatch
from kdaif_fast.distill.mechanisms import MECHANISMS
from kdaif_fast.distill.step import JointStep
from kdaif_fast.solvers import cg_columns, looks

from .cases import MODELS, mlp
from .waits import Waits

N, V = 6, 9


def on_gpu(*shape, **options):
    """A tensor without values, which is not on the CPU."""
    return torch.empty(*shape, device="meta", **options)


T, TOP, HEAD = on_gpu(N, V), on_gpu(N, 3), on_gpu(V, V)
Y, INDICES = on_gpu(N, dtype=torch.int64), on_gpu(N, 3, dtype=torch.int64)
ROW, MASK = on_gpu(N), on_gpu(N, V, dtype=torch.bool)
A, B = on_gpu(4, 3, 5), on_gpu(4, 3, 7)

ROW_LOSSES = {
    **{
        name: (lambda s, name=name: getattr(ops, name)(s, T, Y))
        for name in ("kd_loss", "dkd_loss", "js_loss", "log_cosh_loss", "logit_mse_loss", "nkd_loss", "reverse_kl_loss")
    },
    "skew_kl_loss": lambda s: ops.skew_kl_loss(s, T, Y),
    "total_variation_loss": lambda s: ops.total_variation_loss(s, T, Y),
    "taid_loss": lambda s: ops.taid_loss(s, T, share=0.5),
    "weighted mean": lambda s: ops.kd_loss(s, T, Y, weight=ROW, reduction="mean"),
    "mean by weights": lambda s: ops.row_divergence(s, T, Y, weight=ROW, reduction="mean", normalizer="weights"),
    "settings of each row": lambda s: ops.row_divergence(s, T, Y, temperature=ROW, ce_weight=0.5, kd_weight=ROW),
    "top k": lambda s: ops.row_divergence(s, TOP, Y, teacher_form="probabilities", teacher_indices=INDICES),
    "mask": lambda s: ops.row_divergence(s, T, Y, class_mask=MASK, standardize=True, label_smoothing=0.1),
    "second teacher": lambda s: ops.row_divergence(s, T, Y, second_teacher=T, gate=ROW, class_weight=on_gpu(V)),
    "linear_kd_loss": lambda s: ops.linear_kd_loss(s, HEAD, T, Y),
}
OTHERS = {
    "row_hvp": lambda: ops.row_hvp(on_gpu(2, N, V), T, T, Y),
    "row_hvp gauss_newton": lambda: ops.row_hvp(on_gpu(2, N, V), T, T, Y, curvature="gauss_newton"),
    "row_stats": lambda: ops.row_stats(T, T, Y, classes=(1, 5)),
    "segment_mean": lambda: ops.segment_mean(ROW, Y, count=3, weight=ROW),
    "persample_dot": lambda: ops.persample_dot(A, B, on_gpu(2, 7, 5)),
    "persample_grad": lambda: ops.persample_grad(A, B),
    "persample_norm": lambda: ops.persample_norm(A, B),
    "persample_conv": lambda: ops.persample_conv(
        on_gpu(2, 3, 8, 8),
        on_gpu(2, 4, 6, 6),
        kernel=(3, 3),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        norms=True,
    ),
    "persample_layer_norm": lambda: ops.persample_layer_norm(A, A, on_gpu(4, 3), on_gpu(4, 3)),
    "persample_group_norm": lambda: ops.persample_group_norm(A, A, on_gpu(4, 3), on_gpu(4, 3)),
    "weighted_grad": lambda: ops.weighted_grad(A, B, on_gpu(4)),
    "cg_update": lambda: ops.cg_update(*(on_gpu(2, 5) for _ in range(4)), on_gpu(2), 0.1),
    "cg_dots": lambda: ops.cg_dots(on_gpu(2, 5), on_gpu(2, 5)),
    "sigmoid_weights": lambda: kdaif_fast.sigmoid_weights(ROW, scale="robust"),
}


def forward(loss):
    loss(T)


def gradients(loss):
    """A gradient, and one of it."""
    s = on_gpu(N, V, requires_grad=True)
    (first,) = torch.autograd.grad(loss(s).sum(), s, create_graph=True)
    if first.requires_grad:
        first.sum().backward()


def transforms(loss):
    vmap(grad(lambda s: loss(s).sum()))(on_gpu(3, N, V))
    jvp(loss, (T,), (T,))


@pytest.fixture(params=["the kernels' shapes", "reference"])
def answers(request):
    """Who answers: the ops themselves, whose kernels are not run; and the definitions, as where there is no kernel."""
    return contextlib.nullcontext if request.param != "reference" else lambda: kdaif_fast.backend("reference")


@pytest.mark.parametrize("use", [forward, gradients, transforms])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_row_losses(name, use, answers):
    with Waits("meta") as waits, answers():
        use(ROW_LOSSES[name])
    assert not waits.found


@pytest.mark.parametrize("name", OTHERS)
def test_other_ops(name, answers):
    with Waits("meta") as waits, answers():
        OTHERS[name]()
    assert not waits.found


def test_every_op_is_here():
    named = {*ROW_LOSSES, *OTHERS, "RowStats", "row_divergence"}
    assert set(ops.__all__) <= named


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_kd_loss_in_chunks(reduction, monkeypatch):
    """The eager form of a GPU, which values need not be there for."""
    module = importlib.import_module("kdaif_fast.ops.linear_kd_loss")  # the package's name is the function's
    monkeypatch.setattr(module, "_is_plain", lambda *tensors: True)
    hidden, head = on_gpu(N, V, requires_grad=True), on_gpu(V, V, requires_grad=True)
    with Waits("meta") as waits:
        loss = ops.linear_kd_loss(hidden, head, T, Y, reduction=reduction)
        loss.backward(torch.ones_like(loss))
    assert not waits.found


# --- measurements, in steady state: on the CPU, whatever would wait -------------------------------------------------

OPS = ("ops/",)  # have been looked at above, and look at values on the CPU
ONLY_ON_THE_CPU = (*OPS, "distill/rule_checks.py", "distill/step.py", "distill/finite.py")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The solvers count in torch, and look as rarely as on a GPU."""
    monkeypatch.setattr(looks, "LOOKS_EVERY", {})
    monkeypatch.setattr(cg_columns, "scalars_for", lambda device: torch)


def model_and_batch(name):
    build, inputs = MODELS[name]
    model = build().eval()
    return model, (inputs(12), torch.randint(3, (12,)))


def waits_of(call, without=OPS):
    with Waits("cpu", without) as waits:
        call()
    return waits.found


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "lstm"])
def test_per_sample_calls_and_steps(name):
    """The first call of a model finds out where its samples are, and may wait. No other does."""
    model, batch = model_and_batch(name)
    direction = torch.randn(sum(p.numel() for p in model.parameters()))
    calls = {
        "dots": lambda: kdaif_fast.per_sample_grad_dots(model, batch, direction),
        "norms": lambda: kdaif_fast.per_sample_grad_norms(model, batch),
        "grads": lambda: kdaif_fast.per_sample_grads(model, batch),
        "pairs": lambda: kdaif_fast.pairwise_grad_dots(model, batch, batch),
        "step": lambda: kdaif_fast.weighted_step(
            model, batch, weight_fn=kdaif_fast.sigmoid_weights, direction=direction
        ),
        "given weights": lambda: kdaif_fast.weighted_step(model, batch, torch.ones(12)),
    }
    assert waits_of(calls["dots"]), "the first call looks"
    for call in calls.values():
        call()
    found = {key: waits_of(call) for key, call in calls.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "EmpiricalFisher", "MonteCarloFisher", "KFAC", "EKFAC"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_products(kind, name):
    model, batch = model_and_batch(name)
    operator = getattr(curvature, kind)(model, batch)
    vectors = torch.randn(2, operator.size)
    operator.matmat(vectors)
    assert not waits_of(lambda: operator.matmat(vectors))


@pytest.mark.parametrize(
    ("method", "every"), [("cg", 10), ("minres", 10), ("lissa", 10), ("lanczos", 10), ("arnoldi", 10)]
)
def test_solvers_look_once_in_ten_iterations(method, every, as_on_a_gpu):
    """What they read before and after does not depend on how long they run."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 60
    b = torch.randn(60, generator=generator, dtype=torch.float64)
    counts = []
    for iterations in (10, 40):
        length = {"rank": iterations} if method in ("lanczos", "arnoldi") else {"max_iter": iterations}
        found = waits_of(
            lambda length=length: getattr(solvers, method)(lambda v: v @ matrix, b, damping=1e-3, tol=1e-30, **length)
        )
        counts.append(sum(found.values()))
    assert counts[0] > 0
    assert counts[1] - counts[0] <= 3 * (40 - 10) / every


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_fixed_number_of_iterations_is_not_looked_at(method, as_on_a_gpu):
    matrix = torch.diag(torch.linspace(1, 2, 30, dtype=torch.float64))
    b = torch.ones(30, dtype=torch.float64)
    solve = getattr(solvers, method)
    few, many = (
        sum(waits_of(lambda n=n: solve(lambda v: v @ matrix, b, damping=0.1, tol=None, max_iter=n)).values())
        for n in (5, 25)
    )
    assert many <= few + 2  # those that see whether rounding has had its way


def weighting_and_batches(refresh):
    model = mlp()
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    loader = with_indices(DataLoader(data, batch_size=8))
    weighting = InfluenceWeighting(
        model, loader, [(torch.randn(9, 4), torch.randint(3, (9,)))], refresh=refresh, influence={"damping": 0.1}
    )
    return model, weighting, list(loader)


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_steps_of_a_weighting(refresh):
    _, weighting, batches = weighting_and_batches(refresh)
    weighting.start_epoch(0)

    def step():
        for indices, batch in batches:
            if refresh == "step":
                weighting.step(batch, indices)
            weighting(indices)

    step()
    assert not waits_of(step, ONLY_ON_THE_CPU)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_steps_of_teacher_and_student(mechanism):
    student, weighting, batches = weighting_and_batches("step")
    weighting.start_epoch(0)
    has_weights = MECHANISMS[mechanism].weighs_student or MECHANISMS[mechanism].weighs_teacher
    joint = JointStep(
        mlp(),
        student,
        kdaif_fast.DistillationLoss(),
        None,
        MECHANISMS[mechanism],
        weighting if has_weights else None,
        device=torch.device("cpu"),
        autocast=None,
        clock=Clock(),
        watch=FiniteWatch(),
    )

    def steps():
        for batch in batches:
            joint(batch, 8)

    steps()
    assert not waits_of(steps, ONLY_ON_THE_CPU)


def test_what_is_left_out_looks_on_the_cpu_only():
    """The three files above: each look is behind a question for the device."""
    root = Path(kdaif_fast.__file__).parent / "distill"
    assert 'if weights.device.type == "cpu":' in (root / "weighting.py").read_text()
    assert 'if targets.device.type != "cpu"' in (root / "step.py").read_text()
    assert 'if values.device.type == "cpu" or len(self._waiting) >= self._every:' in (root / "finite.py").read_text()


# --- the finder itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x[[0, 2]],
        lambda x: x + torch.ones(6).to(x.device),
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_finds(look, monkeypatch):
    monkeypatch.setattr("tests.waits.place", lambda: "here")
    with Waits("meta") as waits, contextlib.suppress(RuntimeError, AssertionError, NotImplementedError):
        look(on_gpu(6))
    assert waits.found
