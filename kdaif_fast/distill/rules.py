"""Weight rules: from the influence phi of samples to their weights in the training loss.

phi_i > 0 says that sample i harms the validation loss. By Theorem 1 of KD-AIF (arXiv 2501.02705) weights
w_i = 1 + eps_i lower that loss, to first order, if

    (1) a sample without influence keeps its weight, w(0) = 1, and
    (2) w decreases in phi,

since each eps_i phi_i, which sum up to the change, is then not above 0. (The paper's wording of (2) was not at hand;
this is what the algebra asks for, and what the theorem of UIDS, arXiv 1912.01321, says.) Every rule's docstring says
which of them hold. How steep a rule is says how far the validation data are trusted.

A rule is any function (stats, phi, epoch) -> weights; those here share the following. phi is [n]; the weights are [n],
on its device, of its dtype (float32 at least), without a graph, and never NaN for finite phi and a finite reference.
phi that is NaN gets the weight NaN. Ranges and quantiles are those of `stats.reference`, the last phi of all samples; a
NaN in it leaves no range, and every weight NaN. Nothing waits for a GPU.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from .._tree import wide_dtype
from ..influence.weights import require_gamma, require_scale, sigmoid_weights
from .rule_checks import checked_weights, require_usable
from .statistics import SampleStatistics

__all__ = [
    "RULES",
    "Drop",
    "ExpMinMax",
    "HalfSigmoid",
    "KeepProbability",
    "Linear",
    "OwnLoss",
    "SelectFraction",
    "Shuffled",
    "Sigmoid",
    "WeightRule",
    "checked_weights",
    "make_rule",
    "require_usable",
]


class WeightRule(Protocol):
    """What turns influence into weights: rule(stats, phi, epoch) -> [n].

    stats is a `SampleStatistics` of n samples, phi [n] their influence, epoch the number of epochs that are done.
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class _Scaled:
    """A rule of gamma * phi / scale."""

    gamma: float = 10.0
    scale: float | str = "range"

    def __post_init__(self) -> None:
        require_gamma(self.gamma)
        require_scale(self.scale)

    def _sigmoid(self, stats: SampleStatistics, phi: Tensor) -> Tensor:
        """Of the weights in (0, 2)."""
        return sigmoid_weights(phi, gamma=self.gamma, scale=stats.width(self.scale).to(phi))


class Sigmoid(_Scaled):
    """W = 2 / (1 + exp(gamma phi / scale)), in (0, 2): `sigmoid_weights`. w(0) = 1. Meets conditions 1 and 2.

    Args:
        gamma: steepness, >= 0; the slope at 0 is -gamma / (2 scale).
        scale: "range" (max - min of the reference and 0), "robust" (the same between its 1 % and 99 % quantiles), or a
            number > 0.

    Source: UIDS's sigmoid (arXiv 1912.01321), doubled so that w(0) = 1. KD-AIF (arXiv 2501.02705) has a sigmoid too;
        its constants were not at hand.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0])
        >>> Sigmoid(gamma=4.0)(SampleStatistics(torch.arange(3), None, phi), phi, 0)
        tensor([1.7616, 1.0000, 0.2384])
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], in (0, 2)."""
        return self._sigmoid(stats, _scores(stats, phi))


class HalfSigmoid(_Scaled):
    """W = 1/2 + 1 / (1 + exp(gamma phi / scale)), in (0.5, 1.5). w(0) = 1. Meets conditions 1 and 2.

    Half as far from 1 as `Sigmoid`: no sample is lost, and less is trusted to the validation data.

    Args:
        gamma: steepness, >= 0; the slope at 0 is -gamma / (4 scale).
        scale: as for `Sigmoid`.

    Source: UIDS's probability (arXiv 1912.01321), raised by 1/2 so that w(0) = 1.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0])
        >>> HalfSigmoid(gamma=4.0)(SampleStatistics(torch.arange(3), None, phi), phi, 0)
        tensor([1.3808, 1.0000, 0.6192])
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], in (0.5, 1.5)."""
        return 0.5 + self._sigmoid(stats, _scores(stats, phi)) / 2


class KeepProbability(_Scaled):
    """W is 1 with probability pi = 1 / (1 + exp(gamma phi / scale)), else 0, drawn at every call. w(0) is 0 or 1.

    The mean weight pi is in (0, 1), half that of `Sigmoid`. It decreases in phi: condition 2 holds, for the mean.
    Condition 1 does not, as pi(0) = 1/2; but that half is common to all samples, so that relative to each other they
    are weighted as by `Sigmoid`.

    Args:
        gamma: steepness, >= 0; 0 keeps half of the samples, whichever.
        scale: as for `Sigmoid`.

    Draws one number a sample from stats.generator, in their order: a seed keeps the same samples on every device.
    `Distiller` averages weights over measurements unless it is given ema=0; with that, weights stay 0 or 1.

    Source: UIDS (arXiv 1912.01321), its sigmoid sampling, with gamma 10. There samples are drawn class by class until a
        given share of them is kept; here each is drawn for itself.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0])
        >>> stats = SampleStatistics(torch.arange(3), None, phi, torch.Generator().manual_seed(0))
        >>> KeepProbability().probabilities(stats, phi)
        tensor([0.9933, 0.5000, 0.0067])
        >>> KeepProbability()(stats, phi, 0)
        tensor([1., 0., 0.])
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], each 0 or 1."""
        phi = _scores(stats, phi)
        kept = _drawn(len(phi), stats.generator, phi.device) < self.probabilities(stats, phi)
        return _unless_nan(phi, kept)

    def probabilities(self, stats: SampleStatistics, phi: Tensor) -> Tensor:
        """pi [n], in (0, 1)."""
        return self._sigmoid(stats, _scores(stats, phi)) / 2


