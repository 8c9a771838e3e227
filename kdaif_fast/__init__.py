"""Influence of each training sample on the validation loss, fast enough to be used inside training (KD-AIF)."""

from . import ops
from ._library import MissingKernelsWarning, backend, backends

__all__ = ["MissingKernelsWarning", "backend", "backends", "ops"]
__version__ = "0.1.0"
