"""Kronecker-factored curvature: a block for each layer, a product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group
from .._model import Loss, Params, plain_model, require_independent_samples, select_parameters
from .._tree import as_dict, as_vectors
from .blocks import DiagonalBlock, KroneckerBlock, Workspace
from .operator import CurvatureOperator, Direction, require_real
from .output_roots import FISHERS, Fisher
from .statistics import Blocks, Statistics

KEPT = 1 << 30
"""Bytes of layer inputs and gradients that are kept for a second use, unless `memory` says else."""


class KFAC(CurvatureOperator):
    """Block-diagonal curvature: for each layer A x B, its inputs' second moment and that of its output gradients.

    Every layer that is linear in its parameters (fully connected at any number of positions, convolution) has such a
    block, its bias included as the weight of an input that is 1; a layer that is used several times in the same way has
    more positions. Any other parameter (of norms, embeddings, transposed convolutions, tied ones that are used in
    several ways) gets a diagonal block, the mean square of the samples' gradients. `blocks` says what is what.

    Everything is in closed form: products, the damped inverse, diagonal and trace. Statistics are computed once, when
    they are first asked for.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout).
        data: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches.
        fisher: whose second moments are taken. "monte_carlo": gradients whose second moment in expectation is the
            loss's curvature at the outputs (for cross-entropy, those of labels drawn from the model's predictions);
            "ggn": that curvature itself, for which there is one backward pass for each class; "empirical": the
            gradients of the losses.
        draws: for "monte_carlo", how many a sample, each a backward pass.
        seed: of the draws.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        keep_graphs: for a loader, keep what the first pass has found for the second, as is always done for one batch.
            Only `EKFAC` has a second pass.
        memory: bytes that may be kept so; default 1 GiB. Where they do not suffice, the second pass starts anew.
        group: a process group, or "world": every rank has its own share of the samples, and all get the statistics over
            all of them. All ranks have to ask for them together.

    Raises (when the statistics are computed):
        ValueError: losses that are not finite, or a loss for which there is no Hessian in the outputs.

    Memory: a training step's on a batch without the gradients, the factors and as much again while their eigenvectors
        are found. For width n of a layer's inputs and m of its outputs: (n + 1)^2 + m^2 + m (n + 1) numbers.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); convolutions: Grosse and Martens 2016 (arXiv 1602.01407).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3, bias=False))
        >>> curvature = KFAC(model, (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])))
        >>> curvature.blocks["0.bias"], curvature.blocks["1.bias"]
        ('kronecker', 'diagonal')
        >>> b = torch.randn(32)
        >>> x = curvature.solve(b, damping=0.1)
        >>> torch.allclose(curvature.matvec(x) + 0.1 * x, b, atol=1e-5)
        True
    """

    _corrects = False

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        fisher: Fisher = "monte_carlo",
        draws: int = 1,
        seed: int = 0,
        loss: Loss | None = None,
        params: Params | None = None,
        keep_graphs: bool = False,
        memory: int | None = None,
        group: Group = None,
    ) -> None:
        if not isinstance(fisher, str) or fisher not in FISHERS:
            raise ValueError(f"fisher is {fisher!r}, expected one of {', '.join(map(repr, FISHERS))}")
        if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
            raise ValueError(f"draws is {draws!r}, expected an int >= 1")
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is {memory}, expected a positive number of bytes")
        self._model = plain_model(model)
        require_independent_samples(self._model)
        self.parameters = select_parameters(self._model, params)
        require_real(self.parameters)
        self._fisher, self._draws, self._seed, self._loss, self._group = fisher, draws, seed, loss, group
        self._batches = (
            data if isinstance(data, Batches) else Batches(data, "data", self.device, may_be_empty=group is not None)
        )
        self._keeps = self._batches.is_one or keep_graphs
        self._memory = memory or KEPT
        self._blocks: Blocks | None = None
        self._samples = 0

    def _found(self) -> Blocks:
        """The blocks, with their statistics, which are computed once."""
        if self._blocks is None:
            with torch.inference_mode(False), torch.no_grad():
                statistics = self._statistics()
                self._blocks = statistics.blocks(self._corrects)
            self._samples = statistics.samples
        return self._blocks

    def _statistics(self) -> Statistics:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        memory = self._memory if self._keeps else 0
        return Statistics(
            self._model,
            self._batches,
            self.parameters,
            self._loss,
            self._fisher,
            self._draws,
            self._seed,
            memory,
            self._group,
            like,
        )

    @property
    def samples(self) -> int:
        """N, the number of samples in all batches of all ranks."""
        self._found()
        return self._samples

    @property
    def blocks(self) -> dict[str, str]:
        """What each parameter has got: "kronecker" or "diagonal"."""
        kind = {n: "kronecker" for b in self._found().values() if isinstance(b, KroneckerBlock) for n in b.names}
        return {name: kind.get(name, "diagonal") for name in self.parameters}

    def factors(self, weight: str) -> tuple[Tensor, Tensor]:
        """A [groups, I, I] and B [groups, O, O] of a layer, by the name of its weight; with a bias, I counts it."""
        block = self._found().get(weight)
        if not isinstance(block, KroneckerBlock):
            layers = [name for name, b in self._found().items() if isinstance(b, KroneckerBlock)]
            raise ValueError(f"weight is {weight!r}, expected one of {', '.join(map(repr, layers))}")
        return block.factors()

    # --- what it is for -----------------------------------------------------------------------------------------

    def _products(self, vectors: Tensor) -> Tensor:
        return self._apply(vectors, lambda block: block.values)

    def solve(self, b: Direction, damping: float, *, factored: bool = False) -> Direction:
        """(C + damping I)^-1 b, exactly: rotate, scale, rotate back.

        Args:
            b: flat [P] or [K, P], or a dictionary shaped like the parameters.
            damping: added to every eigenvalue, > 0 unless none of them is 0.
            factored: damp the two factors instead of their product, with the pi correction of Martens and Grosse 2015
                (section 6.3): the inverse of another matrix, as K-FAC is often used.

        Returns:
            x, in the form of b.

        Memory: the result, and two buffers of K times the largest layer.
        """
        if isinstance(damping, bool) or not isinstance(damping, Real) or not 0 <= damping < math.inf:
            raise ValueError(f"damping is {damping!r}, expected a finite number >= 0")
        damping = float(damping)
        if damping == 0 and not all(bool((block.values > 0).all()) for block in self._found().values()):
            raise ValueError("damping is 0, but there are eigenvalues of 0; expected a number > 0")
        if factored and self._corrects:
            raise ValueError("factored is True, but EKFAC has eigenvalues of its own and no factors to damp; use KFAC")
        stacked = isinstance(b, Tensor) and b.dim() == 2
        vectors = as_vectors(b, self.parameters, "b", stacked=stacked)
        x = self._apply(vectors, lambda block: block.inverse_values(damping, factored))
        if isinstance(b, Tensor):
            return x if stacked else x[0]
        return {name: rows[0] for name, rows in as_dict(x, self.parameters).items()}

    def _apply(self, vectors: Tensor, scale: Callable[[KroneckerBlock | DiagonalBlock], Tensor]) -> Tensor:
        """Every block times its part of [K, P], with its eigenvalues replaced."""
        blocks = self._found()
        vectors = vectors.to(self.dtype).contiguous()
        out = torch.empty_like(vectors)
        rows, results = self._by_name(vectors), self._by_name(out)
        most = max((block.size for block in blocks.values() if isinstance(block, KroneckerBlock)), default=0)
        workspace = Workspace(most * len(vectors), vectors)
        with torch.no_grad():
            for block in blocks.values():
                block.apply(rows, results, scale(block), workspace)
        return out

    def _by_name(self, vectors: Tensor) -> dict[str, Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        return dict(zip(self.parameters, vectors.split(sizes, 1), strict=True))

    def diagonal(self, probes: int = 0, seed: int = 0) -> Tensor:
        """The diagonal, exactly: [P]. The arguments, those of other operators' estimates, are not used."""
        found: dict[str, Tensor] = {}
        for block in self._found().values():
            found.update(block.diagonal())
        return torch.cat([found[name] for name in self.parameters])

    def mean_eigenvalue(self, probes: int = 0, seed: int = 0) -> float:
        """trace(C) / P, exactly. The arguments, those of other operators' estimates, are not used."""
        return float(torch.stack([block.values.double().sum() for block in self._found().values()]).sum()) / self.size

    # --- to keep and to use again -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The statistics, as torch.save takes them."""
        blocks = self._found()
        return {
            "kind": type(self).__name__,
            "samples": self._samples,
            "sizes": {name: p.numel() for name, p in self.parameters.items()},
            "blocks": [block.state() for block in blocks.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take statistics from `state_dict` instead of computing them.

        Raises:
            ValueError: those of another kind, or of other parameters.
        """
        kind = state.get("kind")
        if kind != type(self).__name__:
            raise ValueError(f"state has statistics of {kind}, expected {type(self).__name__}")
        sizes = {name: p.numel() for name, p in self.parameters.items()}
        if dict(state["sizes"]) != sizes:
            different = sorted({name for name, _ in set(sizes.items()) ^ set(state["sizes"].items())})
            raise ValueError(f"state is of other parameters: {', '.join(different[:5])} differ in name or size")
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        found: Blocks = {}
        for entry in state["blocks"]:
            block = (KroneckerBlock if "shape" in entry else DiagonalBlock).load(entry, like)
            found[block.names[0]] = block
        self._blocks, self._samples = found, int(state["samples"])
