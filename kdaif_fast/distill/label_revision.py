"""Label Revision + Data Selection: the teacher corrected by the labels, and only on the samples that it helps with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..ops import row_divergence, row_stats
from .rules import SelectFraction

ROUNDING = 1e-5  # how far a mean of shares in float32 may be outside [0, 1]


@dataclass(frozen=True)
class LabelRevisionLoss:
    """Cross-entropy plus KL from the teacher's revised probabilities, sample by sample, in nats.

        l_i = ce_weight * CE(y, softmax(s)) + kd_weight * T^2 KL(r || q),      q = softmax(s / T)
        r = beta p + (1 - beta) e_y,  beta = eta / (p_max - p_y + 1),          p = softmax(t / T)

    s are the student's logits, t the teacher's, e_y is the label as a distribution. In the revised target r the label
    has more than any other class, by 1 - eta at least; where the teacher is right beta is eta, and the more wrong it
    is, the less of it is left. r is a constant: no gradient reaches the teacher.

    The revision is at the temperature of the KL. Whether the paper's is could not be read; at this one r is what the
    student is compared with, so that it is r that has the label on top.

    Args:
        eta: how much of the teacher is left where it is right, from 0 (labels only) to below 1.
        temperature: T > 0.
        ce_weight: lambda_1 of the paper, >= 0.
        kd_weight: lambda_2, >= 0. Their values, and those of eta and T, were not found: the defaults are ours.

    Raises:
        TypeError, ValueError: a setting that is no number or out of its range. When called: what row_divergence and
            row_stats raise, for labels out of range say.

    Memory: that of kd_loss (one fused kernel); r is not stored.

    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693. There,
        too, beta is below 1 / (p_max - p_y + 1), which is just what keeps the label on top.

    Example:
        >>> import torch
        >>> loss = LabelRevisionLoss(eta=0.8, temperature=2.0)
        >>> outputs, targets = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> teacher_logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]])  # right, wrong
        >>> loss.teacher_share(targets, teacher_logits)
        tensor([0.8000, 0.4541])
        >>> loss.revised(targets, teacher_logits)
        tensor([[0.9046, 0.0954],
                [0.4000, 0.6000]])
        >>> loss(outputs, targets, teacher_logits)
        tensor([2.2066, 0.7737])
        >>> loss.weighted(outputs, targets, teacher_logits, torch.tensor([1.0, 0.0]))
        tensor([2.2066, 0.6931])
    """

    eta: float = 0.8
    temperature: float = 4.0
    ce_weight: float = 1.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, expected, is_right in (
            ("eta", "a number >= 0 and < 1", 0 <= _number("eta", self.eta) < 1),
            ("temperature", "a finite number > 0", 0 < _number("temperature", self.temperature) < math.inf),
            ("ce_weight", "a finite number >= 0", 0 <= _number("ce_weight", self.ce_weight) < math.inf),
            ("kd_weight", "a finite number >= 0", 0 <= _number("kd_weight", self.kd_weight) < math.inf),
        ):
            if not is_right:
                raise ValueError(f"LabelRevisionLoss: {name} is {getattr(self, name)!r}, expected {expected}")

    def __call__(self, outputs: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """[N], for outputs [N, V], int64 targets [N] and teacher logits [N, V]; cross-entropy where there are none."""
        if teacher_logits is None:
            return row_divergence(outputs, None, targets)
        return self._losses(outputs, targets, teacher_logits, float(self.ce_weight), float(self.kd_weight))

    def weighted(self, outputs: Tensor, targets: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
        """The losses [N] of samples that are distilled by the share w [N], and learn from their labels for the rest.

            (w ce_weight + 1 - w) CE(y, softmax(s)) + w kd_weight T^2 KL(r || q)

        A weight of 1 is the loss itself; 0 is plain cross-entropy, and the teacher's logits are not looked at.

        Args:
            outputs, targets, teacher_logits: as for the loss.
            weights: [N] from 0 to 1: those of a selection, or of a mean of several.

        Raises:
            ValueError: weights of another shape; below 0 or above 1 (on the CPU; a GPU gives NaN for those rows).
        """
        if not isinstance(weights, Tensor) or weights.shape != outputs.shape[:-1] or not weights.is_floating_point():
            form = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(
                f"LabelRevisionLoss: weights is {form}, expected floating-point {tuple(outputs.shape[:-1])}"
            )
        is_outside = (weights < -ROUNDING) | (weights > 1 + ROUNDING)
        if weights.device.type == "cpu" and not torch.compiler.is_compiling():
            _require_shares(weights, is_outside)
        share = weights.to(torch.promote_types(outputs.dtype, torch.float32)).clamp(0, 1)
        share = share.masked_fill(is_outside, math.nan)
        ce_weight = 1.0 if self.ce_weight == 1 else share * self.ce_weight + (1 - share)
        return self._losses(outputs, targets, teacher_logits, ce_weight, share * self.kd_weight)

    def _losses(
        self, outputs: Tensor, targets: Tensor, teacher_logits: Tensor, ce_weight: Any, kd_weight: Any
    ) -> Tensor:
        if isinstance(teacher_logits, Tensor) and teacher_logits.shape != outputs.shape:
            raise ValueError(
                f"LabelRevisionLoss: teacher_logits has shape {tuple(teacher_logits.shape)}, expected "
                f"{tuple(outputs.shape)} as the student's outputs: the same samples and classes"
            )
        beta = self.teacher_share(targets, teacher_logits)
        return row_divergence(
            outputs,
            teacher_logits.detach(),
            targets,
            temperature=self.temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            label_mix=1 - beta,
        )

    def teacher_share(self, targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """Beta [N], what is left of the teacher in the revised target; NaN where a sample is ignored (label -100)."""
        stats = row_stats(teacher_logits, None, targets, temperature=self.temperature)
        if stats.student_max is None or stats.student_label is None:
            raise TypeError("LabelRevisionLoss: targets is None, expected the samples' labels")
        return self.eta / (stats.student_max - stats.student_label + 1)

    def revised(self, targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """The revised target r [N, V], to look at: the loss does without. float32 at least."""
        beta = self.teacher_share(targets, teacher_logits)[..., None]
        teacher = (teacher_logits.detach().to(beta.dtype) / self.temperature).softmax(-1)
        return beta * teacher + (1 - beta) * _one_hot(targets, teacher.shape[-1])


def label_revision(
    share: float = 0.8,
    eta: float = 0.8,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    **others: Any,
) -> dict[str, Any]:
    """Label Revision + Data Selection (selection rule ours), as keyword arguments of `Distiller`.

    The `share` of the training samples with the lowest phi is distilled, with revised targets; the others learn from
    their labels alone. phi is the influence of a sample's whole distillation loss. It is measured once an epoch, and
    the selection is that of the last measurement (ema 0), so that a sample is either distilled or not.

    The paper selects by influence. Its score, its threshold and the values of all five settings were not found: the
    rule and the defaults here are ours, and results are those of this rule.

    Args:
        share: of the samples, to be distilled, in (0, 1].
        eta, temperature, ce_weight, kd_weight: of `LabelRevisionLoss`.
        others: further arguments of Distiller, which come before those that are chosen here (mechanism, refresh, ema).

    Raises:
        TypeError, ValueError: what the rule and the loss raise; a rule or a loss among the others; normalize, which
            would bring shares above 1.

    Source: arXiv 2404.03693.

    Example:
        >>> settings = label_revision(share=0.6, warmup_epochs=1)
        >>> settings["rule"], settings["mechanism"], settings["warmup_epochs"]
        (SelectFraction(share=0.6), 'M1', 1)
    """
    for name, instead in (("rule", "share"), ("loss", "eta, temperature, ce_weight and kd_weight")):
        if name in others:
            raise TypeError(f"label_revision: {name} is given, expected {instead}, which say what it is")
    if others.get("normalize"):
        raise ValueError("label_revision: normalize is True, expected False: weights are shares of the distillation")
    return {
        "rule": SelectFraction(share),
        "loss": LabelRevisionLoss(eta, temperature, ce_weight, kd_weight),
        "mechanism": "M1",
        "refresh": "epoch",
        "ema": 0.0,
        **others,
    }


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """Unlike torch's, which looks at the values."""
    return targets[..., None] == torch.arange(classes, device=targets.device)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"LabelRevisionLoss: {name} is {value!r}, expected a number")
    return float(value)


def _require_shares(weights: Tensor, is_outside: Tensor) -> None:
    bad = is_outside.nonzero()
    if len(bad):
        index = bad[0].tolist()
        raise ValueError(
            f"LabelRevisionLoss: weights{index} is {weights[tuple(index)].item()}, expected a share from 0 to 1 "
            "(rule 'select', without normalize)"
        )
