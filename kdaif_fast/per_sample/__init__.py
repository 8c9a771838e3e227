"""Quantities of each sample's gradient, without a loop over samples and without storing the gradients."""

from .dots import per_sample_grad_dots

__all__ = ["per_sample_grad_dots"]
