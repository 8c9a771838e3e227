"""What a weight rule may look at: the samples, the scores of all of them, and what their predictions are like."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._tree import wide_dtype
from ..influence.weights import score_width
from ..ops import RowStats


class Order(NamedTuple):
    """Scores in ascending order, NaN last, and where each of them was; equal ones stay as they were."""

    scores: Tensor  # [M]
    positions: Tensor  # [M] int64


class SampleStatistics:
    """What a weight rule may look at besides phi, for n samples.

    A rule is called with all samples at once after a measurement; `reference` is phi then. With weights of every step
    it is called once a batch, and `reference` is the last measurement of all samples: ranges and quantiles are taken
    from it, so that a sample's weight does not depend on its batch.

    Args:
        indices: [n] int64, the samples' places in the training data.
        targets: [n], their labels; or None.
        reference: [M], phi of all samples as last measured, sample i at place i. M may be more than n.
        generator: of the CPU, for rules that draw; or None.
        rows: function that computes the samples' RowStats (ops.row_stats), which is called when `rows` is first asked
            for; or None.
        losses: function that computes their training losses [n], likewise.

    Raises:
        TypeError, ValueError: indices that are not int64 [n], targets of another length, a reference that is no
            floating-point vector or empty, a generator of another device, functions that are none.

    Memory: what `rows` and `losses` return, once asked for. `order` keeps 16 bytes a score of the reference, for as
        long as that tensor lives and nobody writes to it: a batch does not sort all samples again.

    Example:
        >>> import torch
        >>> stats = SampleStatistics(torch.tensor([2, 0]), None, torch.tensor([0.5, 0.0, -1.5]))
        >>> stats.width("range")
        tensor(2.)
        >>> stats.order.positions
        tensor([2, 1, 0])
    """

    def __init__(
        self,
        indices: Tensor,
        targets: Tensor | None,
        reference: Tensor,
        generator: torch.Generator | None = None,
        rows: Callable[[], RowStats] | None = None,
        losses: Callable[[], Tensor] | None = None,
    ) -> None:
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise TypeError(f"indices is {_form(indices)}, expected torch.int64 (n,)")
        if targets is not None and len(targets) != len(indices):
            raise ValueError(f"targets has {len(targets)} entries for {len(indices)} samples")
        if not isinstance(reference, Tensor) or not reference.is_floating_point() or reference.dim() != 1:
            raise TypeError(f"reference is {_form(reference)}, expected floating-point scores (M,)")
        if len(reference) == 0 < len(indices):
            raise ValueError(f"reference is empty, expected the scores of all samples, {len(indices)} at least")
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
            form = f"on {generator.device}" if isinstance(generator, torch.Generator) else repr(generator)
            raise TypeError(f"generator is {form}, expected a torch.Generator of the CPU")
        for name, function in (("rows", rows), ("losses", losses)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} is {_form(function)}, expected a function without arguments, or None")
        self.indices, self.targets, self.reference = indices, targets, reference
        self._generator, self._rows, self._losses = generator, rows, losses

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def generator(self) -> torch.Generator:
        """Of the CPU; what a rule draws from."""
        if self._generator is None:
            raise ValueError("the weight rule draws random numbers, but its statistics were given no generator")
        return self._generator

    @cached_property
    def rows(self) -> RowStats:
        """Statistics of the samples' predictions, each [n]; a forward pass where they are not at hand."""
        if self._rows is None:
            raise ValueError("the weight rule asks for row statistics (stats.rows), which are not known here")
        return self._rows()

    @cached_property
    def losses(self) -> Tensor:
        """The samples' training losses [n]; a forward pass where they are not at hand."""
        if self._losses is None:
            raise ValueError("the weight rule asks for the training losses (stats.losses), which are not known here")
        losses = self._losses()
        if not isinstance(losses, Tensor) or losses.shape != self.indices.shape:
            raise ValueError(f"stats.losses are {_form(losses)}, expected ({len(self)},), one a sample")
        return losses.detach()

    def width(self, scale: float | str = "range") -> Tensor:
        """`score_width` of the reference: what phi is measured against. A tensor of no dimensions."""
        return self._of_reference(("width", scale), lambda scores: score_width(scores, scale))

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest score of the reference, NaN if one is NaN or there are none; of no dimensions."""
        nothing = (self.reference.new_full((), math.nan),) * 2
        return self._of_reference("limits", torch.aminmax) if len(self.reference) else nothing

    @property
    def order(self) -> Order:
        """The reference in ascending order."""
        return self._of_reference("order", lambda scores: Order(*scores.sort(stable=True)))

    def _of_reference(self, name: Any, compute: Callable[[Tensor], Any]) -> Any:
        """compute(reference), which is kept for the batches to come."""
        reference = self.reference
        with torch.inference_mode(False), torch.no_grad():
            if reference.is_inference():  # does not tell whether it was written to
                return compute(reference.to(wide_dtype(reference.dtype)))
            kept = _of_references.get(reference)
            if kept is None or kept.version != reference._version:
                kept = _of_references[reference] = _Kept(reference._version, {})
            if name not in kept.values:
                kept.values[name] = compute(reference.detach().to(wide_dtype(reference.dtype)))
            return kept.values[name]


class _Kept(NamedTuple):
    version: int  # of the tensor that the values were computed from
    values: dict[Any, Any]


# What was computed from a reference goes with it.
_of_references: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
