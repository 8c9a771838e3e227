"""Compiles Triton kernels for a GPU that is not here: run by test_compiled.py and tests/registers, on its own.

    python -m tests.triton_kernels.compiling COMPUTE_CAPABILITY few|quick|thorough OP...

It calls the launchers with tensors that have no memory; each launch compiles its kernel instead, in every configuration
to choose from. What came out is printed, a line of JSON for each binary.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PRODUCTS = ("persample_dot", "persample_grad", "persample_norm", "weighted_grad")
SUMS = ("persample_layer_norm", "persample_group_norm", "persample_inner")
OPS = ("row_divergence", "row_stats", *PRODUCTS, *SUMS, "cg_update")
INSTRUCTIONS = r"\b(?:LDL|STL|RED|REDG|ATOM|ATOMG|ATOMS|LDGSTS|LDG|STG|UTMALDG|HMMA|HGMMA|IMMA)\b[A-Z0-9.]*"
SIZES = ("ROWS", "COLUMNS", "DEPTH", "BLOCK", "CHUNK", "SAMPLES", "WIDTH", "TILE", "PRECISION")
EVEN = {"EVEN_T": "DEPTH", "EVEN_OUTPUTS": "ROWS", "EVEN_FEATURES": "COLUMNS"}  # the side of a block that matters
EVEN_OF = {
    "_persample_dot_kernel": {"EVEN_OUTPUTS": "COLUMNS", "EVEN_FEATURES": "DEPTH"},
    "_gram_kernel": {"EVEN_OUTPUTS": "DEPTH", "EVEN_FEATURES": "DEPTH"},
}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _Driver:
    """What the compiler asks of a driver."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def disassembler():
    """nvdisasm, of the toolkit or of Triton's package."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(inside) if inside.exists() else None)


def instructions_of(cubin):
    """The memory and matrix instructions of a binary, and how often each is there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(INSTRUCTIONS, sass)
    return {name: found.count(name) for name in sorted(set(found))}


def ways_of(ttgir):
    """How a Hopper's matrix units are fed, if they are: what the main loop of a product has beside the product."""
    products = re.findall(r"warp_group_dot %.*", ttgir)
    waits = re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ttgir)
    found = {
        "from-shared": all(re.search(r": !ttg.memdesc<.*> \* !ttg.memdesc<", line) for line in products),
        "asynchronous": all("isAsync = true" in line for line in products) and "1" in waits,
        "loaded-ahead": "async_copy_global_to_local" in ttgir,
    }
    return [way for way, is_so in found.items() if is_so] if products else []


def block_of(function, args, named):
    """What decides how many registers a kernel needs, in words: sizes of tiles, precision, warps, stages."""
    given = dict(zip(function.arg_names, args, strict=False)) | named
    constants = [p.name for p in function.params if p.is_constexpr and p.name in SIZES]
    launch = [f"{name[4:]}={given[name]}" for name in ("num_warps", "num_stages") if name in given]
    return " ".join([*(f"{name}={given[name]}" for name in constants if name in given), *launch])


def evenly(function, given):
    """Whether blocks divide each of the sizes: what they divide has no mask."""
    sides = {**EVEN, **EVEN_OF.get(function.__name__, {})}
    return {name: given[name] % given[side] == 0 for name, side in sides.items() if name in given}


def variant_of(function, args, named):
    """What else may make a difference worth looking at: types, options, and what sizes are divisible by."""
    given = dict(zip(function.arg_names, args, strict=False)) | named
    constants = {p.name: given[p.name] for p in function.params if p.is_constexpr and p.name in given}
    even = evenly(function, given)

    def difference(name, value):
        return even.get(name, value > 1 if name == "TOP_K_WIDTH" else value)

    aligned = all(x == 1 or x % 16 == 0 for x in given.values() if type(x) is int and x > 0)
    return str([difference(name, value) for name, value in constants.items() if name not in SIZES]), aligned


def dtype_of(args, named):
    """The name of the first tensor's dtype, not counting integers."""
    tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
    return NAMES[next(x.dtype for x in tensors if x.is_floating_point())]


def tuners():
    """Classes of objects that choose among a kernel's configurations."""
    from triton.runtime.autotuner import Autotuner

    yield Autotuner
    with contextlib.suppress(ImportError):
        from kdaif_fast.triton_kernels.tuning import Tuned

        yield Tuned


@contextlib.contextmanager
def launching(instead, capability):
    """Every launch calls instead(function, args, grid, named), once for each configuration to choose from."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def launch_all(tuned, grid):
        def launch(*args, **named):
            for configuration in tuned.configs:
                tuned.fn[grid](*args, **named, **configuration.all_kwargs())

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(GPUTarget("cuda", capability, 32)))
        for tuner in tuners():
            patch.setattr(tuner, "__getitem__", launch_all)
        patch.setattr(
            JITFunction, "run", lambda function, *args, grid, warmup, **named: instead(function, args, grid, named)
        )
        yield


def recorded(amount, *ops, capability=90):
    """(kernel, dtype, block) of every launch."""
    from tests.triton_kernels.launches import launches

    seen = set()

    def note(function, args, grid, named):
        seen.add((function.__name__, dtype_of(args, named), block_of(function, args, named)))

    with launching(note, capability):
        for op in ops:
            for launch in launches(op, amount):
                launch()
    return seen


class Compiler:
    """Compiles what is launched, once for each set of sizes that may give another binary worth looking at."""

    def __init__(self, out):
        from triton.runtime.jit import JITFunction

        self.out, self.run, self.seen = out, JITFunction.run, set()

    def compile(self, function, args, grid, named):
        dtype, block = dtype_of(args, named), block_of(function, args, named)
        key = (function.__name__, dtype, block, *variant_of(function, args, named))
        if key in self.seen:
            return
        self.seen.add(key)
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = self.run(function, *args, grid=grid, warmup=True, **named)
        ptxas = log.getvalue()
        if not ptxas:
            return  # compiled before
        report = {
            "kernel": function.__name__,
            "dtype": dtype,
            "block": block,
            "architecture": int(sys.argv[1]),
            "registers": int(re.search(r"Used (\d+) registers", ptxas)[1]),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", ptxas))),
            "shared": kernel.metadata.shared,
            "loads": kernel.asm["ttir"].count("tt.load"),
            "even": all(evenly(function, dict(zip(function.arg_names, args, strict=False)) | named).values()),
            "ways": ways_of(kernel.asm["ttgir"]),
            "instructions": instructions_of(kernel.asm["cubin"]),
        }
        print(json.dumps(report), file=self.out, flush=True)


@functools.cache
def compiled(capability, amount, *ops):
    """What a process of its own compiled: a dictionary for each binary, as above."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": folder,
        }
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "tests.triton_kernels.compiling", str(capability), amount, *ops]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def main():
    from tests.triton_kernels.launches import launches

    capability, amount, *ops = sys.argv[1:]
    compiler = Compiler(sys.stdout)
    with launching(compiler.compile, int(capability)):
        for op in ops:
            for launch in launches(op, amount):
                launch()


if __name__ == "__main__":
    main()
