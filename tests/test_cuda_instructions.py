"""What an element costs the row kernels on a GPU, read from their machine code: no GPU is needed to count.

At the bandwidth of an H200 (4.3 TB/s, 132 multiprocessors, 1.98 GHz), 85 % of it, and 6 bytes an element, a
multiprocessor has 55 instructions and 6.9 exponentials for each element of a loss and its gradient. Ceilings here are
static: they count what is rarely executed too (an anchor that moves, the begin of a row), some 110 of each loop.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")
LABELS, TEACHER, BOTH_AT_1, BOTH_AT_2, BOTH = range(5)
ELEMENTS = 16  # of a thread in a turn of each loop: two loads of 16 bytes


def disassembler():
    """The one that the Triton package brings, or the toolkit's."""
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None or not CSRC.exists() or disassembler() is None, reason="needs nvcc and cuobjdump"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Kernel -> its instructions as (address, text)."""
    cubin = tmp_path_factory.mktemp("cuda") / "out.cubin"
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-std=c++20", "-arch=sm_90", "-cubin", "-I", str(CSRC), "-isystem", str(include), "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", str(CSRC / "cuda" / "row_divergence_fast_bfloat16.cu")]
    subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True)
    listing = subprocess.run([disassembler(), "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    found, instructions = {}, []
    for line in listing.splitlines():
        if "Function :" in line:
            instructions = found.setdefault(line.split()[-1], [])
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match:
            instructions.append((int(match[1], 16), match[2]))
    return found


def looks(instructions):
    """The two innermost loops that wait for copies: sums, and gradient."""
    loops = []
    for address, text in instructions:
        target = re.search(r"BRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    waits = [at for at, text in instructions if "DEPBAR.LE" in text]
    loops = [(begin, end) for begin, end in sorted(loops) if any(begin <= at <= end for at in waits)]
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]
    found = [[text for at, text in instructions if begin <= at <= end] for begin, end in innermost]
    assert len(found) == 2
    return found


@pytest.mark.parametrize(("parts", "instructions", "exponentials"), [
    (LABELS, (17, 13), (1, 1)),
    (TEACHER, (26, 19), (2, 2)),
    (BOTH_AT_1, (26, 19), (2, 2)),
    (BOTH_AT_2, (29, 22), (2, 2)),
    (BOTH, (34, 26), (2.75, 2.75)),
])  # fmt: skip
def test_budget_of_an_element(kernels, parts, instructions, exponentials):
    name = next(name for name in kernels if f"fast_ring_kernelILi{parts}E" in name)
    moved = {LABELS: 1, TEACHER: 2, BOTH_AT_1: 2, BOTH_AT_2: 3, BOTH: 3}[parts] * 2  # when anchors move, two loads
    for body, most, each, rare in zip(looks(kernels[name]), instructions, exponentials, (moved, 0), strict=True):
        assert len(body) <= most * ELEMENTS
        assert sum("MUFU" in text for text in body) <= each * ELEMENTS + rare


def test_copies_loads_and_stores_are_16_bytes_wide(kernels):
    streams = {LABELS: 1, TEACHER: 2, BOTH_AT_1: 2, BOTH_AT_2: 2, BOTH: 2}
    for parts, count in streams.items():
        name = next(name for name in kernels if f"fast_ring_kernelILi{parts}E" in name)
        for body, stores in zip(looks(kernels[name]), (0, 2), strict=True):
            widths = Counter(
                match[0] for text in body if (match := re.search(r"\b(LDS|STG|STS|LDGSTS)\.\S+", text)) is not None
            )
            assert widths == Counter(
                {"LDS.128": 2 * count, "LDGSTS.E.BYPASS.128": 2 * count, "STG.E.128": stores}
            ) - Counter({"STG.E.128": 0})
