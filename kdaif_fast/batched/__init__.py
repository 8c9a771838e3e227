"""K backward passes through one kept graph, walked together."""

from .backward import NotBatchableError
from .chain import Chain
from .kept import AGREEMENT, KeptBackward

__all__ = ["AGREEMENT", "Chain", "KeptBackward", "NotBatchableError"]
