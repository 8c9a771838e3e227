"""What the CUDA kernels use: of the library that this checkout built, or else of its sources, compiled here."""

import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import kdaif_fast

CSRC = Path(__file__).parents[2] / "csrc"
LIBRARY = Path(kdaif_fast.__file__).with_name("_kernels_cuda.so")
ARCHITECTURES = (80, 90)
LETTERS = {"f": "float", "d": "double", "i": "int", "l": "long", "b": "bool"}


class Use(NamedTuple):
    """What one instance of a kernel uses on one architecture."""

    kernel: str
    instance: str  # template arguments
    architecture: int
    registers: int
    stack: int  # bytes a thread: what is spilled, and the arguments of printf
    shared: int  # bytes a block, not counting what a launch adds


def nvcc():
    """Where nvcc is, or None."""
    return shutil.which("nvcc")


@functools.cache
def cuobjdump():
    """cuobjdump, of the toolkit or of Triton's package, or None."""
    beside_nvcc = [str(Path(path).parent / "cuobjdump") for path in filter(None, [nvcc()])]
    try:
        import triton

        beside_nvcc.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    except ImportError:
        pass
    return next(filter(None, map(shutil.which, ["cuobjdump", *beside_nvcc])), None)


def template_arguments(mangled):
    """What stands between the kernel's name and its parameters, for a person to read."""
    found, at = [], 1
    while at < len(mangled) and mangled[at] != "E":
        match = re.compile(r"L[ijlbm](\d+)E|NS_(\d+)|LNS_(\d+)|([fdilb])").match(mangled, at)
        if match is None:
            return mangled  # something new: shown as it is
        number, of_class, of_enum, letter = match.groups()
        at = match.end()
        if of_class or of_enum:
            length = int(of_class or of_enum)
            name, at = mangled[at : at + length], at + length
            value = re.compile(r"E(\d+)E" if of_enum else r"E").match(mangled, at)
            if value is None:
                return mangled
            at = value.end()
            found.append(f"{name} {value[1]}" if of_enum else name)
        else:
            found.append(number or LETTERS[letter])
    return ", ".join(found)


def kernel_of(symbol):
    """(name, template arguments) of a kernel's symbol; None for anything else."""
    match = re.match(r"_ZN5kdaif(\d+)", symbol)
    if match is None:
        return None
    name = symbol[match.end() :][: int(match[1])]
    rest = symbol[match.end() + int(match[1]) :]
    if not name.endswith("_kernel") or not rest.startswith(("I", "E")):
        return None
    return name, template_arguments(rest) if rest.startswith("I") else ""


def kernels_of_source(text):
    """Names of what is __global__."""
    return re.findall(r"__global__\s+void\s+(?:__\w+__\([^)]*\)\s*)*(\w+)\s*\(", text)


def library_is_current():
    """Whether the library was written after the sources, as make would see it."""
    sources = [path for name in ("cuda", "common") for path in (CSRC / name).glob("*")]
    return LIBRARY.exists() and bool(sources) and LIBRARY.stat().st_mtime >= max(p.stat().st_mtime for p in sources)


def _compile(source, architecture, folder):
    include = Path(torch.__file__).parent / "include"
    output = Path(folder) / f"{source.stem}-{architecture}.cubin"
    command = [nvcc(), "-std=c++20", f"-arch=sm_{architecture}", "-cubin", "-I", str(CSRC), "-isystem", str(include)]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return output


@functools.cache
def _compiled(architecture):
    """Binaries of all sources; the folder is removed with the process."""
    folder = tempfile.TemporaryDirectory()
    sources = sorted(CSRC.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda source: _compile(source, architecture, folder.name), sources))
    return folder, files


def binaries(architecture):
    """Files with the kernels of an architecture: the library, if it has them and is no older than the sources."""
    if library_is_current() and f"sm_{architecture}" in _dump(LIBRARY, "-lelf"):
        return [LIBRARY]
    return _compiled(architecture)[1] if nvcc() else []


@functools.cache
def _dump(file, *options):
    return subprocess.run([cuobjdump(), *options, str(file)], capture_output=True, text=True, check=True).stdout


@functools.cache
def uses(architecture):
    """A Use for each instance of each kernel."""
    pattern = r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = []
    for file in binaries(architecture):
        text = _dump(file, "-arch", f"sm_{architecture}", "-res-usage")
        for symbol, registers, stack, shared, local in re.findall(pattern, text):
            name = kernel_of(symbol)
            if name is not None:
                found.append(Use(*name, architecture, int(registers), int(stack) + int(local), int(shared)))
    return found


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
LOOKED_FOR = ("LDL", "STL", "RED", "ATOM", "LDG", "STG", "UBLKCP", "UTMA")


@functools.cache
def instructions(architecture):
    """{(kernel, instance): names of its memory instructions}."""
    found = {}
    for file in binaries(architecture):
        command = [cuobjdump(), "-arch", f"sm_{architecture}", "-sass", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            current = set()
            for line in process.stdout:
                if match := INSTRUCTION.match(line):
                    if match[1].startswith(LOOKED_FOR):
                        current.add(match[1])
                elif match := FUNCTION.match(line):
                    current = found.setdefault(kernel_of(match[1]) or (match[1], ""), set())
        assert process.returncode == 0
    return found
