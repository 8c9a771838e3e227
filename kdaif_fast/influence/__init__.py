"""How much each training sample helps or harms the validation loss, and the weight that follows from it."""

from .datainf import datainf_scores
from .projected import projected_scores
from .projected_gradients import ProjectedGradients
from .scores import influence_scores
from .self_influence import self_influence
from .tracin import tracin_scores
from .weights import influence_weights, sigmoid_weights

__all__ = [
    "ProjectedGradients",
    "datainf_scores",
    "influence_scores",
    "influence_weights",
    "projected_scores",
    "self_influence",
    "sigmoid_weights",
    "tracin_scores",
]
