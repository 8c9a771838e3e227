"""K backward passes through one kept graph, walked together."""

from .kept import KeptBackward

__all__ = ["KeptBackward"]
