"""What the machine is, and what the library says about itself there; each printed as JSON by a process of its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "kdaif_fast", "benchmarks/gpu", "setup.py", "CMakeLists.txt")
PACKAGES = ("triton", "numpy", "pytest", "pytest-xdist", "liger-kernel", "cmake", "ninja", "pybind11")


def said(*command: str) -> str:
    """The output of a command; "" where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is checked out, marked if the files are not its own."""
    found = said("git", "rev-parse", "HEAD")
    if not found:
        return "unknown (no git here)"
    return found + (
        " and changes" if said("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES) else ""
    )


def sources() -> str:
    """A fingerprint of the code that is measured, where there is no git to say which it is."""
    digest = hashlib.sha256()
    for top in SOURCES:
        path = ROOT / top
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".txt"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """GPU, driver, versions; the GPU's name and architecture are None where there is none."""
    import torch

    found: dict[str, Any] = {
        "gpu": None,
        "architecture": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "sources": sources(),
        "nvcc": (said("nvcc", "--version").splitlines() or [""])[-1] or "not found",
        "compute-sanitizer": shutil.which("compute-sanitizer") or "not found",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        found |= {
            "gpu": properties.name,
            "architecture": f"{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
            "driver and clocks": said("nvidia-smi", "-i", "0", f"--query-gpu={asked}", "--format=csv"),
        }
    return found


def library() -> dict[str, str]:
    """What `kdaif-fast info` prints."""
    from kdaif_fast.info import info

    return info()


if __name__ == "__main__":
    print(json.dumps({"machine": machine, "library": library}[sys.argv[1]]()))
