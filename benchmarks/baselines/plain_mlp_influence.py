"""Influence by hand for perceptrons with ReLUs: conjugate gradients in plain matrix products, no autograd.

What a product with the Gauss-Newton matrix costs at least in plain PyTorch: ten matrix products for three layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainPerceptron:
    """Linear layers with ReLUs between them, linearised at a batch."""

    def __init__(self, model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
        self.layers = [module for module in model if isinstance(module, nn.Linear)]
        assert len(model) == 2 * len(self.layers) - 1, "linear layers with ReLUs between them"
        x, labels = batch
        self.inputs, self.masks = [x], []
        with torch.no_grad():
            for layer in self.layers[:-1]:
                x = F.linear(x, layer.weight, layer.bias)
                self.masks.append((x > 0).to(x.dtype))
                x = x * self.masks[-1]
                self.inputs.append(x)
            self.probabilities = F.linear(x, self.layers[-1].weight, self.layers[-1].bias).softmax(1)
            self.output_grads = self.probabilities - F.one_hot(labels, self.probabilities.shape[1])
        self.shapes = [shape for layer in self.layers for shape in (layer.weight.shape, layer.bias.shape)]

    def push(self, v: Tensor) -> Tensor:
        """J v: [P] -> [N, V]."""
        pieces = [p.view(s) for p, s in zip(v.split([s.numel() for s in self.shapes]), self.shapes, strict=True)]
        tangent = torch.addmm(pieces[1], self.inputs[0], pieces[0].T)
        for i, layer in enumerate(self.layers[1:], 1):
            tangent = tangent.mul_(self.masks[i - 1]) @ layer.weight.detach().T
            tangent = tangent.addmm_(self.inputs[i], pieces[2 * i].T).add_(pieces[2 * i + 1])
        return tangent

    def pull(self, cotangent: Tensor) -> Tensor:
        """J^T u: [N, V] -> [P]."""
        pieces = []
        for i in reversed(range(len(self.layers))):
            pieces += [cotangent.sum(0), (cotangent.T @ self.inputs[i]).flatten()]
            if i:
                cotangent = (cotangent @ self.layers[i].weight.detach()).mul_(self.masks[i - 1])
        return torch.cat(pieces[::-1])

    def product(self, v: Tensor) -> Tensor:
        """The Gauss-Newton matrix of the mean cross-entropy times v."""
        tangent, p = self.push(v), self.probabilities
        return self.pull((tangent - (p * tangent).sum(1, keepdim=True)) * p) / len(p)


def conjugate_gradients(product, b: Tensor, damping: float, tol: float, max_iter: int) -> Tensor:
    """Solve (C + damping I) x = b on flat vectors."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    bound = tol**2 * float(rr)
    for _ in range(max_iter):
        Ap = product(p).add_(p, alpha=damping)
        step = rr / (p @ Ap)
        x.addcmul_(p, step)
        r.addcmul_(Ap, step, value=-1)
        rr, previous = r @ r, rr
        if float(rr) <= bound:
            break
        p.mul_(rr / previous).add_(r)
    return x


def plain_influence_scores(
    model: nn.Sequential, batch, val, damping: float, tol: float, max_iter: int = 2000
) -> Tensor:
    """phi [N], positive = harmful."""
    train, validation = PlainPerceptron(model, batch), PlainPerceptron(model, val)
    b = validation.pull(validation.output_grads) / len(val[0])
    s = conjugate_gradients(train.product, b, damping, tol, max_iter)
    return -(train.push(s) * train.output_grads).sum(1)
