"""Peak memory of a call, as the kernel counts it: resident pages, whoever took them."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_THP_DISABLE = 41
# mallopt's M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: blocks from 64 KiB on go back to the kernel as they are
# freed, so that the peak is that of live tensors and not of the allocator's reserves.
ALLOCATOR = ((-8, 1), (-3, 1 << 16), (-1, 1 << 16))


def peak_mib(call: Callable[[], object], warm_up: Callable[[], object] | None = None) -> float:
    """MiB at the worst moment of a call, above what was there before it; what it returns is part of it.

    warm_up is called first (the call itself if None): code, thread pools and caches are not meant.
    """
    # The kernel counts pages per processor and adds up when there are enough of them: on one, little is missing.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    libc = ctypes.CDLL(None)
    for option, value in ALLOCATOR:
        libc.mallopt(option, value)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # with huge pages, a tensor's last page would count as 2 MiB
    (warm_up or call)()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def run_in_a_process(script: str, *arguments: str) -> float:
    """The number that a Python script prints, in a process of its own."""
    path = os.pathsep.join(filter(None, [str(_package_root()), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, script, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return float(result.stdout)


def _package_root() -> Path:
    import kdaif_fast

    return Path(kdaif_fast.__file__).parents[1]


def _status(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main(mib: str) -> None:
    """A peak that is known: the given MiB, in blocks, after twice as many that are gone before it begins."""

    def hold(blocks: int) -> list[bytearray]:
        return [bytearray(b"\1") * 2**20 for _ in range(blocks)]

    print(peak_mib(lambda: hold(int(mib)), lambda: hold(128)))


if __name__ == "__main__":
    main(sys.argv[1])
