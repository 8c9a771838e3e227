"""The fused operations, usable under autograd, torch.func transforms and torch.compile."""

from ._row_stats import RowStats
from .cg_update import cg_dots, cg_update
from .linear_kd_loss import linear_kd_loss
from .losses import (
    dkd_loss,
    js_loss,
    kd_loss,
    log_cosh_loss,
    logit_mse_loss,
    nkd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    taid_loss,
    total_variation_loss,
)
from .persample_conv import persample_conv
from .persample_dot import persample_dot
from .persample_grad import persample_grad
from .persample_group_norm import persample_group_norm
from .persample_layer_norm import persample_layer_norm
from .persample_norm import persample_norm
from .row_divergence import row_divergence
from .row_hvp import row_hvp
from .row_stats import row_stats
from .segment_mean import segment_mean
from .weighted_grad import weighted_grad

__all__ = [
    "RowStats",
    "cg_dots",
    "cg_update",
    "dkd_loss",
    "js_loss",
    "kd_loss",
    "linear_kd_loss",
    "log_cosh_loss",
    "logit_mse_loss",
    "nkd_loss",
    "persample_conv",
    "persample_dot",
    "persample_grad",
    "persample_group_norm",
    "persample_layer_norm",
    "persample_norm",
    "reverse_kl_loss",
    "row_divergence",
    "row_hvp",
    "row_stats",
    "segment_mean",
    "skew_kl_loss",
    "taid_loss",
    "total_variation_loss",
    "weighted_grad",
]
