"""Loading, choosing and forcing backends, each in the process it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdaif_fast
from kdaif_fast import _cuda_order, _library

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
    (copy / "_cuda_order.json").write_text((HERE / "_cuda_order.json").read_text())
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
import torch, sys, types
from kdaif_fast import _cuda_order, _library
compiled = torch.library.Library("kdaif_fast", "IMPL")
for name in COMPILED:
    compiled.impl(name, lambda x: x + 1, "CUDA")
_library._STATES |= {"cuda": "loaded", "triton": TRITON}
names = ("usual", "first", "mixed", "plain")
_cuda_order.SIZES |= {name: _cuda_order.Size(_cuda_order.elements, 4) for name in names}
_library.ORDER = _cuda_order.Order("a test", {
    "first": {"small": ["triton", "cuda", "reference"], "large": ["triton", "cuda", "reference"]},
    "mixed": {"small": ["cuda", "triton", "reference"], "large": ["triton", "reference", "cuda"]},
    "plain": {"small": ["reference", "cuda", "triton"], "large": ["reference", "cuda", "triton"]},
})
sys.modules["kdaif_fast.triton_kernels.probe"] = module = types.ModuleType("probe")
for name in names:
    setattr(module, name, lambda x: x + 2)
def one(name):
    schema = f"{name}(Tensor x) -> Tensor"
    return _library.define(schema, fake=torch.empty_like, reference=lambda x: x + 3, triton="probe")
ops = [one(name) for name in names]
answers = {1: "cuda", 2: "triton", 3: "reference"}
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
def answer(op, count, dtype):  # what is registered for CUDA, called as it is: no GPU is needed for it
    x = torch.zeros(count, dtype=dtype)
    has_one = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
    result = torch.library.get_kernel(op, "CUDA").call_boxed(keys, x) if has_one else op(x)
    return answers[int(result[0])]
for op in ops:
    print(op._opname, _library.kernel_for(op, "cuda"), sep=": ")
    print(*(answer(op, n, d) for d in (torch.float32, torch.float64) for n in (3, 4)))
print(*(op._opname for op in ops if op in _library._compiled_cuda_kernels))
print(*(op._opname for op in ops if op in _library._triton_kernels))
print([{name: int(kernel(torch.zeros(1))) for name, kernel in _library.kernels_on_cuda(op).items()} for op in ops])
"""
EVERY = {"usual", "first", "mixed", "plain"}


def order_on_cuda(compiled, triton):
    code = ORDER_ON_CUDA.replace("COMPILED", repr(sorted(compiled))).replace("TRITON}", f"{triton!r}}}")
    *lines, with_cuda, with_triton, kernels = python(code, PYTHONWARNINGS="error").stdout.splitlines()
    said = dict(line.split(": ") for line in lines[::2])
    # Of each op: float32, small and large; float64, small and large.
    return said, dict(zip(said, map(str.split, lines[1::2]), strict=True)), with_cuda, with_triton, kernels


def test_order_of_kernels_on_cuda():
    """The first that is there, for each op and size; float64 never by Triton; every kernel stays reachable."""
    said, answers, with_cuda, with_triton, kernels = order_on_cuda(EVERY, "loaded")
    assert said == {
        "usual": "cuda",
        "first": "triton",
        "mixed": "cuda (small), triton (large)",
        "plain": "reference",
    }
    assert answers == {
        "usual": ["cuda", "cuda", "cuda", "cuda"],
        "first": ["triton", "triton", "cuda", "cuda"],
        "mixed": ["cuda", "triton", "cuda", "reference"],
        "plain": ["reference"] * 4,
    }
    assert with_cuda == with_triton == "usual first mixed plain"
    assert kernels == repr([{"cuda": 1, "triton": 2, "reference": 3}] * 4)


def test_a_kernel_that_is_not_there_is_passed_over():
    said, answers, *_ = order_on_cuda(EVERY, "not installed")
    assert said == {"usual": "cuda", "first": "cuda", "mixed": "cuda (small), reference (large)", "plain": "reference"}
    assert answers["mixed"] == ["cuda", "reference", "cuda", "reference"]
    said, answers, with_cuda, *_ = order_on_cuda(set(), "loaded")
    assert said == {"usual": "triton", "first": "triton", "mixed": "triton", "plain": "reference"}
    assert answers["usual"] == ["triton", "triton", "reference", "reference"]
    assert with_cuda == ""
    said, answers, *_ = order_on_cuda(set(), "not installed")
    assert set(said.values()) == {"reference"}
    assert all(set(found) == {"reference"} for found in answers.values())


