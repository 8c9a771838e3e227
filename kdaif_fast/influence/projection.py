"""Random projections of per-sample gradients, mostly without forming the gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .._tree import product_dtype
from ..per_sample.paths import Path
from ..per_sample.recording import Recording
from ..per_sample.terms import ConvolutionTerm, EmbeddingTerm, LinearTerm, Term
from ..per_sample.terms.base import BLOCK_ELEMENTS
from .gradients import formed, sample_gradients

KINDS = ("normal", "rademacher")


class Projection(ABC):
    """A linear map from gradients to fewer numbers that keeps dot products on average: <R g, R h> ~ <g, h>.

    Random entries have the variance 1 / (numbers kept) (Johnson and Lindenstrauss 1984, Achlioptas 2003). They come
    from their own generators, on the CPU, so that they are the same on every device and in every process.

    Args:
        parameters: those that gradients are in.
        dims: how many numbers to keep.
        kind: "normal" or "rademacher" (signs).
        seed: of the generators.

    Attributes:
        size: how many numbers there are a sample.
        blocks: which of them belong together: {name: where}.
    """

    size: int
    blocks: dict[str, slice]

    def __init__(self, parameters: Mapping[str, Tensor], dims: int, kind: str, seed: int) -> None:
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.dims, self.kind, self.seed = dims, kind, seed
        self.dtype = product_dtype(parameters.values())
        self.device = next(iter(parameters.values())).device

    @abstractmethod
    def features(self, recording: Recording) -> Tensor:
        """Every sample's projected gradient: [N, size]."""

    def _random(self, rows: int, columns: int, *numbers: int) -> Tensor:
        """[rows, columns] with entries of variance 1 / rows; other numbers, other entries."""
        seed = self.seed
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % (1 << 63)
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "normal":
            entries = torch.randn(rows, columns, generator=generator)
        else:
            entries = torch.empty(rows, columns).random_(2, generator=generator).mul_(2).sub_(1)
        return entries.div_(math.sqrt(rows)).to(device=self.device, dtype=self.dtype)


class DenseProjection(Projection):
    """R g with one matrix R [dims, P] for all parameters; g itself if dims >= P.

    Gradients are formed in blocks of one layer.

    Args:
        memory: how many bytes of R may be kept; if it is larger, all of it is made again for each block of samples.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dims: int, kind: str, seed: int, memory: int) -> None:
        super().__init__(parameters, dims, kind, seed)
        total = sum(shape.numel() for shape in self.shapes.values())
        self._is_identity = dims >= total
        self.size = min(dims, total)
        self.blocks = {"all parameters": slice(0, self.size)}
        self._keeps = total * dims * torch.finfo(self.dtype).bits <= 8 * memory
        self._kept: dict[tuple[int, int], Tensor] = {}

    def features(self, recording: Recording) -> Tensor:
        """See Projection."""
        if self._is_identity:
            return sample_gradients(recording)
        rows = torch.zeros(recording.samples, self.size, dtype=self.dtype, device=self.device)

        def receive(terms: list[tuple[Path, Term]]) -> None:
            for path, term in terms:
                for start, stop, grads in formed(path, term):
                    for name, pulled in grads.items():
                        self._add(rows[start:stop], name, pulled.reshape(stop - start, -1))

        recording.visit(receive)
        return rows

    def _add(self, rows: Tensor, name: str, grads: Tensor) -> None:
        step = max(1, BLOCK_ELEMENTS // self.size)
        for start in range(0, grads.shape[1], step):
            part = grads[:, start : start + step].to(self.dtype)
            rows.addmm_(part, self._matrix(name, start, part.shape[1]).T)

    def _matrix(self, name: str, start: int, count: int) -> Tensor:
        """The columns of R for some elements of a parameter."""
        number = list(self.shapes).index(name)
        found = self._kept.get((number, start))
        if found is None:
            found = self._random(self.size, count, number, start)
            if self._keeps:
                self._kept[number, start] = found
        return found


class Sides(NamedTuple):
    """Projections of a parameter's rows, [kb, rows], and of its columns, [ka, columns]; None for the identity."""

    left: Tensor | None
    right: Tensor | None


