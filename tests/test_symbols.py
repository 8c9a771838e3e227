"""What the compiled libraries ask of others, and what they show: torch's stable ABI and the C++ runtime, nothing else.

So they load wherever torch >= 2.10 is, whatever CUDA it brings; the CUDA runtime is inside.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kdaif_fast

PACKAGE = Path(kdaif_fast.__file__).parent
ROOT = PACKAGE.parent
NEEDED = r"lib(torch|torch_cpu)\.so|lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux\S*"
TORCH = r"(aoti_)?torch_\w+"
# What a torch without CUDA has not.
OF_CUDA = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}
# Of glibc, libstdc++ and the compiler's own runtime: these have versions.
VERSIONED = r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
# Some builds of torch carry what their old libstdc++ lacks, without versions, and are found first when linking. At run
# time any libstdc++ that is new enough has it.
OF_STD = r"_ZN?[KRO]*S[tos]\w+"
OF_THE_LINKER = r"_ITM_\w+|__gmon_start__|__bss_start|_edata|_end|_init|_fini"
OURS_OR_TORCHS = r"_Z(T[ISV]|Z)?N?[KRO]*(5kdaif|3c10|2at|5torch|4cuda|6thrust)"


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(path, kind):
    return {line.split()[-1] for line in output_of("nm", "-D", f"--{kind}-only", str(path)).splitlines()}


@pytest.fixture(params=["cpu", "cuda"])
def library(request):
    path = PACKAGE / f"_kernels_{request.param}.so"
    if not path.exists() or shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs the library, nm and readelf")
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    if any(source.exists() and source.stat().st_mtime > path.stat().st_mtime for source in sources):
        pytest.skip("the library is older than its sources")
    return path


def test_libraries_asked_for(library):
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", str(library))))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed  # the first brings libtorch_cuda.so, where there is one
    assert [name for name in needed if not re.fullmatch(NEEDED, name)] == []


def test_functions_asked_for(library):
    undefined = symbols(library, "undefined")
    allowed = f"{TORCH}|{VERSIONED}|{OF_STD}|{OF_THE_LINKER}"
    assert [name for name in undefined if not re.fullmatch(allowed, name)] == []
    assert [name for name in undefined if re.match(OURS_OR_TORCHS, name)] == []


def test_torch_has_them(library):
    paths = [Path(torch.__file__).parent / "lib" / f"libtorch{part}.so" for part in ("", "_cpu", "_cuda")]
    loaded = [ctypes.CDLL(str(path)) for path in paths if path.exists()]
    asked = {name for name in symbols(library, "undefined") if re.fullmatch(TORCH, name)}
    missing = {name for name in asked if not any(hasattr(x, name) for x in loaded)}
    assert missing <= (OF_CUDA if torch.version.cuda is None and "cuda" in library.name else set())


def test_nothing_of_ours_is_shown(library):
    """Two libraries that show the same function share one of them, whichever was loaded first."""
    assert [name for name in symbols(library, "defined") if re.match(OURS_OR_TORCHS, name)] == []
