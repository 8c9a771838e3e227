"""Loading, choosing and forcing backends, each in the process it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdaif_fast
from kdaif_fast import _library

HERE = Path(kdaif_fast.__file__).parent
HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")


def python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


USE = """
import torch, kdaif_fast
torch.manual_seed(0)
s, t = torch.randn(2, 50, 33).unbind()
s.requires_grad_()
loss = kdaif_fast.ops.kd_loss(s, t, torch.arange(50) % 33, temperature=2.5)
loss.sum().backward()
loss = loss.detach()
print(float(loss.sum()), float(s.grad.square().sum()))
"""


def numbers(result):
    return [float(x) for x in result.stdout.split()]


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_gives_the_same(level):
    code = USE + f"print(int(torch.ops.kdaif_fast.cpu_level() == {level!r}))"
    *ours, chosen = numbers(python(code, KDAIF_CPU_LEVEL=level))
    assert ours == pytest.approx(numbers(python(USE, KDAIF_NATIVE="0")), rel=1e-5)
    best = torch.ops.kdaif_fast.cpu_level()
    order = ["baseline", "avx2", "avx512", "avx512bf16"]
    assert chosen == (order.index(level) <= order.index(best))


@needs_kernels
# Between avx512 and the level above it there is one instruction, bfloat16's rounding: nightly is often enough.
@pytest.mark.parametrize("level", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "cg_update",
        "row_divergence_kernel",
        "row_stats_kernel",
        "persample_conv_kernel",
        "persample_group_norm_kernel",
        "persample_layer_norm_kernel",
        "persample_dot",
        "persample_norm",
        "persample_grad",
        "weighted_grad",
    ],
)
def test_lesser_instruction_sets_pass_the_kernel_tests(level, name):
    """Every dtype, shape and option, as for the best one."""
    if torch.ops.kdaif_fast.cpu_level() == level:
        pytest.skip("this is the best one here")
    tests = Path(__file__).parent / f"ops/test_{name}.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(tests)],
        env={**os.environ, "KDAIF_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
        cwd=tests.parents[2],
    )
    assert result.returncode == 0, result.stdout


def test_unknown_level_is_refused():
    code = "import kdaif_fast"
    environment = {**os.environ, "KDAIF_CPU_LEVEL": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "KDAIF_CPU_LEVEL is 'sse9', expected one of baseline, avx2, avx512, avx512bf16" in result.stderr


def test_a_library_that_was_built_and_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "HERE", tmp_path)
    monkeypatch.delenv("KDAIF_NATIVE", raising=False)
    (tmp_path / "_build_report.json").write_text('{"cpu": "built", "cuda": "built"}')
    assert _library._load("cpu") == "missing: it was built, but _kernels_cpu.so is gone"


def test_a_source_tree_that_shadows_the_install(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "HERE", tmp_path / "kdaif_fast")
    (tmp_path / "setup.py").write_text("")
    assert f"imports the source tree {tmp_path}, not an installed package" in _library.build_report()["cpu"]


def test_kernels_can_be_switched_off_without_a_warning():
    result = python(USE + "print(kdaif_fast.backends()['cpu'])", KDAIF_NATIVE="0", PYTHONWARNINGS="error")
    assert "switched off (KDAIF_NATIVE=0)" in result.stdout


def test_missing_kernels_warn_once_and_everything_works(tmp_path):
    """An installation that could not compile: the Python files alone, with the build's report."""
    copy = tmp_path / "kdaif_fast"
    for path in HERE.rglob("*.py"):
        target = copy / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    reason = "no C++ compiler was found (set CXX, or install g++)"
    (copy / "_build_report.json").write_text(f'{{"cpu": "{reason}", "cuda": "{reason}"}}')
    code = USE + "import kdaif_fast.info; import sys; print(kdaif_fast.info.format_info(), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert result.stderr.count("MissingKernelsWarning") == 1
    assert "<string>:" in result.stderr  # it points at the user's import
    assert result.stderr.count(reason) >= 2  # in the warning and in info
    assert numbers(result) == pytest.approx(numbers(python(USE)), rel=1e-5)


def test_damaged_library_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "HERE", tmp_path)
    (tmp_path / "_kernels_cpu.so").write_bytes(b"not a library")
    monkeypatch.delenv("KDAIF_NATIVE", raising=False)
    assert _library._load("cpu").startswith("could not be loaded: ")


