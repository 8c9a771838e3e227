"""When a solver looks at its values, and what it does about right-hand sides that are done."""

from __future__ import annotations

import torch

# A GPU is asked for the residuals only now and then, since each look waits for it.
LOOKS_EVERY = {"cpu": 1}
LOOKS_EVERY_ELSEWHERE = 10

# With this share of the right-hand sides left, the others no longer take part in products: leaving them out costs a
# copy of what is left, about what one iteration does to its vectors.
FEW_LEFT = 0.75


def looks_every(device: torch.device) -> int:
    """Iterations from look to look."""
    return LOOKS_EVERY.get(device.type, LOOKS_EVERY_ELSEWHERE)
