"""Cases of the row ops: loss and gradient, curvature products, statistics."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.eager_row_divergence import eager_kd_loss
from benchmarks.baselines.eager_row_stats import eager_row_stats
from kdaif_fast.ops import kd_loss
from kdaif_fast.ops.row_arguments import read_arguments

from .cases import Case, SkippedError, Target, backends_of, size_class, unchecked
from .scale import Scale
from .timing import Call

T, ALPHA = 2.0, 0.5
OPS = torch.ops.kdaif_fast
SHAPES = (
    (8192, 32000, torch.bfloat16, 0.85),
    (4096, 1000, torch.bfloat16, 0.7),
    (4096, 1000, torch.float32, 0.7),
    (64, 10, torch.float32, None),
    (8192, 50257, torch.bfloat16, None),
    (512, 128256, torch.bfloat16, None),
    (8192, 32000, torch.float32, None),
)
"""Rows, classes, dtype, and the share of the copy bandwidth that is wanted."""
TINY = ((16, 40, torch.bfloat16, 0.85), (64, 10, torch.float32, None))


def _logits(N: int, V: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    def logits() -> Tensor:
        return torch.randn(N, V, device=device, dtype=dtype).mul_(3)

    return {"student": logits(), "teacher": logits(), "labels": torch.randint(V, (N,), device=device)}


def _arguments(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """As the op takes them: the call of kd_loss, each row for itself."""
    call, _ = read_arguments(
        *(inputs[name] for name in ("student", "teacher", "labels")),
        ce_weight=ALPHA,
        kd_weight=1 - ALPHA,
        temperature=T,
    )
    rows, numbers = call._numbers(call.settings, call.tensors[0])
    return *call.tensors, rows, numbers, call.choices


def _step(loss: Callable[..., Tensor]) -> Callable[[dict[str, Tensor]], Call]:
    """Loss and gradient through autograd."""

    def prepare(inputs: dict[str, Tensor]) -> Call:
        student = inputs["student"].detach().requires_grad_()
        return lambda: torch.autograd.grad(loss(student, inputs["teacher"], inputs["labels"]), student)

    return prepare


def _public(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kd_loss(student, teacher, labels, temperature=T, alpha=ALPHA, reduction="mean")


def _eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones((), device=student.device)
    return eager_kd_loss(student, teacher, labels, weight, T, ALPHA)


@functools.cache
def _compiled_eager() -> Callable[..., Tensor]:
    return torch.compile(_eager, fullgraph=True, dynamic=False)


def _compiled(inputs: dict[str, Tensor]) -> Call:
    return _step(_compiled_eager())(inputs)


def _liger(inputs: dict[str, Tensor]) -> Call:
    """Its cross-entropy and its KL divergence, which is what its users combine."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise SkippedError("liger_kernel is not installed")
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    ce, kl = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = (torch.log_softmax(x / T, -1) for x in (student, teacher))
        return ALPHA * ce(student, labels) + (1 - ALPHA) * T**2 * kl(log_q, log_p)

    return _step(loss)({**inputs, "student": inputs["student"].clone()})  # it writes its gradient over the logits


