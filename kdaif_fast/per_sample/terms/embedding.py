"""G_i of a table of embeddings: non-zero only in the rows that the sample looks up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._tree import wide_dtype
from ...ops._persample_inner import persample_inner
from .base import BLOCK_ELEMENTS, Term


class EmbeddingTerm(Term):
    """G_i[r] = sum of b_it over the positions t that look up row r. Never dense, but in `grads`.

    Args:
        indices: [N, T], int64.
        output_grads: b [N, T, D], already zero where a position counts for nothing (padding).
        shape: the table's, [rows, D].
        sparse: whether weighted gradients are to be sparse tensors.
    """

    def __init__(self, indices: Tensor, output_grads: Tensor, shape: torch.Size, sparse: bool = False) -> None:
        self.indices, self.output_grads, self.shape, self.sparse = indices, output_grads, shape, sparse
        self.samples, self.dtype = len(indices), output_grads.dtype

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        b = self.output_grads
        G = b.new_zeros(self.samples, *self.shape) if out is None else out.zero_()
        rows = G.view(-1, self.shape[1])
        return rows.index_add_(0, self._keys().reshape(-1), b.reshape(-1, self.shape[1]).to(rows.dtype)).view_as(G)

    def _keys(self) -> Tensor:
        """Another number for each pair of a sample and a row: [N, T]."""
        first = torch.arange(self.samples, device=self.indices.device) * self.shape[0]
        return self.indices + first.unsqueeze(1)

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        wide = wide_dtype(self.output_grads.dtype)
        b = self.output_grads.to(wide)
        return torch.cat([persample_inner(v[self.indices].to(wide).unsqueeze(1), b) for v in directions], 1)

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        b = self.output_grads * weights.to(self.output_grads.dtype).view(-1, 1, 1)
        if self.sparse:
            flat = self.indices.reshape(1, -1), b.reshape(-1, self.shape[1])
            return torch.sparse_coo_tensor(*flat, self.shape, check_invariants=False)
        return torch.ops.aten.embedding_dense_backward(b, self.indices, self.shape[0], -1, False)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The rows of G that are not zero, with their keys."""
        keys, place = self._keys().unique(return_inverse=True)
        wide = wide_dtype(self.output_grads.dtype)
        rows = self.output_grads.new_zeros((len(keys), self.shape[1]), dtype=wide)
        rows.index_add_(0, place.reshape(-1), self.output_grads.reshape(-1, self.shape[1]).to(wide))
        return keys, rows

    @property
    def by_pairs(self) -> bool:
        """Whether norms are summed over pairs of positions: to find the rows that occur, one would wait for a GPU."""
        return self.output_grads.is_cuda and self.indices.shape[1] ** 2 <= BLOCK_ELEMENTS

    def _norms_by_pairs(self) -> Tensor:
        """sum of <b_t, b_t'> over the positions that look up the same row."""
        wide, T = wide_dtype(self.output_grads.dtype), self.indices.shape[1]
        parts = [self.output_grads.new_zeros(0, dtype=wide)]
        step = max(1, BLOCK_ELEMENTS // max(1, T * T))
        for start in range(0, self.samples, step):
            b, rows = self.output_grads[start : start + step].to(wide), self.indices[start : start + step]
            products = b.bmm(b.mT).masked_fill_(rows.unsqueeze(1) != rows.unsqueeze(2), 0)
            parts.append(products.sum((1, 2)).clamp_(min=0))  # rounding can put 0 below it
        return torch.cat(parts)

    def squared_norms(self) -> Tensor:
        """See Term."""
        if self.by_pairs:
            return self._norms_by_pairs()
        keys, rows = self._rows()
        owner = keys // self.shape[0]
        return rows.new_zeros(self.samples).index_add_(0, owner, rows.square().sum(1))

    def squares(self) -> Tensor:
        """See Term."""
        keys, rows = self._rows()
        return rows.new_zeros(self.shape).index_add_(0, keys % self.shape[0], rows.square_())

    def block(self, start: int, stop: int) -> EmbeddingTerm:
        """See Term."""
        return EmbeddingTerm(self.indices[start:stop], self.output_grads[start:stop], self.shape, self.sparse)
