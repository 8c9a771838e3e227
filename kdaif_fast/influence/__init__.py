"""How much each training sample helps or harms the validation loss, and the weight that follows from it."""

from .scores import influence_scores
from .tracin import tracin_scores
from .weights import influence_weights, sigmoid_weights

__all__ = ["influence_scores", "influence_weights", "sigmoid_weights", "tracin_scores"]
