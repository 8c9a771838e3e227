"""The CUDA kernels on a machine without a GPU: they compile for every architecture, and what they then consist of.

Looked at is the library that this checkout built, if it is no older than the sources; else they are compiled here.
"""

import re

import pytest

from tests import registers
from tests.registers import cuda

pytestmark = pytest.mark.skipif(
    cuda.cuobjdump() is None or not (cuda.CSRC.exists() and (cuda.nvcc() or cuda.library_is_current())),
    reason="needs the sources, cuobjdump, and nvcc or a library that it built",
)

PRINTED = 32  # bytes a thread: the arguments of printf, in front of a trap
ELEMENTS = {"float": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture(params=cuda.ARCHITECTURES)
def architecture(request):
    return request.param


def test_every_kernel_is_compiled(architecture):
    sources = [path for path in (cuda.CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    names = {name for path in sources for name in cuda.kernels_of_source(path.read_text())}
    assert {use.kernel for use in cuda.uses(architecture)} == names


def test_registers(architecture):
    """`python -m tests.registers cuda` notes them anew, where a jump has been explained."""
    found = registers.of_cuda(cuda.uses(architecture))
    noted = registers.table("cuda")
    assert registers.jumps(noted, found) == []
    gone = {kernel: set(noted[kernel]) - set(found.get(kernel, ())) for kernel in noted}
    assert {kernel: instances for kernel, instances in gone.items() if instances} == {}


def test_nothing_is_spilled(architecture):
    """What is never read back is what printf was given."""
    assert [use for use in cuda.uses(architecture) if use.stack > PRINTED] == []
    found = cuda.instructions(architecture)
    assert {(use.kernel, use.instance) for use in cuda.uses(architecture)} == set(found)
    assert [name for name, instructions in found.items() if any(i.startswith("LDL") for i in instructions)] == []


def test_shared_memory_fits_every_gpu(architecture):
    """What a block has without asking for more."""
    assert [use for use in cuda.uses(architecture) if use.shared > 48 * 1024] == []


def test_no_floats_are_added_atomically(architecture):
    """In whatever order: results repeat bit for bit. Compare-and-swap would be another way to do it."""
    pattern = re.compile(r"(RED|ATOM)\w*\..*(F16|BF16|F32|F64|CAS)")
    for name, instructions in cuda.instructions(architecture).items():
        assert [i for i in instructions if pattern.match(i)] == [], name


def test_wide_loads_and_stores(architecture):
    """Instances of row kernels for 16 bytes a load have them: <what it forms, element, elements a load, ...>."""
    wide = []
    for (kernel, instance), instructions in cuda.instructions(architecture).items():
        match = re.match(r"\d+, (\w+), (\d+)", instance)
        if not kernel.startswith("fast_") or match is None or ELEMENTS[match[1]] * int(match[2]) != 16:
            continue
        wide.append(kernel)
        assert any(
            i.startswith(("LDG.E.128", "LDGSTS.E.128", "LDGSTS.E.BYPASS.128", "UBLKCP")) for i in instructions
        ), (
            kernel,
            instance,
        )
        assert "sums" in kernel or any(i.startswith("STG.E.128") for i in instructions), (kernel, instance)
    assert len(wide) >= 12
