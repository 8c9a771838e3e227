"""Per-sample quantities by opacus: gradients by its hooks, norms by its ghost clipping."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .materialised_persample import Batch, Materialised, Tree, UnsupportedError

try:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
except ImportError:
    GradSampleModule = None


class LinearAttention(nn.Module):
    """nn.MultiheadAttention in layers that opacus has rules for.

    opacus 1.6 offers DPMultiheadAttention for this, but with batch_first=True that mixes up heads and positions
    (its last view should be a transpose), so that it computes another function.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        E = attention.embed_dim
        self.heads, self.batch_first, self._qkv_same_embed_dim = attention.num_heads, attention.batch_first, False
        self.projections = nn.ModuleList(nn.Linear(E, E) for _ in range(3))
        self.out_proj = nn.Linear(E, E)
        self.out_proj.load_state_dict(attention.out_proj.state_dict())
        with torch.no_grad():
            for i, layer in enumerate(self.projections):
                layer.weight.copy_(attention.in_proj_weight[i * E : (i + 1) * E])
                layer.bias.copy_(attention.in_proj_bias[i * E : (i + 1) * E])
        self.to(attention.in_proj_weight.dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple[Tensor, None]:
        """[N, T, E] three times -> ([N, T, E], None)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in zip(self.projections, (query, key, value), strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Opacus(Materialised):
    """GradSampleModule; attention is replaced by layers that it knows."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if GradSampleModule is None:
            raise UnsupportedError("opacus is not installed")
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.MultiheadAttention):
                    setattr(parent, name, LinearAttention(child))
        self.model = self._wrapped()

    def _wrapped(self) -> nn.Module:
        return GradSampleModule(self.model, loss_reduction="sum")

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Without the wrapper's prefix."""
        return {name.removeprefix("_module."): p for name, p in self.model.named_parameters()}

    def own(self, tree: Tree, leading: int = 0) -> Tree:
        """Input projections of attention, in three parts; views."""
        named = {}
        for name, value in tree.items():
            if "in_proj_" in name:
                stem, kind = name.split("in_proj_")
                for i, part in enumerate(value.chunk(3, leading)):
                    named[f"{stem}projections.{i}.{kind}"] = part
            else:
                named[name] = value
        return named

    def _backward(self, batch: Batch) -> None:
        self.model.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum").backward()

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        self._backward(batch)
        return {name: p.grad_sample for name, p in self.named_parameters().items()}


class OpacusGhost(Opacus):
    """Norms only: Gram matrices where opacus has them, layer by layer gradients elsewhere."""

    def _wrapped(self) -> nn.Module:
        return GradSampleModuleFastGradientClipping(self.model, loss_reduction="sum")

    def grads(self, batch: Batch) -> Tree:
        """None of it."""
        raise UnsupportedError("ghost clipping has norms only")

    def norms(self, batch: Batch) -> Tensor:
        """[N]"""
        self._backward(batch)
        return self.model.get_norm_sample()
