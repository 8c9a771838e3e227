"""Peak memory of the benchmarks' four models, each call in a process of its own.

The benchmark's script measures: resident pages at the worst moment, above what was there before the call, with an
allocator that gives freed tensors back. A plain step's peak has its new `.grad` in it, and so has a weighted step's.
"""

import functools
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLEAR_REFS = Path("/proc/self/clear_refs")

pytestmark = [
    pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux, to forget the peak of a process"),
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a source tree"),
]

MODELS = ("mlp", "conv", "resnet8", "transformer")


@functools.cache
def measured():
    """The benchmark's functions; its folder is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import persample_memory
    finally:
        sys.path.remove(str(BENCHMARKS))
    return persample_memory


@functools.cache
def peak(model, quantity):
    return measured().peak_of_a_process(model, quantity)


def test_the_measure_sees_what_is_there():
    """What a call holds, and nothing of the 128 MiB that were held and freed before it."""
    script = BENCHMARKS / "peak_memory.py"
    assert 64 <= measured().run_in_a_process(str(script), "64") < 66
    assert measured().run_in_a_process(str(script), "0") < 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantity", ["dots", "weighted step"])
def test_little_more_than_a_plain_step(model, quantity):
    ours, plain = peak(model, quantity), peak(model, "plain step")
    assert ours <= 1.3 * plain, f"{ours:.1f} MiB, {ours / plain:.2f} times a plain step's {plain:.1f} MiB"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantity", ["gradients", "gradients, buffers given"])
def test_gradients_cost_little_more_than_themselves(model, quantity):
    size = measured().gradient_mib(model)
    ours, plain = peak(model, quantity), peak(model, "plain step")
    if quantity != "gradients":
        ours += size  # the buffers were there before
    assert ours <= plain + 1.1 * size, f"{ours:.1f} MiB for {size:.1f} MiB of gradients and a step of {plain:.1f} MiB"
