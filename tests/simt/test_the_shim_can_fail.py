"""Kernels broken on purpose: what a missing barrier, a wrong bound and a narrow offset look like under the shim."""

import shutil
import subprocess

import pytest

from .building import CSRC, CXX, built

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")

ADDRESS = ("-fsanitize=address",)
UNDEFINED = ("-fsanitize=undefined,bounds-strict", "-fno-sanitize-recover=all")


@pytest.fixture
def run(folder_of_drivers, tmp_path):
    """Runs mutants.cpp on a copy of the sources, in which one place of a file is something else."""

    def call(file="block.cuh", old="", new="", which=0, flags=(), mode="schedules"):
        csrc = tmp_path / "csrc"
        shutil.copytree(CSRC, csrc)
        pieces = (csrc / "cuda" / file).read_text().split(old) if old else ["", ""]
        assert 0 <= which < len(pieces) - 1, f"{file} has no such {old!r}"
        if old:
            text = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
            (csrc / "cuda" / file).write_text(text)
        name = f"mutants-{file}-{which}-{''.join(filter(str.isalnum, new + mode + ''.join(flags)))}"
        program = built(folder_of_drivers, "mutants.cpp", "-O0", *flags, csrc=csrc, name=name)
        return subprocess.run(
            [str(program), mode], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
        )

    return call


def test_the_kernels_as_they_are(run):
    assert run().stdout.strip() == "same"


@pytest.mark.parametrize("file", ["block.cuh", "persample_dot.cuh"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier(run, file, which):
    """Schedules differ, or what nobody has written yet is read: NaN, whatever the schedule."""
    assert run(file, "__syncthreads();", "", which).stdout.strip() in ("different", "not numbers")


def test_a_barrier_that_some_do_not_reach(run):
    result = run("block.cuh", "__syncthreads();", "if (threadIdx.x >= WARP) __syncthreads();", 1)
    assert "threads wait at" in result.stdout


def test_reading_past_the_end_of_a_row(run):
    result = run("row_stats.cuh", "v < V; v", "v <= V; v", flags=ADDRESS)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def test_writing_past_shared_memory(run):
    result = run("persample_dot.cuh", "memory.v[x][r", "memory.v[x + 1][r", flags=UNDEFINED)
    assert result.returncode != 0
    assert "out of bounds for type" in result.stderr


def test_an_offset_in_32_bits(run):
    narrow = "a.student + int(row) * int(a.student_stride)"
    result = run("row_stats.cuh", "a.student + row * a.student_stride", narrow, flags=UNDEFINED, mode="far")
    assert result.returncode != 0
    assert "signed integer overflow" in result.stderr
