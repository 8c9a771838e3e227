"""K backward passes through one kept graph, walked together."""

from .backward import NotBatchableError
from .chain import Chain
from .kept import AGREEMENT, KeptBackward
from .norms import closed_form_norms

__all__ = ["AGREEMENT", "Chain", "KeptBackward", "NotBatchableError", "closed_form_norms"]
