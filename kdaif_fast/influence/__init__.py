"""How much each training sample helps or harms the validation loss, and the weight that follows from it."""

from .datainf import datainf_scores
from .scores import influence_scores
from .tracin import tracin_scores
from .weights import influence_weights, sigmoid_weights

__all__ = ["datainf_scores", "influence_scores", "influence_weights", "sigmoid_weights", "tracin_scores"]
