"""Peak memory of scores over a loader, in a process of its own: its length must not matter."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to forget the peak"),
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a source tree"),
]


@pytest.mark.parametrize("queries", ["mean", "per_class"])
def test_it_does_not_grow_with_the_loader(queries, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scores_memory

    short, long = (scores_memory.peak_of_a_process(batches, queries) for batches in (4, 80))
    data = 76 * scores_memory.SAMPLES * scores_memory.FEATURES * 4 / 2**20  # of the batches that it is longer by
    assert data > 4
    assert long < short + 0.2 * data, f"{long:.2f} MiB for 80 batches, {short:.2f} for 4"
