"""Influence of each training sample on the validation loss, fast enough to be used inside training (KD-AIF)."""

from . import curvature, distill, ops, per_sample, solvers
from ._library import MissingKernelsWarning, backend, backends
from ._model import DistillationLoss
from ._sharded import gathered
from .curvature import hvp
from .influence import (
    ProjectedGradients,
    datainf_scores,
    influence_scores,
    influence_weights,
    projected_scores,
    self_influence,
    sigmoid_weights,
    tracin_scores,
)
from .per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
    weighted_step,
)
from .solvers import ConvergenceError, ConvergenceWarning

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "DistillationLoss",
    "MissingKernelsWarning",
    "ProjectedGradients",
    "backend",
    "backends",
    "curvature",
    "datainf_scores",
    "distill",
    "gathered",
    "hvp",
    "influence_scores",
    "influence_weights",
    "ops",
    "pairwise_grad_dots",
    "per_sample",
    "per_sample_grad_dots",
    "per_sample_grad_norms",
    "per_sample_grads",
    "projected_scores",
    "self_influence",
    "sigmoid_weights",
    "solvers",
    "tracin_scores",
    "weighted_step",
]
__version__ = "0.1.0"