def test_what_compiled_kernels_answer_needs_no_python():
    """Nothing is registered over a compiled kernel that comes first for every size."""
    code = ORDER_ON_CUDA.replace("COMPILED", repr(sorted(EVERY))).replace("TRITON}", "'loaded'}")
    code += """
for op in ops:
    registered = torch._C._dispatch_dump(op.name()).split("CUDA: ", 1)[1].splitlines()[0]
    print(op._opname, "_library.py" in registered)
"""
    lines = python(code, PYTHONWARNINGS="error").stdout.splitlines()[-4:]
    assert lines == ["usual False", "first True", "mixed True", "plain True"]


COMPOSED_ON_CUDA = """
import torch, sys, types
from kdaif_fast import _library
if COMPILED:
    compiled = torch.library.Library("kdaif_fast", "IMPL", "CUDA")
    compiled.impl("composed", lambda x: x + 1, "CUDA")
sys.modules["kdaif_fast.triton_kernels.probe"] = module = types.ModuleType("probe")
module.composed = lambda x: x + 2
_library._STATES |= {"cuda": "loaded", "triton": "loaded"}
made = dict(fake=torch.empty_like, reference=lambda x: x + 3, composed=lambda x: x + 4, triton=TRITON)
op = _library.define("composed(Tensor x) -> Tensor", **made)
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x = torch.zeros(3)
print(_library.kernel_for(op, "cuda"), int(torch.library.get_kernel(op, "CUDA").call_boxed(keys, x)[0]), int(op(x)[0]))
"""


@pytest.mark.parametrize(
    ("compiled", "triton", "answers"),
    [(False, None, "torch 4 3"), (False, "probe", "triton 2 3"), (True, "probe", "cuda 1 3")],
)
def test_what_is_composed_answers_where_no_kernel_does(compiled, triton, answers):
    code = COMPOSED_ON_CUDA.replace("COMPILED", repr(compiled)).replace("TRITON)", f"{triton!r})")
    assert python(code, PYTHONWARNINGS="error").stdout.strip() == answers


def test_forced_cuda_leaves_cpu_tensors_to_the_cpu():
    calls = []
    op = torch.ops.kdaif_fast.cg_dots.default
    assert _library._if_on_cuda(lambda *args: calls.append(args), op, *torch.ones(2, 1, 3)).tolist() == [[3.0], [3.0]]
    assert not calls

    class OnCuda(torch.Tensor):
        is_cuda = True

    _library._if_on_cuda(lambda *args: calls.append(args), op, torch.ones(1).as_subclass(OnCuda), 2.0)
    assert len(calls) == 1


def test_ops_of_several_backends_have_a_size_and_an_order():
    order = _cuda_order.read()
    assert set(order.of) == set(_cuda_order.SIZES)
    assert set(order.of) <= {op._opname for op in _library.ops()}
    for classes in order.of.values():
        assert set(classes) == set(_cuda_order.CLASSES)
        assert all(sorted(found) == ["cuda", "reference", "triton"] for found in classes.values())


def test_info_says_where_the_order_is_from(monkeypatch):
    from kdaif_fast.info import info

    monkeypatch.setattr(_library, "ORDER", _library.ORDER._replace(source=_cuda_order.ESTIMATE))
    assert info()["order on CUDA"] == "by estimate, as no GPU has measured it"
    monkeypatch.setattr(_library, "ORDER", _library.ORDER._replace(source="benchmarks/results/x.json"))
    assert info()["order on CUDA"] == "by benchmarks/results/x.json"


def test_sizes_are_those_of_the_work():
    size = _cuda_order.SIZES["persample_dot"]
    inputs, output_grads = torch.empty(4, 8, 32, device="meta"), torch.empty(4, 8, 16, device="meta")
    assert size.of(inputs, output_grads, None) == 4 * 8 * 32 * 16
    wide = torch.empty(1024, 1024, device="meta")
    assert [_cuda_order.SIZES["row_divergence"].size_class(x, None) for x in (wide, wide[1:])] == ["large", "small"]


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
