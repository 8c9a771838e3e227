"""Which form the per-sample gradients of a node have. A node without a rule here gets the generic term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tree import wide_dtype
from .graph import Edge, Graph
from .layout import Layout, Scattered
from .terms import BroadcastTerm, ConvolutionTerm, EmbeddingTerm, LinearTerm, Materialised, Term
from .terms.base import NoRule
from .terms.convolution import Convolution

_KERNELS = torch.ops.kdaif_fast


class Meeting:
    """A junction in one pass: the node, and the gradient b that has arrived at its outputs.

    Args:
        node: of the autograd graph.
        output_grads: one for each of its outputs; None where there is none.
        layouts: of these.
        samples: N.
        edges: of the inputs that come from parameters, by their position.
        graph: theirs.
        saved: what the node has saved, if it had to be read early.
    """

    def __init__(
        self,
        node: Any,
        output_grads: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
        samples: int,
        edges: dict[int, Edge],
        graph: Graph,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.node, self.output_grads, self.layouts, self.samples = node, output_grads, layouts, samples
        self.edges, self._graph, self._saved = edges, graph, saved

    def shape(self, position: int) -> torch.Size:
        """The shape of an input that comes from parameters."""
        return self._graph.shape(self.edges[position])

    def saved(self, name: str) -> Any:
        """What the node has saved of its forward pass."""
        if self._saved is not None:
            return self._saved[name]
        try:
            value = getattr(self.node, f"_saved_{name}")
        except AttributeError:  # a torch that has renamed it
            raise NoRule from None
        return value

    @property
    def b(self) -> Tensor:
        """The gradient of the node's first output."""
        b = self.output_grads[0]
        if b is None or self.layouts[0] is None or b.is_complex():  # the rules conjugate nothing
            raise NoRule
        return b

    @property
    def layout(self) -> Layout:
        """The layout of the node's first output."""
        layout = self.layouts[0]
        if layout is None or (isinstance(layout, Scattered) and layout.owner.dim() > 1):
            raise NoRule
        return layout

    def positions(self, x: Tensor, last: int = 1) -> Tensor:
        """[N, T, ...] from a tensor laid out like b, with its last axes kept."""
        layout = self.layout
        if layout.axis >= x.dim() - last:
            raise NoRule
        if layout.axis == 0 and x.dim() == last + 2 and x.shape[0] == self.samples and type(layout) is Layout:
            return x
        x = layout.per_sample(x, self.samples)
        return x if x.dim() == last + 2 else x.flatten(1, x.dim() - last - 1)

    def broadcast(self, values: Tensor, position: int) -> Term:
        """The term of a parameter that was broadcast to the node's output."""
        return BroadcastTerm(values, self.layout, self.samples, self.shape(position))


Rule = Callable[[Meeting], dict[int, Term]]


class NodeRule(NamedTuple):
    """How to make the terms of one kind of node, and which saved values that takes."""

    make: Rule
    saved: tuple[str, ...]


NODE_RULES: dict[str, NodeRule] = {}


