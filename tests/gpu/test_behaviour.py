"""What a library owes to a GPU: no waits, the current stream and device, graphs, compilers, determinism, its memory."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdaif_fast
from kdaif_fast import ops

from .calls import CALLS, KERNELS, TOLERANCE, as_tuple, error, expected, on

ROOT = Path(kdaif_fast.__file__).parent
REPOSITORY = Path(__file__).parents[2]
DTYPE = torch.float32
CLOCKS = 100_000_000  # of a GPU that is kept busy: some 50 milliseconds


def tensors_of(name, device, dtype=DTYPE):
    return on(device, CALLS[name].make(dtype))


@contextlib.contextmanager
def waits_are_errors(device):
    """Where there is no GPU, nothing waits for one."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CALLS)
def test_waits_for_nothing(name, device):
    """The first call may: kernels are compiled and configurations timed."""
    call, tensors = CALLS[name], tensors_of(name, device)
    call.run(*tensors)
    with waits_are_errors(device):
        results = call.run(*tensors)
    assert error(results, expected(call, tensors)) <= TOLERANCE[DTYPE]


def test_waits_are_seen(gpu):
    with pytest.raises(RuntimeError, match="synchron"), waits_are_errors(gpu):
        torch.ones(3, device=gpu).sum().item()


def overwritten(tensors, others):
    """Copies of some tensors over others, on the current stream."""
    for tensor, other in zip(tensors, others, strict=True):
        other.copy_(tensor)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_current_stream(name, device):
    """The arguments get their values late on a side stream: whoever reads them on another one, reads zeros."""
    call, tensors = CALLS[name], tensors_of(name, device)
    call.run(*tensors)
    late = [torch.zeros_like(x) for x in tensors]
    if device.type != "cuda":
        overwritten(tensors, late)
        results = call.run(*late)
    else:
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(CLOCKS)
            overwritten(tensors, late)
            results = call.run(*late)
        side.synchronize()
    assert error(results, expected(call, tensors)) <= TOLERANCE[DTYPE]


