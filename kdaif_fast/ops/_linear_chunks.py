"""The chunks of linear_kd_loss: some rows' logits at a time, their losses, and the gradient taken back at once.

What is alive at a time, in chunks (chunk_rows x V numbers of the accumulation dtype): the student's logits, 1, which
the gradient overwrites (in bfloat16 for a GPU's matrix units, in half of their memory); half a chunk of the teacher's;
a quarter of the gradient as the row op returns it, or, after that, half a chunk of what a product returns (float16: of
the gradient in low precision). Never more than 2.

On a GPU, V classes of bfloat16 heads and [N, D] hidden states take 6 N V D operations (8 with a teacher's head), and
besides move about 6 float32 numbers for each logit: written by the product, read by the row op with the teacher's, its
gradient written, read and written in bfloat16; 2 more to copy a teacher's logits, and 12 D / rows of a chunk to add up
the head's gradient. An estimate for D = 4096 and V = 32000 on an H200: a fifth of the products' time. Nothing waits for
the GPU: rows that are ignored are computed too, from zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.linear_kd_loss import choices, numbers
from .row_ops import row_divergence, row_divergence_grad, row_divergence_with_grad

# Elements of a head that are widened at a time where the processor cannot multiply low precision with float32 results:
# 4 MiB in float32, which stay in the cache until the product has read them.
_WIDENED = 1 << 20


class Options(NamedTuple):
    """What is the same for all rows."""

    temperature: float
    alpha: float
    chunk_rows: int
    ignore_index: int


def default_chunk_rows(V: int, device: torch.device) -> int:
    """Rows whose logits stay near the processor, yet enough of them to keep its matrix products busy."""
    if device.type == "cpu":  # 32 MiB of float32: the size of a last-level cache
        return min(max((1 << 23) // V, 64), 1024)
    return min(max((1 << 27) // V // 128 * 128, 256), 8192)  # 512 MiB


def multiplies_low_precision(features: Tensor, head: Tensor) -> bool:
    """Whether a product of these has float32 results without a wide copy of them."""
    is_low = features.dtype == head.dtype and head.dtype in (torch.bfloat16, torch.float16)
    return is_low and head.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of low-precision matrices, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _narrow(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The gradient in low precision, and what it was multiplied by, if it was. Overwrites the wide one.

    Entries of float16 below 6e-8 are zero, and a vocabulary has many as small: they are lifted by a power of two first.
    """
    if dtype != torch.float16:
        return gradient.to(dtype), None
    low, high = gradient.aminmax()
    lift = torch.exp2(torch.floor(torch.log2(16384 / torch.maximum(-low, high).clamp(min=1e-30))))
    return gradient.mul_(lift).to(dtype), lift


