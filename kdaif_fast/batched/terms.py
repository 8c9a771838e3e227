"""What flows along the edges of a graph that is walked with K cotangents: tensors, and matrix products to be formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Product:
    """left @ right, not formed yet: of [K, m, k] or [m, k], and [K, k, n] or [k, n]; one of them has the K.

    Whoever takes it has it written, or added, to where it is needed, without a temporary of its size.
    """

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """K."""
        return len(self.left) if self.left.dim() == 3 else len(self.right)

    @property
    def mT(self) -> Product:
        """Transposed: still not formed."""
        return Product(self.right.mT, self.left.mT)

    def formed(self) -> Tensor:
        """[K, m, n], fresh."""
        left, right = self.left, self.right
        if self.count == 1:  # bmm is slower than mm at that
            return torch.mm(left.flatten(0, -2), right.flatten(0, -2))[None]
        if right.dim() == 2:  # K belongs to the rows: one large product
            rows = left.reshape(-1, left.shape[-1]) @ right
            return rows.view(*left.shape[:-1], right.shape[-1])
        return torch.bmm(left.expand(self.count, *left.shape[-2:]), right)

    def write(self, target: Tensor, *, add: bool) -> None:
        """Form it in, or add it to, the memory of a tensor [K, m, n] that may be strided."""
        if target.dtype != self.left.dtype:  # vectors are wider than the parameters of a model in half precision
            target.add_(self.formed()) if add else target.copy_(self.formed())
            return
        left, right = (x.expand(self.count, *x.shape[-2:]) for x in (self.left, self.right))
        if self.count == 1:
            target[0].addmm_(left[0], right[0], beta=int(add))
        elif self.right.dim() == 2 and target.is_contiguous():
            target.view(-1, target.shape[-1]).addmm_(self.left.reshape(-1, left.shape[-1]), self.right, beta=int(add))
        else:
            target.baddbmm_(left, right, beta=int(add))


Term = Tensor | Product


def formed(term: Term) -> Tensor:
    """The tensor itself, or the product's."""
    return term.formed() if isinstance(term, Product) else term


def reduced(term: Tensor, shape: torch.Size) -> Tensor:
    """[K, *broadcast] summed to [K, *shape]: what a gradient through broadcasting is."""
    if term.shape[1:] == shape:
        return term
    extra = term.dim() - 1 - len(shape)
    over = [*range(1, 1 + extra)]
    over += [1 + extra + i for i, size in enumerate(shape) if size == 1 and term.shape[1 + extra + i] != 1]
    return (term.sum(over, keepdim=True) if over else term).reshape(len(term), *shape)


class Sum:
    """Terms that arrive one by one; the first is never written to, since others may hold it."""

    def __init__(self, target: Tensor | None = None) -> None:
        self.target = target  # where the sum is to be, or None: wherever the terms are
        self._total: Tensor | None = None
        self._owned = False

    def add(self, term: Term) -> None:
        """Add a term [K, ...]."""
        if self.target is not None:
            if isinstance(term, Product):
                term.write(self.target, add=self._owned)
            else:
                self.target.add_(term) if self._owned else self.target.copy_(term)
            self._total, self._owned = self.target, True
        elif self._total is None:
            self._total, self._owned = formed(term), isinstance(term, Product)
        elif self._owned and isinstance(term, Product) and self._total.is_contiguous():
            term.write(self._total, add=True)
        elif self._owned:
            self._total.add_(formed(term))
        else:
            fresh = isinstance(term, Product)
            other = formed(term)
            self._total = other.add_(self._total) if fresh else self._total + other
            self._owned = True

    @property
    def total(self) -> Tensor | None:
        """The sum, None if nothing came."""
        return self._total
