"""Influence as the field's example code computes it: Python loops over samples and batches, and double backward.

One backward pass per training sample; conjugate gradients in which every Hessian-vector product goes through the
training set in loader batches and builds the gradient's graph afresh. Same mathematics, damping and stopping rule as
`kdaif_fast.influence_scores(..., curvature="hessian")`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = list[Tensor]


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Inner product of two lists of tensors."""
    return sum(torch.sum(x * y) for x, y in zip(a, b, strict=True))


def hessian_vector_product(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensors, batch_size: int) -> Tensors:
    """Hessian of the mean training loss times v, by double backward, batch by batch."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(*(part.split(batch_size) for part in batch), strict=True):
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(dot(grads, v), parameters)
        total = [t + h * len(x) / len(batch[0]) for t, h in zip(total, product, strict=True)]
    return total


def gauss_newton_vector_product(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensors, batch_size: int) -> Tensors:
    """Gauss-Newton matrix of the mean training loss times v: J v by double backward, then J^T, batch by batch."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(*(part.split(batch_size) for part in batch), strict=True):
        outputs = model(x)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, parameters, dummy, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, dummy, v, retain_graph=True)
        logits = outputs.detach().requires_grad_()
        (grads,) = torch.autograd.grad(F.cross_entropy(logits, y), logits, create_graph=True)
        (curved,) = torch.autograd.grad(grads, logits, tangent)
        product = torch.autograd.grad(outputs, parameters, curved)
        total = [t + h * len(x) / len(batch[0]) for t, h in zip(total, product, strict=True)]
    return total


def conjugate_gradients(product, b: Tensors, damping: float, tol: float, max_iter: int) -> Tensors:
    """Solve (H + damping I) x = b."""
    x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
    rr = dot(r, r)
    bound = tol**2 * rr
    for _ in range(max_iter):
        Ap = [h + damping * q for h, q in zip(product(p), p, strict=True)]
        step = rr / dot(p, Ap)
        x = [a + step * q for a, q in zip(x, p, strict=True)]
        r = [a - step * q for a, q in zip(r, Ap, strict=True)]
        rr, previous = dot(r, r), rr
        if rr <= bound:
            break
        p = [a + rr / previous * q for a, q in zip(r, p, strict=True)]
    return x


def naive_influence_scores(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    damping: float,
    tol: float,
    max_iter: int = 200,
    batch_size: int = 64,
    curvature: str = "hessian",
) -> Tensor:
    """phi [N], positive = harmful. batch_size is that of the loader which the curvature goes through."""
    product = {"hessian": hessian_vector_product, "ggn": gauss_newton_vector_product}[curvature]
    parameters = list(model.parameters())
    validation_grad = torch.autograd.grad(F.cross_entropy(model(val[0]), val[1]), parameters)
    s = conjugate_gradients(
        lambda v: product(model, batch, v, batch_size), list(validation_grad), damping, tol, max_iter
    )
    scores = []
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        scores.append(-dot(list(torch.autograd.grad(loss, parameters)), s))
    return torch.stack(scores)
