"""Products with the Jacobian of a network whose layers follow one another, for one vector, without a graph engine.

A node of a kept graph holds what its layer's derivative needs. Where each node has one predecessor, J^T u is a walk
from the outputs to the inputs and J v one the other way, in plain tensor operations: of small networks the engine, and
the graph of the backward pass that J v would go through, take about as long as the matrix products themselves.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .backward import NotBatchableError

CHUNK = 2 << 20
"""Bytes of the largest tangent between two layers that are under way together on a CPU.

More than a few MB are returned to the system by the allocator and come back as page faults, which took longer than the
convolutions of a small network (5,600 faults, 11 of 29 ms a product). With 0.5 MB a product takes 23 ms, 1 MB 19, 2 MB
18 (the network "cnn" of benchmarks/influence_problem.py, 1,200 samples).
"""

_LEAF, _TRANSPOSE = "torch::autograd::AccumulateGrad", "TBackward0"
_RESHAPES = frozenset(("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "AliasBackward0"))
# One input, one output: the derivative is a diagonal matrix, its own transpose.
_DIAGONAL = frozenset(
    f"{name}Backward{index}"
    for name in ("Elu", "Gelu", "Hardtanh", "LeakyRelu", "Sigmoid", "Silu", "Softplus", "Tanh")
    for index in (0, 1)
)
_backward = torch.ops.aten.convolution_backward.default
_unpool = torch.ops.aten.max_pool2d_with_indices_backward.default
_relu = torch.ops.aten.threshold_backward.grad_input


class _Layer(ABC):
    """A node, and where in the flat vector its weight and bias are: None where it has none that is asked for."""

    by_sample: ClassVar[tuple[str, ...] | None] = None
    """The attributes that are tensors with an axis of samples; None: the layer takes all samples or none."""

    def __init__(self, weight: tuple[slice, torch.Size] | None, bias: tuple[slice, torch.Size] | None) -> None:
        if weight is None and bias is not None:
            raise NotBatchableError("a bias without its weight")
        self.weight, self.bias = weight, bias

    @abstractmethod
    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        """The outputs' change from that of the inputs (None: they do not change), which may be overwritten."""

    @abstractmethod
    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        """The inputs' gradient if wanted, from that of the outputs, which may be overwritten.

        The parameters' gradients are written to the product (beta 0), or added to it (beta 1).
        """

    def rows(self, chosen: slice) -> _Layer:
        """The same for some of the samples; tensors are shared."""
        layer = copy.copy(self)
        for name in self.by_sample or ():
            value = getattr(self, name)
            setattr(layer, name, None if value is None else value[chosen])
        return layer


def _part(vector: Tensor, place: tuple[slice, torch.Size]) -> Tensor:
    return vector[place[0]].view(place[1])


def _write(target: Tensor, value: Tensor, beta: int) -> None:
    target.add_(value) if beta else target.copy_(value)


class _Linear(_Layer):
    by_sample = ("inputs",)

    def __init__(self, node: Any, has_bias: bool, weight: Any, bias: Any) -> None:
        super().__init__(weight, bias)
        self.inputs: Any = (node._saved_mat1 if has_bias else node._saved_self) if weight is not None else None
        self.matrix: Any = node._saved_mat2  # [in, out]; None in the first layer
        if has_bias and (node._saved_alpha != 1 or node._saved_beta != 1):
            raise NotBatchableError("a scaled addmm")

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        total = None if tangent is None else torch.mm(tangent, self.matrix)
        if self.weight is not None:
            direction = _part(vector, self.weight).T
            if total is not None:
                total.addmm_(self.inputs, direction)
            elif self.bias is not None:
                return torch.addmm(_part(vector, self.bias), self.inputs, direction)
            else:
                return torch.mm(self.inputs, direction)
        if self.bias is not None and total is not None:
            total.add_(_part(vector, self.bias))
        return total

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        if self.weight is not None:
            _part(product, self.weight).addmm_(cotangent.T, self.inputs, beta=beta)
        if self.bias is not None:
            _write(_part(product, self.bias), cotangent.sum(0), beta)
        return torch.mm(cotangent, self.matrix.T) if wanted else None


