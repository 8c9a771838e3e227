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

    def _backward(self, batch: Batch, extension: object, field: str) -> Tree:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            warnings.filterwarnings("ignore", ".*does not have an extension", UserWarning)
            self.model.zero_grad(set_to_none=True)
            with backpack(extension):
                self.loss(self.model(batch[0]), batch[1]).backward()
        named = self.named_parameters()
        missing = [name for name, p in named.items() if not hasattr(p, field)]
        if missing:
            raise UnsupportedError(f"BackPACK leaves {len(missing)} of {len(named)} parameters out, {missing[0]} first")
        return {name: getattr(p, field) for name, p in named.items()}

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        return self._backward(batch, BatchGrad(), "grad_batch")

    def norms(self, batch: Batch) -> Tensor:
        """[N], without the gradients."""
        return torch.stack(list(self._backward(batch, BatchL2Grad(), "batch_l2").values())).sum(0).sqrt()
