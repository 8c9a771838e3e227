"""One timer for both devices: events on a GPU, a clock on a CPU; the same code around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

WARM_UP = 3  # calls of each set of inputs, before anything is timed
LEAST, MOST = 5, 200  # timed calls
# Seconds until a call's result is there. What is shorter is timed several at a time, as an event costs some
# microseconds: also a kernel of five that Python takes a hundred to ask for.
SHORT = 300e-6
TOGETHER = 20
SLOW = 0.7  # seconds of a call that is timed only once, after one that does not count
LONGEST_SLEEP = 0.1  # seconds
CYCLES = 2e9  # a second, at most: what torch.cuda._sleep counts in


class Timing(NamedTuple):
    """Seconds a call: what the device is busy (median; 1st and 4th fifth), and what the CPU takes to ask for it."""

    seconds: float
    low: float
    high: float
    asking: float
    calls: int


class Timer:
    """Times calls on one device.

    Args:
        device: "cuda" or "cpu".
        seconds: about what one timing may take.
    """

    def __init__(self, device: str, seconds: float = 0.25) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def asking(self, calls: Sequence[Call], repeats: int = 7) -> float:
        """Seconds until a call returns while the device is idle: what launches cost; on a CPU, the call itself."""
        found = []
        for i in range(repeats):
            self.wait()
            start = time.perf_counter()
            calls[i % len(calls)]()
            found.append(time.perf_counter() - start)
        self.wait()
        return statistics.median(found)

    def time(self, calls: Sequence[Call], asks_ahead: bool = True) -> Timing:
        """Median over many calls, each on the next set of inputs, so that none finds its own in the cache.

        asks_ahead: whether the GPU is kept from starting until the CPU has asked for everything: then what the GPU
            needs is measured; without, what a user waits for, whichever of the two is slower.
        """
        self._once(calls[:1])
        slow = self._once(calls[:1])
        if slow > SLOW:
            return Timing(slow, slow, slow, slow, 1)
        for call in calls:
            for _ in range(WARM_UP):
                call()
        asking = self.asking(calls)
        once = sum(self._once(calls) for _ in range(3)) / 3
        together = TOGETHER if once < SHORT and self.device == "cuda" else 1
        count = min(max(int(self.seconds / max(once, asking) / together), LEAST), MOST)
        ahead = asking if asks_ahead else 0.0
        found = self._events(calls, count, together, ahead) if self.device == "cuda" else self._clock(calls, count)
        found.sort()
        low, high = (found[min(int(share * len(found)), len(found) - 1)] for share in (0.2, 0.8))
        return Timing(statistics.median(found), low, high, asking, count * together)

    def _once(self, calls: Sequence[Call]) -> float:
        self.wait()
        start = time.perf_counter()
        calls[0]()
        self.wait()
        return time.perf_counter() - start

    def _clock(self, calls: Sequence[Call], count: int) -> list[float]:
        found = []
        for i in range(count):
            start = time.perf_counter()
            calls[i % len(calls)]()
            found.append(time.perf_counter() - start)
        return found

    def _events(self, calls: Sequence[Call], count: int, together: int, ahead: float) -> list[float]:
        """Between pairs of events; the GPU sleeps first for so many seconds a call."""
        found: list[float] = []
        done, a_batch = 0, max(64 // together, 1)
        each = 1.5 * ahead * together
        if ahead:  # no more than are asked for while the GPU sleeps
            a_batch = max(min(a_batch, int(LONGEST_SLEEP / each)), 1)
        while done < count:
            size = min(a_batch, count - done)
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(size)]
            if ahead:
                torch.cuda._sleep(int(min(each * size + 1e-4, LONGEST_SLEEP) * CYCLES))
            for i, (first, last) in enumerate(pairs):
                first.record()
                for j in range(together):
                    calls[(done + i * together + j) % len(calls)]()
                last.record()
            self.wait()
            found += [first.elapsed_time(last) / 1e3 / together for first, last in pairs]
            done += size
        return found


def kernels_of(call: Call, device: str) -> int | None:
    """How many kernels, copies and fills a call puts on the GPU; None on a CPU, or where none can be seen.

    The profiler stays in the process, and slows launches down: timing comes before.
    """
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events()) or None


def peak_of(call: Call, device: str) -> float | None:
    """Bytes at the worst moment of a call, above what was there before it; None on a CPU."""
    if device != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def graph_of(call: Call, device: str) -> Call:
    """The call as a CUDA graph, to be replayed; on a CPU the call itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves its own stream behind
        raise
    return graph.replay
