"""Per-sample quantities by BackPACK: BatchGrad and BatchL2Grad."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .materialised_persample import Batch, Materialised, Tree, UnsupportedError

try:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad, BatchL2Grad
except ImportError:
    backpack = None


class BackPACK(Materialised):
    """Linear layers, convolutions, embeddings, recurrent layers and BatchNorm; else UnsupportedError."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if backpack is None:
            raise UnsupportedError("backpack-for-pytorch is not installed")
        self.model = extend(self.model)
        self.loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def _backward(self, batch: Batch, extension: object) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            warnings.filterwarnings("error", ".*does not have an extension", UserWarning)
            self.model.zero_grad(set_to_none=True)
            try:
                with backpack(extension):
                    self.loss(self.model(batch[0]), batch[1]).backward()
            except (UserWarning, NotImplementedError) as reason:
                raise UnsupportedError(f"BackPACK: {reason}") from reason

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        self._backward(batch, BatchGrad())
        return {name: p.grad_batch for name, p in self.named_parameters().items()}

    def norms(self, batch: Batch) -> Tensor:
        """[N], without the gradients."""
        self._backward(batch, BatchL2Grad())
        return torch.stack([p.batch_l2 for p in self.model.parameters()]).sum(0).sqrt()
