"""Distillation losses by the names they were published under: settings of row_divergence.

They share their arguments. Student and teacher logits are [..., V] in float32, float64, bfloat16 or float16, labels
int64 [...]; `weight` [...] multiplies each row's loss; rows whose label is `ignore_index` count for nothing;
`reduction` is "none", "sum" or "mean" (over the rows that count). Losses are in nats, float32 (float64 for float64).
What they raise, the memory they take and what can be differentiated is said at row_divergence; `options` are its other
arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from .row_arguments import plain_call
from .row_call import PerRow
from .row_divergence import row_divergence


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: PerRow = 1.0,
    alpha: float = 0.5,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """Weighted distillation loss, alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), in nats.

    Args:
        student_logits: [..., V]; -inf masks a class.
        teacher_logits: the same shape. Not read if alpha is 1.
        labels: int64 [...], 0 <= label < V.
        weight: [...], factor of each row's loss; may be negative, and is differentiable. Default 1.
        temperature: T > 0, divides both sets of logits in the KL part; T^2 brings its gradient back to scale.
        alpha: weight of the cross-entropy part, in [0, 1].
        reduction: "none", "sum", or "mean" over the rows that are not ignored (not divided by the sum of weights).
        options: further arguments of row_divergence.

    Returns:
        [...] for "none", else a scalar.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2; per-row weights as in KD-AIF (arXiv 2501.02705).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import kd_loss
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, -1.0, 0.0], [0.0, 2.0, 0.0]])
        >>> loss = kd_loss(student, teacher, torch.tensor([0, 1]), weight=torch.tensor([1.0, 0.5]), temperature=2.0)
        >>> print(loss.detach())
        tensor([0.2017, 0.2230])
        >>> loss.sum().backward()
    """
    _check.is_share("kd_loss", "alpha", alpha)
    for name in ("ce_weight", "kd_weight"):
        if name in options:
            raise TypeError(f"kd_loss: {name} is given, but alpha says what it is; row_divergence takes both weights")
    if not options:
        call = plain_call(student_logits, teacher_logits, labels, weight, temperature, alpha)
        if call is not None:
            return call.losses() if reduction == "none" else call.reduced(reduction, "rows")
    return row_divergence(
        student_logits,
        teacher_logits,
        labels,
        weight=weight,
        temperature=temperature,
        ce_weight=float(alpha),
        kd_weight=1.0 - alpha,
        reduction=reduction,
        **options,
    )


def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """T^2 KL(q || p), q the student's distribution: seeks the teacher's modes; plus ce_weight * cross-entropy.

    Source: MiniLLM (arXiv 2306.08543), on given data.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import reverse_kl_loss
        >>> reverse_kl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.1201])
    """
    return row_divergence(
        student_logits, teacher_logits, labels, divergence="reverse_kl", ce_weight=ce_weight, **options
    )


def js_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    skew: float = 0.5,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """T^2 times the Jensen-Shannon divergence, skew KL(p || m) + (1 - skew) KL(q || m), m = skew p + (1 - skew) q.

    Source: generalised knowledge distillation (arXiv 2306.13649).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import js_loss
        >>> js_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.0285])
    """
    return row_divergence(
        student_logits, teacher_logits, labels, divergence="jensen_shannon", skew=skew, ce_weight=ce_weight, **options
    )


def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    skew: float = 0.1,
    reverse: bool = False,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """T^2 KL(p || skew p + (1 - skew) q), or with `reverse` T^2 KL(q || skew q + (1 - skew) p).

    Source: DistiLLM (arXiv 2402.03898).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import skew_kl_loss
        >>> skew_kl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.0906])
    """
    divergence = "skew_reverse_kl" if reverse else "skew_kl"
    return row_divergence(
        student_logits, teacher_logits, labels, divergence=divergence, skew=skew, ce_weight=ce_weight, **options
    )


def total_variation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """T^2 times the total variation distance, sum |q - p| / 2.

    Source: f-distill (arXiv 2307.15190).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import total_variation_loss
        >>> total_variation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.2311])
    """
    return row_divergence(
        student_logits, teacher_logits, labels, divergence="total_variation", ce_weight=ce_weight, **options
    )


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: PerRow = 1.0,
    gamma: float = 1.5,
    ce_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    """Normalised distillation: ce_weight CE - p_y log q_y (at T = 1) + gamma T^2 CE(p', q').

    Here p' and q' are the distributions over the other classes, at T. Reads the teacher's logits once more, for p_y.

    Source: "From Knowledge Distillation to Self-Knowledge Distillation" (arXiv 2303.13005).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import nkd_loss
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5)
        tensor([2.0456])
    """
    for name in ("teacher_form", "teacher_indices", "classes", "standardize", "soft_labels", "second_teacher"):
        if name in options:
            raise ValueError(f"nkd_loss: {name} is given, expected plain teacher logits over all classes, and labels")
    ignored = {"ignore_index": options["ignore_index"]} if "ignore_index" in options else {}
    teacher_label = torch.exp(-row_divergence(teacher_logits, None, labels, **ignored))
    return row_divergence(
        student_logits,
        teacher_logits,
        labels,
        divergence="cross_entropy",
        exclude_label=True,
        temperature=temperature,
        ce_weight=ce_weight + teacher_label,
        kd_weight=gamma,
        **options,
    )


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: PerRow = 4.0,
    alpha: PerRow = 1.0,
    beta: PerRow = 8.0,
    ce_weight: PerRow = 1.0,
    **options: Any,
) -> Tensor:
    """Decoupled distillation: ce_weight CE + T^2 (alpha KL(b_p || b_q) + beta KL(p' || q')).

    Here b = (label, not label), and p', q' are the distributions over the other classes.

    Source: "Decoupled Knowledge Distillation" (arXiv 2203.08679).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import dkd_loss
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]))
        tensor([0.9911])
    """
    return row_divergence(
        student_logits,
        teacher_logits,
        labels,
        divergence="decoupled",
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=alpha,
        other_weight=beta,
        **options,
    )


def taid_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, share: PerRow, **options: Any
) -> Tensor:
    """Cross-entropy of softmax((1 - share) s' + share t) with the student's softmax(s); s' is s, as a constant.

    `share` grows from a start value to 1 in training. Without labels, and without the CE term of `row_divergence`
    unless ce_weight is given.

    Source: TAID (arXiv 2501.16937).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import taid_loss
        >>> taid_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), share=0.4)
        tensor([0.6931])
    """
    options = {"ce_weight": 0.0, **options}
    return row_divergence(
        student_logits, teacher_logits, labels, divergence="cross_entropy", interpolation=share, **options
    )


def logit_mse_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """Mean over classes of (s - t)^2.

    Source: Ba and Caruana 2014 (arXiv 1312.6184).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import logit_mse_loss
        >>> logit_mse_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.5000])
    """
    return row_divergence(
        student_logits, teacher_logits, labels, divergence="logit_mse", ce_weight=ce_weight, **options
    )


def log_cosh_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: PerRow = 2.0,
    ce_weight: PerRow = 0.0,
    **options: Any,
) -> Tensor:
    """T^2 sum log cosh((s - t) / (2 T)): what the binary divergence of dual-head distillation comes to.

    Source: DHKD (arXiv 2411.08937), the loss of the auxiliary head.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import log_cosh_loss
        >>> log_cosh_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.1237])
    """
    return row_divergence(
        student_logits,
        teacher_logits,
        labels,
        divergence="log_cosh",
        temperature=temperature,
        ce_weight=ce_weight,
        **options,
    )
