"""Per-sample quantities by torch.func: vmap(grad) of one sample's loss, and jvp of all losses along a direction."""

from __future__ import annotations

from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdaif_fast import sigmoid_weights

from .loop_persample import weighted_backward
from .materialised_persample import Batch, Materialised, Tree


class VmapGrad(Materialised):
    """The recipe of PyTorch's own tutorial on per-sample gradients."""

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        parameters = {name: p.detach() for name, p in self.named_parameters().items()}

        def loss(parameters: Tree, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, parameters, (x[None],)), y[None])

        # "different": dropout of rate 0 counts as random for vmap
        return vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, *batch)


class ForwardMode(Materialised):
    """One directional derivative for all dots; the weighted step is a second pass."""

    def dots(self, batch: Batch, direction: Tree) -> Tensor:
        """[N]"""
        parameters = {name: p.detach() for name, p in self.named_parameters().items()}

        def losses(parameters: Tree) -> Tensor:
            return F.cross_entropy(functional_call(self.model, parameters, (batch[0],)), batch[1], reduction="none")

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward mode
            return jvp(losses, (parameters,), (direction,))[1]

    def weighted_step(self, batch: Batch, direction: Tree) -> None:
        """Forward mode for phi, then one ordinary backward pass of the weighted losses."""
        weighted_backward(self, batch, sigmoid_weights(-self.dots(batch, direction)))
