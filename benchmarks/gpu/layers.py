"""Cases of the contractions of a layer's per-sample gradients, against the matrix products that they are at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.eager_cg_update import eager_cg_update
from kdaif_fast.ops import persample_conv, segment_mean

from .cases import Case, Target, backends_of, size_class, unchecked
from .scale import Scale
from .timing import Call

OPS = torch.ops.kdaif_fast
PRODUCT = "matrix product"
LAYERS = (
    ("GPT-2 MLP", 16, 512, 768, 3072),
    ("ViT-B MLP", 64, 197, 3072, 768),
    ("GPT-2 attention", 16, 512, 768, 768),
    ("MLP", 4096, 1, 784, 512),
    ("small MLP", 64, 1, 64, 32),
)
"""Name, samples, positions, inputs, outputs."""
TINY = (("tiny MLP", 8, 1, 16, 8), ("tiny sequence", 4, 6, 16, 8))
KINDS = ((torch.bfloat16, False, "bfloat16", "bf16"), (torch.float32, True, "float32, TF32", "tf32"))
IN_FULL = (torch.float32, False, "float32", "float32")


def _layer(scale: Scale, N: int, T: int, I: int, O: int, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:  # noqa: E741
    def inputs() -> dict[str, Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=scale.device, dtype=dtype)

        weights = torch.rand(N, device=scale.device) * 2
        return {"a": random(N, T, I), "b": random(N, T, O), "v": random(1, O, I), "w": weights}

    return inputs


def _product(x: dict[str, Tensor]) -> Call:
    """[N T, I] x [I, O]"""
    a, v = x["a"].flatten(0, 1), x["v"][0].T
    return unchecked(lambda: torch.mm(a, v))


def _weight_gradient(x: dict[str, Tensor]) -> Call:
    """[O, N T] x [N T, I]"""
    a, b = x["a"].flatten(0, 1), x["b"].flatten(0, 1).T
    return unchecked(lambda: torch.mm(b, a))


def _gradients(x: dict[str, Tensor]) -> Call:
    """N products of [O, T] x [T, I]"""
    a, b = x["a"], x["b"].mT
    return unchecked(lambda: torch.bmm(b, a))


def _grams(x: dict[str, Tensor]) -> Call:
    """Both Gram matrices of each sample."""
    a, b = x["a"], x["b"]
    return unchecked(lambda: (torch.bmm(a, a.mT), torch.bmm(b, b.mT)))


def layer_cases(scale: Scale) -> list[Case]:
    """persample_dot and weighted_grad, then norms and gradients, at the shapes of layers that people have."""
    first, second = [], []
    for kind in (*KINDS, IN_FULL):
        for name, N, T, I, O in TINY if scale.tiny else LAYERS:  # noqa: E741
            if kind == IN_FULL and not (scale.tiny or name in ("GPT-2 MLP", "MLP")):
                continue
            first += _contractions(scale, kind, name, N, T, I, O)
            second += _others(scale, kind, name, N, T, I, O)
    return first + second


def _case(
    scale: Scale,
    kind: tuple[torch.dtype, bool, str, str],
    layer: tuple[Any, ...],
    op: Any,
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]],
    product: Callable[[dict[str, Tensor]], Call],
    **more: Any,
) -> Case:
    dtype, tf32, label, rate = kind
    name, N, T, I, O = layer  # noqa: E741
    a, b = torch.empty(N, T, I, device="meta"), torch.empty(N, T, O, device="meta")
    ways = {**backends_of(op, scale.device, arguments), PRODUCT: product}
    return Case(
        *(op._opname, f"{name}: N {N}, T {T}, {I} -> {O}", label, _layer(scale, N, T, I, O, dtype), ways),
        rate=rate,
        tf32=tf32,
        right="reference",
        op=op._opname,
        size=size_class(op, a, b),
        **more,
    )


def _contractions(scale: Scale, kind: Any, name: str, N: int, T: int, I: int, O: int) -> list[Case]:  # noqa: E741
    read, weight = N * T * (I + O), O * I
    shared = {
        "operations": 2.0 * N * T * I * O,
        "bytes": float((read + weight) * kind[0].itemsize),
        "targets": (Target("<= 1.25 of the matrix product", times=1.25, against=PRODUCT),),
    }
    layer = (name, N, T, I, O)
    return [
        _case(
            *(scale, kind, layer, OPS.persample_dot.default),
            *(lambda x: (x["a"], x["b"], x["v"]), _product),
            **shared,
        ),
        _case(
            *(scale, kind, layer, OPS.weighted_grad.default),
            *(lambda x: (x["a"], x["b"], x["w"]), _weight_gradient),
            **shared,
        ),
    ]


def _others(scale: Scale, kind: Any, name: str, N: int, T: int, I: int, O: int) -> list[Case]:  # noqa: E741
    read, written = N * T * (I + O), N * O * I
    layer, size = (name, N, T, I, O), kind[0].itemsize
    cases = [
        _case(
            *(scale, kind, layer, OPS.persample_norm.default),
            *(lambda x: (x["a"], x["b"]), _grams if T > 1 else _product),
            operations=2.0 * N * min(T * T * (I + O), T * I * O) if T > 1 else 0.0,
            bytes=float(read * size),
        )
    ]
    if written * size < 2**33:
        cases.append(
            _case(
                *(scale, kind, layer, OPS.persample_grad.default),
                *(lambda x: (x["a"], x["b"]), _gradients),
                operations=2.0 * N * T * I * O,
                bytes=float((read + written) * size),
            )
        )
    return cases


def vector_cases(scale: Scale) -> list[Case]:
    """cg_update, cg_dots and segment_mean."""
    cases = []
    for K, P in ((2, 100),) if scale.tiny else ((1, 25_000_000), (8, 1_200_000), (1, 17_000)):

        def inputs(K: int = K, P: int = P) -> dict[str, Tensor]:
            vectors = torch.randn(4, K, P, device=scale.device).unbind()
            return {**dict(zip(("x", "r", "p", "Ap"), vectors, strict=True)), "steps": torch.rand(K).to(scale.device)}

        def update(v: dict[str, Tensor]) -> tuple[Any, ...]:
            return v["x"].clone(), v["r"].clone(), v["p"], v["Ap"], 1e-3 * v["steps"], 0.1, None, None

        def eager(v: dict[str, Tensor]) -> Call:
            args = update(v)[:6]
            return lambda: eager_cg_update(*args)

        for op, arguments, passes, others in (
            (OPS.cg_update.default, update, 6, {"eager": eager}),
            (OPS.cg_dots.default, lambda v: (v["p"], v["Ap"]), 2, {}),
        ):
            cases.append(
                Case(
                    *(op._opname, f"K = {K}, P = {P:,}", "float32", inputs),
                    {**backends_of(op, scale.device, arguments), **others},
                    bytes=4.0 * passes * K * P,
                    right="reference",
                    op=op._opname,
                    size=size_class(op, torch.empty(K, P, device="meta")),
                )
            )
    rows, segments = (64, 4) if scale.tiny else (2**22, 8192)

    def tokens() -> dict[str, Tensor]:
        of = torch.randint(segments, (rows,), device=scale.device)
        return {"values": torch.randn(rows, device=scale.device), "segments": of}

    def mean(x: dict[str, Tensor]) -> Call:
        return lambda: segment_mean(x["values"], x["segments"], segments)

    def by_sums(x: dict[str, Tensor]) -> Call:
        def call() -> Tensor:
            zeros = x["values"].new_zeros(segments)
            count = zeros.index_add(0, x["segments"], torch.ones_like(x["values"]))
            return zeros.index_add(0, x["segments"], x["values"]) / count

        return call

    shape = f"{rows:,} rows, {segments:,} segments"
    ways = {"kdaif_fast": mean, "eager, float32": by_sums}
    cases.append(Case("segment_mean", shape, "float32", tokens, ways, bytes=12.0 * rows))
    return cases


def convolution_cases(scale: Scale) -> list[Case]:
    """Dots and norms of a convolution's per-sample gradients, against the weight gradient of the same layer."""
    N, C, O, side = (2, 3, 4, 6) if scale.tiny else (64, 64, 64, 56)  # noqa: E741
    geometry = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    cases = []
    for dtype, tf32, label, rate in (*KINDS, IN_FULL):

        def inputs(dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            def random(*shape: int) -> Tensor:
                return torch.randn(shape, device=scale.device, dtype=dtype)

            return {"a": random(N, C, side, side), "b": random(N, O, side, side), "v": random(1, O, C, 3, 3)}

        def ours(x: dict[str, Tensor]) -> Call:
            return lambda: persample_conv(x["a"], x["b"], x["v"], norms=True, **geometry)[1:]

        def weight_gradient(x: dict[str, Tensor]) -> Call:
            shape = (O, C, 3, 3)
            return unchecked(lambda: torch.nn.grad.conv2d_weight(x["a"], shape, x["b"], padding=1))

        cases.append(
            Case(
                *("persample_conv, dots and norms", f"N {N}, {C} -> {O}, {side} x {side}, 3 x 3", label, inputs),
                {"kdaif_fast": ours, "weight gradient of the batch": weight_gradient},
                operations=2.0 * N * side * side * C * O * 9,
                bytes=float(N * side * side * (C + O) * dtype.itemsize),
                rate=rate,
                tf32=tf32,
            )
        )
    return cases
