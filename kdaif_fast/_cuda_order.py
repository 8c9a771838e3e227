"""Which backend answers for CUDA tensors: the order of each op and size class, as _cuda_order.json says.

`python -m benchmarks.gpu.order` writes that file, from measurements or, before there are any, from estimates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

FILE = Path(__file__).parent / "_cuda_order.json"
ESTIMATE = "estimate"
USUAL = ("cuda", "triton", "torch", "reference")  # "torch": made of torch's own operations


def elements(first: Tensor, *args: Any) -> int:
    """What a call reads: of logits, tangents or vectors."""
    return first.numel()


def multiplications(inputs: Tensor, output_grads: Tensor, *args: Any) -> int:
    """What forming every gradient sum_t b_t a_t^T takes: N T I O."""
    return inputs.numel() * output_grads.shape[-1]


class Size(NamedTuple):
    """How large a call is, and from where on it is "large": where the work is longer than some launches."""

    of: Callable[..., int]
    large: int

    def size_class(self, *args: Any) -> str:
        """Of a call with these arguments: "small" or "large"."""
        return "large" if self.of(*args) >= self.large else "small"


_VECTORS, _PRODUCTS = Size(elements, 2**20), Size(multiplications, 2**30)
SIZES = {
    **dict.fromkeys(("row_divergence", "row_divergence_with_grad", "row_divergence_grad"), _VECTORS),
    **dict.fromkeys(("row_divergence_hvp", "row_stats", "cg_update", "cg_dots"), _VECTORS),
    **dict.fromkeys(("persample_layer_norm", "persample_group_norm", "persample_inner"), _VECTORS),
    **dict.fromkeys(("persample_dot", "persample_norm", "persample_grad", "weighted_grad"), _PRODUCTS),
}
"""Of the ops that several backends have. 2^20 elements take 2 microseconds at 4 TB/s, 2^30 products 3 in bfloat16."""
CLASSES = ("small", "large")


class Order(NamedTuple):
    """The file's content: where it is from (a file of results, or "estimate"), and op -> class -> backends."""

    source: str
    of: dict[str, dict[str, list[str]]]

    def for_op(self, name: str) -> dict[str, list[str]]:
        """Class -> backends, the best one first; the usual ones where nothing is said."""
        return self.of.get(name) or {size: list(USUAL) for size in CLASSES}


def read(path: Path = FILE) -> Order:
    """The order that is in force."""
    content = json.loads(path.read_text())
    return Order(content["source"], content["order"])
