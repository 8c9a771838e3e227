"""A problem to compare ways to influence scores on, with its exact answer: digits, 10 % of the labels wrong."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdaif_fast.curvature import GaussNewton
from kdaif_fast.demo.data import load_digits

SAMPLES, FLIPS, EPOCHS = 1200, 0.1, 10


def perceptron():
    """Three layers: P = 17,226."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional():
    """Two convolutions with pooling, two linear layers: P = 9,814."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 36), nn.ReLU(), nn.Linear(36, 10)),
    )


NETWORKS = {"mlp": perceptron, "cnn": convolutional}


@dataclass(frozen=True)
class Problem:
    """A trained model, its training and validation samples, which of the labels are wrong, and the damping for all."""

    model: nn.Sequential
    batch: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    flipped: Tensor
    damping: float
    validation_grad: Tensor  # [P], of the mean validation loss


def make_problem(network: str, epochs: int = EPOCHS, damping: float | None = None) -> Problem:
    """damping: the library's own choice ("auto") if None, as a number, so that all have the same."""
    torch.manual_seed(0)
    data = load_digits(flip=FLIPS, seed=0)
    model = NETWORKS[network]()
    batch, val = (data.train_x[:SAMPLES], data.train_y[:SAMPLES]), (data.val_x, data.val_y)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(SAMPLES).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0][index]), batch[1][index]).backward()
            optimizer.step()
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(val[0]), val[1])
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    if damping is None:
        damping = 0.1 * GaussNewton(model, batch).mean_eigenvalue(probes=4)
    return Problem(model, batch, val, data.flipped[:SAMPLES], damping, grad)


def exact_scores(problem: Problem, cache: Path) -> Tensor:
    """phi [N] of the dense damped Gauss-Newton matrix, in float64, by Cholesky; minutes, so it is kept in `cache`.

    Plain torch, not the library: the Jacobian J of all outputs by one backward pass for each class and sample, the
    loss's Hessians H = R R^T in closed form. (J^T H J / N + damping I)^-1 b is formed from the smaller of the matrices
    A^T A [P, P] and A A^T [9 N, 9 N], A = R^T J / sqrt(N) (the second by Woodbury's identity).
    """
    model, (x, y) = problem.model, problem.batch
    values = [problem.damping, *(float(p.detach().double().abs().sum()) for p in model.parameters())]
    path = cache / f"exact_{hashlib.sha256(repr(values).encode()).hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path)
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}

    def outputs(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],))[0]

    def validation_loss(parameters):
        inputs, labels = problem.val
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (inputs.double(),)), labels)

    rows = []
    for samples in x.double().split(100):
        pieces = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, samples)
        rows.append(torch.cat([piece.flatten(2) for piece in pieces.values()], 2))
    J = torch.cat(rows)  # [N, V, P]
    N, V, P = J.shape
    probabilities = torch.func.functional_call(model, parameters, (x.double(),)).softmax(1)
    grads = torch.einsum("nv,nvp->np", probabilities - nn.functional.one_hot(y, V), J)
    b = torch.cat([g.flatten() for g in torch.func.grad(validation_loss)(parameters).values()])
    roots = probabilities.sqrt()
    R = torch.diag_embed(roots) - probabilities[:, :, None] * roots[:, None, :]  # H = R R^T
    A = torch.einsum("nvw,nvp->nwp", R, J).reshape(N * V, P) / N**0.5
    del J
    if P <= N * V:
        matrix = A.T @ A
        matrix.diagonal().add_(problem.damping)
        s = torch.cholesky_solve(b[:, None], torch.linalg.cholesky(matrix))[:, 0]
    else:
        matrix = A @ A.T
        matrix.diagonal().add_(problem.damping)
        inner = torch.cholesky_solve((A @ b)[:, None], torch.linalg.cholesky(matrix))[:, 0]
        s = (b - A.T @ inner) / problem.damping
    residual = (A.T @ (A @ s) + problem.damping * s - b).norm() / b.norm()
    assert residual < 1e-8, residual
    phi = -grads @ s
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(phi, path)
    return phi
