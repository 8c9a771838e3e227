"""Backward passes through a kept graph for K cotangents: walked together, or one by one by PyTorch's engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .backward import BatchedBackward, NotBatchableError

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""By how much a walk may differ from the engine, relative to the size of the gradients; others: 0.2.

Far above what rounding does (TF32 included), far below what a wrong rule or a hook that was not called would.
"""

# Gradients of this times rounding, relative to the largest, may be rounding altogether.
NOTHING = 1e3

# The engine's derivative of a convolution's backward pass computes what nobody asked for, by convolutions of odd
# shapes, and large gradients are copied more often: there a walk is faster for a single vector too. In small graphs
# the calls from Python cost more than that.
_BETTER_WALKED = "ConvolutionBackwardBackward0"
_LARGE = 8 << 20


class KeptBackward:
    """The map from cotangents of `outputs` to gradients of the leaves `inputs`; the graph is kept.

    Args:
        outputs: tensors with a graph.
        inputs: leaves.
        known: what has been found out about graphs of the same model: kinds of nodes -> whether a walk agrees with the
            engine. It is looked up, and filled in, at the first walk.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], known: dict[Any, bool]) -> None:
        self._outputs, self._inputs, self._known = list(outputs), list(inputs), known

    @cached_property
    def _walk(self) -> BatchedBackward | None:
        try:
            return BatchedBackward(self._outputs, self._inputs)
        except NotBatchableError:
            return None

    @property
    def vector_bytes(self) -> int:
        """What cotangents and gradients inside of the graph take at the worst moment, per vector."""
        return 0 if self._walk is None else self._walk.vector_bytes

    @property
    def at_once(self) -> int:
        """How many vectors are under way together."""
        return 1 if self._walk is None else self._walk.at_once(self._outputs[0].device)

    def __call__(self, cotangents: Sequence[Tensor], targets: Sequence[Tensor]) -> list[bool]:
        """Write the gradients of every input to its target, [K, *shape]; zeros where the outputs do not depend on it.

        Args:
            cotangents: [K, *shape] for every output.
            targets: of a dtype at least as wide as that of the inputs; may be strided.

        Returns:
            Which inputs the outputs depend on.
        """
        K = len(cotangents[0])
        if K == 0:
            return [True] * len(self._inputs)
        walk = self._walk if K > 1 or self._is_better_walked() else None
        if walk is None or not self._agrees(walk):
            return self._one_by_one(cotangents, targets)
        step = walk.at_once(cotangents[0].device)
        found: list[Tensor | None] = []
        for start in range(0, K, step):
            rows = slice(start, start + step)
            found = walk([c[rows] for c in cotangents], [t[rows] for t in targets])
        return _fill(found, targets)

    def _is_better_walked(self) -> bool:
        walk = self._walk
        return walk is not None and (_BETTER_WALKED in walk.kinds or walk.vector_bytes >= _LARGE)

    def _one_by_one(self, cotangents: Sequence[Tensor], targets: Sequence[Tensor]) -> list[bool]:
        for k in range(len(cotangents[0])):
            found = self._by_engine([c[k] for c in cotangents])
            for target, gradient in zip(targets, found, strict=True):
                if gradient is not None:
                    target[k].copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        return _fill(found, targets)

    def _by_engine(self, cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(self._outputs, self._inputs, cotangents, retain_graph=True, allow_unused=True)

    def _agrees(self, walk: BatchedBackward) -> bool:
        """Whether a walk gives what the engine gives, for two random vectors; once for every set of kinds of nodes.

        A hook on a tensor, say, is nothing that a graph shows from outside.
        """
        first = self._outputs[0]
        key = (walk.kinds, first.dtype, first.device.type)
        if key not in self._known:
            generator = torch.Generator().manual_seed(0)
            signs = [torch.randint(0, 2, (2, *x.shape), generator=generator).mul_(2).sub_(1) for x in self._outputs]
            cotangents = [s.to(device=x.device, dtype=x.dtype) for s, x in zip(signs, self._outputs, strict=True)]
            expected = self._by_engine([c[1] for c in cotangents])
            try:
                walked = walk(cotangents)
            except (RuntimeError, TypeError, AttributeError, NotImplementedError, NotBatchableError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._known[key] = False  # a node that cannot be called from outside the engine
                return False
            agreement = AGREEMENT.get(first.dtype, 0.2)
            self._known[key] = _agree(walked, expected, agreement)
        return self._known[key]


def _agree(walked: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> bool:
    dense = [None if x is None else x.to_dense() if x.is_sparse else x for x in expected]
    sizes = [float(x.norm()) for x in dense if x is not None]
    # Gradients that are nothing in truth, such as those of the bias of an attention's keys, are all rounding.
    nothing = max(sizes, default=0.0) * min(NOTHING * torch.finfo(_dtype_of(dense)).eps, tolerance / 100)
    for one, other in zip(walked, dense, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not float((one[1] - other).norm()) <= tolerance * float(other.norm()) + nothing:
            return False
    return True


def _dtype_of(tensors: Sequence[Tensor | None]) -> torch.dtype:
    return next((x.dtype for x in tensors if x is not None), torch.float64)


def _fill(found: Sequence[Tensor | None], targets: Sequence[Tensor]) -> list[bool]:
    for gradient, target in zip(found, targets, strict=True):
        if gradient is None:
            target.zero_()
    return [gradient is not None for gradient in found]
