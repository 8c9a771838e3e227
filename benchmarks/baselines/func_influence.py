"""Influence with torch.func: conjugate gradients on the Gauss-Newton matrix by jvp and vjp, scores by one jvp."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional as F

from .plain_mlp_influence import conjugate_gradients


def func_influence_scores(model: nn.Module, batch, val, damping: float, tol: float, max_iter: int = 2000) -> Tensor:
    """phi [N], positive = harmful. One linearisation of the backward pass (vjp) serves all products."""
    names = [name for name, _ in model.named_parameters()]
    tensors = [p.detach() for p in model.parameters()]
    sizes = [t.numel() for t in tensors]

    def unflatten(v: Tensor) -> dict[str, Tensor]:
        pieces = v.split(sizes)
        return {n: piece.view(t.shape) for n, piece, t in zip(names, pieces, tensors, strict=True)}

    def outputs(parameters, inputs):
        return functional_call(model, parameters, (inputs,))

    def run(parameters):
        return outputs(parameters, batch[0])

    parameters = dict(zip(names, tensors, strict=True))
    logits, pull = vjp(run, parameters)
    output_grads = grad(lambda z: F.cross_entropy(z, batch[1], reduction="sum"))

    def product(v: Tensor) -> Tensor:
        tangent = jvp(run, (parameters,), (unflatten(v),))[1]
        curved = jvp(output_grads, (logits,), (tangent,))[1]
        return torch.cat([piece.flatten() for piece in pull(curved)[0].values()]) / len(batch[0])

    validation = grad(lambda p: F.cross_entropy(outputs(p, val[0]), val[1]))(parameters)
    b = torch.cat([piece.flatten() for piece in validation.values()])
    s = conjugate_gradients(product, b, damping, tol, max_iter)

    def losses(parameters):
        return F.cross_entropy(run(parameters), batch[1], reduction="none")

    return -jvp(losses, (parameters,), (unflatten(s),))[1]
