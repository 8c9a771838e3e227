"""K backward passes through one kept graph, walked together."""

from .kept import KeptBackward
from .norms import closed_form_norms

__all__ = ["KeptBackward", "closed_form_norms"]
