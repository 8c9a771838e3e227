"""Pieces that the tests of several scores share: loaders, queries by brute force, digits with wrong labels."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast.demo.data import load_digits


def loader(batch, size):
    """A batch cut into a list of batches, the last of them smaller where it does not divide."""
    return list(zip(*(part.split(size) for part in batch), strict=True))


def query_rows(grads, targets, queries):
    """Query gradients [K, P] from those of all samples [N, P]."""
    if queries == "mean":
        return grads.mean(0, keepdim=True)
    if queries == "per_sample":
        return grads
    return torch.stack([grads[targets == c].mean(0) for c in sorted(set(targets.tolist()))])


@functools.cache
def digits():
    """A small network after a few epochs on digits, a tenth of whose training labels are wrong: model, data."""
    data = load_digits(0.1, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(4):
            for index in torch.randperm(len(data.train_y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
                optimizer.step()
    return model, data


def auc(scores, flags):
    """The chance that a flagged sample has a higher score than another."""
    ranks = scores.double().argsort().argsort().double() + 1
    positive = int(flags.sum())
    return float((ranks[flags].sum() - positive * (positive + 1) / 2) / (positive * (len(flags) - positive)))
