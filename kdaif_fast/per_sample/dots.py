"""Dot products of every sample's gradient with directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._tree import product_dtype
from .directions import read_directions
from .independence import require_independence
from .paths import Path
from .recording import Recording
from .terms import Materialised, Term, Together


@torch.inference_mode(False)
def per_sample_grad_dots(
    model: nn.Module,
    batch: Any,
    direction: Tensor | Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    check_independence: bool = False,
) -> Tensor:
    """<grad l_i, direction> for every sample i: how fast each loss grows along the direction.

    One forward and one backward pass whatever the number of directions; no sample's gradient is kept. A layer that is
    linear in its parameters gives <b_i, layer(a_i; V)>, with a_i its input and b_i the gradient at its output.

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        direction: flat [P], in the order of model.named_parameters(), or a dictionary shaped like the parameters; K of
            them stacked: [K, P], or a dictionary of tensors with a leading axis K.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        check_independence: make sure that samples do not influence each other's outputs, at the cost of two more
            forward passes.

    Returns:
        [N], or [N, K] for stacked directions; float32, or float64 for float64 parameters.

    Raises:
        ValueError: a direction that does not fit the parameters, a module that mixes samples, a loss that is not [N].

    Memory: that of one training step, without the gradients.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> per_sample_grad_dots(model, batch, {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})
        tensor([-0.5000, -1.0000])
    """
    if check_independence:
        require_independence(model, batch)
    recording = Recording(model, batch, loss, params, checks=check_independence)
    directions, is_one = read_directions(direction, recording.parameters)
    dots = Dots(recording, directions)

    recording.visit(dots.take)
    return dots.total()[:, 0] if is_one else dots.total()


# Elements of terms that wait to be multiplied together, and of products that wait to be added.
_MOST_WAITING = 1 << 22
# Elements of a term whose product costs less than the call: some microseconds' worth of memory traffic.
_SMALL_ON_CPU, _SMALL_ON_GPU = 1 << 15, 1 << 18


class Dots:
    """Dot products with directions, being summed over the terms of a recording.

    Args:
        recording: whose terms they are.
        directions: {name: [K, *shape]}.
        keeps: whether the terms, after their products, are wanted for a weighted sum: `kept`.
    """

    def __init__(self, recording: Recording, directions: dict[str, Tensor], *, keeps: bool = False) -> None:
        K = len(next(iter(directions.values())))
        self._dtype, self._device = product_dtype(recording.parameters.values()), recording.losses.device
        self._shape = (recording.samples, K)
        self._directions, self._keeps = directions, keeps
        self._pushed: dict[Path, Tensor] = {}
        self._small: list[tuple[Path, Materialised]] = []
        self._small_elements = 0
        self._products: list[Tensor] = []
        self.kept: list[tuple[Path, Term]] = []

    def take(self, terms: list[tuple[Path, Term]]) -> None:
        """Multiply the terms of a junction; small ones wait for others."""
        for path, term in terms:
            if isinstance(term, Materialised) and _is_small(path, term):
                self._small.append((path, term))
                self._small_elements += term.values.numel()
                if self._small_elements > _MOST_WAITING:
                    self._multiply_small()
            elif self._keeps:
                product, rest = term.step(self._along(path))
                self._add(product)
                self.kept.append((path, rest))
            else:
                self._add(term.dots(self._along(path)))

    def total(self) -> Tensor:
        """[N, K], of all terms so far."""
        if self._small:
            self._multiply_small()
        if len(self._products) != 1 or self._products[0].dtype != self._dtype:
            self._products = [self._sum()]
        return self._products[0]

    def _along(self, path: Path) -> Tensor:
        """The directions at the end of a path: [K, *shape]."""
        if path not in self._pushed:
            self._pushed[path] = path.push(self._directions)
        return self._pushed[path]

    def _multiply_small(self) -> None:
        together = Together([term for _, term in self._small])
        along = [self._along(path) for path, _ in self._small]
        self._add(together.dots(torch.cat([v if v.dim() == 2 else v.reshape(len(v), -1) for v in along], 1)))
        if self._keeps:
            self.kept.extend((path, part) for (path, _), part in zip(self._small, together.parts, strict=True))
        self._small, self._small_elements = [], 0

    def _add(self, product: Tensor) -> None:
        self._products.append(product)
        if len(self._products) * product.numel() > _MOST_WAITING:
            self._products = [self._sum()]

    def _sum(self) -> Tensor:
        if not self._products:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return torch.stack([product.to(self._dtype) for product in self._products]).sum(0)


def _is_small(path: Path, term: Materialised) -> bool:
    """Whether it is of a whole parameter as it is, and costs less work than the call that multiplies it."""
    small = _SMALL_ON_GPU if term.values.is_cuda else _SMALL_ON_CPU
    is_whole = path.leaf is not None and not path.transposes
    return is_whole and term.values.numel() <= small and not term.dtype.is_complex
