"""The `memory` of an operator bounds what its products need, each call in a process of its own."""

import functools
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to forget a process's peak"),
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a source tree"),
]


@functools.cache
def peak(*arguments):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import hvp_memory
    finally:
        sys.path.remove(str(BENCHMARKS))
    return hvp_memory.peak_of_a_process(*arguments)


@pytest.mark.parametrize(
    ("model", "curvature", "count", "budget", "together"),
    [
        ("mlp", "ggn", 32, 32, ()),
        ("conv", "hessian", 8, 160, ("together",)),
        pytest.param("conv", "ggn", 8, 110, ("together",), marks=pytest.mark.slow),
        pytest.param("mlp", "hessian", 32, 64, ("together",), marks=pytest.mark.slow),
        pytest.param("resnet8", "hessian", 8, 110, ("together",), marks=pytest.mark.slow),
    ],
)
def test_within_the_budget(model, curvature, count, budget, together):
    assert 1 < peak(model, curvature, count, budget, *together) < budget


def test_a_small_budget_needs_less():
    """Vectors are really multiplied in fewer at a time."""
    assert peak("conv", "hessian", 8, 60, "together") < 0.6 * peak("conv", "hessian", 8, 1024, "together")
