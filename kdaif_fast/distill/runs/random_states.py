"""The states of all random numbers that training draws from the global generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..._warn import warn_user

_PARTS = ("torch", "cuda", "numpy", "python")


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch (CPU, and CUDA if it is in use), numpy and Python.

    Returns:
        A tree for write_state: "torch" and each of "cuda" (a list, by device) a tensor of bytes; "numpy" and "python"
        as the two give them. About 15 kB. Nothing is drawn, and no device is waited for.

    Example:
        >>> import torch
        >>> before = random_state()
        >>> first = torch.rand(2)
        >>> set_random_state(before)
        >>> torch.equal(torch.rand(2), first)
        True
    """
    import numpy as np

    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if in_use else [],
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what random_state has given; a generator it had nothing of is left alone.

    Raises TypeError, ValueError for a tree that random_state has not given; then all generators are as before.
    Warns if it has states of CUDA devices that are not here.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}, expected what random_state gives")
    if set(state) != set(_PARTS):
        raise ValueError(f"state has the entries {sorted(map(str, state))}, expected {sorted(_PARTS)}")
    before = random_state()
    try:
        _set(state)
    except Exception as error:
        _set(before)
        raise ValueError(f"state is not one that random_state gives: {error}") from error
    here = torch.cuda.device_count()
    if len(state["cuda"]) > here:
        warn_user(
            f"there are random states of {len(state['cuda'])} CUDA devices to set, but {here} devices are here: "
            "what is drawn on the others' part will differ",
            UserWarning,
        )


def _set(state: Mapping[str, Any]) -> None:
    import numpy as np

    torch.set_rng_state(state["torch"])
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Within it the global generators may be drawn from; afterwards they are where they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
