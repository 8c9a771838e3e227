"""The loss of a model on a batch, as a function of the parameters, with one linearisation for all products."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._model import (
    Loss,
    Params,
    plain_model,
    require_independent_samples,
    run_model,
    sample_losses,
    select_parameters,
    twice_differentiable,
    unpack_batch,
)
from ._tree import shaped, unstack, vector_dtype, wide_dtype
from .batched import AGREEMENT, Chain, KeptBackward, NotBatchableError, closed_form_norms

# By how much <J v, u> and <v, J^T u> may differ, relative to their size: far above what rounding does (TF32 included),
# far below what a missing derivative does.
ADJOINT_TOLERANCE = 0.05

# Models whose derivatives have been checked, with the parameters and the mode they were checked in.
_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()

# What is known about walking the graphs of a model with several vectors at once.
_walkable: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


class Objective:
    """A model's per-sample losses on one batch, with their derivatives in the chosen parameters.

    The model runs once. Everything else walks the graph of that run, which is kept as long as this object: the
    activations of the forward pass, and of the backward pass too once `push` is used.

    Nothing of the model is changed: not its parameters, their `.grad`, its buffers nor its mode.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss: Loss | None = None,
        params: Params | None = None,
        name: str = "batch",
    ) -> None:
        model = plain_model(model)
        require_independent_samples(model)
        self.parameters = select_parameters(model, params)
        self._tensors = list(self.parameters.values())
        self._loss, self._name, self._model = loss, name, model
        with torch.inference_mode(False), torch.enable_grad(), twice_differentiable(model):
            self._batch = unpack_batch(batch, name)
            self._watched = [*model.parameters(), *model.buffers()]
            self._watched += [leaf for leaf in tree_leaves(tuple(self._batch)) if isinstance(leaf, Tensor)]
            self._states = _states(self._watched)
            with closed_form_norms(model):
                self.outputs = run_model(model, self._batch.inputs, name)
            if not self.outputs.requires_grad:
                raise ValueError(self._independent())
            # A cut between model and loss: the loss is differentiated by itself, in outputs instead of parameters.
            self._cut = self.outputs.detach().requires_grad_()
            self.losses = sample_losses(loss, self._cut, self._batch, name)
            if self.losses.shape[0] == 0:
                raise ValueError(f"{name} has no samples")
            (self._output_grads,) = torch.autograd.grad(self.losses.sum(), self._cut, create_graph=True)
            if not self._output_grads.requires_grad:
                self._require_linear_loss()

    def _independent(self) -> str:
        return f"the model's outputs on {self._name} do not depend on the chosen parameters"

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return self.losses.shape[0]

    @property
    def is_current(self) -> bool:
        """Whether parameters, buffers and batch are what they were when the model ran, as far as PyTorch knows."""
        return self._states == _states(self._watched)

    def most_vectors(self, memory: int, walks: Sequence[KeptBackward]) -> int:
        """How many vectors products can be computed with in that many bytes, at least 1.

        Each needs its product, its tangents in the outputs before and after the loss's Hessian, and what is inside the
        graph while it is walked; of the last there is only as much as vectors are under way together.
        """
        size = sum(tensor.numel() * wide_dtype(tensor.dtype).itemsize for tensor in self._tensors)
        kept = size + 3 * self.outputs.numel() * self.outputs.element_size()
        together = max((walk.at_once for walk in walks), default=1)
        inside = max((walk.vector_bytes for walk in walks), default=0)
        few = memory // (kept + inside)
        return max(1, few if few < together else (memory - together * inside) // kept)

    @property
    def output_grads(self) -> Tensor:
        """Gradient of each sample's loss with respect to its own outputs, shaped like the outputs."""
        return self._output_grads.detach()

    def require_finite(self) -> None:
        """Raise ValueError at the first sample whose loss, or its gradient, is not finite. Looks at the values."""
        finite = self.losses.isfinite() & self.output_grads.reshape(self.samples, -1).isfinite().all(1)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            value = self.losses[index].item()
            raise ValueError(f"{self._name}: sample {index} has the loss {value}, or a gradient that is not finite")

    def gradient(self) -> Tensor:
        """Gradient of the summed loss: [P]."""
        return self.pull(self.output_grads[None])[0]

    def pull(self, cotangents: Tensor) -> Tensor:
        """J^T U: K directions in the outputs, [K, N, ...], taken back to the parameters, [K, P]."""
        if len(cotangents) == 1 and self._chain is not None and self._chain.is_current:
            return self._chain.pull(cotangents[0])[None]
        products, found = self._products(self.pulling, [cotangents])
        if not any(found):
            raise ValueError(self._independent())
        return products

    def push(self, directions: Tensor) -> Tensor:
        """J V: how the outputs change along K directions in the parameters, [K, P] -> [K, N, ...].

        The map u -> J^T u is linear, so its own transpose, one more backward pass through the graph kept, is J v.
        That reuses every activation, and the engine that runs it is compiled: forward mode would redo the forward
        pass, in Python. A chain of layers needs neither for a single vector.
        """
        if len(directions) == 1 and self._chain is not None and self._chain.is_current:
            return self._chain.push(directions[0])[None]
        pushing, used = self.pushing, self._transposed[1][1]
        if pushing is None:
            raise ValueError(self._independent())
        pieces = unstack(directions, self._tensors)
        tangents = self.outputs.new_empty(len(directions), *self.outputs.shape)
        pushing([pieces[i] for i in used], [tangents])
        return tangents

    def _products(self, walk: KeptBackward, cotangents: Sequence[Tensor]) -> tuple[Tensor, list[bool]]:
        """The gradients of a walk in one matrix [K, P], and which parameters they depend on."""
        K, dtype = len(cotangents[0]), vector_dtype(self._tensors)
        products = self._tensors[0].new_empty(K, sum(tensor.numel() for tensor in self._tensors), dtype=dtype)
        return products, walk(cotangents, shaped(products, self._tensors))

    def _kept(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> KeptBackward:
        return KeptBackward(outputs, inputs, _walkable.setdefault(self._model, {}))

    @cached_property
    def _chain(self) -> Chain | None:
        """The network as layers one after the other, if that is what it is."""
        try:
            chain = Chain(self.outputs, self._tensors)
        except NotBatchableError:
            return None
        known = _walkable.setdefault(self._model, {})
        key = (chain.kinds, self.outputs.dtype, self.outputs.device.type)
        if key not in known:
            known[key] = chain.agrees(AGREEMENT[self.outputs.dtype])
        return chain if known[key] else None

    @cached_property
    def pulling(self) -> KeptBackward:
        """The walk of J^T U."""
        return self._kept([self.outputs], self._tensors)

    @cached_property
    def pushing(self) -> KeptBackward | None:
        """The walk of J V; None where the outputs depend on no parameter."""
        dummy, (pulled, used) = self._transposed
        return self._kept(pulled, [dummy]) if used else None

    @cached_property
    def differentiating(self) -> KeptBackward | None:
        """The walk of the Hessian's products; None where the gradient is constant."""
        grads, used = self._parameter_grads
        return self._kept(grads, self._tensors) if used else None

    @cached_property
    def _curving(self) -> KeptBackward:
        return self._kept([self._output_grads], [self._cut])

    def _require_linear_loss(self) -> None:
        """Raise RuntimeError if the loss's gradient has no derivative although it changes with the outputs.

        So do fused losses that form their gradient in the forward pass and only scale it in the backward pass.
        """
        moved = (self._cut + 0.01 * (self._cut.abs() + 1)).detach().requires_grad_()
        losses = sample_losses(self._loss, moved, self._batch, self._name)
        (grads,) = torch.autograd.grad(losses.sum(), moved)
        if not torch.allclose(grads, self.output_grads, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise RuntimeError(
                f"the loss on {self._name} has a gradient that is not differentiable itself, so there is no curvature. "
                "Give one made of PyTorch's functions, or DistillationLoss"
            )

    def require_second_derivatives(self) -> None:
        """Raise RuntimeError if J v is not the transpose of J^T u; once a model, as it costs a product.

        A layer whose backward pass is not itself differentiable (a custom autograd.Function, say) says nothing: its
        part of J v would just be missing.
        """
        key = (*self.parameters, self._model.training)
        if key in _checked.setdefault(self._model, set()) or self.outputs.dtype not in (torch.float32, torch.float64):
            return  # in half precision rounding would say as much as a missing part
        first = self._tensors[0]
        count = sum(tensor.numel() for tensor in self._tensors)
        signs = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
        direction = signs.to(device=first.device, dtype=vector_dtype(self._tensors))
        tangent = self.push(direction[None])[0]
        size = tangent.abs().max()
        # Outputs that do not depend on these parameters in truth have tangents of nothing but rounding.
        if size > 1e3 * torch.finfo(tangent.dtype).eps * self.outputs.detach().abs().max():
            unit = tangent / size
            expected = (unit * tangent).sum()
            if (self.pull(unit[None])[0] @ direction - expected).abs() > ADJOINT_TOLERANCE * expected:
                raise RuntimeError(
                    f"the model's derivatives on {self._name} contradict each other: a layer's backward pass is not "
                    "differentiable itself. Look for custom autograd.Functions (once_differentiable, torch.no_grad)"
                )
        _checked[self._model].add(key)

    @cached_property
    def _transposed(self) -> tuple[Tensor, tuple[list[Tensor], list[int]]]:
        with torch.inference_mode(False), torch.enable_grad():
            dummy = torch.zeros_like(self.outputs, requires_grad=True)
            pulled = torch.autograd.grad(self.outputs, self._tensors, dummy, create_graph=True, allow_unused=True)
        return dummy, _differentiable(pulled)

    def loss_hessian(self, tangents: Tensor) -> Tensor:
        """Every sample's Hessian of the loss in the outputs, times its K tangents: [K, N, ...] -> [K, N, ...]."""
        if not self._output_grads.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(tangents)
        products = torch.empty_like(tangents)
        self._curving([tangents], [products])
        return products

    def full_hessian(self, directions: Tensor) -> Tensor:
        """Hessian of the summed loss in the parameters, times K directions: [K, P] -> [K, P]."""
        if self.differentiating is None:
            return torch.zeros_like(directions)
        pieces, used = unstack(directions, self._tensors), self._parameter_grads[1]
        return self._products(self.differentiating, [pieces[i] for i in used])[0]

    @cached_property
    def _parameter_grads(self) -> tuple[list[Tensor], list[int]]:
        with torch.inference_mode(False), torch.enable_grad():
            losses = sample_losses(self._loss, self.outputs, self._batch, self._name).sum()
            return _differentiable(torch.autograd.grad(losses, self._tensors, create_graph=True, allow_unused=True))

    def dots(self, directions: Tensor) -> Tensor:
        """<grad l_i, v> for every sample and direction, [K, P] -> [N, K]: the losses' change along the directions."""
        return self.output_dots(self.output_grads, self.push(directions))

    def output_dots(self, grads: Tensor, tangents: Tensor) -> Tensor:
        """<u_i, t_ki> of every sample, over all that it has of outputs: [N, ...], [K, N, ...] -> [N, K]."""
        dtype = wide_dtype(tangents.dtype)
        left = grads.reshape(self.samples, -1).to(dtype)
        return torch.einsum("no,kno->nk", left, tangents.reshape(len(tangents), self.samples, -1).to(dtype))


def _states(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes when tensors are written to, or get other memory. Tensors of inference mode do not say."""
    return [(0 if x.is_inference() else x._version, 0 if x.is_sparse else x.data_ptr()) for x in tensors]


def _differentiable(grads: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The gradients that depend on something, with the positions of their parameters."""
    kept = [(grad, i) for i, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    return [grad for grad, _ in kept], [i for _, i in kept]
