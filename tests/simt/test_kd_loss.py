"""The CUDA kernels of kd_loss, run on the CPU under several thread schedules, against the reference."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdaif_fast.reference import kd_loss as reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("c++")
ORDERS = {"forward": 0, "reverse": 1, "odd before even": 2, "random": 3}
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


def compile_driver(output, *flags):
    command = [CXX, "-std=c++20", "-g", "-I", str(CSRC), "-I", str(HERE), str(HERE / "kd_loss.cpp"), "-o", str(output)]
    subprocess.run([*command, *flags], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    library = tmp_path_factory.mktemp("simt") / "kd_loss.so"
    undefined = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    compile_driver(library, "-O1", "-shared", "-fPIC", *undefined)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(N, V, *strides, T, alpha):
    return [*map(ctypes.c_int64, (N, V, *strides)), ctypes.c_double(T), ctypes.c_double(alpha)]


def run_loss(driver, order, s, t, labels, scale, T, alpha):
    loss = torch.full_like(scale, math.nan)
    grad = torch.full(s.shape, math.nan, dtype=s.dtype)
    arguments = [pointer(x) for x in (s, t, labels, scale, loss, grad)]
    driver.kd_loss(TYPES[s.dtype], order, *arguments, *sizes(*s.shape, s.stride(0), t.stride(0), T=T, alpha=alpha))
    return loss, grad


def run_hvp(driver, order, s, u, scale, T, alpha):
    out = torch.full(s.shape, math.nan, dtype=s.dtype)
    arguments = [pointer(x) for x in (s, u, scale, out)]
    driver.kd_loss_hvp(TYPES[s.dtype], order, *arguments, *sizes(*s.shape, s.stride(0), u.stride(0), T=T, alpha=alpha))
    return out


def inputs(N, V, dtype):
    s, t = (3 * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    return s, t, torch.randint(V, (N,)), torch.randn(N, dtype=reference.accumulation_dtype(s))


def error(ours, expected):
    return ((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 37), (2, 130), (2, 700), (1, 2100)])
@pytest.mark.parametrize(("T", "alpha"), [(1.0, 1.0), (2.5, 0.0), (3.0, 0.3)])
def test_against_reference_under_every_schedule(driver, dtype, shape, T, alpha):
    s, t, labels, scale = inputs(*shape, dtype)
    wide = (s.double(), t.double(), labels, scale.double())
    expected = reference.kd_loss_with_grad(*wide, T, alpha)
    expected_hvp = reference.kd_loss_hvp(scale.double(), t.double(), s.double(), T, alpha)
    results = [
        (*run_loss(driver, order, s, t, labels, scale, T, alpha), run_hvp(driver, order, s, t, scale, T, alpha))
        for order in ORDERS.values()
    ]
    loss, grad, hvp = results[0]
    for others in results[1:]:  # the same bits whatever the order of the threads
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    if shape[1] == 1:
        assert all(x.abs().max() < 1e-5 for x in (loss, grad, hvp))
    else:
        assert error(loss, expected[0]) < max(TOLERANCE[dtype], 1e-13) * (1 if dtype == torch.float64 else 10)
        assert error(grad, expected[1]) < 2 * TOLERANCE[dtype]
        assert error(hvp, expected_hvp) < 5 * TOLERANCE[dtype]


def test_masked_classes_and_wrong_labels(driver):
    s, t, labels, scale = inputs(4, 70, torch.float32)
    labels[:] = torch.tensor([0, 0, 70, -1])
    s[:, 3] = t[:, 3] = -math.inf
    s[1, 1:] = t[1, 1:] = -math.inf
    loss, grad = run_loss(driver, 3, s, t, labels, scale, 2.0, 0.5)
    assert loss.isnan().tolist() == [False, False, True, True]
    expected = reference.kd_loss_with_grad(s[:2], t[:2], labels[:2], scale[:2], 2.0, 0.5)
    torch.testing.assert_close(loss[:2], expected[0])
    torch.testing.assert_close(grad[:2], expected[1], rtol=1e-4, atol=1e-6)
    assert (grad[:2, 3] == 0).all()


def test_row_strides(driver):
    s, t, labels, scale = inputs(5, 40, torch.float32)
    padded = torch.full((5, 64), math.nan)
    padded[:, :40] = s
    ours = run_loss(driver, 0, padded[:, :40], t[:1].expand(5, 40), labels, scale, 2.0, 0.5)
    expected = run_loss(driver, 0, s, t[:1].repeat(5, 1), labels, scale, 2.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_address_sanitizer_is_silent(tmp_path):
    program = tmp_path / "kd_loss"
    compile_driver(program, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert (result.returncode, result.stdout.strip()) == (0, "clean"), result.stderr


def test_the_shim_sees_races_and_deadlocks(tmp_path):
    """A test tool that cannot fail proves nothing: a missing barrier changes results, a divergent one is reported."""
    source = tmp_path / "broken.cpp"
    source.write_text("""
    #include "simt.h"
    #include <cstdio>
    void racy(int* out) {
      __shared__ int memory[64];
      memory[threadIdx.x] = static_cast<int>(threadIdx.x);
      out[threadIdx.x] = memory[63 - threadIdx.x];  // no barrier between writing and reading
    }
    void divergent() { if (threadIdx.x < 32) __syncthreads(); }
    int main() {
      int a[64], b[64];
      simt::launch(1, 64, simt::Order::forward, [&] { racy(a); });
      simt::launch(1, 64, simt::Order::reverse, [&] { racy(b); });
      bool same = true;
      for (int i = 0; i < 64; ++i) same &= a[i] == b[i];
      try { simt::launch(1, 64, simt::Order::forward, [] { divergent(); }); std::puts("missed"); }
      catch (const std::runtime_error&) { std::puts(same ? "race missed" : "seen"); }
    }""")
    program = tmp_path / "broken"
    subprocess.run([CXX, "-std=c++20", "-I", str(HERE), str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.strip() == "seen"
