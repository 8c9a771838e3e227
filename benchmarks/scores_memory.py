"""Peak memory of influence_scores over loaders of different lengths.

`python benchmarks/scores_memory.py 100 mean` prints the peak in MiB above what the model needs, for 100 batches of 64
samples that the loader makes as it is asked for them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peak_memory import peak_mib, run_in_a_process
from torch import Tensor, nn

from kdaif_fast import influence_scores

FEATURES, WIDTH, CLASSES, SAMPLES = 256, 256, 10, 64


class Loader:
    """As many batches as asked for, the same ones at every pass; none is kept."""

    def __init__(self, batches: int) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self._batches):
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(SAMPLES, FEATURES, generator=generator)
            yield x, torch.randint(CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return self._batches


def peak(batches: int, queries: str) -> float:
    """MiB above the model, with the result in a file; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    folder = tempfile.TemporaryDirectory()

    def score(count: int) -> None:
        influence_scores(
            model,
            Loader(count),
            Loader(2),
            damping=0.1,
            tol=None,
            max_iter=2,
            queries=queries,  # type: ignore[arg-type]
            out=Path(folder.name) / "phi.npy",
            resume=False,
        )

    with folder:
        return peak_mib(lambda: score(batches), lambda: score(2))


def peak_of_a_process(batches: int, queries: str) -> float:
    """The same, in a process of its own."""
    return run_in_a_process(__file__, str(batches), queries)


if __name__ == "__main__":
    print(peak(int(sys.argv[1]), sys.argv[2]))
