"""The fused operations, usable under autograd, torch.func transforms and torch.compile."""

from .kd_loss import kd_loss
from .linear_kd_loss import linear_kd_loss

__all__ = ["kd_loss", "linear_kd_loss"]
