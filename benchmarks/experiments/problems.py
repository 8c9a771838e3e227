"""What is learned from: handwritten digits, with wrong labels or with classes that are rare in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdaif_fast.demo.data import CLASSES, load_digits

RARE_CLASSES = 5
"""Classes 0-4 are the rare ones."""


class Problem(NamedTuple):
    """Five splits of the digits: 1,200 training images, 200 of validation, 397 of test."""

    title: str
    flip: float = 0.0  # share of the training labels that are wrong, each any other class
    kept: float = 1.0  # share of the training images of the rare classes that there are


PROBLEMS = {
    "flips-0": Problem("no label flipped"),
    "flips-10": Problem("10 % of the training labels flipped", flip=0.1),
    "flips-20": Problem("20 % of the training labels flipped", flip=0.2),
    "flips-40": Problem("40 % of the training labels flipped", flip=0.4),
    "shift": Problem("digits 0-4 rare in training, not in validation and test", kept=0.1),
}


class Data(NamedTuple):
    """(images [N, 64], labels [N]) of each part, and what is known of the training images."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flipped: Tensor  # bool [N]
    is_rare: Tensor  # bool [N]
    oracle: Tensor  # [N], the weights of who knows what is wrong with the training data


def load(problem: Problem, seed: int) -> Data:
    """Another split, other flips for each seed.

    The oracle weighs flipped samples 0 and others 1. Where classes are rare, it weighs a sample by how much more
    frequent its class is in the validation data than in the training data.
    """
    digits = load_digits(problem.flip, seed)
    kept = torch.zeros(len(digits.train_y), dtype=torch.bool)
    for label in range(CLASSES):
        places = (digits.true_y == label).nonzero()[:, 0]
        share = problem.kept if label < RARE_CLASSES else 1.0
        kept[places[: round(share * len(places))]] = True
    x, y, flipped = (part[kept] for part in (digits.train_x, digits.train_y, digits.flipped))
    oracle = (~flipped).float()
    if problem.kept != 1:
        frequent_there, frequent_here = (
            torch.bincount(labels, minlength=CLASSES) / len(labels) for labels in (digits.val_y, y)
        )
        oracle = (frequent_there / frequent_here)[y]
    is_rare = (y < RARE_CLASSES) if problem.kept != 1 else torch.zeros_like(flipped)
    return Data((x, y), (digits.val_x, digits.val_y), (digits.test_x, digits.test_y), flipped, is_rare, oracle)