class Projection:
    """logits = features @ head^T + bias in chunks of the rows that count, and the way back to all three.

    features: [N, D]; without a head, the logits themselves. kept: which rows count, or None for all. blank: [N], the
    rows whose features are taken for zeros, or None.
    """

    def __init__(
        self,
        features: Tensor,
        head: Tensor | None,
        bias: Tensor | None,
        kept: Tensor | None,
        blank: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.features, self.head, self.bias, self.dtype = features, head, bias, dtype
        self.kept, self.blank = kept, blank
        self.d_features: Tensor | None = None
        self.d_head: Tensor | None = None
        self.d_bias: Tensor | None = None
        self.has_head_sum = False  # of any chunk yet
        self.is_low = head is not None and dtype == torch.float32 and multiplies_low_precision(features, head)

    def want(self, features: bool, head: bool, bias: bool) -> None:
        """Make room for gradients, in the accumulation dtype."""

        def room(like: Tensor | None) -> Tensor:
            assert like is not None
            return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

        self.d_features = room(self.features) if features else None
        self.d_head = room(self.head) if head else None
        self.d_bias = room(self.bias) if bias else None

    @property
    def is_wanted(self) -> bool:
        """Whether any gradient is."""
        return self.d_features is not None or self.d_head is not None or self.d_bias is not None

    @property
    def needs_room(self) -> bool:
        """Whether the logits are not there in their dtype, or would be overwritten with their gradient."""
        return self.head is not None or self.features.dtype != self.dtype or self.is_wanted

    def logits(self, begin: int, end: int, room: Tensor) -> Tensor:
        """Logits of some of the rows that count, in `room` if it is needed."""
        x, room = self._rows(begin, end), room[: end - begin]
        if self.head is None:
            return room.copy_(x) if self.needs_room else x
        if self.is_low:
            wide_product(x, self.head.T, out=room)
        else:
            x = x.to(self.dtype)
            for classes, head in self._head_parts():
                torch.mm(x, head.T, out=room[:, classes])
        return room if self.bias is None else room.add_(self.bias)

    def gradient_in(self, logits: Tensor) -> Tensor:
        """Where their gradient goes: over them, and if that may be in the dtype that it will be multiplied in."""
        if not self.is_low or self.features.dtype != torch.bfloat16 or self.d_bias is not None:
            return logits
        return logits.view(torch.bfloat16)[:, : logits.shape[1]]  # the first half of each row

    def add(self, begin: int, end: int, gradient: Tensor) -> None:
        """Add the gradient in some rows' logits [n, V] to what it means for features, head and bias."""
        if self.d_bias is not None:
            self.d_bias += gradient.sum(0)
        if self.head is None:
            self._put(begin, end, gradient)
            return
        x = self._rows(begin, end)
        if self.is_low:
            self._add_low(begin, end, gradient, x)
            return
        x = x.to(self.dtype)
        if self.d_features is not None:
            self._put(begin, end, self._to_features(gradient))
        if self.d_head is not None:
            self.d_head.addmm_(gradient.T, x)

    def _add_low(self, begin: int, end: int, wide: Tensor, x: Tensor) -> None:
        """The same by products of low precision with float32 results."""
        assert self.head is not None
        gradient, lift = _narrow(wide, x.dtype)
        if self.d_features is not None:
            rows = wide_product(gradient, self.head)
            self._put(begin, end, rows if lift is None else rows / lift)
        if self.d_head is None:
            return
        if not self.has_head_sum:
            wide_product(gradient.T, x, out=self.d_head)
            if lift is not None:
                self.d_head /= lift
            self.has_head_sum = True
            return
        # Each product is a tensor of its own: of as many classes as fit in the wide gradient, which has been read, or
        # in half a chunk.
        D = x.shape[1]
        room = wide.view(-1) if gradient is not wide else None
        if room is None or room.numel() < D:
            room = self.d_head.new_empty(min(max(gradient.numel() // 2, _WIDENED, D), self.d_head.numel()))
        size = room.numel() // D
        for first in range(0, self.d_head.shape[0], size):
            part = self.d_head[first : first + size]
            product = room[: part.numel()].view(part.shape)
            wide_product(gradient[:, first : first + size].T, x, out=product)
            part += product if lift is None else product.div_(lift)

    def _to_features(self, gradient: Tensor) -> Tensor:
        assert self.head is not None
        total = gradient.new_zeros(gradient.shape[0], self.head.shape[1])
        for classes, head in self._head_parts():
            total.addmm_(gradient[:, classes], head)
        return total

    def _rows(self, begin: int, end: int) -> Tensor:
        rows = self.features[begin:end] if self.kept is None else self.features[self.kept[begin:end]]
        if self.blank is None or self.head is None:  # without a head, the row op reads no ignored rows
            return rows
        return rows.masked_fill(self.blank[begin:end, None], 0)

    def _put(self, begin: int, end: int, rows: Tensor) -> None:
        assert self.d_features is not None
        if self.kept is None:
            self.d_features[begin:end] = rows
        else:
            self.d_features[self.kept[begin:end]] = rows

    def _parts(self) -> Iterator[slice]:
        assert self.head is not None
        V, D = self.head.shape
        size = max(_WIDENED // max(D, 1), 64)
        for first in range(0, V, size):
            yield slice(first, min(first + size, V))

    def _head_parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in its accumulation dtype: whole, or part by part so that no second head is ever there."""
        assert self.head is not None
        if self.head.dtype == self.dtype:
            yield slice(None), self.head
        else:
            for classes in self._parts():
                yield classes, self.head[classes].to(self.dtype)


def run(
    student: Projection, teacher: Projection, labels: Tensor, scale: Tensor | None, V: int, options: Options
) -> Tensor:
    """Loss of each row that counts, with weight 1: [K]. labels and scale are of these rows only.

    With a scale, scale * gradient is added to what the projections want; without, they must not want any.
    """
    K, rows = labels.shape[0], min(options.chunk_rows, max(labels.shape[0], 1))
    half, quarter = max(rows // 2, 1), max(rows // 4, 1)
    is_read = options.alpha != 1
    losses = torch.empty(K, dtype=student.dtype, device=labels.device)
    room = torch.empty(rows, V, dtype=student.dtype, device=labels.device)
    teacher_room = room.new_empty(half if is_read and teacher.needs_room else 0, V)
    for first in range(0, K, rows):
        last = min(first + rows, K)
        logits = student.logits(first, last, room)
        gradient = student.gradient_in(logits)
        for begin in range(first, last, half):
            end = min(begin + half, last)
            own = logits[begin - first : end - first]
            given = teacher.logits(begin, end, teacher_room) if is_read else own
            for top in range(begin, end, quarter):
                at = slice(top, min(top + quarter, end))
                inside = slice(top - begin, at.stop - begin)
                given_grad = given[inside] if is_read and teacher.is_wanted else None
                part = None if scale is None else scale[at]
                into = None if part is None else gradient[top - first : at.stop - first]
                losses[at] = _row_losses(own[inside], given[inside], labels[at], part, into, given_grad, options)
            if teacher.is_wanted and is_read:
                teacher.add(begin, end, given)
        if student.is_wanted:
            student.add(first, last, gradient)
    return losses


def _row_losses(
    own: Tensor,
    given: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    into: Tensor | None,
    given_grad: Tensor | None,
    options: Options,
) -> Tensor:
    """The losses of some rows; with a scale, their gradients go over the logits, and into given_grad."""
    which = choices(own.shape[1], options.ignore_index)
    rest = (None, None, labels, None, None, None)
    settings = numbers(options.temperature, options.alpha), which
    if scale is None:
        return row_divergence(own, given, *rest, None, None, *settings)
    loss, gradient = row_divergence_with_grad(own, given, *rest, None, None, *settings)
    if given_grad is not None:
        swapped = numbers(options.temperature, options.alpha, of_teacher=True), which
        given_grad.copy_(row_divergence_grad(given, own, *rest, scale, None, *swapped))
    torch.mul(gradient, scale[:, None], out=into)
    return loss