def node_rule(*names: str, saved: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """Register the rule of the nodes with these names."""

    def register(make: Rule) -> Rule:
        NODE_RULES.update(dict.fromkeys(names, NodeRule(make, saved)))
        return make

    return register


def _product(m: Meeting, left: str, right: str, left_at: int, right_at: int) -> dict[int, Term]:
    """z = left @ right, both matrices; samples are rows of z, or its columns."""
    terms: dict[int, Term] = {}
    if right_at in m.edges:
        if m.layout.axis != 0:
            raise NoRule
        terms[right_at] = LinearTerm(m.positions(m.saved(left)), m.positions(m.b), transposed=True)
    if left_at in m.edges:
        if m.layout.axis != 1:
            raise NoRule
        columns = Layout(0, m.layout.interleaved)
        a, b = (columns.per_sample(x.T, m.samples) for x in (m.saved(right), m.b))
        terms[left_at] = LinearTerm(a, b)
    return terms


@node_rule("AddmmBackward0", saved=("mat1", "mat2", "alpha", "beta"))
def _addmm(m: Meeting) -> dict[int, Term]:
    if m.saved("alpha") != 1 or m.saved("beta") != 1:
        raise NoRule
    terms = _product(m, "mat1", "mat2", 1, 2)
    if 0 in m.edges:
        terms[0] = m.broadcast(m.b, 0)
    return terms


@node_rule("MmBackward0", saved=("self", "mat2"))
def _mm(m: Meeting) -> dict[int, Term]:
    return _product(m, "self", "mat2", 0, 1)


@node_rule("MvBackward0", saved=("self",))
def _mv(m: Meeting) -> dict[int, Term]:
    if 0 in m.edges or m.layout.axis != 0:
        raise NoRule
    return {1: LinearTerm(m.positions(m.saved("self")), m.positions(m.b.unsqueeze(1)), shape=m.shape(1))}


@node_rule("BmmBackward0", saved=("self", "mat2"))
def _bmm(m: Meeting) -> dict[int, Term]:
    if m.b.shape[0] != 1 or m.layout.axis != 1 or 0 in m.edges:
        raise NoRule
    a, b = (Layout(0, m.layout.interleaved).per_sample(x[0], m.samples) for x in (m.saved("self"), m.b))
    return {1: LinearTerm(a, b, transposed=True, shape=m.shape(1))}


@node_rule("LinearBackward0", saved=("input",))
def _linear(m: Meeting) -> dict[int, Term]:
    terms: dict[int, Term] = {}
    if 0 in m.edges:
        raise NoRule
    if 1 in m.edges:
        terms[1] = LinearTerm(m.positions(m.saved("input")), m.positions(m.b))
    if 2 in m.edges:
        terms[2] = m.broadcast(m.b, 2)
    return terms


@node_rule("TrilinearBackward0", saved=("i1", "i3", "sumdim"))
def _bilinear(m: Meeting) -> dict[int, Term]:
    # nn.Bilinear calls it on [R, 1, I1, 1], [1, O, I1, I2], [R, 1, 1, I2], summed over the last two: z is [R, O].
    if list(m.edges) != [1] or list(m.saved("sumdim")) != [2, 3] or m.layout.axis != 0 or m.b.dim() != 2:
        raise NoRule
    x, y = m.positions(m.saved("i1")), m.positions(m.saved("i3"))
    pairs = (x.unsqueeze(3) * y.unsqueeze(2)).flatten(2)
    return {1: LinearTerm(pairs, m.positions(m.b), shape=m.shape(1))}


@node_rule("AddBackward0", saved=("alpha",))
def _add(m: Meeting) -> dict[int, Term]:
    return {at: m.broadcast(m.b if at == 0 else _times(m.b, m.saved("alpha")), at) for at in m.edges}


@node_rule("SubBackward0", saved=("alpha",))
def _sub(m: Meeting) -> dict[int, Term]:
    return {at: m.broadcast(m.b if at == 0 else _times(m.b, -m.saved("alpha")), at) for at in m.edges}


def _times(b: Tensor, factor: float) -> Tensor:
    return b if factor == 1 else b * factor


@node_rule("ExpandBackward0")
def _expand(m: Meeting) -> dict[int, Term]:
    return {0: m.broadcast(m.b, 0)}


@node_rule("RepeatBackward0", saved=("repeats",))
def _repeat(m: Meeting) -> dict[int, Term]:
    if m.b.dim() != 1 or len(m.shape(0)) != 1 or m.layout.interleaved:
        raise NoRule
    per_sample = m.layout.per_sample(m.b, m.samples)
    return {0: Materialised(per_sample.unflatten(1, (-1, m.shape(0)[0])).sum(1))}


@node_rule("MulBackward0", saved=("self", "other"))
def _mul(m: Meeting) -> dict[int, Term]:
    terms: dict[int, Term] = {}
    for at, other in ((0, "other"), (1, "self")):
        if at not in m.edges:
            continue
        factor = m.saved(other)
        if factor is None:
            raise NoRule
        alike = factor.shape == m.b.shape and factor.dtype == m.b.dtype
        if alike and m.shape(at) == m.b.shape[-1:] and m.layout.axis < m.b.dim() - 1:
            x, b = m.positions(factor), m.positions(m.b)
            terms[at] = Materialised(_layer_norm_grads(x, b, None, x.new_ones(1, 1).expand(x.shape[:2]))[0])
        else:
            terms[at] = m.broadcast(m.b * factor, at)
    return terms


@node_rule("PreluKernelBackward0", saved=("self",))
def _prelu(m: Meeting) -> dict[int, Term]:
    if 0 in m.edges:
        raise NoRule
    return {1: m.broadcast(m.b * m.saved("self").clamp(max=0), 1)}


@node_rule("NativeLayerNormBackward0", saved=("input", "normalized_shape", "result1", "result2"))
def _layer_norm(m: Meeting) -> dict[int, Term]:
    last = len(m.saved("normalized_shape"))
    x, b = (m.positions(y, last).flatten(2) for y in (m.saved("input"), m.b))
    mean, rstd = (m.positions(m.saved(name), last).flatten(1) for name in ("result1", "result2"))
    return _affine(m, _layer_norm_grads(x, b, mean, rstd))


# What is passed is right by construction, and nobody differentiates it: straight to the kernels, past all checks.
def _layer_norm_grads(x: Tensor, b: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != b.dtype:
        raise NoRule
    wide = wide_dtype(x.dtype)
    dw, dc = _KERNELS.persample_layer_norm.default(x, b, None if mean is None else mean.to(wide), rstd.to(wide))
    return dw, dc


def _group_norm_grads(x: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != b.dtype:
        raise NoRule
    wide = wide_dtype(x.dtype)
    dw, dq = _KERNELS.persample_group_norm.default(x, b, mean.to(wide), rstd.to(wide))
    return dw, dq


@node_rule("NativeGroupNormBackward0", saved=("input", "C", "HxW", "result1", "result2"))
def _group_norm(m: Meeting) -> dict[int, Term]:
    if m.layout.axis != 0:
        raise NoRule
    x, b = (y.flatten(2) if y.dim() > 2 else y.unsqueeze(2) for y in (m.saved("input"), m.b))
    return _affine(m, _by_sample(m, _group_norm_grads(x, b, m.saved("result1"), m.saved("result2"))))


@node_rule(
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    saved=("input", "training", "running_mean", "running_var", "eps"),
)
def _batch_norm(m: Meeting) -> dict[int, Term]:
    if m.saved("training") or m.layout.axis != 0 or 0 in m.edges:
        raise NoRule
    x, b = (y.flatten(2) if y.dim() > 2 else y.unsqueeze(2) for y in (m.saved("input"), m.b))
    rstd = (m.saved("running_var") + m.saved("eps")).rsqrt()
    mean, rstd = (s.expand(len(x), -1) for s in (m.saved("running_mean"), rstd))
    return _affine(m, _by_sample(m, _group_norm_grads(x, b, mean, rstd)))


def _by_sample(m: Meeting, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[rows, D] -> [N, D]."""
    return m.layout.sum_rows(grads[0], m.samples), m.layout.sum_rows(grads[1], m.samples)


def _affine(m: Meeting, grads: tuple[Tensor, Tensor]) -> dict[int, Term]:
    """Gradients of scale (input 1) and shift (input 2), [N, D]."""
    terms: dict[int, Term] = {}
    for at, values in zip((1, 2), grads, strict=True):
        if at in m.edges:
            terms[at] = Materialised(values.reshape(m.samples, *m.shape(at)))
    if set(terms) != set(m.edges):
        raise NoRule
    return terms


@node_rule("EmbeddingBackward0", saved=("indices", "padding_idx", "scale_grad_by_freq", "sparse"))
def _embedding(m: Meeting) -> dict[int, Term]:
    indices, b = m.saved("indices"), m.b
    if m.layout.axis >= indices.dim():
        raise NoRule
    if m.saved("padding_idx") >= 0:
        b = b.masked_fill((indices == m.saved("padding_idx")).unsqueeze(-1), 0)
    if m.saved("scale_grad_by_freq"):  # as autograd has it: by how often the whole batch looks a row up
        counts = torch.bincount(indices.reshape(-1), minlength=m.shape(0)[0])
        b = b / counts[indices].unsqueeze(-1)
    b, places = m.positions(b), m.positions(indices.unsqueeze(-1)).squeeze(-1)
    return {0: EmbeddingTerm(places, b, m.shape(0), sparse=m.saved("sparse"))}


@node_rule("IndexBackward0", saved=("indices",))
def _index(m: Meeting) -> dict[int, Term]:
    # table[tokens]
    table, places = m.shape(0), m.saved("indices")
    if len(table) != 2 or len(places) != 1 or places[0] is None or places[0].is_floating_point():
        raise NoRule
    return _look_up(m, places[0], table)


@node_rule("IndexSelectBackward0", saved=("index", "dim"))
def _index_select(m: Meeting) -> dict[int, Term]:
    table = m.shape(0)
    if len(table) != 2 or m.saved("dim") != 0:
        raise NoRule
    return _look_up(m, m.saved("index"), table)


def _look_up(m: Meeting, places: Tensor, table: torch.Size) -> dict[int, Term]:
    if places.dtype in (torch.bool, torch.uint8) or m.layout.axis >= places.dim():
        raise NoRule
    rows = m.positions(places.long().remainder(table[0]).unsqueeze(-1)).squeeze(-1)
    return {0: EmbeddingTerm(rows, m.positions(m.b), table)}


@node_rule(
    "EmbeddingBagBackward0",
    saved=(
        *("indices", "offsets", "result1", "result2", "mode", "padding_idx", "per_sample_weights", "sparse"),
        "scale_grad_by_freq",
    ),
)
def _embedding_bag(m: Meeting) -> dict[int, Term]:
    mode, indices = m.saved("mode"), m.saved("indices")
    if mode == 2 or set(m.edges) != {0} or m.layout.axis != 0 or m.layout != Layout(0):
        raise NoRule
    if len(m.b) != m.samples or m.saved("scale_grad_by_freq"):
        raise NoRule
    bag = m.saved("result1")  # which bag each index is in; empty where a sum has found it out as it went
    if bag.numel() != indices.numel():
        offsets = m.saved("offsets")
        if len(offsets) > m.samples and int(offsets[-1]) != len(indices):  # indices after the last bag
            raise NoRule
        bag = torch.searchsorted(offsets[: m.samples], torch.arange(len(indices), device=indices.device), right=True)
        bag = bag - 1
    scale = m.b.new_ones(len(indices))
    if mode == 1:
        scale = 1 / m.saved("result2").to(m.b.dtype)[bag]
    if m.saved("per_sample_weights") is not None:
        scale = scale * m.saved("per_sample_weights")
    if m.saved("padding_idx") >= 0:
        scale = scale * (indices != m.saved("padding_idx"))
    counts = torch.bincount(bag, minlength=m.samples)
    first = counts.cumsum(0) - counts
    T = max(1, int(counts.max()))
    place = torch.arange(len(bag), device=bag.device) - first[bag]
    padded = indices.new_zeros(m.samples, T)
    padded[bag, place] = indices
    factor = scale.new_zeros(m.samples, T)
    factor[bag, place] = scale
    return {0: EmbeddingTerm(padded, m.b.unsqueeze(1) * factor.unsqueeze(2), m.shape(0), sparse=m.saved("sparse"))}


@node_rule(
    "ConvolutionBackward0",
    saved=("input", "stride", "padding", "dilation", "groups", "transposed", "output_padding"),
)
def _convolution(m: Meeting) -> dict[int, Term]:
    if m.layout.axis != 0 or 0 in m.edges:
        raise NoRule
    terms: dict[int, Term] = {}
    if 1 in m.edges:
        lists = ("stride", "padding", "dilation", "output_padding")
        stride, padding, dilation, output_padding = (tuple(m.saved(name)) for name in lists)
        numbers = Convolution(stride, padding, dilation, m.saved("groups"), m.saved("transposed"), output_padding)
        terms[1] = ConvolutionTerm(m.saved("input"), m.b, numbers, m.layout, m.samples, m.shape(1))
    if 2 in m.edges:
        per_image = m.b.flatten(2).sum(2)
        terms[2] = Materialised(m.layout.sum_rows(per_image, m.samples))
    return terms
