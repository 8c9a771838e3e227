"""Operators that are a mean over samples, added up batch by batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group, add_number_over_ranks, add_over_ranks, together
from .._model import Loss, Params, plain_model, select_parameters
from .._objective import Objective
from ..batched import KeptBackward
from .ekfac import EKFAC
from .kfac import KFAC
from .operator import CurvatureOperator, require_real

Factored = TypeVar("Factored", bound=KFAC)

VECTORS_AT_ONCE = 1 << 30
"""Bytes that a chunk of vectors may take: its products, tangents, and what is inside the graphs on the way."""


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
        memory: bytes that products with many vectors may use beyond the linearisation and the products themselves;
            default 1 GiB. More vectors than that allows are multiplied in several chunks, of one vector at least.
        group: a process group, or "world": every rank has its own share of the samples, of any size (a loader without
            a batch is one too), and all get the product over all of them. All ranks have to call together. What is
            raised while one of them goes through its share, all raise.

    Products are of the model as it is when they are asked for: a linearisation that is kept is made anew once a
    parameter, a buffer or the batch has been written to. (Of writes through `.data` in place PyTorch does not know.)

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
        require_real(self.parameters)
        self._model, self._loss, self._group = model, loss, group
        self._batches = data if isinstance(data, Batches) else self._read(data)
        self._keep = keep_graphs or self._batches.is_one
        self._memory = memory or VECTORS_AT_ONCE
        self._kept: list[Objective] = []
        self._endless: Iterator[tuple[int, Objective] | None] | None = None
        self._own: int | None = None  # samples of this rank, and of all
        self._samples: int | None = None
        with together(group, self.device):
            if self._batches.is_one:  # what is wrong with it shall be said here
                self._go_through()
        # Ranks have data of different kinds, but have to agree on when they talk.
        self._all_keep = not add_number_over_ranks(not self._keep, group, self.device)

    def _read(self, data: Any) -> Batches:
        return Batches(data, "data", self.device, may_be_empty=self._group is not None)

    @abstractmethod
    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        """The sum over a batch's samples of their matrices, times every row of [K, P]; index: the batch's number."""

    def objectives(self) -> Iterator[Objective]:
        """The loss on every batch of this rank, linearised."""
        if self._kept and all(objective.is_current for objective in self._kept):
            yield from self._kept
            return
        self._kept = []  # before others are made: there may not be room for both
        made, chosen = [], list(self.parameters.values())
        samples = 0
        for label, batch in self._batches:
            objective = Objective(self._model, batch, self._loss, chosen, label)
            if self._own is None:
                objective.require_finite()
                if not samples:
                    objective.require_second_derivatives()
            samples += objective.samples
            if self._keep:
                made.append(objective)
            yield objective
        self._kept, self._own = made, samples

    @property
    def samples(self) -> int:
        """N, the number of samples in all batches of all ranks."""
        if self._samples is None:
            with together(self._group, self.device):
                self._go_through()
        return self._count()

    def _go_through(self) -> None:
        for _ in self.objectives():
            pass

    def _count(self) -> int:
        """N, once every rank has gone through its data."""
        if self._samples is None:
            assert self._own is not None
            total = add_number_over_ranks(self._own, self._group, self.device)
            if not total:
                raise ValueError(f"{self._batches.name} is empty on every rank")
            self._samples = int(total)
        return self._samples

    @property
    def stochastic(self) -> Callable[[int], Callable[[Tensor], Tensor]]:
        """Products [K, P] -> [K, P] with the curvature of the next batch of a loader alone, for `solvers.lissa`.

        stochastic(seed) is one of them. Batches come in the order of the loader, again and again, whatever the seed:
        a loader that shuffles makes them random. Over ranks, each brings its next one.

        Raises:
            AttributeError: the data are one batch, of which there are no parts.
        """
        if self._batches.is_one:
            raise AttributeError("the data are one batch: its products are exact")
        return lambda seed: self._next_products

    def _next_products(self, vectors: Tensor) -> Tensor:
        if self._endless is None:
            self._endless = self._again_and_again()
        with torch.inference_mode(False), together(self._group, self.device):
            found = next(self._endless)
            rows, samples = torch.zeros_like(vectors, dtype=self.dtype), torch.zeros((), device=self.device)
            if found is not None:
                index, objective = found
                rows = self._batch_in_chunks(objective, vectors.to(self.dtype), index)
                samples += objective.samples
        return add_over_ranks(rows, self._group) / add_over_ranks(samples, self._group)

    def _again_and_again(self) -> Iterator[tuple[int, Objective] | None]:
        """Batches with their numbers, without end; None for each of a rank that has none."""
        while True:
            found = None
            for found in enumerate(self.objectives()):
                yield found
            if found is None:
                yield None

    def kfac(self, **options: Any) -> KFAC:
        """K-FAC of the same loss on the same data: an approximate inverse by `.solve`, or a preconditioner for cg.

        Args:
            options: those of `KFAC`, such as fisher; the model, the loss, the parameters and the group are this one's.
        """
        return self._factored(KFAC, options)

    def ekfac(self, **options: Any) -> EKFAC:
        """EK-FAC of the same loss on the same data, likewise."""
        return self._factored(EKFAC, options)

    def _factored(self, kind: type[Factored], options: dict[str, Any]) -> Factored:
        chosen = list(self.parameters.values())
        return kind(self._model, self._batches, loss=self._loss, params=chosen, group=self._group, **options)

    def _products(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):  # in it, graphs cannot be walked
            vectors = vectors.to(self.dtype)
            return self._sums(vectors.clone() if vectors.is_inference() else vectors) if len(vectors) else vectors

    def _sums(self, vectors: Tensor) -> Tensor:
        total = None
        # Linearisations that are kept have been made without an error: no need to ask the other ranks again.
        with together(None if self._all_keep and self._samples is not None else self._group, self.device):
            for index, objective in enumerate(self.objectives()):
                products = self._batch_in_chunks(objective, vectors, index)
                total = products if total is None else total.add_(products)
        total = torch.zeros_like(vectors) if total is None else total  # a rank without samples
        return add_over_ranks(total, self._group).div_(self._count())

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
