"""What tol="rank" saves, and how near its ranking is to that of the converged solution, on digits.

`python benchmarks/rank_tolerance.py` prints the table that kdaif_fast/influence/rank.py shows: 1,200 training and 200
validation images, a tenth of the labels flipped; networks after 1 to 60 epochs; dampings from automatic to 0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdaif_fast import influence_scores
from kdaif_fast.demo.data import Digits, load_digits
from kdaif_fast.influence.rank import ranks_of, spearman
from kdaif_fast.solvers import Solution

EPOCHS = (1, 4, 15, 60)
DAMPINGS = ("auto", 1e-1, 1e-2, 1e-3)


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
    data = load_digits(0.1, seed=0)
    print("| model | epochs | damping | iterations | residual | Spearman | for 1e-2 | for 1e-3 | for 1e-5 |")
    print("|---" * 9 + "|")
    for build in (mlp, cnn):
        torch.manual_seed(0)
        model, done = build(), 0
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for epochs in EPOCHS:
            for _ in range(epochs - done):
                train(model, optimizer, data)
            done = epochs
            for damping in DAMPINGS:
                phi, early = scores(model, data, damping=damping, tol="rank")
                others = [scores(model, data, damping=early.damping, tol=tol) for tol in (1e-2, 1e-3, 1e-5)]
                rho = float(spearman(ranks_of(phi[:, None]), ranks_of(others[-1][0][:, None])))
                name = f"auto, {early.damping:.1e}" if damping == "auto" else f"{damping:.0e}"
                counts = " | ".join(str(solution.iterations) for _, solution in others)
                print(
                    f"| {build.__name__} | {epochs} | {name} | {early.iterations} | {early.residual:.0e} | {rho:.4f} | "
                    f"{counts} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
