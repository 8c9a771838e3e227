"""How near K-FAC and EK-FAC come to the exact damped answer, what limits them, and what they are worth to cg.

    python benchmarks/kfac_quality.py mlp|cnn

Digits, 1,200 training and 200 validation samples, 10 % of the labels flipped, 20 epochs of Adam. The exact answer is
that of conjugate gradients on the Gauss-Newton matrix to 1e-6 in float64. "layer blocks" is the exact answer of the
matrix without the blocks between layers, which no method with a block for each layer can be expected to surpass.
"""

import sys
import time
from itertools import product

import torch
from torch import nn

from kdaif_fast._objective import Objective
from kdaif_fast.curvature import EKFAC, KFAC, GaussNewton
from kdaif_fast.demo.data import load_digits
from kdaif_fast.per_sample import per_sample_grad_dots

EPOCHS, SCALES = 20, (0.1, 1, 10, 100)
MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    "cnn": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    ),
}


def problem(kind, epochs=EPOCHS):
    """A trained model, its training samples, and validation samples."""
    torch.manual_seed(0)
    data = load_digits(flip=0.1, seed=0)
    batch, val = (data.train_x[:1200], data.train_y[:1200]), (data.val_x[:200], data.val_y[:200])
    model = MODELS[kind]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(batch[0])).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0][index]), batch[1][index]).backward()
            optimizer.step()
    return model.eval(), batch, val


def correlation(a, b):
    """(Spearman, Pearson)."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1]), float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def cg(matvec, b, damping, inverse, tolerances, max_iter=3000):
    """{tolerance: (iterations, CPU seconds, x)} of preconditioned conjugate gradients."""
    x, r, found, start = torch.zeros_like(b), b.clone(), {}, time.thread_time()
    z = inverse(r)
    p, rz = z.clone(), r @ z
    for iteration in range(1, max_iter + 1):
        Ap = matvec(p) + damping * p
        step = rz / (p @ Ap)
        x, r = x + step * p, r - step * Ap
        for tolerance in tolerances:
            if tolerance not in found and r.norm() <= tolerance * b.norm():
                found[tolerance] = iteration, time.thread_time() - start, x
        if len(found) == len(tolerances):
            break
        z = inverse(r)
        rz, before = r @ z, rz
        p = z + rz / before * p
    return found


def layer_blocks(model, batch, gradient, damping):
    """The exact solution without the blocks between layers."""
    parts, at = [], 0
    for name, layer in model.named_children():
        if list(layer.parameters()):
            block = GaussNewton(model, batch, params=[name])
            piece = gradient[at : at + block.size]
            parts.append(cg(block.matvec, piece, damping, lambda r: r, [1e-6])[1e-6][2])
            at += block.size
    return torch.cat(parts)


def quality(kind):
    """Correlations with the exact scores."""
    model, batch, val = problem(kind)
    model, batch, val = model.double(), (batch[0].double(), batch[1]), (val[0].double(), val[1])
    gradient, exact = Objective(model, val).gradient(), GaussNewton(model, batch)
    operators = {
        f"{cls.__name__}, {fisher}, {draws} draws": cls(model, batch, fisher=fisher, draws=draws)
        for cls, (fisher, draws) in product(
            (KFAC, EKFAC), (("monte_carlo", 1), ("monte_carlo", 10), ("ggn", 1), ("empirical", 1))
        )
    }
    auto = 0.1 * operators["EKFAC, ggn, 1 draws"].mean_eigenvalue()
    for scale in SCALES:
        damping = scale * auto
        solution = cg(exact.matvec, gradient, damping, lambda r: r, [1e-6])[1e-6]
        truth = per_sample_grad_dots(model, batch, solution[2])
        answers = {"layer blocks": layer_blocks(model, batch, gradient, damping), "identity": gradient}
        answers |= {name: operator.solve(gradient, damping) for name, operator in operators.items()}
        answers["KFAC, ggn, factored damping"] = operators["KFAC, ggn, 1 draws"].solve(gradient, damping, factored=True)
        print(f"{kind}, damping {damping:.3g}, {scale} times auto")
        for name, answer in answers.items():
            spearman, pearson = correlation(per_sample_grad_dots(model, batch, answer), truth)
            print(f"    {name:32s} Spearman {spearman:.3f}  Pearson {pearson:.3f}", flush=True)


def preconditioning(kind):
    """Iterations and CPU seconds of cg with and without EK-FAC."""
    model, batch, val = problem(kind)
    gradient, exact = Objective(model, val).gradient(), GaussNewton(model, batch)
    auto = 0.1 * EKFAC(model, batch, fisher="ggn").mean_eigenvalue()
    for scale in SCALES[:3]:
        damping = scale * auto
        for name in ("plain", "monte_carlo", "ggn"):
            start = time.thread_time()
            operator = None if name == "plain" else EKFAC(model, batch, fisher=name)

            def inverse(r, operator=operator, damping=damping):
                return r if operator is None else operator.solve(r, damping)

            inverse(gradient)
            made = time.thread_time() - start
            found = cg(exact.matvec, gradient, damping, inverse, [1e-1, 1e-2, 1e-4])
            steps = "  ".join(f"to {t:g}: {found[t][0]} in {found[t][1]:.2f} s" for t in found)
            print(f"{kind}, {scale} times auto, {name:12s} made in {made:.3f} s  {steps}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quality(sys.argv[1])
    preconditioning(sys.argv[1])
