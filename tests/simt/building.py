"""Compiles the drivers of this folder, each once for all processes that run tests."""

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("c++")
SOURCES = ("row_divergence.cpp", "row_stats.cpp", "persample_dot.cpp")
# A GPU multiplies and adds in one rounding wherever it can; what cancels without it may not cancel then.
_CPU = Path("/proc/cpuinfo")
_CAN_FUSE = _CPU.exists() and " fma " in _CPU.read_text()
FUSED = ("-mfma", "-ffp-contract=fast", "-fexpensive-optimizations") if _CAN_FUSE else ()
LIBRARY = (*FUSED, "-O1", "-shared", "-fPIC", "-fsanitize=undefined,bounds-strict", "-fno-sanitize-recover=all")
UNDER_SANITIZERS = ("-O0", "-fsanitize=address,undefined,bounds-strict", "-fno-sanitize-recover=all")


def compile_into(output, source, *flags, csrc=CSRC):
    """One driver: a library to be called from Python, or a program."""
    command = [CXX, "-std=c++20", "-g1", "-I", str(csrc), "-I", str(HERE), str(HERE / source), *flags]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]


def fingerprint(source, flags, csrc):
    """Changes with everything that a compiled driver depends on."""
    digest = hashlib.sha256(repr((CXX, flags)).encode())
    folders = [folder.rglob("*") for folder in (csrc / "common", csrc / "cuda")]
    for path in sorted(path for found in (*folders, HERE.glob("*.h"), [HERE / source]) for path in found):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def built(folder, source, *flags, csrc=CSRC, name=None):
    """Where the compiled driver is: in a folder of the processes' own, or, if it is there, from a run before."""
    folder = Path(folder)
    kind = f"{name or Path(source).stem}-{'library' if '-shared' in flags else 'program'}"
    output = folder / f"{kind}-{fingerprint(source, flags, csrc)}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            for stale in folder.glob(f"{kind}-*"):
                stale.unlink()
            unfinished = folder / "unfinished"
            compile_into(unfinished, source, *flags, csrc=csrc)
            unfinished.rename(output)
    return output
