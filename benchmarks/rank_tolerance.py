"""What rough solves cost, and how near their ranking is to the converged one: tol="rank", and 3e-2 with K-FAC.

`python benchmarks/rank_tolerance.py [seed]` prints the table that kdaif_fast/influence/rank.py shows a part of: digits,
1,200 for training and 200 for validation, a tenth of the labels flipped; networks after 1 to 60 epochs; dampings from
automatic to 1e-3. Thread time of one thread, statistics and eigenvectors of K-FAC included.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from kdaif_fast import influence_scores
from kdaif_fast.demo.data import Digits, load_digits
from kdaif_fast.influence.rank import ranks_of, spearman
from kdaif_fast.solvers import Solution

EPOCHS = (1, 4, 15, 60)
DAMPINGS = ("auto", 1e-2, 1e-3)
TOLERANCES: tuple[Any, ...] = (1e-2, "rank", 3e-2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    first = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits) -> None:
    """One epoch."""
    for index in torch.randperm(len(data.train_y)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
        optimizer.step()


def scores(model: nn.Module, data: Digits, **options: Any) -> tuple[Tensor, Solution]:
    batch, val = (data.train_x, data.train_y), (data.val_x, data.val_y)
    return influence_scores(model, batch, val, max_iter=3000, return_solution=True, **options)


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    data = load_digits(0.1, seed=seed)
    columns = ["model", "epochs", "damping"]
    for tol in TOLERANCES:
        columns += [f"{tol}: products", "s", "Spearman"]
    print("| " + " | ".join(columns) + " |")
    for build in (mlp, cnn):
        torch.manual_seed(seed)
        model, done = build(), 0
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for epochs in EPOCHS:
            for _ in range(epochs - done):
                train(model, optimizer, data)
            done = epochs
            for damping in DAMPINGS:
                exact, converged = scores(model, data, damping=damping, tol=1e-4)
                name = f"auto, {converged.damping:.1e}" if damping == "auto" else f"{damping:.0e}"
                cells = [build.__name__, str(epochs), name]
                for tol in TOLERANCES:
                    start = time.thread_time()
                    phi, early = scores(model, data, damping=damping, tol=tol)
                    seconds = time.thread_time() - start
                    rho = float(spearman(ranks_of(phi[:, None]), ranks_of(exact[:, None])))
                    cells += [str(early.iterations), f"{seconds:.2f}", f"{rho:.4f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
