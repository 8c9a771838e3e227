"""Small models, with the dense truth that every operator and score can be compared with."""

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F

from kdaif_fast._model import twice_differentiable

N, M, FEATURES, CLASSES = 12, 7, 4, 3


class Attention(nn.Module):
    """Attention, a tied embedding, and one layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.twice(torch.tanh(self.twice(self.norm(x))))
        return x.mean(1) @ self.embedding.weight[:CLASSES].T


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES), nn.Dropout(0.5)
    )


def batch_norm():
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES))
    model(torch.randn(20, FEATURES))  # statistics other than 0 and 1
    return model


MODELS = {
    "linear": (lambda: nn.Linear(FEATURES, CLASSES), lambda n: torch.randn(n, FEATURES)),
    "mlp": (mlp, lambda n: torch.randn(n, FEATURES)),
    "conv": (conv, lambda n: torch.randn(n, 1, 4, 4)),
    "batch norm": (batch_norm, lambda n: torch.randn(n, FEATURES)),
    "attention": (Attention, lambda n: torch.randint(6, (n, 5))),
    "lstm": (Recurrent, lambda n: torch.randn(n, 4, 3)),
}


def make(name):
    """A model in eval mode, a training batch and a validation batch, in float64."""
    build, inputs = MODELS[name]
    model = build().double().eval()

    def batch(n):
        x = inputs(n)
        return (x.double() if x.is_floating_point() else x), torch.randint(CLASSES, (n,))

    return model, batch(N), batch(M)


class Dense:
    """Brute force: Jacobians and Hessians of the parameters, as matrices."""

    def __init__(self, model, params=None):
        self.model = model
        self.parameters = {
            name: p.detach()
            for name, p in model.named_parameters()
            if p.requires_grad and (not params or name in params)
        }

    def flat(self, tree, leading=0):
        return torch.cat([tree[name].flatten(leading) for name in self.parameters], leading)

    def unflat(self, vector):
        pieces = vector.split([p.numel() for p in self.parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def outputs(self, parameters, inputs):
        with twice_differentiable(self.model):
            return functional_call(self.model, parameters, (inputs,))

    def losses(self, parameters, batch, loss=None):
        loss = loss or (lambda z, y: F.cross_entropy(z, y, reduction="none"))
        return loss(self.outputs(parameters, batch[0]), *batch[1:])

    def grads(self, batch, loss=None):
        """[N, P]"""
        return self.flat(jacrev(lambda p: self.losses(p, batch, loss))(self.parameters), 1)

    def hessian(self, batch, loss=None, step=1e-5):
        """[P, P], of the mean loss, by central differences of the gradient.

        Not by torch.func.hessian: that is off by 1e-2 on the attention model (torch 2.13).
        """
        point = self.flat(self.parameters)
        gradient = grad(lambda v: self.losses(self.unflat(v), batch, loss).mean())
        rows = [(gradient(point + e) - gradient(point - e)) / (2 * step) for e in step * torch.eye(len(point)).double()]
        matrix = torch.stack(rows)
        return (matrix + matrix.T) / 2

    def gauss_newton(self, batch, loss=None):
        """[P, P], of the mean loss."""
        loss = loss or (lambda z, y: F.cross_entropy(z, y, reduction="none"))
        jacobian = self.flat(jacrev(lambda p: self.outputs(p, batch[0]))(self.parameters), 2)
        z = self.outputs(self.parameters, batch[0])
        curvature = vmap(hessian(lambda z, *rest: loss(z[None], *(r[None] for r in rest))[0]))(z, *batch[1:])
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(z)
