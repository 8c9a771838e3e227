"""Targets that are probabilities: what a teacher's soft pseudo-labels are, beside labels of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..._model import DistillationLoss
from ...ops import row_divergence


@dataclass(frozen=True)
class SoftTargetLoss:
    """DistillationLoss for targets that are probabilities [N, V]; for labels it is that loss itself.

        l_i = alpha CE(y_i, softmax(s)) + (1 - alpha) T^2 KL(softmax(t / T) || softmax(s / T))

    with y_i a row of probabilities, and without a teacher's logits t the cross-entropy alone. Nothing is derived by the
    targets.

    Args:
        temperature: T.
        alpha: weight of the cross-entropy part, where there is a teacher.

    Raises (when called):
        TypeError, ValueError: targets of another shape than the outputs; what row_divergence raises.

    Memory: that of kd_loss, one fused kernel.

    Example:
        >>> import torch
        >>> loss = SoftTargetLoss(temperature=2.0)
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> loss(outputs, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.1269, 0.6931])
        >>> loss(outputs, torch.tensor([0, 1]))
        tensor([0.1269, 0.6931])
    """

    temperature: float = 1.0
    alpha: float = 0.5

    def __call__(self, outputs: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """[N], for outputs [N, V], targets [N, V] or int64 [N], and teacher logits [N, V] or none."""
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            plain = DistillationLoss(self.temperature, self.alpha)
            return plain(outputs, targets) if teacher_logits is None else plain(outputs, targets, teacher_logits)
        if targets.shape != outputs.shape:
            raise ValueError(
                f"SoftTargetLoss: targets has shape {tuple(targets.shape)}, expected {tuple(outputs.shape)} as the "
                "outputs: a probability for every class"
            )
        if teacher_logits is None:
            return row_divergence(outputs, None, soft_labels=targets.detach())
        return row_divergence(
            outputs,
            teacher_logits,
            soft_labels=targets.detach(),
            temperature=self.temperature,
            ce_weight=self.alpha,
            kd_weight=1 - self.alpha,
        )


def most_likely(targets: Any) -> Any:
    """Classes: of probabilities [N, V] the largest, of anything else itself."""
    is_soft = isinstance(targets, Tensor) and targets.dim() == 2 and targets.is_floating_point()
    return targets.argmax(1) if is_soft else targets
