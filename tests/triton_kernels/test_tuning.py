"""The choice of a configuration, with a kernel and a clock that stand in for a GPU's."""

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

from kdaif_fast.triton_kernels import tuning  # noqa: E402


def function(x, y, size, BLOCK):
    """What the kernel below would be in Triton."""


class Kernel(KernelInterface):
    """Notes the blocks it is launched with; blocks wider than `widest` do not fit the GPU."""

    def __init__(self, widest=1024):
        self.fn, self.arg_names, self.widest = function, ["x", "y", "size", "BLOCK"], widest
        self.blocks = []

    def run(self, *args, grid, warmup, **named):
        assert not warmup
        if callable(grid):
            grid = grid(named)
        assert grid == (7,)
        if named["BLOCK"] > self.widest:
            raise OutOfResources(named["BLOCK"], self.widest, "registers")
        assert named["num_warps"] == named["BLOCK"] // 32
        self.blocks.append(named["BLOCK"])


@pytest.fixture
def timed(monkeypatch):
    """A clock for which narrower is faster; gives what it has timed."""
    kernels = []

    def clock(launch, quantiles):
        launch()
        block = kernels[0].blocks.pop()
        timings.append(block)
        return [block] * 3

    timings = []
    monkeypatch.setattr(tuning, "clock", clock)
    return kernels, timings


def make(timed, blocks=(128, 64, 32), widest=1024):
    kernel = Kernel(widest)
    timed[0].append(kernel)
    return kernel, tuning.tuned(kernel, [triton.Config({"BLOCK": b}, num_warps=b // 32) for b in blocks], ["size"])


def arguments(size=100, dtype=torch.float32):
    return torch.zeros(3, dtype=dtype), torch.zeros(3), size


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_fastest_is_found_once(timed):
    kernel, tuned = make(timed)
    for _ in range(3):
        tuned[(7,)](*arguments())
    assert timed[1] == [128, 64, 32]
    assert kernel.blocks == [32, 32, 32]


def test_a_grid_may_depend_on_the_choice(timed):
    kernel, tuned = make(timed)
    for _ in range(2):
        tuned[lambda chosen: (7,) if chosen["BLOCK"] else None](*arguments())
    assert kernel.blocks == [32, 32]


def test_what_a_choice_is_for(timed):
    """Dtypes and the key's sizes, between powers of two; named or not."""
    _, tuned = make(timed)
    x, y, _ = arguments()
    for size, dtype, times in ((64, torch.float32, 1), (127, torch.float32, 1), (128, torch.float32, 2)):
        tuned[(7,)](*arguments(size, dtype))
        tuned[(7,)](x, y, size=size)
        tuned[(7,)](x=x, y=y, size=size)
        assert len(timed[1]) == 3 * times
    tuned[(7,)](*arguments(64, torch.bfloat16))
    assert len(timed[1]) == 9


def test_a_single_configuration_is_never_timed(timed):
    kernel, tuned = make(timed, blocks=(64,))
    tuned[(7,)](*arguments())
    assert timed[1] == []
    assert kernel.blocks == [64]


def test_deterministic_mode_takes_the_first_whatever_was_timed(timed, deterministic):
    kernel, tuned = make(timed)
    torch.use_deterministic_algorithms(False)
    tuned[(7,)](*arguments())
    assert timed[1] == [128, 64, 32]
    torch.use_deterministic_algorithms(True)
    for size in (100, 1000):
        for _ in range(2):
            tuned[(7,)](*arguments(size))
    assert len(timed[1]) == 3
    assert kernel.blocks == [32, 128, 128, 128, 128]


def test_the_first_that_fits(timed, deterministic):
    kernel, tuned = make(timed, widest=64)
    for _ in range(2):
        tuned[(7,)](*arguments())
    assert kernel.blocks == [64, 64]
    _, hopeless = make(timed, widest=16)
    with pytest.raises(OutOfResources):
        hopeless[(7,)](*arguments())


def test_what_does_not_fit_is_not_chosen(timed):
    kernel, tuned = make(timed, blocks=(128, 64), widest=64)
    tuned[(7,)](*arguments())
    assert kernel.blocks == [64]


def test_capture_takes_the_first_unless_one_was_chosen(timed, monkeypatch):
    kernel, tuned = make(timed)
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    tuned[(7,)](*arguments())
    assert (timed[1], kernel.blocks) == ([], [128])
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    tuned[(7,)](*arguments())
    assert (timed[1], kernel.blocks) == ([128, 64, 32], [128, 32])
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    tuned[(7,)](*arguments())
    assert kernel.blocks == [128, 32, 32]


def test_no_memory_to_time_in(timed, monkeypatch):
    """The launch itself may fit; what was not timed is timed when there is room."""
    kernel, tuned = make(timed)
    clock = tuning.clock

    def out_of_memory(launch, quantiles):
        raise torch.OutOfMemoryError("timing's own memory")

    tuned._tuner._do_bench = out_of_memory
    tuned[(7,)](*arguments())
    assert kernel.blocks == [128]
    assert tuned._tuner.nargs is None
    tuned._tuner._do_bench = clock
    if "do_bench" in vars(tuned._tuner):
        tuned._tuner.do_bench = clock
    tuned[(7,)](*arguments())
    assert kernel.blocks == [128, 32]


def test_every_kernel_is_tuned_here():
    """triton.autotune itself would time in a capture, and in deterministic mode."""
    from pathlib import Path

    folder = Path(tuning.__file__).parent
    users = [path.name for path in sorted(folder.glob("*.py")) if "triton.autotune(" in path.read_text()]
    assert users == ["tuning.py"]


def test_a_name_that_is_no_argument():
    with pytest.raises(ValueError, match="Size"):
        tuning.tuned(Kernel(), [triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], ["Size"])
