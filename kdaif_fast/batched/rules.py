"""How the kinds of autograd nodes take K cotangents at once.

A rule gets a node, its K cotangents (one [K, *shape] or None per output of the forward operation), the shapes wanted of
its K gradients (None where none is), and gives those gradients. A gradient may still have the shape that broadcasting
made of it: whoever receives it sums. Kinds without a rule are called once per vector, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .convolutions import convolution, convolution_twice
from .norms import norm_grad
from .terms import Product, Term

Rule = Callable[[Any, Sequence[Tensor | None], Sequence[torch.Size | None]], Sequence[Term | None]]

# fmt: off
_ELEMENTWISE = (
    "Abs", "Add", "Clamp", "Cos", "Div", "Exp", "Gelu", "LeakyRelu", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Relu",
    "Rsqrt", "Rsub", "Sigmoid", "SigmoidBackward", "Silu", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "TanhBackward",
)
# fmt: on

# Nodes whose formulas are made of elementwise operations: K cotangents broadcast against what they saved.
ELEMENTWISE = frozenset(f"{name}Backward{index}" for name in _ELEMENTWISE for index in (0, 1))

# Nodes that put the same elements, in the same order, into another shape.
_RESHAPES = frozenset(
    f"{name}Backward{index}"
    for name in ("Alias", "Clone", "ReshapeAlias", "Squeeze", "ToCopy", "UnsafeView", "Unsqueeze", "View")
    for index in (0, 1, 2)
)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number  # saved dimensions are shown without their sign


def _given(cotangents: Sequence[Tensor | None]) -> Tensor:
    (cotangent,) = cotangents
    assert cotangent is not None
    return cotangent


def _reshape(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given = _given(cotangents)
    assert wanted[0] is not None
    return [given.reshape(len(given), *wanted[0])]


def _expand(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    return [_given(cotangents)]  # the receiver sums over what was expanded


def _transpose(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given = _given(cotangents)
    first, second = (_signed(dim) % (given.dim() - 1) + 1 for dim in (node._saved_dim0, node._saved_dim1))
    return [given.transpose(first, second)]


def _permute(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given = _given(cotangents)
    dims = [_signed(dim) % (given.dim() - 1) for dim in node._saved_dims]
    back = sorted(range(len(dims)), key=dims.__getitem__)
    return [given.permute(0, *(1 + dim for dim in back))]


def _sum(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given, (shape,) = _given(cotangents), wanted
    assert shape is not None
    kept = list(shape)
    dims = [] if node.name().endswith("0") else [_signed(dim) % max(1, len(shape)) for dim in node._saved_dim or ()]
    for dim in dims or range(len(shape)):
        kept[dim] = 1
    return [given.reshape(len(given), *kept).expand(len(given), *shape)]


def _mean(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given, shape = _given(cotangents), wanted[0]
    assert shape is not None
    return _sum(node, [given * (given[0].numel() / max(1, shape.numel()))], wanted)


def _matrix_products(given: Tensor, left: Tensor | None, right: Tensor | None) -> list[Term | None]:
    """The gradients of left @ right, as products that are not formed yet."""
    return [
        None if right is None else Product(given, right.mT.conj()),
        None if left is None else Product(left.mT.conj(), given),
    ]


def _mm(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term | None]:
    to_left, to_right = wanted
    left = None if to_right is None else node._saved_self
    right = None if to_left is None else node._saved_mat2
    return _matrix_products(_given(cotangents), left, right)


def _addmm(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Term | None]:
    given = _given(cotangents)
    _, to_left, to_right = wanted
    left = None if to_right is None else node._saved_mat1
    right = None if to_left is None else node._saved_mat2
    alpha, beta = node._saved_alpha, node._saved_beta
    scaled = given if alpha == 1 else given * alpha
    return [given if beta == 1 else given * beta, *_matrix_products(scaled, left, right)]


def _bmm(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term | None]:
    given = _given(cotangents)
    to_left = to_right = None
    if wanted[0] is not None:  # by a loop: the operand without a K would have to be copied K times for one call
        to_left, right = given.new_empty(len(given), *wanted[0]), node._saved_mat2.mT
        for one, out in zip(given, to_left, strict=True):
            torch.bmm(one, right, out=out)
    if wanted[1] is not None:
        to_right, left = given.new_empty(len(given), *wanted[1]), node._saved_self.mT
        for one, out in zip(given, to_right, strict=True):
            torch.bmm(left, one, out=out)
    return [to_left, to_right]


def _softmax(node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]) -> Sequence[Term]:
    given, outputs = _given(cotangents), node._saved_result
    return [_softmax_gradient(given, outputs, _axis(node, outputs))]


def _softmax_twice(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Term | None]:
    """Of y * (u - <u, y>) in u and y: symmetric in u and the cotangent, save for the factor y."""
    given, u, y = _given(cotangents), node._saved_grad_output, node._saved_output
    axis = _axis(node, y)
    to_outputs = None
    if wanted[1] is not None:
        along = (given * y).sum(axis, keepdim=True)
        to_outputs = (given - along) * u - given * (u * y).sum(axis, keepdim=True)
    return [None if wanted[0] is None else _softmax_gradient(given, y, axis), to_outputs]


def _threshold_twice(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Term | None]:
    """Piecewise linear: nothing in the inputs, where PyTorch goes on with zeros."""
    given = _given(cotangents)
    return [torch.ops.aten.threshold_backward(given, node._saved_self, node._saved_threshold), None]


def _max_pool_twice(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Term | None]:
    """The backward pass scatters to the largest inputs; its own gathers from there. Nothing in the inputs."""
    given, indices = _given(cotangents), node._saved_indices
    from_places = indices.flatten(-2).expand(len(given), *indices.shape[:-2], -1)
    return [given.flatten(-2).gather(-1, from_places).reshape(len(given), *indices.shape), None]


def _axis(node: Any, outputs: Tensor) -> int:
    return _signed(node._saved_dim) % outputs.dim() - outputs.dim()  # from the right: there may be a K on the left


def _softmax_gradient(given: Tensor, outputs: Tensor, axis: int) -> Tensor:
    product = given * outputs
    return product.addcmul_(outputs.expand_as(product), product.sum(axis, keepdim=True), value=-1)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    "ExpandBackward0": _expand,
    "TransposeBackward0": _transpose,
    "PermuteBackward0": _permute,
    "SumBackward0": _sum,
    "SumBackward1": _sum,
    "MeanBackward0": _mean,
    "MeanBackward1": _mean,
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "BmmBackward0": _bmm,
    "SoftmaxBackward0": _softmax,
    "SafeSoftmaxBackward0": _softmax,
    "SoftmaxBackwardDataBackward0": _softmax_twice,
    "ThresholdBackwardBackward0": _threshold_twice,
    "MaxPool2DWithIndicesBackwardBackward0": _max_pool_twice,
    "_NormGradBackward": norm_grad,
    "ConvolutionBackward0": convolution,
    "ConvolutionBackwardBackward0": convolution_twice,
}
"""Kind of node -> its rule."""
