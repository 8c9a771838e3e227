"""Curvature products by torch.func: forward over reverse mode, in a loop, under vmap, and linearised before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loop_hvp import DoubleBackward

Tree = dict[str, Tensor]


class JvpOfGrad(DoubleBackward):
    """A loop; every product goes through the model again."""

    def linearise(self) -> None:
        """The functions."""
        self.point = {name: p.detach() for name, p in self.model.named_parameters()}

    def _outputs(self, parameters: Tree) -> Tensor:
        return functional_call(self.model, parameters, (self.batch[0],))

    def _loss_of(self, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, self.batch[1])

    def one(self, vector: Tensor) -> Tensor:
        """[P] -> [P]."""
        direction = dict(zip(self.point, self.shaped(vector), strict=True))
        if self.curvature == "hessian":
            return _flat(jvp(grad(lambda p: self._loss_of(self._outputs(p))), (self.point,), (direction,))[1])
        outputs, tangent = jvp(self._outputs, (self.point,), (direction,))
        curved = jvp(grad(self._loss_of), (outputs,), (tangent,))[1]
        return _flat(vjp(self._outputs, self.point)[1](curved)[0])

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack([self.one(vector) for vector in vectors])


class VmapOfJvp(JvpOfGrad):
    """All vectors under vmap."""

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(self.one, randomness="different")(vectors)


class VmapOfLinearised(JvpOfGrad):
    """The linear part is traced once; products are vmap of it."""

    def linearise(self) -> None:
        """Trace."""
        super().linearise()
        with sdpa_kernel(SDPBackend.MATH):
            if self.curvature == "hessian":
                self.linear: Callable[[Tree], Tree] = linearize(
                    grad(lambda p: self._loss_of(self._outputs(p))), self.point
                )[1]
                return
            outputs, self.push = linearize(self._outputs, self.point)
            self.curve = linearize(grad(self._loss_of), outputs)[1]
            self.pull = vjp(self._outputs, self.point)[1]

    def one(self, vector: Tensor) -> Tensor:
        """[P] -> [P]."""
        direction = dict(zip(self.point, self.shaped(vector), strict=True))
        if self.curvature == "hessian":
            return _flat(self.linear(direction))
        return _flat(self.pull(self.curve(self.push(direction)))[0])

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        return vmap(self.one, randomness="different")(vectors)


def _flat(tree: Tree) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tree.values()])
