"""Small data and networks that trainers are tested with."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import Distiller

FEATURES, CLASSES = 6, 3
SOLVE = {"damping": 0.1, "tol": 1e-2}


def samples(count, seed=0, flip=0.0):
    """Gaussian clusters, one a class; a share of the labels is wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    x = centres[labels] + torch.randn(count, FEATURES, generator=generator)
    flipped = torch.rand(count, generator=generator) < flip
    given = torch.where(flipped, (labels + 1) % CLASSES, labels)
    return x, given, flipped


class Noisy(Dataset):
    """Samples with noise from all three random generators, as random augmentation draws."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(FEATURES) + float(np.random.normal()) + random.gauss(0, 1)
        return self.x[index] + 0.1 * noise, self.y[index]


def network(width=8, dropout=0.0):
    layers = [nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers[:2], nn.Dropout(dropout), layers[2]) if dropout else nn.Sequential(*layers)


def loaders(train=24, val=12, batch=6, flip=0.0, noisy=False, **options):
    x, y, _ = samples(train, 1, flip)
    data = Noisy(x, y) if noisy else TensorDataset(x, y)
    options = {"batch_size": batch, "shuffle": True} | options
    return DataLoader(data, **options), DataLoader(TensorDataset(*samples(val, 2)[:2]), batch_size=val)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def make(seed=0, dropout=0.0, optimizer=adam, **settings):
    """A Distiller of two small networks, always the same for a seed."""
    torch.manual_seed(seed)
    teacher, student = network(16, dropout), network(8, dropout)
    settings = {"warmup_epochs": 0, "influence": SOLVE, "progress": False} | settings
    teacher_optimizer = None if settings.get("mechanism") == "vanilla" else optimizer
    return Distiller(
        teacher,
        student,
        teacher_optimizer,
        optimizer,
        loss=settings.pop("loss", DistillationLoss(2.0, 0.5)),
        **settings,
    )


def state_of(distiller):
    """Every number that training depends on."""
    found = {f"student {k}": v for k, v in distiller.student.state_dict().items()}
    found |= {f"teacher {k}": v for k, v in distiller.teacher.state_dict().items()}
    if distiller.weighting is not None:
        found |= {"weights": distiller.weighting.weights, "phi": distiller.weighting.phi}
        found |= {f"phi {i}": phi for i, (_, phi) in enumerate(distiller.weighting.measurements)}
    return {name: value.clone() for name, value in found.items()}


def assert_same_bits(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name].nan_to_num(7.0), other[name].nan_to_num(7.0)), name
