"""Every public op once: a function of tensors, and small tensors of awkward sizes. Needs no pytest.

Behaviour does not depend on what is computed, so the tests of streams, graphs, memory and the rest go through this
table; and each result is compared with the same call in float64 on the CPU, answered by the definitions.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.func import grad, jvp, vmap

import kdaif_fast
from kdaif_fast import ops

N, V, K = 5, 37, 3
NARROW = (torch.bfloat16, torch.float16)
# Of all of a result, in the 2-norm: sums of hundreds of terms, and for narrow types the rounding of what is between.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Call(NamedTuple):
    """run(*tensors) -> a tensor, or a tuple of them."""

    run: Callable[..., Any]
    make: Callable[..., list[Any]]


def logits(dtype):
    """Student, teacher, labels (one of them ignored) and weights of N rows."""
    student, teacher = (3 * torch.randn(2, N, V)).to(dtype).unbind()
    labels = torch.randint(V, (N,))
    labels[1] = -100
    return [student, teacher, labels, torch.rand(N) + 0.5]


def with_tangents(dtype):
    return [*logits(dtype), torch.randn(K, N, V).to(dtype)]


def with_settings(dtype):
    """A temperature, a weight and a gate for each row."""
    return [*logits(dtype), torch.rand(N) + 0.5]


def top_k(dtype):
    student, teacher, labels, weight = logits(dtype)
    values, classes = teacher.float().softmax(-1).topk(4)
    return [student, values, labels, weight, classes]


def layer(dtype, T=7):
    """A linear layer's inputs and output gradients, directions, and weights."""
    return [torch.randn(4, T, 33).to(dtype), torch.randn(4, T, 18).to(dtype), torch.randn(2, 18, 33).to(dtype)]


def one_position(dtype):
    return layer(dtype, T=1)


def weighted(dtype):
    return [*layer(dtype)[:2], torch.rand(4)]


def convolution(dtype):
    return [torch.randn(3, 4, 9, 8).to(dtype), torch.randn(3, 6, 7, 6).to(dtype), torch.randn(2, 6, 4, 3, 3).to(dtype)]


def norm_layer(dtype):
    x = torch.randn(4, 6, 10).to(dtype)
    return [x, torch.randn(4, 6, 10).to(dtype), x.float().mean(2), 1 / (x.float().var(2) + 1e-5).sqrt()]


def group_norm(dtype):
    x = torch.randn(4, 6, 10).to(dtype)
    grouped = x.float().view(4, 2, 30)
    return [x, torch.randn(4, 6, 10).to(dtype), grouped.mean(2), 1 / (grouped.var(2) + 1e-5).sqrt()]


def vectors(dtype):
    """x, r, p, A p of K right-hand sides, their steps, the best iterates, and which to keep."""
    return [
        *torch.randn(4, K, 1001).unbind(),
        torch.tensor([0.3, 0.0, -0.2]),
        torch.randn(K, 1001),
        torch.arange(K) > 0,
    ]


def head(dtype):
    """Hidden states, heads and biases of student and teacher, labels."""
    labels = torch.randint(V, (N,))
    labels[2] = -100
    return [
        torch.randn(N, 16).to(dtype),
        torch.randn(V, 16).to(dtype),
        torch.randn(N, 8).to(dtype),
        torch.randn(V, 8).to(dtype),
        labels,
        torch.rand(N) + 0.5,
    ]


def gradient(loss):
    """The gradient of the summed loss in the first argument, by autograd."""

    def run(first, *rest):
        first = first.detach().requires_grad_()
        return torch.autograd.grad(loss(first, *rest).sum(), first)[0]

    return run


def product(loss):
    """A Hessian's product with the teacher's logits, by autograd twice."""

    def run(first, *rest):
        first = first.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(first, *rest).sum(), first, create_graph=True)
        return torch.autograd.grad(g, first, rest[0])[0]

    return run


def kd(student, teacher, labels, weight):
    return ops.kd_loss(student, teacher, labels, weight=weight, temperature=2.0, alpha=0.3)


def kd_mean(student, teacher, labels, weight):
    return ops.kd_loss(student, teacher, labels, weight=weight, reduction="mean")


def by_row(student, teacher, labels, weight, settings):
    return ops.row_divergence(
        student, teacher, labels, weight=weight, temperature=settings, ce_weight=settings, kd_weight=0.5
    )


def from_top_k(student, values, labels, weight, classes):
    return ops.row_divergence(
        student, values, labels, weight=weight, teacher_form="probabilities", teacher_indices=classes, ce_weight=0.5
    )


def chunked(reduction):
    def run(hidden, weight, teacher, teacher_head, labels, row_weight):
        return ops.linear_kd_loss(
            hidden, weight, teacher, labels, teacher_head=teacher_head, weight=row_weight, reduction=reduction
        )

    return run