class FactoredProjection(Projection):
    """For every parameter by itself L G R^T: L [kb, rows], R [ka, columns], with kb ka <= dims, about square.

    For a linear layer G = sum_t b_t a_t^T, so that L G R^T = sum_t (L b_t) (R a_t)^T: layer inputs and output gradients
    are projected before they are contracted. Convolutions do it by filters R, embeddings by rows of L. What has no such
    form (biases, norms, parameters that are made of others) is projected from gradients in blocks. A vector has one
    column. A side that is not longer than its kb or ka is kept as it is.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dims: int, kind: str, seed: int) -> None:
        super().__init__(parameters, dims, kind, seed)
        self._sides, self._matrices = {}, {}
        self.blocks, self.size = {}, 0
        for number, (name, shape) in enumerate(self.shapes.items()):
            rows = shape[0] if len(shape) > 1 else shape.numel()
            columns = shape.numel() // max(1, rows)
            kb = min(rows, math.isqrt(dims))
            ka = min(columns, dims // max(1, kb))
            kb = min(rows, dims // max(1, ka))
            left = None if kb == rows else self._random(kb, rows, number, 0)
            right = None if ka == columns else self._random(ka, columns, number, 1)
            self._sides[name], self._matrices[name] = Sides(left, right), (rows, columns)
            self.blocks[name] = slice(self.size, self.size + kb * ka)
            self.size += kb * ka

    def features(self, recording: Recording) -> Tensor:
        """See Projection."""
        features = torch.zeros(recording.samples, self.size, dtype=self.dtype, device=self.device)

        def receive(terms: list[tuple[Path, Term]]) -> None:
            for path, term in terms:
                self._add(features, path, term)

        recording.visit(receive)
        return features

    def of_gradients(self, name: str, grads: Tensor) -> Tensor:
        """L G R^T of formed gradients of one parameter: [n, *shape] -> [n, kb ka]."""
        left, right = self._sides[name]
        G = grads.reshape(len(grads), *self._matrices[name]).to(self.dtype)
        G = G if left is None else left @ G
        G = G if right is None else G @ right.T
        return G.flatten(1)

    def _add(self, features: Tensor, path: Path, term: Term) -> None:
        if path.leaf is not None:
            (name,) = path.parameters
            pair = self._factors(path, term, self._sides[name])
            if pair is not None:
                lefts, rights = (x.to(self.dtype) for x in pair)
                features[:, self.blocks[name]] += (lefts.mT @ rights).flatten(1)
                return
        for start, stop, grads in formed(path, term):
            for name, pulled in grads.items():
                features[start:stop, self.blocks[name]] += self.of_gradients(name, pulled)

    def _factors(self, path: Path, term: Term, sides: Sides) -> tuple[Tensor, Tensor] | None:
        """L b [N, T, kb] and R a [N, T, ka], whose products over T are the features; None if there is no such form."""
        if isinstance(term, LinearTerm) and term.shape == term.matrix:
            pair = term.output_grads, term.inputs
            lefts, rights = pair if term.transposed == path.transposes else pair[::-1]
            return _projected(lefts, sides.left), _projected(rights, sides.right)
        if isinstance(term, EmbeddingTerm) and sides.left is not None and not path.transposes:
            return sides.left.T[term.indices], _projected(term.output_grads, sides.right)
        if isinstance(term, ConvolutionTerm) and term.is_plain and not path.transposes:
            return _projected(term.output_grads.flatten(2).mT, sides.left), _filtered(term, sides.right)
        return None


def _projected(x: Tensor, matrix: Tensor | None) -> Tensor:
    """The last axis projected."""
    return x if matrix is None else x.to(matrix.dtype) @ matrix.T


def _filtered(term: ConvolutionTerm, matrix: Tensor | None) -> Tensor:
    """Every position's patch of the input, projected: [N, positions, ka]. The rows of the matrix are filters."""
    window = term.shape[1:]
    x = term.inputs if matrix is None else term.inputs.to(matrix.dtype)
    filters = torch.eye(window.numel(), dtype=x.dtype, device=x.device) if matrix is None else matrix
    c = term.convolution
    zeros = (0,) * len(c.stride)
    found = torch.convolution(
        x, filters.view(-1, *window), None, c.stride, c.padding, c.dilation, False, zeros, c.groups
    )
    return found.flatten(2).mT
