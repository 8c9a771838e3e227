"""cg_update by definition: what an iteration of conjugate gradients does to its vectors, for K right-hand sides.

K right-hand sides, P parameters; all vectors are [K, P], and every right-hand side has scalars of its own [K].
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """best = x where keep; x += a p; r -= a (Ap + damping p); returns r . r [K].

    Overwrites x, r and best. Where a step is 0, x and r stay as they are.
    """
    if best is not None and keep is not None:
        best.copy_(torch.where(keep[:, None], x, best))
    a = steps[:, None]
    x.copy_(torch.where(a != 0, x + a * p, x))
    r.copy_(torch.where(a != 0, r - a * (Ap + damping * p), r))
    return r.double().square().sum(1).to(r.dtype)


def cg_dots(p: Tensor, q: Tensor) -> Tensor:
    """[K, P], [K, P] -> [2, K]: p . q and p . p of every row."""
    wide = p.double()
    return torch.stack([(wide * q.double()).sum(1), wide.square().sum(1)]).to(p.dtype)