@dataclass(frozen=True)
class Linear(_Scaled):
    """W = 1 - gamma phi / scale between 0 and 2, the nearer of them outside. w(0) = 1. Meets conditions 1 and 2.

    Args:
        gamma: steepness, >= 0; the slope at 0 is -gamma / scale, with the default that of `Sigmoid`'s default.
        scale: as for `Sigmoid`. gamma = 1 with "range" clips nothing.

    Source: UIDS (arXiv 1912.01321) keeps a sample with probability -gamma phi between 0 and 1; raised by 1 so that
        w(0) = 1, and up to 2 as `Sigmoid` is.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 0.2, 1.0])
        >>> Linear()(SampleStatistics(torch.arange(4), None, phi), phi, 0)
        tensor([2.0000, 1.0000, 0.5000, 0.0000])
    """

    gamma: float = 5.0

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], in [0, 2]."""
        phi = _scores(stats, phi)
        width, largest = stats.width(self.scale).to(phi), torch.finfo(phi.dtype).max
        steps = torch.where(width == 0, phi, phi / width).clamp(-largest, largest)  # as 0 * inf would be NaN
        return (1 - min(float(self.gamma), largest) * steps).clamp(0, 2)


@dataclass(frozen=True)
class Drop:
    """W = 1 where phi <= 0, else 0. w(0) = 1. Meets conditions 1 and 2, with a jump instead of a slope.

    UIDS's bound on the loss under other distributions grows with a rule's slope: of this one it says nothing.

    Source: UIDS (arXiv 1912.01321), dropout by influence.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0])
        >>> Drop()(SampleStatistics(torch.arange(3), None, phi), phi, 0)
        tensor([1., 1., 0.])
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], each 0 or 1."""
        phi = _scores(stats, phi)
        return _unless_nan(phi, phi <= 0)


@dataclass(frozen=True)
class ExpMinMax:
    """W = exp(1 - 2 (phi - min) / (max - min)), in [1/e, e], min and max those of the reference.

    Meets condition 2 only. Condition 1 fails: w(0) = exp((max + min) / (max - min)), 1 only where max = -min, and one
    outlier moves all weights. Scores beyond the reference's count as its lowest or highest; if all of those are the
    same there is nothing to tell apart, and every weight is 1.

    Source: the code published with KD-AIF (github.com/Sharonwu96/KD-AIF), which has exp(2 (I - min) / (max - min) - 1).
        That is right for scores I that are high for helpful samples. The scores that the code stores beside it are
        phi itself, so that it raises the weights of harmful samples; the sign is corrected here.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0])
        >>> ExpMinMax()(SampleStatistics(torch.arange(3), None, phi), phi, 0)
        tensor([2.7183, 1.0000, 0.3679])
    """

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], in [1/e, e]."""
        phi = _scores(stats, phi)
        low, high = (limit.to(phi) / 2 for limit in stats.limits)  # halves, as max - min could overflow
        share = ((phi / 2 - low) / (high - low)).clamp(0, 1)
        share = torch.where(high == low, torch.where(phi.isnan(), phi, 0.5), share)
        return torch.exp(1 - 2 * share)


