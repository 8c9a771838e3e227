"""What the tests of linear_kd_loss share: a problem, and the reference's loss of it."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import linear_kd_loss
from kdaif_fast.reference import linear_kd_loss as reference

T, ALPHA = 2.0, 0.3
IGNORED = -100
needs_kernels = pytest.mark.skipif(kdaif_fast.backends()["cpu"] != "loaded", reason="no compiled CPU kernels here")
DIFFERENTIABLE = ("hidden", "head_weight", "head_bias", "teacher", "teacher_head", "teacher_bias", "weight")


def problem(N=7, D=5, V=11, E=3, dtype=torch.float64, bias=True, teacher_head=True, weight=True, ignored=(1, 4)):
    """Arguments by name; rows in `ignored` have the label -100."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments = {"hidden": normal(N, D), "head_weight": normal(V, D)}
    arguments |= {"teacher": normal(N, E), "teacher_head": normal(V, E)} if teacher_head else {"teacher": normal(N, V)}
    if bias:
        arguments |= {"head_bias": normal(V)}
        arguments |= {"teacher_bias": normal(V)} if teacher_head else {}
    if weight:
        arguments["weight"] = normal(N).to(reference.accumulation_dtype(arguments["hidden"]))
    labels = torch.randint(V, (N,), generator=generator)
    labels[[row for row in ignored if row < N]] = IGNORED
    return arguments | {"labels": labels}


def ours(reduction="mean", temperature=T, alpha=ALPHA, chunk_rows=None, **arguments):
    return linear_kd_loss(**arguments, temperature=temperature, alpha=alpha, reduction=reduction, chunk_rows=chunk_rows)


def expected(reduction="mean", temperature=T, alpha=ALPHA, chunk_rows=None, **arguments):
    """By definition; in float64 if the arguments are."""
    tensors = [arguments.get(name) for name in DIFFERENTIABLE]
    labels = arguments["labels"]
    loss = reference.linear_kd_loss(*tensors[:6], labels, tensors[6], temperature, alpha, IGNORED)
    return reference.reduce(loss, labels, IGNORED, reduction)


def leaves(arguments, *names):
    """The arguments, of which the named ones (all without names) require a gradient; and those."""
    names = [name for name in names or DIFFERENTIABLE if name in arguments]
    arguments = {k: v.detach().clone().requires_grad_(k in names) for k, v in arguments.items()}
    return arguments, [arguments[name] for name in names]


def double(arguments):
    return {k: v if k == "labels" else v.detach().double() for k, v in arguments.items()}


def relative_error(a, exact):
    """In the 2-norm."""
    assert a.shape == exact.shape
    return ((a.double() - exact).norm() / exact.norm()).item()
