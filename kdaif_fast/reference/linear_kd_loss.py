"""linear_kd_loss by definition: equation 4 of docs/method.md, of logits that are matrix products, s = h W^T + b.

N rows, V classes; hidden states [N, D], heads [V, D], biases [V]. Low precision is widened before the product, never
after it: the gradient of a distillation loss is a difference of nearly equal distributions, and logits rounded to
bfloat16 cost several percent of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .row_divergence import row_divergence
from .row_terms import KL, LOGITS, Choices


def numbers(temperature: float, alpha: float, of_teacher: bool = False) -> list[float]:
    """As row_divergence takes them: T, the weights of cross-entropy, forward KL and reverse KL, then what is not used.

    of_teacher: of the loss as a function of the teacher's logits, in the student's place.
    """
    kl = (1 - alpha) * temperature**2
    parts = [0.0, 0.0, kl] if of_teacher else [alpha, kl, 0.0]
    return [temperature, *parts, 0.0, 1.0, 0.0, 0.0, 0.0]


def choices(V: int, ignore_index: int) -> Choices:
    """The plain divergence over all classes."""
    return Choices(KL, LOGITS, 0, 0, 0, V, ignore_index)


def logits(features: Tensor, head: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """features @ head^T + bias [N, V] in the given dtype; without a head the features are the logits."""
    if head is None:
        return features.to(dtype)
    return F.linear(features.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of logits, sums and losses: float64 if any of the tensors is, else float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def linear_kd_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    teacher: Tensor,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
) -> Tensor:
    """Loss of each row: [N]; 0 where the label is ignore_index."""
    dtype = accumulation_dtype(hidden, head_weight, head_bias, teacher, teacher_head, teacher_bias)
    student = logits(hidden, head_weight, head_bias, dtype)
    given = logits(teacher, teacher_head, teacher_bias, dtype)
    if weight is not None:
        weight = weight.to(dtype)
    settings = numbers(temperature, alpha), choices(student.shape[1], ignore_index)
    return row_divergence(student, given, None, None, labels, None, None, None, weight, None, *settings)


def reduce(loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The mean is over the rows that are not ignored, 0 if there are none; row weights do not count."""
    if reduction == "none":
        return loss
    count = (labels != ignore_index).sum().clamp(min=1)
    return loss.sum() / count if reduction == "mean" else loss.sum()