@pytest.mark.parametrize("name", CALLS)
def test_in_a_graph(name, gpu):
    """Captured once, replayed with other numbers."""
    call, first, then = CALLS[name], tensors_of(name, gpu), tensors_of(name, gpu)
    given = [x.clone() for x in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call.run(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(*given)
    for tensors in (then, first):
        overwritten(tensors, given)
        graph.replay()
        assert error(results, expected(call, tensors)) <= TOLERANCE[DTYPE]


@pytest.mark.parametrize("T", [9, 17])
def test_nothing_is_timed_in_a_capture(T, gpu):
    """Sizes for which no configuration was chosen yet, of kernels that are compiled already."""
    a, b = torch.randn(4, 17, 64, device=gpu), torch.randn(4, 17, 256, device=gpu)
    ops.persample_grad(a[:, :5], b[:, :5])
    a, b = a[:, :T], b[:, :T]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.persample_grad(a, b)
    graph.replay()
    exact = torch.einsum("nto,nti->noi", b.double(), a.double()).cpu()
    assert error(results, (exact,)) <= TOLERANCE[DTYPE]


COMPILED = ("kd_loss mean", "row_hvp", "row_stats", "persample_dot", "persample_norm", "weighted_grad")


@pytest.mark.parametrize("name", [*COMPILED, "linear_kd_loss none", "cg_dots"])
def test_under_a_compiler(name, device):
    """In one graph, as its tracer sees it."""
    call, tensors = CALLS[name], tensors_of(name, device)
    torch.compiler.reset()
    results = torch.compile(call.run, fullgraph=True, backend="aot_eager")(*tensors)
    assert error(results, expected(call, tensors)) <= TOLERANCE[DTYPE]


def test_gradients_under_a_compiler(device):
    """Forward and backward; on a GPU to the end, whose code is Triton's too."""
    call, (student, *rest) = CALLS["kd_loss mean"], tensors_of("kd_loss mean", device)
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    student.requires_grad_()
    torch.compile(call.run, fullgraph=True, backend=backend)(student, *rest).backward()
    wanted = expected(CALLS["kd_loss mean gradient"], [student.detach(), *rest])
    assert error(student.grad, wanted) <= TOLERANCE[DTYPE]


@pytest.mark.parametrize("name", CALLS)
def test_on_the_second_device(name, gpu):
    """While the first one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    call, tensors = CALLS[name], tensors_of(name, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    results = call.run(*tensors)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in as_tuple(results))
    assert error(results, expected(call, tensors)) <= TOLERANCE[DTYPE]


@pytest.mark.parametrize("name", CALLS)
def test_deterministic(name, device):
    """Without an error, the same bits each time, and whatever was chosen before."""
    call, tensors = CALLS[name], tensors_of(name, device)
    call.run(*tensors)
    with deterministic():
        first, again = as_tuple(call.run(*tensors)), as_tuple(call.run(*tensors))
    assert error(first, expected(call, tensors)) <= TOLERANCE[DTYPE]
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_without_being_asked(name, device):
    """No kernel of the library adds in an order that is left to chance."""
    call, tensors = CALLS[name], tensors_of(name, device, torch.float32)
    runs = [as_tuple(call.run(*tensors)) for _ in range(4)][1:]
    for run in runs[1:]:
        for x, y in zip(runs[0], run, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    "name", ["persample_dot", "persample_grad", "persample_norm", "weighted_grad", "kd_loss gradient"]
)
def test_every_configuration(name, gpu, monkeypatch):
    """Those that timing did not choose are right too."""
    tuning = pytest.importorskip("kdaif_fast.triton_kernels.tuning")
    launched, there = set(), set()

    def launch(self, grid, *args, **named):
        there.update((self.fn.__name__, i) for i in range(len(self._settings)))
        at = min(which, len(self._settings) - 1)
        launched.add((self.fn.__name__, at))
        self.fn[grid](*args, **named, **self._settings[at])

    monkeypatch.setattr(tuning.Tuned, "launch", launch)
    narrow = torch.bfloat16
    a, b = torch.randn(4, 64, 320, device=gpu).to(narrow), torch.randn(4, 64, 288, device=gpu).to(narrow)
    tensors = [a, b, a]
    if name == "persample_dot":
        tensors = [a, b, torch.randn(2, 288, 320, device=gpu).to(narrow)]
    elif name == "weighted_grad":
        tensors = [a, b, torch.rand(4, device=gpu)]
    elif name == "kd_loss gradient":
        tensors = [(3 * torch.randn(5, 9000, device=gpu)).to(narrow) for _ in range(2)]
        tensors += [torch.randint(9000, (5,), device=gpu), torch.rand(5, device=gpu)]
    exact = expected(CALLS[name], tensors)
    which = 0
    while which == 0 or any(at >= which for _, at in there):
        with kdaif_fast.backend("triton"):
            results = CALLS[name].run(*tensors)
        assert error(results, exact) <= TOLERANCE[narrow], which
        which += 1
    assert launched == there
    assert there


def test_memory_is_torchs(gpu):
    """What the driver has given away since is what torch's allocator has taken, and kernels' code."""
    tensors = [torch.randn(2048, 8192, device=gpu), torch.randn(2048, 8192, device=gpu)]
    labels, weight = torch.zeros(2048, dtype=torch.int64, device=gpu), torch.ones(2048, device=gpu)
    for _ in range(2):
        CALLS["kd_loss gradient"].run(*tensors, labels, weight)
    reserved, lost = torch.cuda.memory_reserved(), []
    for _ in range(5):
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        for _ in range(10):
            CALLS["kd_loss gradient"].run(*tensors, labels, weight)
        torch.cuda.synchronize()
        lost.append(free - torch.cuda.mem_get_info()[0])
    assert torch.cuda.memory_reserved() == reserved
    # Other processes may use the same GPU while tests run side by side: only what is lost each time is a finding.
    assert min(lost) < 2**26


def test_no_source_asks_the_driver_for_memory_or_waits():
    """Statically: neither the compiled kernels' launchers nor Triton's."""
    forbidden = (
        r"cuda(Malloc|Free|HostAlloc|Memcpy|MemPool)\w*|cuda(Device|Stream|Event)Synchronize|thrust::|set_allocator"
        r"|\.item\(\)|\.tolist\(\)|\.cpu\(\)|torch\.cuda\.synchronize"
    )
    sources = [*(REPOSITORY / "csrc/cuda").glob("*"), *(ROOT / "triton_kernels").glob("*.py")]
    assert sources
    found = [(path.name, m) for path in sources for m in re.findall(forbidden, path.read_text())]
    assert found == []


LABEL_OUT_OF_RANGE = """
import torch
from kdaif_fast.ops import kd_loss
s = torch.zeros(4, 300, device="cuda")
try:
    loss = kd_loss(s, s, torch.tensor([0, 299, 300, 1], device="cuda"))
    print(loss.isnan().tolist())
except RuntimeError as error:
    print("RuntimeError")
"""


def test_labels_out_of_range_do_not_go_unseen(gpu):
    """NaN in that row, or an error; in a process of its own, whose GPU context may be lost by it."""
    result = subprocess.run([sys.executable, "-c", LABEL_OUT_OF_RANGE], capture_output=True, text=True, check=False)
    assert "[False, False, True, False]" in result.stdout or "RuntimeError" in result.stdout, result.stderr


def test_out_of_memory_leaves_everything_usable(gpu):
    """A call that does not fit raises torch's own error; what was there stays, and the next call is right."""
    call, tensors = CALLS["persample_grad"], tensors_of("persample_grad", gpu)
    call.run(*tensors)
    large = torch.randn(64, 2, 2048, device=gpu)  # 1 GiB of gradients
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ops.persample_grad(large, large)
        assert error(call.run(*tensors), expected(call, tensors)) <= TOLERANCE[DTYPE]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ops.persample_grad(large, large).shape == (64, 2048, 2048)
