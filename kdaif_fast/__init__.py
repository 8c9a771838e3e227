"""Influence of each training sample on the validation loss, fast enough to be used inside training (KD-AIF)."""

from . import curvature, ops, per_sample, solvers
from ._library import MissingKernelsWarning, backend, backends
from ._model import DistillationLoss
from .influence import influence_scores, influence_weights, sigmoid_weights
from .solvers import ConvergenceWarning

__all__ = [
    "ConvergenceWarning",
    "DistillationLoss",
    "MissingKernelsWarning",
    "backend",
    "backends",
    "curvature",
    "influence_scores",
    "influence_weights",
    "ops",
    "per_sample",
    "sigmoid_weights",
    "solvers",
]
__version__ = "0.1.0"