def test_cuda_library_waits_for_a_torch_with_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "HERE", tmp_path)
    monkeypatch.delenv("KDAIF_NATIVE", raising=False)
    (tmp_path / "_kernels_cuda.so").write_bytes(b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in _library._load("cuda")


ORDER_ON_CUDA = """
import torch
from kdaif_fast import _library
compiled = torch.library.Library("kdaif_fast", "IMPL")
for name in COMPILED:
    compiled.impl(name, lambda x: x + 1, "CUDA")
_library._STATES |= {"cuda": "loaded", "triton": TRITON}
def one(name, **more):
    return _library.define(f"{name}(Tensor x) -> Tensor", fake=torch.empty_like, reference=lambda x: x, **more)
ops = (
    *(one("plain"), one("with_triton", triton="probe"), one("first", triton="probe", triton_first=True)),
    one("composed", composed=lambda x: x),
)
print(*(_library.kernel_for(op, "cuda") for op in ops))
print(*(op in _library._compiled_cuda_kernels for op in ops))
"""


@pytest.mark.parametrize(
    ("compiled", "triton", "answers"),
    [
        (["plain", "with_triton", "first_compiled"], "loaded", "cuda cuda triton torch"),
        (["plain", "with_triton", "first_compiled", "composed"], "not installed", "cuda cuda cuda cuda"),
        ([], "loaded", "reference triton triton torch"),
        ([], "not installed", "reference reference reference torch"),
    ],
)
def test_order_of_kernels_on_cuda(compiled, triton, answers):
    """Compiled, Triton, what torch's own operations are composed to, reference, for each op by itself; Triton before
    compiled where that is said."""
    code = ORDER_ON_CUDA.replace("COMPILED", repr(compiled)).replace("TRITON}", f"{triton!r}}}")
    result = python(code, PYTHONWARNINGS="error")
    assert result.stdout.splitlines() == [answers, f"False False {'first_compiled' in compiled} False"]


class TestForcing:
    def called(self, monkeypatch):
        calls = []
        for op, reference in list(_library._references.items()):
            monkeypatch.setitem(
                _library._references, op, lambda *args, f=reference, name=op._opname: (calls.append(name), f(*args))[1]
            )
        return calls

    def test_reference_answers_also_under_transforms(self, monkeypatch):
        calls = self.called(monkeypatch)
        s = torch.randn(3, 4)

        def loss(s):
            return kdaif_fast.ops.kd_loss(s, s.detach(), torch.tensor([0, 1, 2])).sum()

        with kdaif_fast.backend("reference"):
            torch.func.hessian(loss)(s)
            with torch.inference_mode():
                loss(s)
        assert {"row_divergence", "row_divergence_grad", "row_divergence_hvp"} <= set(calls)
        calls.clear()
        torch.func.hessian(loss)(s)
        assert not calls  # the block has ended

    @needs_kernels
    def test_compiled_kernels_answer_by_default(self, monkeypatch):
        with kdaif_fast.backend("cpu"):
            kdaif_fast.ops.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        without = [op._opname for op in _library.ops() if _library.kernel_for(op, "cpu") != "cpu"]
        assert without == ["persample_inner"]  # which other ops need on CUDA only

    def test_unknown_and_missing(self):
        with (
            pytest.raises(ValueError, match="name is 'tpu', expected one of reference, cpu"),
            kdaif_fast.backend("tpu"),
        ):
            pass
        if kdaif_fast.backends()["cuda"] != "loaded":
            with pytest.raises(ValueError, match="'cuda' is not loaded: "), kdaif_fast.backend("cuda"):
                pass


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
class TestThreads:
    LIBRARIES = "libs = {l.split()[-1] for l in open('/proc/self/maps') if '.so' in l}\n"

    @pytest.mark.parametrize("first", ["torch", "kdaif_fast"])
    def test_one_openmp_runtime(self, first):
        """All threads are torch's: the process has one OpenMP runtime, and it came with torch."""
        code = f"import {first}\n{USE}{self.LIBRARIES}" + (
            "openmp = [l for l in libs if any(n in l for n in ('libgomp', 'libiomp', 'libomp.'))]\n"
            "import pathlib; root = pathlib.Path(torch.__file__).parent.parent\n"
            "assert len(openmp) == 1, openmp\n"
            "assert pathlib.Path(openmp[0]).is_relative_to(root), openmp\n"
        )
        python(code)

    def test_library_does_not_ask_for_one(self):
        needed = subprocess.run(
            ["readelf", "-d", str(HERE / "_kernels_cpu.so")], capture_output=True, text=True, check=False
        ).stdout
        if not needed:
            pytest.skip("readelf is not installed")
        assert "libtorch_cpu" in needed
        assert not any(name in needed for name in ("libgomp", "libiomp", "libomp", "libpython", "libc10"))

    def test_kernels_use_torchs_threads(self):
        """Work is really spread: more CPU time than wall time when torch has two threads, not when it has one."""
        code = """
import os, threading, torch, kdaif_fast
torch.set_num_threads({n})
s, t = torch.randn(2, 20000, 500).unbind()
y = torch.zeros(20000, dtype=torch.int64)
before = set(os.listdir('/proc/self/task'))
def ticks():
    total = {{}}
    for task in os.listdir('/proc/self/task'):
        fields = open(f'/proc/self/task/{{task}}/stat').read().rsplit(')', 1)[1].split()
        total[task] = int(fields[11]) + int(fields[12])
    return total
kdaif_fast.ops.kd_loss(s, t, y)
start = ticks()
for _ in range(60): kdaif_fast.ops.kd_loss(s, t, y)
print(sum(b - start.get(a, 0) > 2 for a, b in ticks().items()))
"""
        assert numbers(python(code.format(n=1))) == [1]
        if len(os.sched_getaffinity(0)) > 1:
            assert numbers(python(code.format(n=2)))[0] >= 2
