"""What the machine offers a build: which torch, which compilers. Used by the PEP 517 backend and by setup.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Pinned so that a build in an environment without torch is reproducible. It binds nobody at run time: kernels built
# against its headers run on every torch >= 2.10.
TORCH_FOR_BUILDING = "torch==2.13.0"
OLDEST_TORCH = (2, 10)
USUAL_TOOLKIT = "/usr/local/cuda"

_LOCATE_TORCH = """
import importlib.metadata, importlib.util, json, pathlib
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    print(json.dumps([str(pathlib.Path(spec.origin).parent), importlib.metadata.version("torch")]))
"""


class Torch(NamedTuple):
    """An installed torch: its package folder (with include/ and lib/) and its version."""

    root: Path
    version: str

    def can_build_kernels(self) -> bool:
        """Whether this torch is new enough and has the stable ABI's headers."""
        major, minor = (int(part) for part in self.version.split(".")[:2])
        return (major, minor) >= OLDEST_TORCH and (self.root / "include/torch/csrc/stable/library.h").exists()


def find_torch() -> Torch | None:
    """Find the torch to build against: the one importable here, else that of the environment being installed into.

    pip isolates a build by putting its own folders first through PYTHONPATH; the same interpreter without that
    variable still sees the target environment. torch is located, never imported (seconds, and hundreds of MB).
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for variables in (dict(os.environ), environment):
        found = subprocess.run(
            [sys.executable, "-c", _LOCATE_TORCH], env=variables, capture_output=True, text=True, check=False
        ).stdout.strip()
        if found:
            root, version = json.loads(found.splitlines()[-1])
            return Torch(Path(root), version)
    return None


def find_cxx() -> str | None:
    """Path of the C++ compiler: $CXX if set (CMake reads it, with its flags), else the first usual name on the PATH."""
    wanted = os.environ.get("CXX")
    if wanted:
        return shutil.which(wanted.split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """Path of nvcc: $CUDACXX if set, which may name nothing; else on the PATH, else where toolkits are installed."""
    wanted = os.environ.get("CUDACXX")
    if wanted:
        return shutil.which(wanted)
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(toolkit_folders()))


def toolkit_folders() -> list[str]:
    """Where the programs of a CUDA toolkit are, which its installer does not put on the PATH."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), USUAL_TOOLKIT]
    return [str(Path(toolkit) / "bin") for toolkit in toolkits if toolkit]


def wanted_build() -> str:
    """The value of KDAIF_BUILD: auto (default), cpu, cuda or none."""
    wanted = os.environ.get("KDAIF_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"KDAIF_BUILD={wanted!r}: expected auto, cpu, cuda or none")
    return wanted
