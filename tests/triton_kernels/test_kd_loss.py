"""The Triton kernels of kd_loss without a GPU: run by Triton's interpreter, and compiled for GPUs that are not here."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import kd_loss
from kdaif_fast.reference import kd_loss as reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}


@pytest.mark.skipif(INTERPRETED, reason="this is the run inside")
def test_under_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so the tests below run in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "TestInterpreted", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def inputs(N, V, dtype):
    s, t = (3 * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    return s, t, torch.randint(V, (N,)), torch.randn(N)


def error(ours, expected):
    return ((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestInterpreted:
    @pytest.fixture
    def kernels(self):
        from kdaif_fast.triton_kernels import kd_loss

        return kd_loss

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (2, 2), (4, 37), (2, 128), (2, 5000)])
    @pytest.mark.parametrize(("T", "alpha"), [(1.0, 1.0), (2.5, 0.0), (3.0, 0.3)])
    def test_against_reference(self, kernels, dtype, shape, T, alpha):
        s, t, labels, scale = inputs(*shape, dtype)
        loss, grad = kernels.kd_loss_with_grad(s, t, labels, scale, T, alpha)
        hvp = kernels.kd_loss_hvp(scale, t, s, T, alpha)
        wide = (s.double(), t.double(), labels, scale.double())
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, T, alpha)
        expected_hvp = reference.kd_loss_hvp(scale.double(), t.double(), s.double(), T, alpha)
        assert (loss.dtype, grad.dtype, hvp.dtype) == (torch.float32, dtype, dtype)
        assert error(loss, expected_loss) < 1e-5 or loss.abs().max() < 1e-6
        assert error(grad, expected_grad) < TOLERANCE[dtype] or grad.abs().max() < 1e-6
        # u - <p, u> cancels where one class has all the probability, so the tangent is what rounding is measured by.
        tangent = (scale[:, None] * t).double()
        assert (hvp.double() - expected_hvp).norm() <= TOLERANCE[dtype] * tangent.norm()
        assert torch.equal(kernels.kd_loss(s, t, labels, scale, T, alpha), loss)
        assert torch.equal(kernels.kd_loss_grad(scale, s, t, labels, T, alpha), grad)

    def test_masked_classes_wrong_labels_and_nan(self, kernels):
        s, t, labels, scale = inputs(5, 70, torch.float32)
        labels[:] = torch.tensor([0, 0, 70, -1, 0])
        s[:, 3] = t[:, 3] = -math.inf
        s[1, 1:] = t[1, 1:] = -math.inf
        t[4, 60] = math.nan
        loss, grad = kernels.kd_loss_with_grad(s, t, labels, scale, 2.0, 0.5)
        assert loss.isnan().tolist() == [False, False, True, True, True]
        expected = reference.kd_loss_with_grad(s[:2], t[:2], labels[:2], scale[:2], 2.0, 0.5)
        torch.testing.assert_close(loss[:2], expected[0])
        torch.testing.assert_close(grad[:2], expected[1], rtol=1e-4, atol=1e-6)
        assert (grad[:2, 3] == 0).all()

    def test_a_block_of_masked_classes(self, kernels):
        """A whole first block of -inf: a running maximum that was not guarded would give NaN."""
        s, t, labels, scale = inputs(1, 5000, torch.float32)
        s[0, :4096] = t[0, :4096] = -math.inf
        labels[0] = 4999
        loss = kernels.kd_loss(s, t, labels, scale, 2.0, 0.5)
        torch.testing.assert_close(loss, reference.kd_loss(s, t, labels, scale, 2.0, 0.5))

    def test_strides(self, kernels):
        s, t, labels, scale = inputs(4, 40, torch.float32)
        padded = torch.full((4, 64), math.nan)
        padded[:, :40] = s
        ours = kernels.kd_loss_with_grad(padded[:, :40], t.t().contiguous().t(), labels, scale, 2.0, 0.5)
        expected = kernels.kd_loss_with_grad(s, t, labels, scale, 2.0, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_forced_through_the_public_call_and_its_derivatives(self):
        s, t, labels, weight = inputs(3, 5, torch.float32)

        def loss(s):
            return kd_loss(s, t, labels, weight=weight, temperature=2.0).sum()

        expected = torch.func.hessian(loss)(s)
        with kdaif_fast.backend("triton"):
            torch.testing.assert_close(torch.func.hessian(loss)(s), expected)
            torch.testing.assert_close(torch.func.grad(loss)(s), torch.func.grad(loss)(s.double()).float())


COMPILE = """
import itertools, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kdaif_fast.triton_kernels.kd_loss import _kd_loss_hvp_kernel, _kd_loss_kernel, block_for

def build(kernel, types, constants, warps):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 48 * 1024
    print("COMPILED", kernel.__name__, flush=True)

for element, classes in itertools.product(("fp32", "bf16", "fp16"), (1000, 32000)):
    block, warps = block_for(classes)
    scalars = {"V": "i32", "temperature": "fp32", "alpha": "fp32", "scale": "*fp32", "student_stride": "i64"}
    logits = {name: f"*{element}" for name in ("student", "teacher", "tangent", "grad", "out")}
    loss_types = {**scalars, **logits, "labels": "*i64", "loss": "*fp32", "teacher_stride": "i64"}
    hvp_types = {**scalars, **logits, "tangent_stride": "i64"}
    for parts in ({"CE": True, "KL": True},) if element != "fp32" else (
        {"CE": True, "KL": True}, {"CE": True, "KL": False}, {"CE": False, "KL": True}
    ):
        build(_kd_loss_kernel, loss_types, {**parts, "LOSS": True, "GRAD": True, "BLOCK": block}, warps)
    build(_kd_loss_hvp_kernel, hvp_types, {"CE": True, "KL": True, "BLOCK": block}, warps)
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_without_spilling(architecture, tmp_path):
    """Every dtype and block width, to machine code; a register spill would cost more than all else."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("ARCHITECTURE", str(architecture))],
        env={
            **os.environ,
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    assert output.count("COMPILED") == 2 * (4 + 2 + 2)
    assert len(spills) >= 2 * output.count("COMPILED")  # stores and loads of each
    assert not any(spills)


def test_state_says_why_it_is_off(monkeypatch):
    from kdaif_fast import _library

    monkeypatch.delenv("KDAIF_NATIVE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in _library._triton_state()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _library._triton_state() == "loaded"
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    assert _library._triton_state() == "not installed"
