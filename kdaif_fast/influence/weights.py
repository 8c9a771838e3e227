"""From influence to sample weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .scores import influence_scores

ROBUST_QUANTILES = (0.01, 0.99)


def sigmoid_weights(phi: Tensor, *, gamma: float = 10.0, scale: float | str | Tensor = "range") -> Tensor:
    """W = 2 / (1 + exp(gamma * phi / scale)): in (0, 2), 1 at phi = 0, below 1 exactly where phi > 0 (harmful).

    Meets both conditions of KD-AIF's Theorem 1: the perturbation w - 1 vanishes with phi, and decreases in phi.

    Args:
        phi: influence scores [N], positive = harmful.
        gamma: steepness; a larger one trusts the scores more. 0 gives weights 1.
        scale: "range" is max - min of phi and 0 (harmful and helpful samples there are always, near a minimum);
            "robust" is the same between the 1 % and 99 % quantiles, so that one outlier does not flatten all others;
            or a number > 0. Or the `score_width` of other scores (of all samples, where phi is that of a batch), a
            tensor of no dimensions, which is not looked at.

    Returns:
        [N], same dtype. All 1 if every phi is 0; NaN for NaN. Their mean is not 1 in general: divide by it where the
        size of a step must not change.

    Raises:
        TypeError, ValueError: phi that is no floating-point vector, a negative gamma, a scale that is not positive.

    Source: KD-AIF (arXiv 2501.02705), Theorem 1; the rule is that of UIDS (arXiv 1912.01321), doubled so that w(0) = 1.

    Example:
        >>> import torch
        >>> sigmoid_weights(torch.tensor([-0.5, 0.0, 0.5]), gamma=2.0)
        tensor([1.4621, 1.0000, 0.5379])
    """
    _require_scores(phi)
    require_gamma(gamma)
    with torch.inference_mode(False):
        phi = phi.clone() if phi.is_inference() else phi
        width = score_width(phi, scale) if isinstance(scale, (str, Real)) else _given_width(scale, phi)
        return _sigmoid_weights(phi, float(gamma), width)


def score_width(scores: Tensor, scale: float | str = "range") -> Tensor:
    """What scores are measured against before they become weights: a tensor of no dimensions, never below 0.

    0 says that there is nothing to measure against, and weights are those of the scores as they are.

    Args:
        scores: [M], of all samples that are to have a common scale.
        scale: "range", "robust", as for `sigmoid_weights`; a number is given back, within what the dtype holds.

    Returns:
        A tensor of no dimensions, of the dtype and on the device of the scores. Nobody waits for a GPU.

    Raises:
        TypeError, ValueError: scores that are no floating-point vector, a scale that is not known or not positive.

    Example:
        >>> import torch
        >>> score_width(torch.tensor([1.0, 3.0]))  # harmful, both of them: from 0 to 3
        tensor(3.)
    """
    _require_scores(scores, "scores")
    require_scale(scale)
    limits = torch.finfo(scores.dtype)
    if not isinstance(scale, str):
        return scores.new_full((), min(max(float(scale), limits.tiny), limits.max))
    if len(scores) == 0:
        return scores.new_zeros(())
    low, high = scores.aminmax() if scale == "range" else _quantiles(scores)
    return (high.clamp(min=0) - low.clamp(max=0)).clamp(max=limits.max)


def require_gamma(gamma: Any) -> None:
    """Raise unless it is a steepness: a finite number, not below 0."""
    if isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"gamma is {gamma!r}, expected a number >= 0")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma!r}, expected a finite number >= 0")


def require_scale(scale: Any) -> None:
    """Raise unless it says what scores are measured against."""
    if isinstance(scale, str):
        known = scale in ("range", "robust")
    else:
        known = isinstance(scale, Real) and not isinstance(scale, bool) and 0 < float(scale) < math.inf
    if not known:
        raise ValueError(f"scale is {scale!r}, expected 'range', 'robust' or a positive number")


def _require_scores(scores: Any, name: str = "phi") -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"{name} is {type(scores).__name__}, expected a floating-point tensor of influence scores")
    if scores.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}, expected [N]")


def _given_width(scale: Any, phi: Tensor) -> Tensor:
    if not isinstance(scale, Tensor) or scale.dim() != 0 or not scale.is_floating_point():
        form = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(
            f"scale is {form}, expected 'range', 'robust', a positive number, or a tensor of no dimensions"
        )
    return scale.to(phi)


def _sigmoid_weights(phi: Tensor, gamma: float, width: Tensor) -> Tensor:
    largest = torch.finfo(phi.dtype).max
    # Clamped, as 0 * inf would be NaN. 2 / (1 + exp(z)) without overflow.
    steps = torch.where(width == 0, phi, phi / width).clamp(-largest, largest)
    return 2 * torch.sigmoid(-min(gamma, largest) * steps)


def _quantiles(phi: Tensor) -> Sequence[Tensor]:
    # torch.quantile stops at 16 million values and wants float32.
    ordered = phi.sort().values
    return [ordered[round(share * (len(phi) - 1))] for share in ROBUST_QUANTILES]


def influence_weights(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    gamma: float = 10.0,
    scale: float | str = "range",
    **options: Any,
) -> Tensor:
    """Weight w [N] of every sample of `batch` by its influence on the mean loss of `val`; w < 1 means harmful.

    `influence_scores`, then `sigmoid_weights`: w = 2 / (1 + exp(gamma * phi / scale)), in (0, 2).

    Args:
        model, batch, val: as for `influence_scores`; batch and val are batches or loaders.
        gamma: steepness of the weights.
        scale: what phi is measured against: "range" (max - min), "robust" (1 % to 99 % quantile), or a number.
        **options: loss, params, curvature, solver, damping, tol, max_iter and the others of `influence_scores`; queries
            stays "mean".

    Returns:
        [N], detached, on the model's device.

    Raises, warns, memory, source: as `influence_scores` and `sigmoid_weights`.

    Example:
        >>> import torch, kdaif_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> val = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> w = kdaif_fast.influence_weights(model, batch, val, damping=0.1)
        >>> bool((w > 0).all() and (w < 2).all())
        True
    """
    if "return_solution" in options:
        raise TypeError("influence_weights returns weights only; for the solve's report call influence_scores")
    if options.get("queries", "mean") != "mean":
        raise ValueError(
            f"queries is {options['queries']!r}, but a sample has one weight: expected 'mean', or sigmoid_weights of a "
            "column of influence_scores"
        )
    return sigmoid_weights(influence_scores(model, batch, val, **options), gamma=gamma, scale=scale)
