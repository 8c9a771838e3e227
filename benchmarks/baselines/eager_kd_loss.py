"""The distillation loss as it is usually written in PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def eager_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, T: float, alpha: float) -> Tensor:
    """Weighted mean of alpha CE + (1 - alpha) T^2 KL over the rows."""
    ce = F.cross_entropy(student, labels, reduction="none")
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (weight * (alpha * ce + (1 - alpha) * T**2 * kl)).mean()