@dataclass(frozen=True)
class SelectFraction:
    """W = 1 for the `share` of all samples with the lowest phi, else 0.

    Meets condition 2 only. Condition 1 fails: what is selected depends on the share, not on the sign of phi, and w(0)
    is 0 or 1.

    Of a reference of M scores round(share * M) are selected, ties by their place: that many weights are 1 when phi is
    the reference. Scores of a batch are selected if they are below the last of those (or equal, and not behind it).

    Args:
        share: in (0, 1]; the default is ours.

    Source: Label Revision + Data Selection (arXiv 2404.03693) selects by influence; its rule was not found, and this
        one is ours.

    Example:
        >>> import torch
        >>> phi = torch.tensor([-1.0, 0.0, 1.0, -2.0])
        >>> SelectFraction(0.5)(SampleStatistics(torch.arange(4), None, phi), phi, 0)
        tensor([1., 0., 0., 1.])
    """

    share: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, Real):
            raise TypeError(f"share is {self.share!r}, expected a number in (0, 1]")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share!r}, expected a number in (0, 1]")

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], each 0 or 1."""
        is_reference = phi is stats.reference
        phi = _scores(stats, phi)
        count = round(self.share * len(stats.reference))
        if count == 0:
            return _unless_nan(phi, torch.zeros_like(phi))
        last, position = (part[count - 1].to(phi.device) for part in stats.order)
        places = torch.arange(len(phi), device=phi.device) if is_reference else stats.indices.to(phi.device)
        # NaN comes last: if the last one selected is, so is every number.
        is_tied = (phi == last) & (places <= position)
        return _unless_nan(phi, (phi < last) | is_tied | last.isnan())


@dataclass(frozen=True)
class OwnLoss:
    """W = 2 / (1 + exp(gamma (l - mean) / range)), in (0, 2): a high loss of the sample's own, a low weight. A control.

    phi is not looked at, so that neither condition says anything. mean and range are those of the losses of the call,
    of all samples or of a batch. With it, an experiment tells what influence knows beyond the loss.

    Args:
        gamma: steepness, >= 0.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        require_gamma(self.gamma)

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], in (0, 2), of the losses' dtype."""
        losses = stats.losses.to(wide_dtype(stats.losses.dtype))
        return sigmoid_weights(losses - losses.mean(), gamma=self.gamma).to(phi.device)


@dataclass(frozen=True)
class Shuffled:
    """The weights of another rule, given to other samples: the same histogram, and no information. A control.

    Meets neither condition.

    Args:
        rule: whose weights.
        seed: of the order, which is then the same for all calls with as many samples: an average over several
            measurements has the histogram of the rule's own, too. None draws another order at every call, from
            stats.generator.
    """

    rule: WeightRule
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", make_rule(self.rule))

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int = 0) -> Tensor:
        """[n], the rule's in another order."""
        weights = checked_weights(self.rule(stats, phi, epoch), phi)
        generator = stats.generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(weights), generator=generator)
        return weights[_moved(order, weights.device)]


RULES: dict[str, type[Any]] = {
    "sigmoid": Sigmoid,
    "half_sigmoid": HalfSigmoid,
    "keep_probability": KeepProbability,
    "linear": Linear,
    "drop": Drop,
    "exp_min_max": ExpMinMax,
    "select": SelectFraction,
}


def make_rule(rule: str | WeightRule, **settings: Any) -> WeightRule:
    """The rule of that name with these settings, or the function as it is.

    Args:
        rule: a name in RULES, or a function (stats, phi, epoch) -> weights.
        settings: of a named rule.

    Raises:
        ValueError: a name that is not known, or settings out of their range.
        TypeError: something that is no rule; settings that the rule does not have, lacks, or that are given with a
            function.

    Example:
        >>> make_rule("linear", gamma=2.0)
        Linear(gamma=2.0, scale='range')
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}, expected one of {', '.join(map(repr, RULES))}, or a function")
        known = {field.name: field.default is MISSING for field in fields(RULES[rule])}
        has = f"rule {rule!r} has the settings {', '.join(known)}" if known else f"rule {rule!r} has no settings"
        for name in settings:
            if name not in known:
                raise TypeError(f"{name} is given, but {has}")
        for name, is_needed in known.items():
            if is_needed and name not in settings:
                raise TypeError(f"rule {rule!r} needs {name}")
        made: WeightRule = RULES[rule](**settings)
        return made
    if isinstance(rule, type):
        raise TypeError(f"rule is the class {rule.__name__}, expected one of its objects: {rule.__name__}(...)")
    if not callable(rule):
        raise TypeError(f"rule is {rule!r}, expected a name or a function (stats, phi, epoch) -> weights")
    if settings:
        raise TypeError(f"{', '.join(settings)} given with a rule that is a function: expected only with a name")
    return rule


def _scores(stats: SampleStatistics, phi: Tensor) -> Tensor:
    """Phi in float32 at least, without a graph."""
    if not isinstance(phi, Tensor) or not phi.is_floating_point():
        form = phi.dtype if isinstance(phi, Tensor) else type(phi).__name__
        raise TypeError(f"phi is {form}, expected a floating-point tensor of influence scores")
    if phi.shape != stats.indices.shape:
        raise ValueError(f"phi has shape {tuple(phi.shape)}, expected ({len(stats)},), as many as there are indices")
    with torch.inference_mode(False):
        phi = phi.clone() if phi.is_inference() else phi.detach()
        return phi.to(wide_dtype(phi.dtype))


def _unless_nan(phi: Tensor, is_kept: Tensor) -> Tensor:
    """1 where a sample is kept, else 0; NaN where phi is."""
    return torch.where(phi.isnan(), phi, is_kept.to(phi.dtype))


def _drawn(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return _moved(torch.rand(count, generator=generator), device)


def _moved(drawn: Tensor, device: torch.device) -> Tensor:
    """From the CPU; from pinned memory to a GPU, as nobody waits for it then."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
