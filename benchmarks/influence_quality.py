"""What approximate solvers are worth: their scores against the exact damped answer, with what they cost.

    python benchmarks/influence_quality.py mlp|cnn

Digits, 1,200 training and 200 validation samples, 10 % of the labels flipped, 20 epochs of Adam. The exact answer is
that of conjugate gradients on the Gauss-Newton matrix to 1e-6 in float64; the methods run in float32 on one thread, on
all training samples as one batch. Residuals are the true ones, for the Gauss-Newton matrix.
"""

import copy
import sys
import time
import warnings

import torch
from torch import nn

from kdaif_fast._objective import Objective
from kdaif_fast.curvature import EKFAC, KFAC, GaussNewton
from kdaif_fast.demo.data import load_digits
from kdaif_fast.per_sample import per_sample_grad_dots
from kdaif_fast.solvers import ConvergenceError, ConvergenceWarning, solve

EPOCHS = 20
SCALES = 0.1, 1.0
"""Dampings, in units of the mean eigenvalue; the first is what "auto" takes."""

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    "cnn": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    ),
}

SOLVES = {
    "cg, tol 1e-1": ("cg", {"tol": 1e-1}),
    "cg, tol 1e-2": ("cg", {"tol": 1e-2}),
    "cg, 10 products": ("cg", {"tol": None, "max_iter": 10}),
    "lissa, 50 products": ("lissa", {"tol": None, "max_iter": 50}),
    "lissa, 500 products": ("lissa", {"tol": None, "max_iter": 500}),
    "nystrom, rank 50": ("nystrom", {"rank": 50, "tol": None}),
    "nystrom, rank 200": ("nystrom", {"rank": 200, "tol": None}),
    "arnoldi, rank 50": ("arnoldi", {"rank": 50, "tol": None}),
    "arnoldi, rank 200": ("arnoldi", {"rank": 200, "tol": None}),
    "lanczos, rank 50": ("lanczos", {"rank": 50, "tol": None}),
    "lanczos, rank 200": ("lanczos", {"rank": 200, "tol": None}),
}


def problem(kind):
    """A trained model, its training samples, and validation samples."""
    torch.manual_seed(0)
    data = load_digits(flip=0.1, seed=0)
    batch, val = (data.train_x[:1200], data.train_y[:1200]), (data.val_x[:200], data.val_y[:200])
    model = MODELS[kind]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(batch[0])).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0][index]), batch[1][index]).backward()
            optimizer.step()
    return model.eval(), batch, val


def correlations(a, b):
    """(Spearman, Pearson)."""
    pairs = torch.stack([a.double(), b.double()])
    return torch.corrcoef(pairs.argsort(1).argsort(1).double())[0, 1], torch.corrcoef(pairs)[0, 1]


def exact_scores(model, batch, val, scale):
    """(damping, scores) in float64."""
    model = copy.deepcopy(model).double()
    batch, val = ((x.double(), y) for x, y in (batch, val))
    curvature = GaussNewton(model, batch)
    damping = scale * curvature.mean_eigenvalue(probes=16)
    validation = Objective(model, val)
    b = validation.gradient() / validation.samples
    solution = solve(curvature, b, "cg", damping=damping, tol=1e-6, max_iter=5000, strict=True)
    return damping, -per_sample_grad_dots(model, batch, solution.x)


def layer_blocks(model, batch, b, damping):
    """The exact answer without what is between layers: the best that methods with a block for each layer can do."""
    parts, products, start = [], 0, 0
    for name, layer in model.named_children():
        if list(layer.parameters()):
            block = GaussNewton(model, batch, params=[name])
            piece = b[start : start + block.size]
            solution = solve(block, piece, "cg", damping=damping, tol=1e-4, max_iter=2000)
            parts.append(solution.x)
            products, start = products + solution.iterations, start + block.size
    return torch.cat(parts), products


def methods(model, batch, b, damping):
    """Name and function -> (x, products) of every method."""
    curvature = GaussNewton(model, batch)
    curvature.matvec(b)  # all share the linearisation

    def solved(method, options):
        solution = solve(curvature, b, method, damping=damping, **options)
        return solution.x, solution.iterations

    for name, (method, options) in SOLVES.items():
        yield name, lambda method=method, options=options: solved(method, options)
    for made in (KFAC, EKFAC):
        for fisher in ("monte_carlo", "ggn"):

            def closed(made=made, fisher=fisher):
                return made(model, batch, fisher=fisher).solve(b, damping), 0

            yield f"{made.__name__}, {fisher}", closed
    yield "layers by themselves, exact", lambda: layer_blocks(model, batch, b, damping)
    yield "identity", lambda: (b / (1 + damping), 0)


def main(kind):
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    model, batch, val = problem(kind)
    validation = Objective(model, val)
    b = validation.gradient() / validation.samples
    curvature = GaussNewton(model, batch)
    for scale in SCALES:
        damping, exact = exact_scores(model, batch, val, scale)
        print(f"\n{kind}, P = {len(b):,}, damping {damping:.3g} = {scale} times the mean eigenvalue\n")
        print("| method | products | CPU s | residual | Spearman | Pearson |")
        print("|---|---|---|---|---|---|")
        for name, function in methods(model, batch, b, damping):
            start = time.thread_time()
            try:
                x, products = function()
            except ConvergenceError as error:
                print(f"| {name} | {str(error).splitlines()[0][:80]} |", flush=True)
                continue
            seconds = time.thread_time() - start
            residual = float((curvature.matvec(x) + damping * x - b).norm() / b.norm())
            spearman, pearson = correlations(-per_sample_grad_dots(model, batch, x), exact)
            cells = f"{products} | {seconds:.2f} | {residual:.2g} | {spearman:.3f} | {pearson:.3f}"
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
