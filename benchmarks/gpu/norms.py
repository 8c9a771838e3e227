"""Cases of what reads inputs and output gradients once: the gradients of norms, and inner products of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case, backends_of, size_class
from .scale import Scale

OPS = torch.ops.kdaif_fast
DTYPES = ((torch.bfloat16, "bfloat16"), (torch.float32, "float32"))


def norm_cases(scale: Scale) -> list[Case]:
    """Layer norms of GPT-2, group norms of ResNet-18, and the contraction after a convolution."""
    N, T, D = (4, 6, 16) if scale.tiny else (16, 512, 768)
    images, C, L, groups = (2, 8, 9, 4) if scale.tiny else (64, 64, 3136, 32)
    cases = []
    for dtype, label in DTYPES:

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=scale.device, dtype=dtype)

        def statistic(*shape: int) -> Tensor:
            return torch.rand(shape, device=scale.device) + 0.5

        def layer(random: Any = random) -> tuple[Tensor, ...]:
            return random(N, T, D), random(N, T, D), statistic(N, T), statistic(N, T)

        def image(random: Any = random) -> tuple[Tensor, ...]:
            return random(images, C, L), random(images, C, L), statistic(images, groups), statistic(images, groups)

        def inner(random: Any = random) -> tuple[Tensor, ...]:
            return random(images, 1, C, L), random(images, C, L)

        for op, shape, inputs, elements in (
            (OPS.persample_layer_norm.default, f"[{N}, {T}, {D}]", layer, N * T * D),
            (OPS.persample_group_norm.default, f"[{images}, {C}, {L}], {groups} groups", image, images * C * L),
            (OPS.persample_inner.default, f"[{images}, 1, {C}, {L}]", inner, images * C * L),
        ):
            cases.append(
                Case(
                    *(op._opname, shape, label, inputs),
                    backends_of(op, scale.device, lambda arguments: arguments),
                    bytes=2.0 * elements * dtype.itemsize,
                    right="reference",
                    op=op._opname,
                    size=size_class(op, torch.empty(elements, device="meta")),
                )
            )
    return cases
