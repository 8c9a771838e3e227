"""The fused operations, usable under autograd, torch.func transforms and torch.compile."""

from .kd_loss import kd_loss

__all__ = ["kd_loss"]
