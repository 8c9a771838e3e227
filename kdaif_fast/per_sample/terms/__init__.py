"""Per-sample gradients of what meets parameters, in the form that makes their products cheap: one kind a file."""

from .base import Materialised, Term
from .convolution import ConvolutionTerm
from .elementwise import BroadcastTerm
from .embedding import EmbeddingTerm
from .generic import GenericTerm
from .linear import LinearTerm
from .together import Together

__all__ = [
    "BroadcastTerm",
    "ConvolutionTerm",
    "EmbeddingTerm",
    "GenericTerm",
    "LinearTerm",
    "Materialised",
    "Term",
    "Together",
]
