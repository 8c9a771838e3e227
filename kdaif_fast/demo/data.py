"""The demo's data: scikit-learn's handwritten digits, with some of the training labels flipped."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
VALIDATION, TEST = 200, 397


class Digits(NamedTuple):
    """1,797 real images of 8 x 8 pixels, in three parts; only training labels are ever wrong."""

    train_x: Tensor  # [N, 64], pixels in [0, 1]
    train_y: Tensor  # [N], as given to the learner
    true_y: Tensor  # [N], as they should be
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def flipped(self) -> Tensor:
        """Which training labels are wrong: bool [N]."""
        return self.train_y != self.true_y


def load_digits(flip: float, seed: int) -> Digits:
    """Split the digits at random and give a share `flip` of the training images a wrong label, chosen uniformly."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    x = torch.tensor(pixels[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(labels[order], dtype=torch.int64)
    train = len(y) - VALIDATION - TEST
    given = y[:train].clone()
    chosen = torch.from_numpy(random.choice(train, round(flip * train), replace=False))
    shift = torch.from_numpy(random.integers(1, CLASSES, len(chosen)))
    given[chosen] = (given[chosen] + shift) % CLASSES
    validation = slice(train, train + VALIDATION)
    test = slice(train + VALIDATION, None)
    return Digits(x[:train], given, y[:train], x[validation], y[validation], x[test], y[test])
