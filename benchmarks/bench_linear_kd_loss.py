"""linear_kd_loss, hidden states to gradients, against PyTorch: time, and peak memory of a process of its own.

`python benchmarks/bench_linear_kd_loss.py kdaif_fast float32` prints one peak: MiB above what the inputs need.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from baselines.eager_linear_kd_loss import eager_linear_kd_loss

from kdaif_fast.ops import linear_kd_loss

N, D, E, V = 1024, 256, 512, 32000
T, ALPHA = 2.0, 0.5


def fused_linear_kd_loss(hidden, head, teacher, teacher_head, labels, T, alpha):
    return linear_kd_loss(hidden, head, teacher, labels, teacher_head=teacher_head, temperature=T, alpha=alpha)


def widened(hidden, head, teacher, teacher_head, labels, T, alpha):
    return eager_linear_kd_loss(hidden.float(), head.float(), teacher.float(), teacher_head.float(), labels, T, alpha)


def with_bfloat16_units(*arguments):
    """A switch of the caller's: products of float32 in bfloat16, which loses nothing where the factors are bfloat16."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        return fused_linear_kd_loss(*arguments)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


IMPLEMENTATIONS = {
    "kdaif_fast": lambda: fused_linear_kd_loss,
    "kdaif_fast, bfloat16 units": lambda: with_bfloat16_units,
    "eager": lambda: eager_linear_kd_loss,
    "eager, float32 logits": lambda: widened,
    "torch.compile": lambda: torch.compile(eager_linear_kd_loss, fullgraph=True, dynamic=False),
}


def inputs(N, dtype, ignored=0.0):
    torch.manual_seed(0)
    hidden, teacher = torch.randn(N, D).to(dtype), torch.randn(N, E).to(dtype)
    head, teacher_head = (torch.randn(V, D) / D**0.5 * 2).to(dtype), (torch.randn(V, E) / E**0.5 * 2).to(dtype)
    labels = torch.randint(V, (N,))
    labels[: int(ignored * N)] = -100
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def step(loss, arguments):
    return torch.autograd.grad(loss(*arguments, T, ALPHA), arguments[:2])


def status(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak(name, dtype):
    """MiB at the worst moment of a step, above what was there before it; the gradients are part of it."""
    loss = IMPLEMENTATIONS[name]()
    arguments = inputs(N, getattr(torch, dtype))
    if name == "torch.compile":
        step(loss, arguments)  # the compiler's own memory is not meant
    else:
        step(loss, inputs(8, getattr(torch, dtype)))
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps from it would not be seen to be needed again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    step(loss, arguments)
    return status("VmHWM") - before


def peak_of_a_process(name, dtype):
    command = [sys.executable, __file__, name, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return float(result.stdout)


LOW_PRECISION_ONLY = ("kdaif_fast, bfloat16 units", "eager, float32 logits")
CASES = [(name, "float32") for name in IMPLEMENTATIONS if name not in LOW_PRECISION_ONLY]
CASES += [(name, "bfloat16") for name in IMPLEMENTATIONS]
# Largest relative error (2-norm) of the head's gradient; with logits in bfloat16 it is whatever it is.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}
ROUNDED = [("eager", "bfloat16"), ("torch.compile", "bfloat16")]


def head_gradient_error(loss, dtype):
    arguments = inputs(64, getattr(torch, dtype))
    exact = [x.detach().double() if x.is_floating_point() else x for x in arguments]
    expected = step(eager_linear_kd_loss, [exact[0].requires_grad_(), exact[1].requires_grad_(), *exact[2:]])[1]
    return (step(loss, arguments)[1].double() - expected).norm() / expected.norm()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def bench_linear_kd_loss(measure, name, dtype):
    arguments = inputs(N, getattr(torch, dtype))
    torch.compiler.reset()
    loss = IMPLEMENTATIONS[name]()
    assert (name, dtype) in ROUNDED or head_gradient_error(loss, dtype) < TOLERANCE[dtype]
    measure(
        f"linear_kd_loss forward + backward, D = {D}, [{N}, {V}] {dtype}",
        name,
        lambda: step(loss, arguments),
        peak_mib=peak_of_a_process(name, dtype),
    )


@pytest.mark.parametrize("name", ["kdaif_fast", "eager"])
def bench_half_of_the_rows_ignored(measure, name):
    arguments = inputs(N, torch.float32, ignored=0.5)
    loss = IMPLEMENTATIONS[name]()
    measure(
        f"linear_kd_loss, half of the rows ignored, D = {D}, [{N}, {V}] float32", name, lambda: step(loss, arguments)
    )


if __name__ == "__main__":
    print(peak(*sys.argv[1:]))