def conv(inputs, output_grads, directions):
    found = ops.persample_conv(
        *(inputs, output_grads, directions),
        **{"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "grads": True, "norms": True},
    )
    return tuple(x for x in found if x is not None)


def update(x, r, p, Ap, steps, best, keep):
    x, r, best = x.clone(), r.clone(), best.clone()
    return x, r, best, ops.cg_update(x, r, p, Ap, steps, 0.1, best=best, keep=keep)


def statistics(student, teacher, labels, weight):
    stats = ops.row_stats(student, teacher, labels, temperature=2.0, classes=(1, 9))
    return tuple(x for name, x in stats._asdict().items() if x is not None and x.is_floating_point())


CALLS = {
    "kd_loss": Call(kd, logits),
    "kd_loss mean": Call(kd_mean, logits),
    "kd_loss gradient": Call(gradient(kd), logits),
    "kd_loss mean gradient": Call(gradient(kd_mean), logits),
    "kd_loss Hessian": Call(product(kd), logits),
    **{
        name: Call(gradient(lambda s, t, y, w, name=name: getattr(ops, name)(s, t, y, weight=w)), logits)
        for name in ("dkd_loss", "js_loss", "log_cosh_loss", "logit_mse_loss", "nkd_loss", "reverse_kl_loss")
    },
    "skew_kl_loss": Call(gradient(lambda s, t, y, w: ops.skew_kl_loss(s, t, y, weight=w)), logits),
    "taid_loss": Call(gradient(lambda s, t, y, w: ops.taid_loss(s, t, y, weight=w, share=0.4)), logits),
    "total_variation_loss": Call(lambda s, t, y, w: ops.total_variation_loss(s, t, y, weight=w), logits),
    "settings of each row": Call(gradient(by_row), with_settings),
    "top k": Call(gradient(from_top_k), top_k),
    "row_hvp": Call(lambda s, t, y, w, u: ops.row_hvp(u, s, t, y, weight=w, temperature=2.0), with_tangents),
    "vmap of grad": Call(
        lambda s, t, y, w: vmap(grad(lambda s, t: ops.kd_loss(s, t, y).sum()))(
            torch.stack((s, 2 * s)), torch.stack((t, t))
        ),
        logits,
    ),
    "jvp": Call(lambda s, t, y, w: jvp(lambda s: kd(s, t, y, w), (s,), (t,))[1], logits),
    "row_stats": Call(statistics, logits),
    "segment_mean": Call(lambda s, t, y, w: ops.segment_mean(s[:, 0], y.clamp(0, 2), count=3), logits),
    "linear_kd_loss mean": Call(gradient(chunked("mean")), head),
    "linear_kd_loss none": Call(chunked("none"), head),
    "persample_dot": Call(ops.persample_dot, layer),
    "persample_dot, one position": Call(ops.persample_dot, one_position),
    "persample_grad": Call(lambda a, b, v: ops.persample_grad(a, b), layer),
    "persample_grad, one position": Call(lambda a, b, v: ops.persample_grad(a, b), one_position),
    "persample_norm": Call(lambda a, b, v: ops.persample_norm(a, b), layer),
    "persample_norm, one position": Call(lambda a, b, v: ops.persample_norm(a, b), one_position),
    "weighted_grad": Call(ops.weighted_grad, weighted),
    "persample_conv": Call(conv, convolution),
    "persample_layer_norm": Call(ops.persample_layer_norm, norm_layer),
    "persample_group_norm": Call(ops.persample_group_norm, group_norm),
    "cg_update": Call(update, vectors),
    "cg_dots": Call(lambda x, r, *rest: ops.cg_dots(x, r), vectors),
}
# Without layers of torch's own between, so that each reaches a kernel of the library's; one a kernel.
KERNELS = (
    *("kd_loss", "kd_loss gradient", "row_hvp", "row_stats", "persample_dot", "persample_grad", "persample_norm"),
    *("persample_norm, one position", "persample_grad, one position", "weighted_grad", "cg_update", "cg_dots"),
)
# Of these, compiled CUDA C++ has: what it has not, another backend answers wherever "cuda" is asked for.
COMPILED = ("kd_loss", "kd_loss gradient", "row_hvp", "row_stats", "persample_dot")


def on(device, tensors):
    return [x.to(device) for x in tensors]


def widened(tensors):
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in tensors]


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def expected(call, tensors):
    """By the definitions, in float64, on the CPU."""
    with kdaif_fast.backend("reference"):
        return as_tuple(call.run(*widened(tensors)))


def error(results, wanted):
    """The largest of the results' relative errors, in the 2-norm."""
    results = as_tuple(results)
    assert len(results) == len(wanted)
    worst = 0.0
    for ours, exact in zip(results, wanted, strict=True):
        assert ours.shape == exact.shape
        there = ours.detach().double().cpu()
        assert torch.equal(there.isnan(), exact.isnan())
        difference = (there - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp(min=1e-30)
        worst = max(worst, float(difference))
    return worst


def dtypes_of(name):
    """In what dtypes a call is there."""
    wide = (torch.float32,)
    return wide if CALLS[name].make is vectors else (*wide, *NARROW, torch.float64)


def backends_of(device):
    """What can answer there."""
    names = ("cuda", "triton", "reference") if torch.device(device).type == "cuda" else ("cpu", "reference")
    return [name for name in names if kdaif_fast.backends()[name] == "loaded"]


def reference_of(op):
    return getattr(importlib.import_module(f"kdaif_fast.reference.{op}"), op)
