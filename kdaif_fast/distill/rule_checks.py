"""What a weight rule returned: whether it can be used as weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .._tree import wide_dtype

SAMPLES_IN_MESSAGE = 5


def checked_weights(weights: Any, phi: Tensor) -> Tensor:
    """What a rule returned for phi, as weights: float32 at least, on its device, without a graph.

    The values are not looked at, so that nothing waits for a GPU; `require_usable` does that.

    Raises:
        TypeError, ValueError: it is no floating-point tensor of one weight a sample.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"the weight rule returned a {type(weights).__name__}, expected a tensor of {len(phi)} weights")
    if not weights.is_floating_point():
        raise TypeError(f"the weight rule returned {weights.dtype}, expected real floating-point weights (.float())")
    if weights.shape != phi.shape:
        raise ValueError(
            f"the weight rule returned the shape {tuple(weights.shape)}, expected {tuple(phi.shape)}, one a sample"
        )
    with torch.inference_mode(False):
        weights = weights.clone() if weights.is_inference() else weights.detach()
        return weights.to(device=phi.device, dtype=wide_dtype(weights.dtype))


def require_usable(weights: Tensor, indices: Tensor) -> None:
    """Raise ValueError if a weight is negative, infinite or NaN, with the first of these samples. Looks at the values.

    A negative weight would have the network unlearn a sample, without a bound. Waits for a GPU: once a measurement is
    no matter, once a batch is.

    Args:
        weights: [n].
        indices: [n], the samples' places in the training data.
    """
    bad = (~((weights >= 0) & weights.isfinite())).nonzero()[:, 0]
    if len(bad):
        first = bad[:SAMPLES_IN_MESSAGE]
        places = indices.to(first.device)[first].tolist()
        named = ", ".join(f"{place}: {w:g}" for place, w in zip(places, weights[first].tolist(), strict=True))
        more = ", ..." if len(bad) > len(first) else ""
        raise ValueError(
            f"{len(bad)} of {len(weights)} weights are negative or not finite (sample: weight) {{{named}{more}}}; "
            "expected finite numbers >= 0"
        )


def require_rule(rule: Any) -> None:
    """TypeError, that says what a rule is, for something that cannot be called with (stats, phi, epoch)."""
    form = "a name or a function (stats, phi, epoch) -> weights"
    if not callable(rule):
        raise TypeError(f"rule is a {type(rule).__name__}, expected {form}")
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None, None, 0)
    except TypeError as error:
        raise TypeError(f"rule is {rule!r}, which takes {signature}, expected {form}") from error
