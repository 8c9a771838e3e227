"""cg_update and cg_dots against PyTorch, each in units of PyTorch's own passes that are measured in turns with it."""

import pytest
import torch
from baselines.eager_cg_update import eager_cg_dots, eager_cg_update

from kdaif_fast.ops import cg_dots, cg_update

SHAPES = [(1, 17_000), (8, 17_000), (32, 17_000), (1, 1_000_000), (8, 1_000_000)]


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


UPDATES = {
    "kdaif_fast": lambda: cg_update,
    "eager": lambda: eager_cg_update,
    "torch.compile": lambda: compiled(eager_cg_update),
}
DOTS = {
    "kdaif_fast": lambda: cg_dots,
    "eager": lambda: eager_cg_dots,
    "torch.compile": lambda: compiled(eager_cg_dots),
}


def vectors(K, P):
    torch.manual_seed(0)
    return torch.randn(4, K, P).unbind(), torch.full((K,), 1e-6)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cg_update(measure_in, shape, name):
    (x, r, p, Ap), steps = vectors(*shape)
    update = UPDATES[name]()
    ours, theirs = [x.clone(), r.clone()], [x.clone(), r.clone()]
    result, expected = update(*ours, p, Ap, steps, 0.1), eager_cg_update(*theirs, p, Ap, steps, 0.1)
    torch.testing.assert_close([result, *ours], [expected, *theirs], rtol=1e-4, atol=1e-5)
    measure_in(
        "eager",
        lambda: eager_cg_update(x, r, p, Ap, steps, 0.1),
        f"cg_update {list(shape)} float32",
        name,
        lambda: update(x, r, p, Ap, steps, 0.1),
    )


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cg_dots(measure_in, shape, name):
    (p, q, _, _), _ = vectors(*shape)
    dots = DOTS[name]()
    torch.testing.assert_close(dots(p, q), eager_cg_dots(p, q), rtol=1e-3, atol=1.0)
    measure_in("eager", lambda: eager_cg_dots(p, q), f"cg_dots {list(shape)} float32", name, lambda: dots(p, q))
