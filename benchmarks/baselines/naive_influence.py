"""Influence as the field's example code computes it: a Python loop over samples, and double backward in the solve.

One backward pass per training sample, and conjugate gradients in which every Hessian-vector product builds the
gradient's graph afresh. Same mathematics, same damping, same stopping rule as `kdaif_fast.influence_scores`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def flat_grad(loss: Tensor, parameters: list[Tensor], create_graph: bool = False) -> Tensor:
    """Gradient of a scalar loss as one vector."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=create_graph)])


def hessian_vector_product(model: nn.Module, batch: tuple[Tensor, Tensor], vector: Tensor) -> Tensor:
    """Hessian of the mean training loss times a vector, by double backward."""
    parameters = list(model.parameters())
    gradient = flat_grad(F.cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
    return flat_grad(gradient @ vector, parameters)


def conjugate_gradients(product, b: Tensor, damping: float, tol: float, max_iter: int) -> Tensor:
    """Solve (H + damping I) x = b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    bound = tol**2 * rr
    for _ in range(max_iter):
        Ap = product(p) + damping * p
        step = rr / (p @ Ap)
        x, r = x + step * p, r - step * Ap
        rr, previous = r @ r, rr
        if rr <= bound:
            break
        p = r + (rr / previous) * p
    return x


def naive_influence_scores(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    damping: float,
    tol: float,
    max_iter: int = 200,
) -> Tensor:
    """Phi [N], positive = harmful."""
    parameters = list(model.parameters())
    validation_grad = flat_grad(F.cross_entropy(model(val[0]), val[1]), parameters)
    s = conjugate_gradients(lambda v: hessian_vector_product(model, batch, v), validation_grad, damping, tol, max_iter)
    scores = []
    for x, y in zip(*batch, strict=True):
        sample_grad = flat_grad(F.cross_entropy(model(x[None]), y[None]), parameters)
        scores.append(-(s @ sample_grad))
    return torch.stack(scores)
