"""One step of joint training: gradients of both networks, with the weights where the mechanism wants them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._model import Batch, DistillationLoss, Loss, call_model, sample_losses
from .clock import Clock
from .finite import FiniteWatch
from .indexed import IndexedBatch, as_batch, on_device
from .label_revision import LabelRevisionLoss
from .mechanisms import Mechanism
from .modes import evaluating, is_same_in_both_modes, unwrapped
from .taught import teacher_logits
from .weighting import InfluenceWeighting

Weights = Callable[[Tensor], Tensor]
"""indices [n] -> weights [n]"""


class StepResult(NamedTuple):
    """What a step has found, each [n], without graphs; None where there is none."""

    student_losses: Tensor
    teacher_losses: Tensor | None
    weights: Tensor | None
    phi: Tensor | None


class JointStep:
    """Adds the gradients of one batch to both networks.

    The teacher learns from the labels, and the student from labels and teacher, each with the samples' weights if the
    mechanism says so. What the student hears of the teacher is its evaluation mode (no dropout), and
    nothing of the student's loss reaches the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        loss: Loss,
        teacher_loss: Loss | None,
        mechanism: Mechanism,
        weights: InfluenceWeighting | Weights | None,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        clock: Clock,
        watch: FiniteWatch,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._loss, self._teacher_loss = loss, teacher_loss
        self._mechanism, self._weights = mechanism, weights
        self._device, self._autocast = device, autocast
        self._clock, self._watch = clock, watch
        # Losses of the user's own may mean something by negative labels.
        self._wants_classes = isinstance(loss, (DistillationLoss, LabelRevisionLoss)) or (
            mechanism.trains_teacher and teacher_loss is None
        )
        # Then the forward pass that the teacher is trained with is what the student hears, too.
        self._shares_forward = mechanism.trains_teacher and is_same_in_both_modes(unwrapped(teacher))

    def __call__(self, indexed: IndexedBatch, divisor: float) -> StepResult:
        """Add the gradients of sum_i w_i l_i / divisor of both networks."""
        if self._wants_classes:
            require_labels(indexed)
        batch = on_device(as_batch(indexed.batch), self._device)
        teacher_losses: Tensor | None = None
        with self._clock.part("teacher"), self._precision():
            if self._mechanism.trains_teacher:
                outputs = call_model(self._teacher, batch.inputs, "batch", updates_buffers=True)
                teacher_losses = sample_losses(
                    self._teacher_loss, outputs, batch._replace(teacher_logits=None), "batch"
                )
                self._watch.look("the teacher's loss", teacher_losses, indexed.indices)
                if self._shares_forward and batch.teacher_logits is None:
                    batch = batch._replace(teacher_logits=outputs.detach())
            if batch.teacher_logits is None:
                with evaluating(self._teacher):
                    batch = batch._replace(teacher_logits=teacher_logits(unwrapped(self._teacher), batch.inputs))
        with self._clock.part("student"), self._precision():
            losses, weights, phi = self._student_part(batch, indexed, divisor)
        if teacher_losses is not None:
            with self._clock.part("teacher"):
                weighted = teacher_losses
                if self._mechanism.weighs_teacher and weights is not None:
                    weighted = weights * teacher_losses
                (weighted.sum() / divisor).backward()
                teacher_losses = teacher_losses.detach()
        return StepResult(losses.detach(), teacher_losses, weights, phi)

    def teach(self, indexed: IndexedBatch, divisor: float) -> Tensor:
        """Add the gradients of sum_i l_i / divisor of the teacher alone; its losses, [n]."""
        if self._teacher_loss is None:
            require_labels(indexed)
        batch = on_device(as_batch(indexed.batch), self._device)._replace(teacher_logits=None)
        with self._clock.part("teacher"), self._precision():
            outputs = call_model(self._teacher, batch.inputs, "batch", updates_buffers=True)
            losses = sample_losses(self._teacher_loss, outputs, batch, "batch")
            self._watch.look("the teacher's loss", losses, indexed.indices)
            (losses.sum() / divisor).backward()
        return losses.detach()

    def _student_part(
        self, batch: Batch, indexed: IndexedBatch, divisor: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The student's losses, the samples' weights (whether the student sees them or not), and phi if measured."""
        weighs = self._mechanism.weighs_student
        weighting = self._weights
        if isinstance(weighting, InfluenceWeighting) and weighting.is_one_pass:
            step = weighting.step(batch, indexed.indices, divisor=divisor, weighs=weighs)
            used: Tensor = step.weights if weighs else weighting(indexed.indices)
            self._watch.look("the student's loss", step.losses, indexed.indices)
            self._watch.look("the weight is negative or", used.where(used >= 0, float("nan")), indexed.indices)
            return step.losses, used, step.phi
        weights = None if weighting is None else weighting(indexed.indices)
        outputs = call_model(self._student, batch.inputs, "batch", updates_buffers=True)
        losses = sample_losses(self._loss, outputs, batch, "batch")
        self._watch.look("the student's loss", losses, indexed.indices)
        weighted = losses
        if weighs and weights is not None:
            own = getattr(self._loss, "weighted", None)
            weighted = weights * losses if own is None else own(outputs, batch.targets, batch.teacher_logits, weights)
        (weighted.sum() / divisor).backward()
        return losses, weights, None

    def _precision(self) -> Any:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._autocast)


def require_labels(indexed: IndexedBatch) -> None:
    """ValueError, naming the samples, if a label is negative: no class. Looked at on the CPU only."""
    targets = as_batch(indexed.batch).targets
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        return
    if targets.device.type != "cpu" or not len(targets) or int(targets.min()) >= 0:
        return
    bad = indexed.indices.cpu()[targets < 0].tolist()
    raise ValueError(
        f"the samples at the indices {', '.join(map(str, bad[:10]))} have the label {int(targets.min())}, no class. "
        "Samples without a label are for SemiSupervisedDistiller, which gives them pseudo-labels"
    )


@torch.no_grad()
def require_same_classes(teacher: nn.Module, student: nn.Module, given: Any, device: torch.device) -> None:
    """ValueError if the two networks give outputs of different shapes for the batch; nothing is trained by looking."""
    batch = on_device(as_batch(given.batch if isinstance(given, IndexedBatch) else given), device)
    plain = [unwrapped(model) for model in (teacher, student)]
    with evaluating(*plain):
        first, second = (call_model(model, batch.inputs, "the first batch", updates_buffers=True) for model in plain)
    for name, outputs in (("teacher", first), ("student", second)):
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{name} returned a {type(outputs).__name__}, expected a tensor or something with logits")
    if first.shape != second.shape:
        raise ValueError(
            f"teacher gives outputs {tuple(first.shape)} and student {tuple(second.shape)} for the same batch; "
            "expected the same number of classes"
        )


@torch.no_grad()
def require_validation_losses(student: nn.Module, loss: Loss, given: Any, device: torch.device) -> None:
    """Compute the loss of a batch of validation samples once, so that what is wrong with it shows before training."""
    batch = on_device(as_batch(given.batch if isinstance(given, IndexedBatch) else given), device)
    plain = unwrapped(student)
    with evaluating(plain):
        outputs = call_model(plain, batch.inputs, "the first batch of val_loader", updates_buffers=True)
        sample_losses(loss, outputs, batch, "the first batch of val_loader")
