"""A head and the distillation loss of its logits, as they are usually written in PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def eager_linear_kd_loss(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, T: float, alpha: float
) -> Tensor:
    """Mean of alpha CE + (1 - alpha) T^2 KL over the rows that are not ignored; logits in the hidden states' dtype.

    In bfloat16 that costs percents of the gradient where student and teacher are near: the equal in precision is a call
    with float32 copies.
    """
    student_logits, teacher_logits = F.linear(hidden, head), F.linear(teacher, teacher_head)
    ce = F.cross_entropy(student_logits, labels, reduction="none")
    log_q, log_p = F.log_softmax(student_logits / T, -1), F.log_softmax(teacher_logits / T, -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    kept = labels != -100
    return (kept * (alpha * ce + (1 - alpha) * T**2 * kl)).sum() / kept.sum()
