"""Quantities of each sample's gradient, without a loop over samples, and mostly without storing the gradients.

How: one ordinary forward pass leaves PyTorch's autograd graph (graph.py). Where parameters meet samples in it is found
by a probe (probe.py, plan.py), the gradient that arrives at each such place is caught in one backward pass over the
samples' part of the graph (recording.py), and its product with what the place has saved (rules.py, terms/) is every
sample's gradient, in a form that can be contracted before it is formed.
"""

from .dots import per_sample_grad_dots
from .grads import per_sample_grads
from .module_rules import register_rule
from .norms import per_sample_grad_norms
from .pairwise import pairwise_grad_dots
from .weighted_step import WeightedStep, weighted_step

__all__ = [
    "WeightedStep",
    "pairwise_grad_dots",
    "per_sample_grad_dots",
    "per_sample_grad_norms",
    "per_sample_grads",
    "register_rule",
    "weighted_step",
]