def loss_cases(scale: Scale) -> list[Case]:
    """Loss and gradient in one kernel, and the public call forward and backward, against what people use."""
    cases = []
    for N, V, dtype, share in TINY if scale.tiny else SHAPES:
        shape, name = f"[{N}, {V}]", str(dtype).removeprefix("torch.")

        def inputs(N: int = N, V: int = V, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            return _logits(N, V, dtype, scale.device)

        floor = {"bytes": 3.0 * N * V * dtype.itemsize + 12 * N}
        targets = () if share is None else (Target(f">= {share:.0%} of copy bandwidth", share=share),)
        first = torch.empty(N, V, device="meta")
        op = OPS.row_divergence_with_grad.default
        cases.append(
            Case(
                *("row_divergence_with_grad", shape, name, inputs),
                backends_of(op, scale.device, _arguments),
                targets=targets,
                right="reference",
                op=op._opname,
                size=size_class(op, first),
                **floor,
            )
        )
        large = N * V >= 2**20
        ways = {"kdaif_fast": _step(_public), "eager": _step(_eager)}
        if large and dtype == torch.bfloat16 and V in (1000, 32000):
            ways |= {"torch.compile": _compiled, "Liger-Kernel": _liger}
        elif (N, V) == (4096, 1000):
            ways |= {"torch.compile": _compiled}
        peers = [way for way in ways if way in ("torch.compile", "Liger-Kernel")]
        faster = tuple(Target(f"faster than {x}", times=1.0, against=x) for x in peers)
        right = "eager" if dtype == torch.float32 else None  # eager code in bfloat16 is no measure of anything
        cases.append(
            Case("kd_loss forward + backward", shape, name, inputs, ways, targets=faster, right=right, **floor)
        )
    return cases


def part_cases(scale: Scale) -> list[Case]:
    """The loss alone and the gradient alone: what the public call does, one after the other, on a GPU."""
    cases = []
    for N, V, dtype, _ in TINY if scale.tiny else SHAPES[:4]:
        for op, reads in ((OPS.row_divergence.default, 2), (OPS.row_divergence_grad.default, 3)):

            def inputs(N: int = N, V: int = V, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
                return _logits(N, V, dtype, scale.device)

            cases.append(
                Case(
                    *(op._opname, f"[{N}, {V}]", str(dtype).removeprefix("torch."), inputs),
                    backends_of(op, scale.device, _arguments),
                    bytes=float(reads * N * V * dtype.itemsize + 12 * N),
                    right="reference",
                    op=op._opname,
                    size=size_class(op, torch.empty(N, V, device="meta")),
                )
            )
    return cases


def product_cases(scale: Scale) -> list[Case]:
    """row_hvp: K tangents read, K products written, and the student's logits read once."""
    cases = []
    shapes = (
        ((16, 40, torch.float32), (64, 10, torch.float32))
        if scale.tiny
        else (*((8192, 32000, torch.bfloat16), (4096, 1000, torch.float32), (64, 10, torch.float32)),)
    )
    op = OPS.row_divergence_hvp.default
    for N, V, dtype in shapes:
        for K in (1, 2) if scale.tiny else (1, 4, 16):
            # Sixteen tangents of 8192 rows and their products, twice, would be 50 GB.
            rows = N // 2 if K == 16 and N * V > 2**27 else N

            def inputs(N: int = rows, V: int = V, K: int = K, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
                tangents = torch.randn(K, N, V, device=scale.device, dtype=dtype)
                return {**_logits(N, V, dtype, scale.device), "tangents": tangents}

            def arguments(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
                return inputs["tangents"], False, *_arguments(inputs)

            cases.append(
                Case(
                    *("row_divergence_hvp", f"K = {K}, [{rows}, {V}]", str(dtype).removeprefix("torch."), inputs),
                    backends_of(op, scale.device, arguments),
                    bytes=(2.0 * K + 1) * rows * V * dtype.itemsize,
                    targets=(Target(">= 80 % of copy bandwidth", share=0.8),) if rows * V >= 2**20 else (),
                    right="reference",
                    op=op._opname,
                    size=size_class(op, torch.empty(K, rows, V, device="meta")),
                )
            )
    return cases


def stats_cases(scale: Scale) -> list[Case]:
    """row_stats with teacher, labels and a slice of the classes: two sets of logits read."""
    cases = []
    op = OPS.row_stats.default
    shapes = (
        ((16, 40, torch.float32),)
        if scale.tiny
        else (*((8192, 32000, torch.bfloat16), (4096, 1000, torch.float32), (64, 10, torch.float32)),)
    )
    for N, V, dtype in shapes:

        def inputs(N: int = N, V: int = V, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            return _logits(N, V, dtype, scale.device)

        def arguments(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
            return inputs["student"], inputs["teacher"], inputs["labels"], T, 0, inputs["student"].shape[1] // 2, -100

        def eager(inputs: dict[str, Tensor]) -> Call:
            args = inputs["student"], inputs["teacher"], inputs["labels"], T, (0, inputs["student"].shape[1] // 2)
            return unchecked(lambda: eager_row_stats(*args))  # other names in another order

        cases.append(
            Case(
                *("row_stats", f"[{N}, {V}]", str(dtype).removeprefix("torch."), inputs),
                {**backends_of(op, scale.device, arguments), "eager": eager},
                bytes=2.0 * N * V * dtype.itemsize + 90 * N,
                right="reference",
                op=op._opname,
                size=size_class(op, torch.empty(N, V, device="meta")),
            )
        )
    return cases
