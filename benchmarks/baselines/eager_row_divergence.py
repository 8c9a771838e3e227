"""Distillation losses as they are usually written in PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def eager_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, T: float, alpha: float) -> Tensor:
    """Weighted mean of alpha CE + (1 - alpha) T^2 KL over the rows."""
    ce = F.cross_entropy(student, labels, reduction="none")
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (weight * (alpha * ce + (1 - alpha) * T**2 * kl)).mean()


def eager_divergence(name: str, student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    """Mean of T^2 D(p, q) over the rows, for some of the divergences."""
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    q, p = log_q.exp(), log_p.exp()
    if name == "reverse_kl":
        rows = (q * (log_q - log_p)).sum(-1)
    elif name == "jensen_shannon":
        m = ((p + q) / 2).log()
        rows = ((p * (log_p - m)).sum(-1) + (q * (log_q - m)).sum(-1)) / 2
    elif name == "total_variation":
        rows = (p - q).abs().sum(-1) / 2
    elif name == "decoupled":
        is_label = F.one_hot(labels, student.shape[-1]).bool()
        p_y, q_y = p.gather(-1, labels[:, None])[:, 0], q.gather(-1, labels[:, None])[:, 0]
        target = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
        rest_q = (student / T).masked_fill(is_label, -1e30).log_softmax(-1)
        rest_p = (teacher / T).masked_fill(is_label, -1e30).log_softmax(-1)
        rows = target + F.kl_div(rest_q, rest_p, reduction="none", log_target=True).sum(-1)
    else:
        raise ValueError(name)
    return (T**2 * rows).mean()