class _Convolution(_Layer):
    by_sample = ("inputs",)

    def __init__(self, node: Any, weight: Any, bias: Any) -> None:
        super().__init__(weight, bias)
        self.inputs, self.kernel = node._saved_input, node._saved_weight
        self.settings = (
            *(node._saved_stride, node._saved_padding, node._saved_dilation),
            *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
        )
        if self.inputs is None or self.kernel is None:
            raise NotBatchableError("a convolution that has not kept its inputs")

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        total = None if tangent is None else torch.convolution(tangent, self.kernel, None, *self.settings)
        bias = None if self.bias is None else _part(vector, self.bias)
        if self.weight is not None:
            own = torch.convolution(self.inputs, _part(vector, self.weight), bias, *self.settings)
            return own if total is None else total.add_(own)
        return total

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        mask = [wanted, self.weight is not None, self.bias is not None]
        sizes = None if self.bias is None else list(self.bias[1])
        gradients = _backward(cotangent, self.inputs, self.kernel, sizes, *self.settings, mask)
        for place, gradient in ((self.weight, gradients[1]), (self.bias, gradients[2])):
            if place is not None:
                _write(_part(product, place), gradient, beta)
        return gradients[0]


class _Relu(_Layer):
    by_sample = ("outputs",)

    def __init__(self, node: Any) -> None:
        super().__init__(None, None)
        self.outputs = node._saved_result

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        return None if tangent is None else _relu(tangent, self.outputs, 0, grad_input=tangent)

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        return _relu(cotangent, self.outputs, 0, grad_input=cotangent)


class _Diagonal(_Layer):
    def __init__(self, node: Any) -> None:
        super().__init__(None, None)
        self.node = node

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        return None if tangent is None else self.node(tangent)

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        return self.node(cotangent)


class _MaxPool(_Layer):
    """Gathers from the largest inputs; its transpose is PyTorch's own backward pass."""

    by_sample = ("inputs", "indices", "places")

    def __init__(self, node: Any) -> None:
        super().__init__(None, None)
        self.inputs, self.indices = node._saved_self, node._saved_result1
        self.places = self.indices.flatten(-2)
        self.settings = (
            *(node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation),
            node._saved_ceil_mode,
        )

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        return None if tangent is None else tangent.flatten(-2).gather(-1, self.places).view_as(self.indices)

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        return _unpool(cotangent, self.inputs, *self.settings, self.indices)


class _Reshape(_Layer):
    """Between shapes of a sample: both have an axis of samples first, or one chunk takes all of them."""

    by_sample = ()

    def __init__(self, inputs: torch.Size, outputs: torch.Size, samples: int) -> None:
        super().__init__(None, None)
        if inputs[0] != samples or outputs[0] != samples:
            raise NotBatchableError("samples are not the first axis throughout")
        self.inputs, self.outputs = inputs[1:], outputs[1:]

    def push(self, tangent: Tensor | None, vector: Tensor) -> Tensor | None:
        return None if tangent is None else tangent.reshape(len(tangent), *self.outputs)

    def pull(self, cotangent: Tensor, product: Tensor, wanted: bool, beta: int) -> Tensor | None:
        return cotangent.reshape(len(cotangent), *self.inputs)


