"""The drivers' own programs under AddressSanitizer and UBSan: buffers of exactly the right size, awkward sizes."""

import subprocess

import pytest

from .building import CSRC, CXX, SOURCES, UNDER_SANITIZERS, built

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


@pytest.mark.parametrize("source", SOURCES)
def test_sanitizers_are_silent(folder_of_drivers, source):
    program = built(folder_of_drivers, source, *UNDER_SANITIZERS)
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "clean", "")
