"""linear_kd_loss, hidden states to gradients: against its matrix products alone, with its memory."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from benchmarks.baselines.eager_linear_kd_loss import eager_linear_kd_loss
from kdaif_fast.ops import linear_kd_loss

from .cases import Case, SkippedError, Target
from .scale import Scale
from .timing import Call

T, ALPHA = 2.0, 0.5
PRODUCTS = "its matrix products"
CHUNK = 512 * 2**20  # bytes, of the docstring of linear_kd_loss


def head_cases(scale: Scale) -> list[Case]:
    """A student's and a teacher's head; the products are those of both logits and of the two gradients."""
    N, D, V = (32, 16, 40) if scale.tiny else (8192, 4096, 32000)
    cases = []
    kinds = ((torch.bfloat16, "bfloat16", "bf16", False), (torch.float32, "float32, TF32", "tf32", True))
    for dtype, label, rate, tf32 in kinds:

        def inputs(dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            def random(*shape: int) -> Tensor:
                return torch.randn(shape, device=scale.device, dtype=dtype)

            head, teacher_head = (random(V, D) * (2 * D**-0.5) for _ in range(2))
            labels = torch.randint(V, (N,), device=scale.device)
            return {"h": random(N, D), "head": head, "t": random(N, D), "teacher_head": teacher_head, "labels": labels}

        # Two chunks; the gradients in float32, and once more in the dtype of what they are of.
        promised = 2.0 * CHUNK + (N + V) * D * (4 + dtype.itemsize)
        cases.append(
            Case(
                *("linear_kd_loss forward + backward", f"[{N}, {D}] x [{V}, {D}]", label, inputs),
                {"kdaif_fast": _ours, PRODUCTS: _products, "eager": _eager, "Liger-Kernel": _liger},
                operations=4 * 2.0 * N * D * V,
                rate=rate,
                tf32=tf32,
                targets=(Target("<= 1.3 of its matrix products", times=1.3, against=PRODUCTS),),
                peak_stated=promised,
            )
        )
    return cases


def _ours(x: dict[str, Tensor]) -> Call:
    hidden, head = (x[name].detach().requires_grad_() for name in ("h", "head"))

    def call() -> tuple[Tensor, ...]:
        options = {"teacher_head": x["teacher_head"], "temperature": T, "alpha": ALPHA}
        return torch.autograd.grad(linear_kd_loss(hidden, head, x["t"], x["labels"], **options), (hidden, head))

    return call


def _eager(x: dict[str, Tensor]) -> Call:
    hidden, head = (x[name].detach().requires_grad_() for name in ("h", "head"))

    def call() -> tuple[Tensor, ...]:
        loss = eager_linear_kd_loss(hidden, head, x["t"], x["teacher_head"], x["labels"], T, ALPHA)
        return torch.autograd.grad(loss, (hidden, head))

    return call


def _products(x: dict[str, Tensor]) -> Call:
    def call() -> None:
        logits = torch.mm(x["h"], x["head"].T)
        torch.mm(x["t"], x["teacher_head"].T)
        torch.mm(logits, x["head"])
        torch.mm(logits.T, x["h"])

    return call


def _liger(x: dict[str, Tensor]) -> Call:
    """Its fused head with cross-entropy and Jensen-Shannon divergence, the nearest that it has."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise SkippedError("liger_kernel is not installed")
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0, temperature=T)
    hidden, head = (x[name].detach().requires_grad_() for name in ("h", "head"))

    def call() -> None:
        torch.autograd.grad(fused(hidden, head, x["t"], x["teacher_head"], x["labels"]), (hidden, head))

    return call
