"""The Triton kernels, compiled for GPUs that are not here: registers, shared memory, instructions.

A spill would cost more than all else, an atomic addition of floats would give other bits each time, and loads that are
not wide leave half of the memory's bandwidth.
"""

import random

import pytest

triton = pytest.importorskip("triton")

from tests import registers  # noqa: E402

from .compiling import OPS, compiled, disassembler, recorded  # noqa: E402

MOST_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a block
ON_EVERY_GPU = 99 * 1024  # of a block on the smallest of the GPUs that have bfloat16
VERSION = ".".join(triton.__version__.split(".")[:2])
# A thread has 4 elements: with 8, registers are spilled on sm_80.
EIGHT_BYTES_A_LOAD = {("_row_stats_kernel", "bfloat16"), ("_row_stats_kernel", "float16")}
ON_TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}

AMOUNTS = [
    pytest.param(80, "few"),
    pytest.param(90, "quick"),
    *(pytest.param(capability, "thorough", marks=pytest.mark.slow) for capability in (80, 90)),
]
needs_a_disassembler = pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm")


def has(binary, *starts):
    """Whether there is such an instruction."""
    return any(name.startswith(starts) for name in binary["instructions"])


@needs_a_disassembler
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("capability", "amount"), AMOUNTS)
def test_binaries(op, capability, amount):
    binaries = compiled(capability, amount, op)
    assert binaries
    assert [b for b in binaries if b["spilled"] or has(b, "LDL", "STL")] == []
    assert [b for b in binaries if b["shared"] > MOST_SHARED_MEMORY[capability]] == []
    assert [b for b in binaries if has(b, "RED", "ATOM")] == []
    kernels = {(b["kernel"], b["dtype"]): [] for b in binaries}
    for b in binaries:
        kernels[b["kernel"], b["dtype"]].append(b)
    for name, of_kernel in kernels.items():
        assert min(b["shared"] for b in of_kernel) <= ON_EVERY_GPU, name
        width = "64" if name in EIGHT_BYTES_A_LOAD else "128"
        assert any(width in i for b in of_kernel for i in b["instructions"] if i.startswith(("LDG", "UTMA"))), name


@needs_a_disassembler
@pytest.mark.parametrize("op", ["persample_dot", "persample_grad", "persample_norm", "weighted_grad"])
@pytest.mark.parametrize(("capability", "amount"), AMOUNTS[:2])
def test_products_are_formed_on_tensor_cores(op, capability, amount):
    """But those of float32 are formed in full, unless torch's setting allows TF32."""
    binaries = compiled(capability, amount, op)
    assert any(has(b, ON_TENSOR_CORES[capability]) for b in binaries if b["dtype"] == "bfloat16")
    in_full = [b for b in binaries if "PRECISION=ieee" in b["block"] and b["dtype"] == "float32"]
    assert in_full
    assert not any(has(b, "HMMA", "HGMMA") for b in in_full)


@needs_a_disassembler
def test_rows_of_one_block_are_read_once():
    """Student, teacher or tangent, label, and logits at the label; and classes' weights in the general kernel."""
    binaries = compiled(90, "quick", "row_divergence")
    plain = [b for b in binaries if "BLOCK=1024" in b["block"]]
    assert {kernel: min(b["loads"] for b in plain if b["kernel"] == kernel) for kernel in KERNELS_OF_ROWS} == {
        "row_divergence_light_kernel": 7,  # with those of the look term by term
        "row_divergence_kernel": 6,
        "row_divergence_hvp_kernel": 3,
    }


KERNELS_OF_ROWS = ("row_divergence_light_kernel", "row_divergence_kernel", "row_divergence_hvp_kernel")


@needs_a_disassembler
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("capability", "amount"), AMOUNTS[:2])
def test_registers(op, capability, amount):
    """`python -m tests.registers triton` notes them anew, where a jump has been explained."""
    noted = registers.table(f"triton-{VERSION}")
    if noted is None:
        pytest.skip(f"no registers were noted for Triton {VERSION}")
    assert registers.jumps(noted, registers.of_triton(compiled(capability, amount, op), capability)) == []


def test_every_kernel_is_launched():
    """A kernel that no launch compiles would be missing from everything above."""
    launched = {kernel for kernel, _, _ in recorded("quick", *OPS)}
    assert launched == set(kernels_of_the_package())


def kernels_of_the_package():
    """Names of what is under triton.jit and called a kernel."""
    import importlib
    import pkgutil

    from triton.runtime.jit import JITFunction

    import kdaif_fast.triton_kernels as package

    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        yield from (n for n, x in vars(module).items() if isinstance(x, JITFunction) and n.endswith("_kernel"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_no_size_leads_to_a_block_that_was_never_compiled(op, capability):
    random.seed(0)
    thorough = recorded("thorough", op, capability=capability)
    for amount in ("few", "quick", "random"):
        assert recorded(amount, op, capability=capability) <= thorough
