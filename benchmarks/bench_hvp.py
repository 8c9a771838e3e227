"""Curvature products with K vectors on four models, each in units of a plain training step measured in turns with it.

Contestants: kdaif_fast; double backward in a loop on a kept graph; torch.func (loop of jvp of grad, vmap of it, vmap of
what `linearize` gives); curvlinops. Groups called "products" have the linearisation made before; those called
"linearised anew" make it each time. Some contestants keep nothing, and are the same in both. Every result is compared
with double backward in float64 before it is timed. One that cannot do a model says why when pytest is run with -rs.

The cost of a vector against K is drawn into runs/hvp_curve.png.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from baselines.curvlinops_hvp import Curvlinops
from baselines.func_hvp import JvpOfGrad, VmapOfJvp, VmapOfLinearised
from baselines.loop_hvp import DoubleBackward, UnsupportedError
from persample_models import MODELS, make, plain_step
from torch import Tensor

from kdaif_fast.curvature import make_curvature

TOLERANCE = 1e-3  # relative, in the 2-norm; float32 against float64: double backward is off by 2e-4 on the transformer
CHECKED = 2  # vectors
CURVATURES = ("hessian", "ggn")
CURVE = Path(__file__).parents[1] / "runs" / "hvp_curve.png"


class Ours(DoubleBackward):
    """The operators of this library."""

    def linearise(self) -> None:
        """One batch's graph is kept by the operator."""
        self.operator = make_curvature(self.curvature, self.model, self.batch)

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        return self.operator.matmat(vectors)


CONTESTANTS = {
    "kdaif_fast": Ours,
    "double backward, graph kept": DoubleBackward,
    "torch.func jvp of grad": JvpOfGrad,
    "torch.func vmap of jvp of grad": VmapOfJvp,
    "torch.func vmap of linearize": VmapOfLinearised,
    "curvlinops": Curvlinops,
}
COUNTS = dict.fromkeys(CONTESTANTS, (1, 8)) | {
    "kdaif_fast": (1, 2, 4, 8, 16, 32),
    "double backward, graph kept": (1, 8, 32),
}
# The activations of 8 copies of these models, with all derivatives, do not fit into 16 GB by vmap.
TOO_LARGE = {("transformer", "torch.func vmap of jvp of grad"), ("transformer", "torch.func vmap of linearize")}


@functools.cache
def vectors(model_name: str) -> Tensor:
    model, _ = make(model_name)
    return torch.randn(max(map(max, COUNTS.values())), sum(p.numel() for p in model.parameters()))


@functools.cache
def truth(model_name: str, curvature: str) -> Tensor:
    model, (x, y) = make(model_name)
    contestant = DoubleBackward(model.double(), (x.double() if x.is_floating_point() else x, y), curvature)
    contestant.linearise()
    return contestant.products(vectors(model_name)[:CHECKED].double())


@pytest.fixture(scope="module")
def curve():
    """Name -> {K: plain steps per vector}, drawn at the end."""
    rows: dict[str, dict[int, float]] = {}
    yield rows
    draw(rows)


def draw(rows: dict[str, dict[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, costs in rows.items():
        style = "--" if name.endswith("ggn") else "-"
        color = f"C{list(MODELS).index(name.split(', ')[0])}"
        axes.plot(list(costs), list(costs.values()), style, marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K, vectors at once", ylabel="plain training steps per vector", ylim=(0, None))
    axes.legend(fontsize="small")
    CURVE.parent.mkdir(exist_ok=True)
    figure.savefig(CURVE, dpi=120)
    pyplot.close(figure)


def prepared(model_name, curvature, name, K):
    """The contestant, linearised, with its products compared; skips what it cannot do."""
    if (model_name, name) in TOO_LARGE and K > 1:
        pytest.skip("would take more than 16 GB")
    contestant = CONTESTANTS[name](*make(model_name), curvature)
    given = vectors(model_name)[:K]
    try:
        contestant.linearise()
        result = contestant.products(given)[:CHECKED].double()
    except (UnsupportedError, NotImplementedError, RuntimeError) as reason:
        pytest.skip(f"{name}: {str(reason).splitlines()[0]}")
    expected = truth(model_name, curvature)[: len(result)]
    error = (result - expected).norm() / expected.norm()
    assert error < TOLERANCE, f"off by {error:.1e}"
    return contestant, given


one_thread = pytest.mark.parametrize("threads", [1], indirect=True, ids=["1 thread"])
ROWS = [
    (model, curvature, K, name)
    for model in MODELS
    for curvature in CURVATURES
    for name in CONTESTANTS
    for K in COUNTS[name]
]


@one_thread
@pytest.mark.parametrize(("model_name", "curvature", "K", "name"), ROWS)
def bench_products(measure_in, curve, model_name, curvature, K, name):
    contestant, given = prepared(model_name, curvature, name, K)
    plain = make(model_name)
    ratio = measure_in(
        "plain steps",
        lambda: plain_step(plain),
        f"{curvature} products, {model_name}, K = {K:2}",
        name,
        lambda: contestant.products(given),
    )
    if name == "kdaif_fast":
        curve.setdefault(f"{model_name}, {curvature}", {})[K] = ratio / K


@one_thread
@pytest.mark.parametrize("name", ["kdaif_fast", "double backward, graph kept", "torch.func vmap of linearize"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("model_name", MODELS)
def bench_linearised_anew(measure_in, model_name, curvature, name):
    """As influence does when the parameters have changed: one linearisation, 8 vectors."""
    contestant, given = prepared(model_name, curvature, name, 8)
    plain = make(model_name)

    def both():
        contestant.linearise()
        contestant.products(given)

    group = f"{curvature} linearised anew, {model_name}, K =  8"
    measure_in("plain steps", lambda: plain_step(plain), group, name, both)
