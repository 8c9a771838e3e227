"""The statistics of row_stats as they are usually written in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def _side(logits: Tensor, labels: Tensor, T: float, classes: slice) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    log_prob = F.log_softmax(logits.float() / T, -1)
    prob = log_prob.exp()
    largest, argmax = prob.max(-1)
    log_label = log_prob.gather(-1, labels[:, None])
    others = log_prob.scatter(-1, labels[:, None], -torch.inf)
    stats = {
        "max": largest,
        "label": log_label.exp()[:, 0],
        "margin": (log_label - others.amax(-1, keepdim=True))[:, 0],
        "entropy": -(prob * log_prob).sum(-1),
        "argmax": argmax,
        "ce": -log_label[:, 0],
        "mass": prob[:, classes].sum(-1),
    }
    return stats, log_prob, prob


def eager_row_stats(
    student: Tensor, teacher: Tensor, labels: Tensor, T: float, classes: tuple[int, int]
) -> dict[str, Tensor]:
    """Every statistic of row_stats, by name."""
    with torch.no_grad():
        ours, log_q, q = _side(student, labels, T, slice(*classes))
        theirs, log_p, _ = _side(teacher, labels, T, slice(*classes))
        return {
            **{f"student_{name}": value for name, value in ours.items()},
            **{f"teacher_{name}": value for name, value in theirs.items()},
            "forward_kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
            "reverse_kl": (q * (log_q - log_p)).sum(-1),
            "agreement": ours["argmax"] == theirs["argmax"],
        }
