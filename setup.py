"""Build driver: hands csrc/ to CMake + Ninja and puts the results beside the Python files.

KDAIF_BUILD        auto (default): what this machine can build | cpu | cuda: fail if it cannot be built | none
KDAIF_CUDA_ARCHS   GPU targets, as CMake writes them (default "80;90")
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE / "build_tools"))

from environment import OLDEST_TORCH, find_cxx, find_nvcc, find_torch, wanted_build  # noqa: E402

REPORT = "_build_report.json"


def tool(name: str) -> str | None:
    """The executable that the PyPI package of that name carries, else the one on the PATH."""
    if importlib.util.find_spec(name):
        module = importlib.import_module(name)
        folder = getattr(module, "BIN_DIR", None) or getattr(module, "CMAKE_BIN_DIR", None)
        if folder and shutil.which(name, path=str(folder)):
            return shutil.which(name, path=str(folder))
    return shutil.which(name)


class CMakeBuild(build_ext):
    """Builds the kernel libraries; what could not be built, and why, goes into a report that `info` reads."""

    def run(self) -> None:
        """Build what is wanted and possible. Only an explicit wish that cannot be met is an error."""
        self.output = (HERE if self.inplace else Path(self.build_lib).resolve()) / "kdaif_fast"
        self.output.mkdir(parents=True, exist_ok=True)
        for stale in [*self.output.glob("_kernels_*.so"), *self.output.glob("_build_info*.so")]:
            stale.unlink()
        wanted = wanted_build()
        report = self._build_all(wanted)
        (self.output / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        for name, state in report.items():
            print(f"kdaif_fast: {name} kernels: {state}", file=sys.stderr)
            if state != "built" and (wanted == name or (wanted == "cuda" and name == "cpu")):
                raise SystemExit(f"KDAIF_BUILD={wanted}, but the {name} kernels could not be built: {state}")

    def _build_all(self, wanted: str) -> dict[str, str]:
        obstacle = self._obstacle(wanted)
        if obstacle:
            return {"cpu": obstacle, "cuda": obstacle}
        cuda_obstacle = self._cuda_obstacle(wanted)
        if cuda_obstacle is None:
            if self._cmake(cuda=True):
                return {"cpu": "built", "cuda": "built"}
            cuda_obstacle = f"{find_nvcc()} failed; its messages are in the build log (pip install -v)"
        cpu = "built" if self._cmake(cuda=False) else "the C++ build failed; see the build log (pip install -v)"
        return {"cpu": cpu, "cuda": cuda_obstacle}

    def _obstacle(self, wanted: str) -> str | None:
        """Why nothing can be compiled at all, or None."""
        if wanted == "none":
            return "not asked for (KDAIF_BUILD=none)"
        if find_cxx() is None:
            return "no C++ compiler was found (set CXX, or install g++)"
        self.torch = find_torch()
        if self.torch is None:
            return "no torch was found to build against (install torch first, or leave build isolation on)"
        if not self.torch.can_build_kernels():
            oldest = ".".join(map(str, OLDEST_TORCH))
            return f"torch {self.torch.version} has no stable ABI headers (need torch >= {oldest})"
        missing = [name for name in ("cmake", "ninja") if tool(name) is None]
        return f"{' and '.join(missing)} not found (pip install cmake ninja pybind11)" if missing else None

    @staticmethod
    def _cuda_obstacle(wanted: str) -> str | None:
        if wanted == "cpu":
            return "not asked for (KDAIF_BUILD=cpu)"
        return None if find_nvcc() else "nvcc was not found on the PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin"

    def _cmake(self, cuda: bool) -> bool:
        # Kept between builds: setuptools' own folder is a fresh temporary one for editable installs.
        folder = HERE / "build" / f"cmake-{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        # A cache written by another installation of CMake or torch (isolated builds have theirs in a temporary
        # folder) must not be continued.
        origin = f"{tool('cmake')}\n{tool('ninja')}\n{self.torch.root}\n{os.environ.get('CXX') or find_cxx()}\n"
        marker = folder / "origin.txt"
        if folder.exists() and (not marker.exists() or marker.read_text() != origin):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(origin)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": self.output,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "TORCH_ROOT": self.torch.root,
            "TORCH_BUILD_VERSION": self.torch.version,
            "KDAIF_CUDA": "ON" if cuda else "OFF",
        }
        if importlib.util.find_spec("pybind11"):
            settings["pybind11_DIR"] = importlib.import_module("pybind11").get_cmake_dir()
        if cuda:
            settings["CMAKE_CUDA_COMPILER"] = find_nvcc()
            settings["CMAKE_CUDA_ARCHITECTURES"] = os.environ.get("KDAIF_CUDA_ARCHS", "80;90")
        if "CXX" not in os.environ:
            settings["CMAKE_CXX_COMPILER"] = find_cxx()
        if shutil.which("ccache") and "ccache" not in os.environ.get("CXX", ""):
            settings["CMAKE_CXX_COMPILER_LAUNCHER"] = settings["CMAKE_CUDA_COMPILER_LAUNCHER"] = "ccache"
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        steps = [
            ["-G", "Ninja", "-S", str(HERE), "-B", str(folder), *defines],
            ["--build", str(folder)],
            ["--install", str(folder)],
        ]
        return all(subprocess.run([str(tool("cmake")), *step], check=False).returncode == 0 for step in steps)

    def get_outputs(self) -> list[str]:
        """Nothing of ours is known before the build; package_data names the files."""
        return []


setup(ext_modules=[Extension("kdaif_fast._build_info", [])], cmdclass={"build_ext": CMakeBuild})
