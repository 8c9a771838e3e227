"""How a checked call of row_divergence is carried out: which op, with which weights, and how it is reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _derive
from ..reference import row_divergence as reference
from ..reference.row_terms import accumulation_dtype
from . import _check, row_ops, row_rules

PerRow = float | Tensor
REDUCTIONS = ("none", "sum", "mean")
NORMALIZERS = ("rows", "weights", "elements")


@dataclass
class RowCall:
    """The arguments of one call, on rows: settings are numbers, or tensors with a value per row."""

    tensors: list[Any]  # student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight
    settings: list[PerRow]  # the first seven numbers of the op
    others: list[float]  # and the rest of them
    choices: list[int]

    def losses(self) -> Tensor:
        """Loss of each row: [N]."""
        return self._total(self.settings, is_sum=False)

    def reduced(self, reduction: str, normalizer: str | float) -> Tensor:
        """The sum of the rows' losses, or their mean."""
        _check.is_choice("row_divergence", "reduction", reduction, REDUCTIONS)
        if reduction == "sum":
            return self._total(self.settings, is_sum=True)
        share = self._share(normalizer)
        if isinstance(share, Tensor):
            return self._total(self.settings, is_sum=True) * share
        settings = list(self.settings)
        settings[1:4] = (x * share for x in settings[1:4])  # free, and the gradient needs no scaling either
        return self._total(settings, is_sum=True)

    def _share(self, normalizer: str | float) -> float | Tensor:
        """What turns the sum into the mean; 0 rows have the mean 0."""
        student, labels, weight = self.tensors[0], self.tensors[4], self.tensors[8]
        if not isinstance(normalizer, str):
            _check.is_positive("row_divergence", "normalizer", normalizer)
            return 1.0 / normalizer
        _check.is_choice("row_divergence", "normalizer", normalizer, NORMALIZERS)
        if normalizer == "weights" and weight is not None:
            total = weight.sum() if labels is None else weight.masked_fill(labels == self.choices[-1], 0).sum()
            is_zero = total == 0
            return (1 / total.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
        per_row = student.shape[1] if normalizer == "elements" else 1
        if labels is None:
            return 1.0 / max(student.shape[0] * per_row, 1)
        if labels.is_cpu and not _derive.is_transformed(labels, student):
            return 1.0 / max(_count_kept(labels, self.choices[-1]) * per_row, 1)
        kept = (labels != self.choices[-1]).sum()
        return 1.0 / (kept * per_row).clamp(min=1).to(accumulation_dtype(student))

    def products(self, tangents: Tensor, gauss_newton: bool) -> Tensor:
        """Curvature of each row's loss times K tangents: [K, N, V] -> [K, N, V]."""
        rows, numbers = self._numbers(self.settings, self.tensors[0])
        given = [x for x in (tangents, *self.tensors, rows) if x is not None]
        use_op = _derive.AVAILABLE and not (_derive.is_transformed(*given) and not row_rules.rules_work())
        op: Any = row_ops.row_divergence_hvp if use_op else reference.row_divergence_hvp
        return op(tangents, gauss_newton, *self.tensors, rows, numbers, self.choices)

    def _total(self, settings: Sequence[PerRow], is_sum: bool) -> Tensor:
        learned = [x for x in settings[1:4] if isinstance(x, Tensor) and _may_be_differentiated(x)]
        if not learned:
            return self._run(settings, is_sum)
        # The loss is linear in these weights: one call for each part, and their gradients are the parts.
        parts = []
        for j in (1, 2, 3):
            part_weight = settings[j]
            if isinstance(part_weight, Tensor) or part_weight != 0:
                alone: list[PerRow] = [*settings[:1], 0.0, 0.0, 0.0, *settings[4:]]
                alone[j] = 1.0
                part = self._run(alone, is_sum=False)
                if isinstance(part_weight, Tensor):  # what has no weight may be infinite
                    part = part.masked_fill((part_weight == 0) & ~part.isfinite(), 0)
                parts.append(part_weight * part)
        losses = sum(parts[1:], parts[0])
        return losses.sum() if is_sum else losses

    def _run(self, settings: Sequence[PerRow], is_sum: bool) -> Tensor:
        rows, numbers = self._numbers(settings, self.tensors[0])
        tensors = [*self.tensors, rows]
        given = [x for x in tensors if x is not None]
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            tensors = _without_inference_tensors(tensors)
        is_transformed = _derive.is_transformed(*given)
        try:
            if not is_transformed and _is_plain_training(given):
                return _Training.apply(tensors[0], tensors[1:], is_sum, numbers, self.choices)
            follows_rules = _derive.AVAILABLE and (not is_transformed or row_rules.rules_work())
            # Where this torch would ignore the op's derivative rules, its decomposed form.
            formula: Any = row_ops.row_divergence if follows_rules else reference.row_divergence
            losses = formula(*tensors, numbers, self.choices)
        except RuntimeError:
            labels = tensors[4]
            if labels is not None and not _derive.is_transformed(labels):
                _check.are_labels("row_divergence", "labels", labels, tensors[0].shape[1], self.choices[-1])
            indices = tensors[2]
            if indices is not None and not _derive.is_transformed(indices):
                first, count = self.choices[4:6]
                classes = tensors[0].shape[1] - first if count < 0 else count
                _check.are_labels("row_divergence", "teacher_indices", indices, classes)
            raise
        return losses.sum() if is_sum else losses

    def _numbers(self, settings: Sequence[PerRow], student: Tensor) -> tuple[Tensor | None, list[float]]:
        if not any(isinstance(x, Tensor) for x in settings):
            return None, [*map(float, settings), *self.others]
        N, dtype = student.shape[0], accumulation_dtype(student)
        columns = [_on_device(x, dtype, student.device).expand(N) for x in settings]
        return torch.stack(columns), [1.0] * len(settings) + self.others


def _on_device(x: PerRow, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The setting as a tensor. A number is filled in there: a copy from the CPU would wait for the GPU."""
    return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def _count_kept(labels: Tensor, ignore_index: int) -> int:
    rows = labels.shape[0]
    if rows and ignore_index < labels.min().item():  # the usual case, in a third of the time
        return rows
    return int((labels != ignore_index).sum())


def _may_be_differentiated(x: Tensor) -> bool:
    return (x.requires_grad and torch.is_grad_enabled()) or _derive.is_transformed(x)


def _without_inference_tensors(tensors: list[Any]) -> list[Any]:
    """Copies of what was made in inference mode (by a teacher, say): autograd cannot keep such tensors themselves."""
    for x in tensors:
        if x is not None and x.is_inference():
            return [y.clone() if y is not None and y.is_inference() else y for y in tensors]
    return tensors


def _is_plain_training(given: Sequence[Tensor]) -> bool:
    """Whether this is ordinary eager training on the CPU, with a gradient wanted for the student only.

    On a GPU bytes are the cost, and forming the gradient early saves none: recomputing reads what scaling would.
    """
    student = given[0]
    if not (student.requires_grad and student.is_cpu and torch.is_grad_enabled() and _derive.AVAILABLE):
        return False
    if _derive.any_transform() or type(student) not in (Tensor, torch.nn.Parameter):
        return False
    for x in given[1:]:  # noqa: SIM110 (a generator costs a microsecond)
        if x.requires_grad or type(x) not in (Tensor, torch.nn.Parameter):
            return False
    return True


class _Training(torch.autograd.Function):
    """Loss and gradient in one pass over the logits, so that the usual backward pass has nothing left to do."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, others: list[Any], is_sum: bool, numbers: list[float], choices: list[int]
    ) -> Tensor:
        losses, grad = row_ops.row_divergence_with_grad(student, *others, numbers, choices)
        ctx.save_for_backward(grad, student, *[x for x in others if x is not None])
        ctx.constants = [x is not None for x in others], is_sum, numbers, choices
        return losses.sum() if is_sum else losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad, student, *given = ctx.saved_tensors
        is_given, is_sum, numbers, choices = ctx.constants
        result = None if torch.is_grad_enabled() else _scaled(grad, upstream)
        if result is None:
            rest = iter(given)
            *others, weight, rows = (next(rest) if there else None for there in is_given)
            scale = upstream.expand(grad.shape[0]) if is_sum else upstream
            scale = scale if weight is None else scale * weight
            result = row_ops.row_divergence_grad(student, *others, scale, rows, numbers, choices)
        return result, None, None, None, None


def _scaled(rows: Tensor, factor: Tensor) -> Tensor | None:
    """factor * rows, without a pass over the rows if it is 1 (a sum or mean of losses).

    None where scaling would round a second time: the caller then recomputes. bfloat16 can be scaled by powers of two,
    as loss scalers do; in float16 small gradients are rounded away before they could be.
    """
    if factor.dim() == 0 or (factor.stride(0) == 0 and factor.shape[0]):
        try:
            value = (factor if factor.dim() == 0 else factor[0]).item()
        except RuntimeError:  # a batch of gradients under autograd's own vmap, which has no single value
            value = math.nan
        if value == 1:
            return rows
        if rows.dtype == torch.bfloat16 and math.frexp(value)[0] == 0.5:
            return value * rows
    if factor.dtype != rows.dtype:
        return None
    return (factor if factor.dim() == 0 else factor[:, None]) * rows
