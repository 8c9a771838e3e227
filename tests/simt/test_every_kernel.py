"""No CUDA kernel is without a test on the CPU: every instance in the CUDA library is one that a driver runs."""

import shutil
import subprocess

import pytest

from tests.registers import cuda

from .building import CSRC, CXX, LIBRARY, SOURCES, built

pytestmark = pytest.mark.skipif(
    CXX is None or not CSRC.exists() or shutil.which("nm") is None, reason="needs a C++ compiler, nm and the sources"
)


@pytest.fixture(scope="module")
def run_by_drivers(folder_of_drivers):
    libraries = [built(folder_of_drivers, source, *LIBRARY) for source in SOURCES]
    listed = [subprocess.run(["nm", str(x)], capture_output=True, text=True, check=True).stdout for x in libraries]
    symbols = {line.split()[-1] for text in listed for line in text.splitlines()}
    return set(filter(None, map(cuda.kernel_of, symbols)))


def test_every_kernel_of_the_sources(run_by_drivers):
    sources = [path for path in (CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    names = {name for path in sources for name in cuda.kernels_of_source(path.read_text())}
    assert names
    assert names <= {kernel for kernel, _ in run_by_drivers}


@pytest.mark.skipif(cuda.cuobjdump() is None, reason="needs cuobjdump")
def test_every_instance_of_the_library(run_by_drivers):
    if not cuda.library_is_current():
        pytest.skip("the CUDA library was not built here, or before the sources were changed")
    instances = {(use.kernel, use.instance) for use in cuda.uses(90) or cuda.uses(80)}
    assert instances
    assert instances <= run_by_drivers