class Chain:
    """J v and J^T u of a network of layers one after the other, for one vector.

    Args:
        outputs: a tensor with a graph, which has to be kept.
        inputs: leaves; together they are the flat vector, in this order.

    Raises:
        NotBatchableError: the graph is no chain of kinds of nodes that are known here, of one dtype.
    """

    def __init__(self, outputs: Tensor, inputs: Sequence[Tensor]) -> None:
        first = inputs[0]
        if any(type(x) not in (Tensor, nn.Parameter) for x in inputs) or type(outputs) is not Tensor:
            raise NotBatchableError("tensors of a kind of their own")
        if any(x.dtype != outputs.dtype for x in inputs) or outputs.dtype not in (torch.float32, torch.float64):
            raise NotBatchableError("several dtypes, or half precision")
        self._outputs, self._inputs = outputs, list(inputs)
        self._count, self._like = sum(x.numel() for x in inputs), first
        self._places: dict[Tensor, tuple[slice, torch.Size]] = {}
        start = 0
        for leaf in inputs:
            self._places[leaf] = slice(start, start + leaf.numel()), leaf.shape
            start += leaf.numel()
        self._leaves: list[Tensor] = []  # all that the graph reaches
        self._layers: list[_Layer] = []
        node, shape = outputs.grad_fn, outputs.shape
        self._samples, largest = shape[0], shape.numel()
        while node is not None:
            layer, node = self._read(node, shape)
            self._layers.append(layer)
            if node is not None:
                shape = torch.Size(node._input_metadata[0].shape)
                largest = max(largest, shape.numel())
        while self._layers and self._layers[-1].weight is None and self._layers[-1].bias is None:
            self._layers.pop()  # nothing asked for from here on
        if not self._layers:
            raise NotBatchableError("no parameter is reached")
        if len(set(self._leaves)) < len(self._leaves):
            raise NotBatchableError("a parameter is used twice")
        kept = [value for layer in self._layers for value in vars(layer).values() if isinstance(value, Tensor)]
        self._watched = [*self._leaves, *kept]
        self._versions = [tensor._version for tensor in self._watched]
        self._chunks = self._cut(largest * outputs.element_size())
        self.kinds = tuple(type(layer).__name__ for layer in self._layers)
        self._covers = sum(leaf.numel() for leaf in self._leaves if leaf in self._places) == self._count

    def _cut(self, largest: int) -> list[tuple[slice, list[_Layer]]]:
        """The layers for some samples at a time, so that what flows between them stays in a CPU's caches."""
        count = 1 + largest // CHUNK if self._like.device.type == "cpu" else 1
        if count == 1 or any(layer.by_sample is None for layer in self._layers):
            return [(slice(0, self._samples), self._layers)]
        step = -(-self._samples // count)
        chosen = [slice(start, min(start + step, self._samples)) for start in range(0, self._samples, step)]
        return [(rows, [layer.rows(rows) for layer in self._layers]) for rows in chosen]

    def _read(self, node: Any, shape: torch.Size) -> tuple[_Layer, Any]:
        """A node as a layer, and the node before it."""
        kind, before = node.name(), [child for child, _ in node.next_functions]
        if kind in ("AddmmBackward0", "MmBackward0"):
            has_bias = kind == "AddmmBackward0"
            bias = self._place(before[0]) if has_bias else None
            return _Linear(node, has_bias, self._place(before[-1], transposed=True), bias), before[-2]
        if kind == "ConvolutionBackward0":
            return _Convolution(node, self._place(before[1]), self._place(before[2])), before[0]
        (previous,) = before if len(before) == 1 else (None,)
        if previous is None:
            raise NotBatchableError(f"{kind} is not known here")
        inputs = torch.Size(previous._input_metadata[0].shape)
        if kind == "ReluBackward0":
            return _Relu(node), previous
        if kind == "MaxPool2DWithIndicesBackward0":
            return _MaxPool(node), previous
        if kind in _RESHAPES:
            return _Reshape(inputs, shape, self._samples), previous
        if kind in _DIAGONAL:
            return _Diagonal(node), previous
        raise NotBatchableError(f"{kind} is not known here")

    def _place(self, node: Any, transposed: bool = False) -> tuple[slice, torch.Size] | None:
        if node is None:  # frozen
            return None
        if transposed:
            if node.name() != _TRANSPOSE:
                raise NotBatchableError("a product with something that is no layer's weight")
            node = node.next_functions[0][0]
        if node.name() != _LEAF:
            raise NotBatchableError("a weight that is computed")
        self._leaves.append(node.variable)
        return self._places.get(node.variable)

    @property
    def is_current(self) -> bool:
        """Whether no parameter, and nothing that the layers keep, was written to since the network ran."""
        return all(tensor._version == version for tensor, version in zip(self._watched, self._versions, strict=True))

    @torch.no_grad()
    def push(self, vector: Tensor) -> Tensor:
        """J v: [P] -> shaped like the outputs."""
        vector = vector.to(self._like.dtype).contiguous()
        tangents = []
        for _, layers in self._chunks:
            tangent = None
            for layer in reversed(layers):
                tangent = layer.push(tangent, vector)
            assert tangent is not None
            tangents.append(tangent)
        return tangents[0] if len(tangents) == 1 else torch.cat(tangents)

    @torch.no_grad()
    def pull(self, cotangent: Tensor) -> Tensor:
        """J^T u: shaped like the outputs -> [P]."""
        make = torch.empty if self._covers else torch.zeros
        product = make(self._count, dtype=self._like.dtype, device=self._like.device)
        for beta, (rows, layers) in enumerate(self._chunks):
            wanted: Tensor | None = cotangent[rows].clone()  # layers write over what they are given
            for position, layer in enumerate(layers):
                assert wanted is not None
                wanted = layer.pull(wanted, product, position + 1 < len(layers), min(1, beta))
        return product

    def agrees(self, tolerance: float) -> bool:
        """Whether J^T u is what PyTorch's engine gives, and J v its transpose, to this relative error.

        A hook on a tensor, say, is nothing that a graph shows from outside.
        """
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, self._outputs.shape, generator=generator).mul_(2).sub_(1)
        u = signs.to(device=self._outputs.device, dtype=self._outputs.dtype)
        found = torch.autograd.grad(self._outputs, self._inputs, u, retain_graph=True, allow_unused=True)
        pieces = [
            x.new_zeros(x.numel()) if g is None else g.flatten() for g, x in zip(found, self._inputs, strict=True)
        ]
        expected = torch.cat(pieces)
        size = expected.norm()
        if not (self.pull(u) - expected).norm() <= tolerance * size:
            return False
        return bool(((self.push(expected) * u).sum() - size**2).abs() <= tolerance * size**2)
