"""Ops without derivative rules of their own: under a transform, autograd or a compiler their definition stands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _derive


def kernel_or_reference(op: Any, reference: Callable[..., Any], *args: Any) -> Any:
    """op(*args), or the definition where somebody differentiates, batches or compiles it: right to every order."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if _derive.is_transformed(*tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return reference(*args)
    return op(*args)
