"""The distillation loss of each row, in the generality that published systems ask for: one fused kernel.

The named losses in losses.py are settings of `row_divergence`.
"""

from __future__ import annotations

from torch import Tensor

from .row_arguments import read_arguments
from .row_call import PerRow


def row_divergence(
    student_logits: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: str = "kl",
    weight: Tensor | None = None,
    temperature: PerRow = 1.0,
    ce_weight: PerRow | None = None,
    kd_weight: PerRow = 1.0,
    other_weight: PerRow = 0.0,
    scale_by_temperature: bool = True,
    skew: float = 0.5,
    teacher_form: str = "logits",
    teacher_indices: Tensor | None = None,
    second_teacher: Tensor | None = None,
    gate: PerRow = 0.0,
    interpolation: PerRow = 1.0,
    label_mix: PerRow = 0.0,
    soft_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    classes: slice | tuple[int, int] | None = None,
    class_mask: Tensor | None = None,
    exclude_label: bool = False,
    ignore_index: int = -100,
    standardize: bool = False,
    reduction: str = "none",
    normalizer: str | float = "rows",
    check_finite: bool = False,
) -> Tensor:
    """Cross-entropy with labels plus a divergence from a teacher, row by row, in nats: one fused kernel.

        loss = weight * (ce_weight * CE(y, softmax(s)) + tau^2 (kd_weight * D(p, q) + other_weight * R(p, q)))

    with q = softmax(s / tau), p the teacher's target, and D the divergence:

    - "kl": forward KL(p || q); R is the reverse KL(q || p). "reverse_kl": D is the reverse KL alone.
    - "cross_entropy": -sum p log q, which is forward KL without the entropy of p; the mass of p need not be 1.
    - "jensen_shannon": skew KL(p || m) + (1 - skew) KL(q || m), m = skew p + (1 - skew) q.
    - "skew_kl": KL(p || skew p + (1 - skew) q). "skew_reverse_kl": KL(q || skew q + (1 - skew) p).
    - "total_variation": sum |q - p| / 2. "probability_mse": the mean over classes of (q - p)^2.
    - "logit_mse": the mean over classes of (s - t)^2, without tau. "log_cosh": sum log cosh((s - t) / (2 tau)).
    - "decoupled": D compares (p_y, 1 - p_y) with (q_y, 1 - q_y), R what is left without the label, by forward KL.

    All derivatives are exact and usable everywhere: autograd to any order, torch.func (grad, vjp, jvp, vmap, jacrev,
    jacfwd, hessian) and torch.compile(fullgraph=True). Those in the student's logits are kernels up to second order,
    so is the gradient in plain teacher logits; others go through the reference formula (kdaif_fast.reference).

    Args:
        student_logits: [..., V], float32, float64, bfloat16 or float16; V classes. -inf masks a class.
        teacher: logits [..., V] of a floating dtype (the wider of the two is used), or what `teacher_form` says. With
            `classes`, as wide as those or as V. None: cross-entropy only. Differentiable.
        labels: int64 [...], 0 <= label < V, or ignore_index. May be None if nothing needs them.
        divergence: see above.
        weight: [...], factor of the row's loss; may be negative; differentiable. Default 1.
        temperature, ce_weight, kd_weight, other_weight: numbers, or tensors (one value per row [...], or a single one);
            differentiable. A part with weight 0 is not looked at. Default of ce_weight: 1 if there are labels or soft
            labels, else 0.
        scale_by_temperature: multiply D and R by tau^2 (not "logit_mse", which has no tau).
        skew: share of p (for "skew_reverse_kl": of q) in m, in [0, 1].
        teacher_form: "logits", or "probabilities" (used as they are; their mass need not be 1).
        teacher_indices: int64 [..., k], different within a row: `teacher` [..., k] holds the probabilities of these
            classes (counted from the first of `classes`), and what is missing to 1 is spread evenly over the others.
        second_teacher: like `teacher`; `gate` (number or [...]) is its share in the target.
        interpolation: share of the teacher's logits in the target's; the rest are the student's own, as constants.
        label_mix: share of the label (or soft label) in the target.
        soft_labels: [..., V], targets of the cross-entropy instead of labels; any mass.
        label_smoothing: share of the uniform distribution in the cross-entropy's target, in [0, 1].
        class_weight: [V], factor of each class's term, in the cross-entropy and in the divergence.
        classes: the divergence is over these consecutive classes only (the cross-entropy is over all).
        class_mask: bool [C] or [..., C], False for classes that take no part in the divergence.
        exclude_label: the divergence compares the distributions conditional on not being the label.
        ignore_index: rows with this label have loss 0 and no gradient, and do not count in a mean.
        standardize: divide each row of logits by its standard deviation first, for the cross-entropy as well (plain
            torch, some more passes; -inf is left out, rows of equal logits stay as they are).
        reduction: "none", "sum" or "mean".
        normalizer: what a mean divides by: "rows" (not ignored), "weights" (their sum), "elements" (rows times V), or
            a number. Without rows, the mean is 0.
        check_finite: look for NaN and +inf first (reads the logits once more; waits for a GPU).

    Returns:
        [...] for "none", else a scalar; float32, or float64 for float64 logits. NaN logits give NaN in their row.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, labels or indices out of range (on the CPU; CUDA C++ kernels
            stop with a device-side message, others give NaN in that row), temperatures that are not positive,
            unknown names. Each names the argument and its value.

    Memory: the gradient [..., V], formed in the forward pass; a second one in the backward pass if the gradient that
        comes from above is not 1. Rows are read in place if their classes are contiguous, else copied.

    Source: docs/method.md, section 5. Forward KL with tau^2: Hinton et al. 2015 (arXiv 1503.02531).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import row_divergence
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, -1.0, 0.0], [0.0, 2.0, 0.0]])
        >>> labels = torch.tensor([0, 1])
        >>> loss = row_divergence(student, teacher, labels, divergence="jensen_shannon", temperature=2.0)
        >>> print(loss.detach())
        tensor([0.2341, 0.7335])
        >>> loss.sum().backward()
    """
    call, shape = read_arguments(
        student_logits,
        teacher,
        labels,
        divergence=divergence,
        weight=weight,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        other_weight=other_weight,
        scale_by_temperature=scale_by_temperature,
        skew=skew,
        teacher_form=teacher_form,
        teacher_indices=teacher_indices,
        second_teacher=second_teacher,
        gate=gate,
        interpolation=interpolation,
        label_mix=label_mix,
        soft_labels=soft_labels,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        classes=classes,
        class_mask=class_mask,
        exclude_label=exclude_label,
        ignore_index=ignore_index,
        standardize=standardize,
        check_finite=check_finite,
    )
    if reduction == "none":
        losses = call.losses()
        return losses if len(shape) == 1 else losses.reshape(shape)
    return call.reduced(reduction, normalizer)
