"""row_stats by definition: what each statistic of one row's two predictions is.

N rows, V classes. With a temperature T, q = softmax(student / T) and p = softmax(teacher / T); all statistics are of
these two. Low-precision logits are widened to float32; statistics are float32 (float64 for float64 logits).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The order of the packed result: these of the student, then the same of the teacher, then the two divergences.
SIDE = ("max", "label", "margin", "entropy", "ce", "mass")
DIVERGENCES = ("forward_kl", "reverse_kl")


def packed_size(has_teacher: bool) -> int:
    """How many statistics a row has."""
    return 2 * len(SIDE) + len(DIVERGENCES) if has_teacher else len(SIDE)


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the statistics of logits of this dtype, in which sums are formed too."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_stats(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    first_class: int,
    class_count: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Statistics [6 or 14, N], in the order above, and arg-maxima int64 [1 or 2, N].

    What has no meaning is NaN: what needs a label where there is none, it is ignore_index, or outside [0, V) (a margin
    takes the arg-max where there are no labels at all); the mass of no classes (class_count 0); all floats of a row
    whose logits have no softmax (NaN, +inf, or -inf everywhere).
    """
    classes = slice(first_class, first_class + class_count)
    student, log_q, argmax = _side(student_logits, labels, temperature, classes, ignore_index)
    if teacher_logits is None:
        return torch.stack(student), argmax[None]
    teacher, log_p, teacher_argmax = _side(teacher_logits, labels, temperature, classes, ignore_index)
    divergences = [_divergence(log_p, log_q), _divergence(log_q, log_p)]
    return torch.stack(student + teacher + divergences), torch.stack([argmax, teacher_argmax])


def _side(
    logits: Tensor, labels: Tensor | None, temperature: float, classes: slice, ignore_index: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One network's statistics, its log-probabilities [N, V] and its arg-max [N]."""
    wide = logits.to(statistics_dtype(logits))
    # The maximum is taken off before dividing: the largest exponent is 0 exactly, and a small T cannot overflow it.
    shifted = (wide - wide.amax(-1, keepdim=True)) / temperature
    log_prob = shifted.log_softmax(-1)
    prob = log_prob.exp()
    argmax = lowest_argmax(wide)
    nothing = torch.full_like(prob[:, 0], math.nan)
    at_label = ce = nothing
    margin = _margin(shifted, argmax)
    if labels is not None:
        V = logits.shape[1]
        known = (labels != ignore_index) & (labels >= 0) & (labels < V)
        legal = labels.clamp(0, V - 1)
        log_label = log_prob.gather(-1, legal[:, None])[:, 0]
        at_label, ce = torch.where(known, log_label.exp(), math.nan), torch.where(known, -log_label, math.nan)
        margin = torch.where(known, _margin(shifted, legal), math.nan)
    entropy = -(prob * log_prob.masked_fill(prob == 0, 0)).sum(-1)
    mass = prob[:, classes].sum(-1) if classes.stop > classes.start else nothing
    defined = torch.where(prob[:, 0].isnan(), math.nan, 0)  # a row without a softmax has no margin either
    return [prob.amax(-1), at_label, margin + defined, entropy, ce, mass], log_prob, argmax


def lowest_argmax(logits: Tensor) -> Tensor:
    """The lowest index of each row's largest logit; where there are NaNs, of the first of them."""
    V = logits.shape[-1]
    is_top = (logits == logits.amax(-1, keepdim=True)) | logits.isnan()
    # Not Tensor.argmax: torch does not promise which of several equal elements it takes.
    return torch.where(is_top, torch.arange(V, device=logits.device), V).amin(-1)


def _margin(shifted: Tensor, of: Tensor) -> Tensor:
    """Log-probability of a class minus the largest other; +inf if there is no other."""
    others = shifted.scatter(-1, of[:, None], -math.inf)
    return shifted.gather(-1, of[:, None])[:, 0] - others.amax(-1)


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    # A class without probability contributes nothing, even where the other excludes it too.
    kl = (a * (log_a - log_b).masked_fill(a == 0, 0)).sum(-1)
    return kl.clamp(min=0)  # rounding can put the divergence of equal distributions a hair below; NaN stays
