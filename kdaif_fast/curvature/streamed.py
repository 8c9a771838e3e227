"""Operators that are a mean over samples, added up batch by batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group, add_over_ranks
from .._model import Loss, Params, plain_model, select_parameters
from .._objective import Objective
from ..batched import KeptBackward
from .operator import CurvatureOperator

VECTORS_AT_ONCE = 1 << 30
"""Bytes that the outputs' tangents and the products of one chunk of vectors may take, unless `memory` says else."""


class StreamedCurvature(CurvatureOperator):
    """The mean over samples of a matrix that each sample has, of a model's loss on a batch or a whole data set.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout).
        data: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches, which
            is gone through once for every product and has to give the same samples each time (no random augmentation).
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        keep_graphs: keep every batch's linearisation of a loader: products cost about half, if all activations of the
            data set fit into memory. One batch's is always kept.
        memory: bytes that products with many vectors may use beyond the linearisation; default 1 GiB. More vectors
            than that allows are multiplied in several chunks.
        group: a process group, or "world": every rank has its own share of the samples, of any size, and all get the
            product over all of them. All ranks have to call together.

    Memory: the graph of one forward and one backward pass over a batch, kept as long as the operator for one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Loss | None = None,
        params: Params | None = None,
        keep_graphs: bool = False,
        memory: int | None = None,
        group: Group = None,
    ) -> None:
        if model is None:
            raise ValueError("model is None, expected a module")
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is {memory}, expected a positive number of bytes")
        self.parameters = select_parameters(plain_model(model), params)
        self._model, self._loss, self._group = model, loss, group
        self._batches = data if isinstance(data, Batches) else Batches(data, "data", self.device)
        self._keep = keep_graphs or self._batches.is_one
        self._memory = memory or VECTORS_AT_ONCE
        self._kept: list[Objective] = []
        self._samples: int | None = None
        if self._batches.is_one:
            next(self.objectives())  # what is wrong with the batch shall be said here

    @abstractmethod
    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        """The sum over a batch's samples of their matrices, times every row of [K, P]; index: the batch's number."""

    def objectives(self) -> Iterator[Objective]:
        """The loss on every batch, linearised."""
        if self._kept:
            yield from self._kept
            return
        made, chosen = [], list(self.parameters.values())
        samples = 0
        for label, batch in self._batches:
            objective = Objective(self._model, batch, self._loss, chosen, label)
            if self._samples is None:
                objective.require_finite()
                if not samples:
                    objective.require_second_derivatives()
            samples += objective.samples
            if self._keep:
                made.append(objective)
            yield objective
        self._kept = made
        if self._samples is None:
            self._samples = int(add_over_ranks(torch.tensor(float(samples), device=self.device), self._group))

    @property
    def samples(self) -> int:
        """N, the number of samples in all batches of all ranks."""
        if self._samples is None:
            for _ in self.objectives():
                pass
        assert self._samples is not None
        return self._samples

    def _products(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(self.dtype)
        if not len(vectors):
            return vectors
        total = None
        for index, objective in enumerate(self.objectives()):
            products = self._batch_in_chunks(objective, vectors, index)
            total = products if total is None else total.add_(products)
        assert total is not None
        return add_over_ranks(total, self._group).div_(self.samples)

    def _batch_in_chunks(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        if len(vectors) == 1:
            return self._batch_products(objective, vectors, index)
        chunks = vectors.split(objective.most_vectors(self._memory, self._walks(objective)))
        if len(chunks) == 1:
            return self._batch_products(objective, vectors, index)
        products, done = torch.empty_like(vectors), 0
        for chunk in chunks:
            products[done : done + len(chunk)] = self._batch_products(objective, chunk, index)
            done += len(chunk)
        return products

    def _walks(self, objective: Objective) -> list[KeptBackward]:
        """The walks through a batch's graphs that a product takes."""
        return [walk for walk in (objective.pushing, objective.pulling) if walk is not None]
