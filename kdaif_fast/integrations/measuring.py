"""What measuring must not do to a trainer that it is a guest of: change what the trainer draws at random."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from ..distill.runs.random_states import random_state, set_random_state


@contextlib.contextmanager
def own_randomness(*seed: int) -> Iterator[None]:
    """Within it the global generators are seeded with these numbers; afterwards they are where they were.

    So a measurement depends on where training is, not on what was drawn before, and training does not depend on whether
    there was a measurement: a run that is resumed goes on as one that was not stopped.

    Example:
        >>> before = torch.get_rng_state()
        >>> with own_randomness(0, 3):
        ...     first = torch.rand(2)
        >>> with own_randomness(0, 3):
        ...     torch.equal(torch.rand(2), first)
        True
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    before = random_state()
    own = int(np.random.SeedSequence(seed).generate_state(1)[0])
    try:
        torch.manual_seed(own)
        np.random.seed(own)
        random.seed(own)
        yield
    finally:
        set_random_state(before)
