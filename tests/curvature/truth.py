"""Models of about 2,000 parameters with their dense matrices, built from plain loops of backward passes.

No torch.func: its Hessian has been seen to be wrong on models with attention (tests/cases.py).
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CLASSES, VOCABULARY, LENGTH = 10, 16, 4


class Tokens(nn.Module):
    """A transformer whose embedding is also its head, and with a layer that is called twice: [N, T] -> [N, T, V]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True, activation="gelu")
        self.twice = nn.Linear(12, 12)

    def forward(self, tokens):
        x = self.block(self.embedding(tokens))
        return self.twice(torch.tanh(self.twice(x))) @ self.embedding.weight.T


def mlp():
    return nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, CLASSES)
    ), torch.randn(9, 20)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 16, 3), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, CLASSES),
    ), torch.randn(9, 1, 8, 8)  # fmt: skip


def transformer():
    return Tokens(), torch.randint(VOCABULARY, (7, LENGTH))


def token_loss(outputs, targets):
    """The mean cross-entropy of a sequence's tokens, without those that have no target."""
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape).sum(1) / (targets >= 0).sum(1)


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


class Problem:
    """A model, its batch and its loss; the dense matrices of their mean loss."""

    def __init__(self, name, frozen=()):
        torch.manual_seed(1)
        self.model, x = MODELS[name]()
        self.model.double().eval()
        self.loss = token_loss if name == "transformer" else functools.partial(F.cross_entropy, reduction="none")
        y = torch.randint(VOCABULARY, x.shape) if name == "transformer" else torch.randint(CLASSES, (len(x),))
        if name == "transformer":
            y[0, 1:], y[2, 0] = -100, -100
        self.batch = (x if name == "transformer" else x.double()), y
        for parameter in frozen:
            self.model.get_parameter(parameter).requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.P = sum(p.numel() for p in self.parameters)

    def batches(self, *sizes):
        return list(zip(*(part.split(sizes) for part in self.batch), strict=True))

    def _outputs(self):
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(self.batch[0])

    def _rows(self, *tensors):
        """Gradients of every element of the tensors in the parameters, [elements, P], one backward pass each."""
        rows = []
        for tensor in tensors:
            for one in torch.eye(tensor.numel(), dtype=tensor.dtype):
                grads = torch.autograd.grad(tensor, self.parameters, one.view_as(tensor), retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows)

    def grads(self, targets=None, loss=None):
        """[N, P], one backward pass a sample."""
        return self._rows((loss or self.loss)(self._outputs(), self.batch[1] if targets is None else targets))

    @functools.cached_property
    def hessian(self):
        """[P, P], one backward pass through the gradient a row."""
        mean = self.loss(self._outputs(), self.batch[1]).mean()
        grads = torch.autograd.grad(mean, self.parameters, create_graph=True)
        return self._rows(*grads)

    @functools.cached_property
    def jacobian(self):
        """[N, outputs, P], one backward pass an output."""
        outputs = self._outputs()
        return self._rows(outputs).view(len(outputs), -1, self.P)

    @functools.cached_property
    def gauss_newton(self):
        """[P, P]"""
        z = self._outputs().detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(z, self.batch[1]).sum(), z, create_graph=True)
        N = len(z)
        curvature = []
        for entries in gradient.view(N, -1).T:  # samples are independent: a sum over them keeps them apart
            (row,) = torch.autograd.grad(entries.sum(), z, retain_graph=True)
            curvature.append(row.reshape(N, -1))
        halves = torch.einsum("nco,nop->ncp", torch.stack(curvature, 1), self.jacobian)
        return self.jacobian.flatten(0, 1).T @ halves.flatten(0, 1) / N

    @functools.cached_property
    def empirical_fisher(self):
        """[P, P]"""
        return self.second_moment(self.grads())

    @staticmethod
    def second_moment(grads):
        return grads.T @ grads / len(grads)


@functools.cache
def problem(name):
    """The same for every test: tests leave models as they are."""
    return Problem(name)
