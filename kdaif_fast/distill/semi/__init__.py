"""Distillation with unlabelled samples: pseudo-labels, and what feeds back to them."""
