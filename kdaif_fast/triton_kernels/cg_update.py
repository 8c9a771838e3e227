"""cg_update and cg_dots in Triton: a program owns a chunk of one right-hand side; a second stage adds the partial sums.

No atomics: results repeat bit for bit. Floor: bytes, as for the CPU (24 an element, 28 while the best iterate is kept,
8 for cg_dots); nothing is read twice. float64 is not for Triton, whose scalar arguments are float32: it goes to the
reference. Not run on a GPU yet; tests/triton_kernels says what was checked without one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import interpreted, on_device_of

CHUNK, WARPS = 2048, 8  # 8 elements a thread of each of up to six vectors: no spills on sm_80 and sm_90
INTERPRETED_CHUNK = 16384  # a program costs milliseconds there, however small


@triton.jit
def _cg_update_kernel(
    x,  # [K, P], overwritten
    r,  # [K, P], overwritten
    p,  # [K, P]
    Ap,  # [K, P]
    steps,  # [K]
    best,  # [K, P], overwritten where keep; KEEP
    keep,  # [K], uint8
    partial,  # [K, chunks], float32
    P,
    chunks,
    damping,
    x_stride,  # from row to row
    r_stride,
    p_stride,
    Ap_stride,
    best_stride,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    k = (tl.program_id(0) // chunks).to(tl.int64)
    at = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    there = at < P
    step = tl.load(steps + k)
    residual = tl.load(r + k * r_stride + at, mask=there, other=0.0)
    if KEEP:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(keep + k) != 0:
            tl.store(best + k * best_stride + at, tl.load(x + k * x_stride + at, mask=there), mask=there)
    if step != 0.0:  # else x and r stay as they are, whatever p and Ap hold
        iterate = tl.load(x + k * x_stride + at, mask=there)
        direction = tl.load(p + k * p_stride + at, mask=there, other=0.0)
        product = tl.load(Ap + k * Ap_stride + at, mask=there, other=0.0)
        tl.store(x + k * x_stride + at, iterate + step * direction, mask=there)
        residual -= step * (product + damping * direction)
        tl.store(r + k * r_stride + at, residual, mask=there)
    tl.store(partial + tl.program_id(0), tl.sum(residual * residual, 0))


@triton.jit
def _cg_dots_kernel(
    p,  # [K, P]
    q,  # [K, P]
    partial,  # [2, K, chunks], float32
    P,
    chunks,
    p_stride,  # from row to row
    q_stride,
    CHUNK: tl.constexpr,
):
    k = (tl.program_id(0) // chunks).to(tl.int64)
    at = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    there = at < P
    left = tl.load(p + k * p_stride + at, mask=there, other=0.0)
    right = tl.load(q + k * q_stride + at, mask=there, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(left * right, 0))
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(left * left, 0))


def chunk() -> int:
    """Elements of a program."""
    return INTERPRETED_CHUNK if interpreted() else CHUNK


def _dense_rows(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(1) == 1 or vectors.shape[1] <= 1 else vectors.contiguous()


def cg_update(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    Ap: Tensor,
    steps: Tensor,
    damping: float,
    best: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Updates x, r and best; returns r . r [K], float32."""
    K, P = x.shape
    if 0 in (K, P):
        return torch.zeros(K, dtype=torch.float32, device=x.device)
    p, Ap = _dense_rows(p), _dense_rows(Ap)
    partial = torch.empty((K, triton.cdiv(P, chunk())), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _cg_update_kernel[(partial.numel(),)](
            x,
            r,
            p,
            Ap,
            steps.contiguous(),
            x if best is None else best,
            steps if keep is None else keep.contiguous().view(torch.uint8),
            partial,
            P,
            partial.shape[1],
            damping,
            x.stride(0),
            r.stride(0),
            p.stride(0),
            Ap.stride(0),
            0 if best is None else best.stride(0),
            KEEP=best is not None,
            CHUNK=chunk(),
            num_warps=WARPS,
        )
    return partial.sum(1)


def cg_dots(p: Tensor, q: Tensor) -> Tensor:
    """[K, P], [K, P] -> [2, K], float32: p . q and p . p of every row."""
    K, P = p.shape
    if 0 in (K, P):
        return torch.zeros((2, K), dtype=torch.float32, device=p.device)
    p, q = _dense_rows(p), _dense_rows(q)
    partial = torch.empty((2, K, triton.cdiv(P, chunk())), dtype=torch.float32, device=p.device)
    with on_device_of(p):
        _cg_dots_kernel[(partial.numel() // 2,)](
            p, q, partial, P, partial.shape[2], p.stride(0), q.stride(0), CHUNK=chunk(), num_warps=WARPS
        )
    return partial.sum(2)
