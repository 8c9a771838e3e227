"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from ...._config import ConfigError, Importer, Section
from ...runs.samples_file import SampleFacts
from .parts import DataParts

KEYS: tuple[str, ...] = ()
HELD_OUT = {"validation": 200, "test": 397}


def read(section: Section) -> Any:
    """There is nothing to choose; ConfigError if scikit-learn is missing."""
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{section.path}: data.kind is 'digits': pip install scikit-learn") from error


def load(options: Any, importer: Importer) -> DataParts:
    """All of them as ([1, 8, 8], label), pixels from 0 to 1."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    names = [str(digit) for digit in range(10)]
    dataset = TensorDataset(images, torch.tensor(labels, dtype=torch.int64))
    return DataParts(dataset, facts=SampleFacts(class_names=names), classes=10)
