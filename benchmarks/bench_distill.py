"""What weights cost a training: mechanism M3, measured in every step, in turns with the same loop without weights.

Both networks are of the same kind, with Adam, at batch 256: the CNN of the digits, and 784-512-512-10. "step" is a call
of Distiller.step along a direction that is there. "solve" is what a new direction costs: 10 products on 1,024 samples,
whose linearisation is kept. Its row says what that comes to a step where an epoch has 234 of them (60,000 samples) and
starts with a solve.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from influence_quality import MODELS
from persample_models import mlp

from kdaif_fast.distill import Distiller

BATCH, BATCHES, STEPS = 256, 8, 234
SOLVE_SAMPLES, PRODUCTS = 1024, 10
NETWORKS = {"digits CNN": (MODELS["cnn"], 64), "mlp 784-512-512-10": (mlp, 784)}


class Loop:
    """A distiller with data to go round and round."""

    def __init__(self, network: str, mechanism: str) -> None:
        build, pixels = NETWORKS[network]
        torch.manual_seed(0)
        self.distiller = Distiller(
            build(),
            build(),
            torch.optim.Adam,
            torch.optim.Adam,
            mechanism=mechanism,
            refresh="step",
            warmup_epochs=0,
            influence={"damping": 0.1, "tol": None, "max_iter": PRODUCTS, "keep_graphs": True},
            solve_samples=SOLVE_SAMPLES,
        )
        batches = [(torch.randn(BATCH, pixels), torch.randint(10, (BATCH,))) for _ in range(BATCHES)]
        validation = torch.randn(BATCH, pixels), torch.randint(10, (BATCH,))
        self.batches = self.distiller.prepare(batches, validation)
        self.distiller.start_epoch(0)
        self.weights: list[float] = []

    def step(self) -> None:
        """Train on the next batch."""
        result = self.distiller.step(self.batches[self.distiller.steps % BATCHES])
        if result.weights is not None:
            self.weights.append(float(result.weights.std()))

    def solve(self) -> None:
        """Measure anew."""
        assert self.distiller.weighting is not None
        self.distiller.weighting.refresh()


@pytest.mark.parametrize("network", NETWORKS)
def bench_weighted_steps(measure_in, network):
    unweighted, weighted = Loop(network, "online"), Loop(network, "M3")
    measure_in("unweighted steps", unweighted.step, f"distillation, {network}", "M3, step", weighted.step)
    assert statistics.median(weighted.weights) > 0, "the weights are all the same: nothing was measured"


@pytest.mark.parametrize("network", NETWORKS)
def bench_solve(measure_in, benchmark, network):
    unweighted, weighted = Loop(network, "online"), Loop(network, "M3")
    ratio = measure_in("unweighted steps", unweighted.step, f"distillation, {network}", "M3, solve", weighted.solve)
    benchmark.extra_info["name"] = f"M3, solve: {ratio / STEPS:.2f} a step where it is one in {STEPS}"
