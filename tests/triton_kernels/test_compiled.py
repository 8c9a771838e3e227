"""The Triton kernels, compiled for GPUs that are not here: registers, shared memory, instructions.

A spill would cost more than all else, an atomic addition of floats would give other bits each time, and loads that are
not wide leave half of the memory's bandwidth.
"""

import random

import pytest

triton = pytest.importorskip("triton")

from tests import registers  # noqa: E402

from .compiling import OPS, PRODUCTS, SUMS, compiled, disassembler, recorded  # noqa: E402

MOST_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a block
ON_EVERY_GPU = 99 * 1024  # of a block on the smallest of the GPUs that have bfloat16
VERSION = ".".join(triton.__version__.split(".")[:2])
# A thread has 4 elements: with 8, registers are spilled on sm_80.
EIGHT_BYTES_A_LOAD = {("_row_stats_kernel", "bfloat16"), ("_row_stats_kernel", "float16")}
WRITES_MORE = {"_outer_product_kernel"}  # than it reads: hundreds of times as much
ON_TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
WAYS = ["from-shared", "asynchronous", "loaded-ahead"]
TOGETHER = [  # compiled by one process, which takes seconds to start
    ("row_divergence",),
    PRODUCTS[:2],
    PRODUCTS[2:],
    (*SUMS, "row_stats", "cg_update"),
]
AMOUNTS = [
    pytest.param(80, "few"),
    pytest.param(90, "quick"),
    *(pytest.param(capability, "thorough", marks=pytest.mark.slow) for capability in (80, 90)),
]
needs_a_disassembler = pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm")


def has(binary, *starts):
    """Whether there is such an instruction."""
    return any(name.startswith(starts) for name in binary["instructions"])


def by(binaries, *names):
    """Those that agree in these, together."""
    found = {}
    for b in binaries:
        found.setdefault(tuple(b[name] for name in names), []).append(b)
    return found


def wrong_anywhere(b):
    """What no binary may have."""
    if b["spilled"] or has(b, "LDL", "STL"):
        yield "spills registers"
    if b["shared"] > MOST_SHARED_MEMORY[b["architecture"]]:
        yield "takes more shared memory than there is"
    if has(b, "RED", "ATOM"):
        yield "adds atomically"


def wrong_in_products(b):
    """float32 is multiplied in full, unless torch's setting allows TF32; what a Hopper's main loop consists of."""
    if "PRECISION=ieee" in b["block"] and b["dtype"] == "float32" and has(b, "HMMA", "HGMMA"):
        yield "is not multiplied in full"
    # What is weighted on load comes from registers; Triton 3.6 then waits for each product.
    weighted_on_load = b["kernel"] == "_weighted_grad_kernel" and "COLUMNS=256" in b["block"]
    wanted = WAYS[2:] if weighted_on_load else WAYS
    if b["architecture"] == 90 and b["dtype"] == "bfloat16" and b["even"] and b["ways"][-len(wanted) :] != wanted:
        yield f"is fed otherwise: {b['ways']}"


@needs_a_disassembler
@pytest.mark.parametrize("ops", TOGETHER, ids="-".join)
@pytest.mark.parametrize(("capability", "amount"), AMOUNTS)
def test_binaries(ops, capability, amount):
    """All that is asked of them, in one test: to compile takes much longer than to look."""
    binaries = compiled(capability, amount, *ops)
    assert [f"{b} {wrong}" for b in binaries for wrong in wrong_anywhere(b)] == []
    for name, of_kernel in by(binaries, "kernel", "dtype").items():
        assert min(b["shared"] for b in of_kernel) <= ON_EVERY_GPU, name
        width = "64" if name in EIGHT_BYTES_A_LOAD else "128"
        moved = "STG" if name[0] in WRITES_MORE else ("LDG", "UTMA")
        assert any(width in i for b in of_kernel for i in b["instructions"] if i.startswith(moved)), name
    noted = registers.table(f"triton-{VERSION}")
    if noted is not None and amount != "thorough":
        # `python -m tests.registers triton` notes them anew, where a jump has been explained.
        assert registers.jumps(noted, registers.of_triton(binaries)) == []
    if ops == ("row_divergence",) and (capability, amount) == (90, "quick"):
        check_that_rows_are_read_once(binaries)
    products = [b for b in binaries if "PRECISION" in b["block"]]
    assert bool(products) == (ops[0] in PRODUCTS)
    assert [f"{b} {wrong}" for b in products for wrong in wrong_in_products(b)] == []
    for name, of_kernel in by(products, "kernel").items():
        assert any(has(b, ON_TENSOR_CORES[capability]) for b in of_kernel if b["dtype"] == "bfloat16"), name
        assert any("PRECISION=ieee" in b["block"] and b["dtype"] == "float32" for b in of_kernel), name
        assert capability != 90 or any(b["ways"] == WAYS for b in of_kernel), name


def check_that_rows_are_read_once(binaries):
    """Those of one block: student, teacher or tangent, label, logits at the label, classes' weights."""
    narrow = by([b for b in binaries if "BLOCK=1024" in b["block"]], "kernel")
    assert {kernel: min(b["loads"] for b in of_kernel) for (kernel,), of_kernel in narrow.items()} == {
        "row_divergence_light_kernel": 7,  # with those of the look term by term
        "row_divergence_kernel": 6,
        "row_divergence_hvp_kernel": 3,
    }


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_hopper_has_tiles_of_its_own(op):
    """The launchers ask Triton's driver what GPU there is."""
    blocks = [{b for _, dtype, b in recorded("few", op, capability=c) if dtype == "bfloat16"} for c in (80, 90)]
    assert all("DEPTH=64" not in b for b in blocks[0])
    assert any("DEPTH=64" in b for b in blocks[1])


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
