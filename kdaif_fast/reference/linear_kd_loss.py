"""linear_kd_loss by definition: kd_loss of logits that are matrix products, s = h W^T + b (docs/method.md, equation 4).

N rows, V classes; hidden states [N, D], heads [V, D], biases [V]. Low precision is widened before the product, never
after it: the gradient of a distillation loss is a difference of nearly equal distributions, and logits rounded to
bfloat16 cost several percent of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kd_loss as rows


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
    ignored = labels == ignore_index
    ones = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    loss = rows.kd_loss(student, given, labels.masked_fill(ignored, 0), ones, temperature, alpha)
    loss = loss if weight is None else weight.to(dtype) * loss
    return loss.masked_fill(ignored, 0)


def reduce(loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The mean is over the rows that are not ignored, 0 if there are none; row weights do not count."""
    if reduction == "none":
        return loss
    count = (labels != ignore_index).sum().clamp(min=1)
    return loss.sum() / count if reduction == "mean" else loss.sum()
