"""One number of feedback a batch: did the student's step on pseudo-labels help it with labelled samples?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._model import Batch, call_model, sample_losses
from ..indexed import IndexedBatch, on_device
from ..mechanisms import Mechanism
from ..modes import evaluating
from ..optimising import take_step
from ..step import JointStep

META = Mechanism("meta", weighs_teacher=True)
"""What the teacher learns of a pseudo-label is multiplied by the feedback; the student has no weights."""


class MetaStep(JointStep):
    """A joint step in which the teacher's pseudo-labels count by what they did for the student.

        h = rate * <grad L_labelled(student after its step), grad L_pseudo(student before it)>

    L_labelled is the mean cross-entropy of labelled samples drawn for the purpose, L_pseudo the mean of the student's
    losses of the pseudo-labelled samples of the batch. The teacher's gradient is that of

        (sum over labelled samples of CE + h * sum over pseudo-labelled samples of CE) / divisor

    so that it moves towards pseudo-labels that helped (h > 0) and away from those that did harm. -h / rate is the mean
    over these samples of the influence phi with the curvature "identity", on labelled samples and after the step.

    This is the first-order dot product of gradients. Published variants differ: the feedback can be the difference of
    the labelled loss before and after, less its moving average; pseudo-labels are drawn from the teacher anew for every
    batch, here they are those of the round; and the student there has no labelled samples.

    Args:
        feedback: gives labelled samples, and is told h.
        optimizer, clip_norm: of the student, whose step is taken in here.
        rate: what the dot product is multiplied by.
        options: of JointStep, but for mechanism and weights.

    Memory: that of a joint step, and two gradients of the student.

    Source: "Meta Pseudo Labels" (arXiv 2003.10580), section 2.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        feedback: MetaFeedback,
        optimizer: Optimizer,
        clip_norm: float | None,
        rate: Callable[[], float],
        **options: Any,
    ) -> None:
        super().__init__(teacher, student, mechanism=META, weights=None, **options)
        self._feedback, self._rate = feedback, rate
        self._optimizer, self._clip_norm = optimizer, clip_norm

    def _student_part(self, batch: Batch, indexed: IndexedBatch, divisor: float) -> tuple[Tensor, Tensor, None]:
        outputs = call_model(self._student, batch.inputs, "batch", updates_buffers=True)
        losses = sample_losses(self._loss, outputs, batch, "batch")
        self._watch.look("the student's loss", losses, indexed.indices)
        is_pseudo = indexed.indices >= self._feedback.labelled
        count = max(int(is_pseudo.sum()), 1) if is_pseudo.device.type == "cpu" else is_pseudo.sum().clamp(min=1)
        is_pseudo = is_pseudo.to(losses.device)
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        pseudo = torch.where(is_pseudo, losses, 0.0).sum() / divisor
        before = torch.autograd.grad(pseudo, parameters, retain_graph=True, allow_unused=True)
        (torch.where(is_pseudo, 0.0, losses).sum() / divisor).backward()
        for p, grad in zip(parameters, before, strict=True):
            if grad is not None:
                p.grad = grad.clone() if p.grad is None else p.grad + grad
        take_step(self._optimizer, self._clip_norm)
        torch.clear_autocast_cache()  # which holds the parameters of before the step
        after = self._labelled_gradient(parameters)
        dots = [(a * b).sum() for a, b in zip(after, before, strict=True) if a is not None and b is not None]
        h = (torch.stack(dots).sum() * (self._rate() * divisor / count)).detach()
        self._feedback.add(h)
        return losses, torch.where(is_pseudo, h, torch.ones_like(h)), None

    def _labelled_gradient(self, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        batch = on_device(self._feedback.draw(), self._device)._replace(teacher_logits=None)
        with evaluating(self._student):
            outputs = call_model(self._student, batch.inputs, "a labelled batch", updates_buffers=True)
            losses = sample_losses(self._loss, outputs, batch, "a labelled batch")
        return torch.autograd.grad(losses.mean(), parameters, allow_unused=True)


class MetaFeedback:
    """What the feedback goes on with from batch to batch: draws of labelled samples, and its mean.

    Args:
        loader: of all samples, with indices, the labelled ones first.
        labelled: how many these are.
        seed: of the draws.
    """

    def __init__(self, loader: Any, labelled: int, seed: int) -> None:
        self._loader, self.labelled = loader, labelled
        self._size = min(labelled, loader.batch_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._sum: Tensor | None = None
        self._batches = 0

    def draw(self) -> Batch:
        """So many labelled samples as a batch of the loader has, none of them twice."""
        places = torch.randperm(self.labelled, generator=self._generator)[: self._size]
        found: IndexedBatch = self._loader.collate_fn(self._loader.dataset.__getitems__(places.tolist()))
        return Batch(*found.batch)

    def add(self, h: Tensor) -> None:
        """Count a batch's feedback; nothing waits for a GPU."""
        self._sum = h if self._sum is None else self._sum + h
        self._batches += 1

    def take_mean(self) -> float | None:
        """The mean since this was last called; None without any batch."""
        mean = None if self._sum is None else float(self._sum) / self._batches
        self._sum, self._batches = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"generator": self._generator.get_state(), "sum": self._sum, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that was noted."""
        self._generator.set_state(state["generator"].cpu())
        self._sum, self._batches = state["sum"], state["batches"]
