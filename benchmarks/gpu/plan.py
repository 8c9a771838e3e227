"""The stages of `make gpu` as commands: what each runs, on the GPU or, as a rehearsal, here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .processes import Job
from .recorder import VARIABLE
from .sanitizer import TOOLS

ROOT = Path(__file__).parents[2]
GPU_TESTS = Path("tests/gpu")
SANITIZED = GPU_TESTS / "sanitized.py"
REHEARSED = "tests/ops/test_segment_mean.py"
WARMERS = 3
ROW_PLANS = ("", "block", "wide", "split", "ring", "ring:256", "ring:512:2", "ring:256:2", "ring:256:3")
"""What KDAIF_ROW_PLAN is set to in turn; "" is the choice that csrc/cuda/row_divergence_plan.h makes by itself."""
PLANNED = "row_divergence_(with_grad|hvp)"
QUIET = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
ONE_THREAD = {**QUIET, "OMP_NUM_THREADS": "1"}


class Plan(NamedTuple):
    """The folder for logs and records, the GPU's architecture, whether it is a rehearsal, and the cores there are."""

    folder: Path
    architecture: str | None
    rehearses: bool
    cores: int

    def facts(self, what: str) -> Job:
        """machine or library."""
        command = (sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.facts", what)
        return Job(what, command, self._log(what), QUIET)

    def build(self) -> Job:
        """All kernels for the one architecture; in a rehearsal setup.py is read, and nothing built."""
        command = [sys.executable, "setup.py", *(["--name"] if self.rehearses else ["build_ext", "--inplace"])]
        variables = {"KDAIF_BUILD": "cuda", "CMAKE_BUILD_PARALLEL_LEVEL": str(self.cores)}
        if self.architecture:
            variables["KDAIF_CUDA_ARCHS"] = self.architecture
        return Job("build", command, self._log("build"), variables)

    def tests(self) -> dict[str, list[Job]]:
        """Stage -> its processes: the tests that need a GPU, and all others."""
        if self.rehearses:
            return {name: self._pytest(name, [REHEARSED], 1) for name in ("GPU tests", "suite")}
        found = {}
        if (ROOT / GPU_TESTS).is_dir():
            found["GPU tests"] = self._pytest("GPU tests", [str(GPU_TESTS)], max(self.cores * 3 // 8, 1))
        others = ["tests", "kdaif_fast", f"--ignore={GPU_TESTS}"]
        found["suite"] = self._pytest("suite", others, max(self.cores // 2, 1))
        return found

    def records(self, stage: str) -> list[Path]:
        """Where the processes of a stage of tests write what they have found."""
        return sorted(self.folder.glob(f"{_plain(stage)}*.record"))

    def sanitizers(self) -> dict[str, Job | str]:
        """Tool -> the job, or why there is none. The rehearsal runs the script as it is, once."""
        if not (ROOT / SANITIZED).exists():
            return dict.fromkeys(TOOLS, f"absent: there is no {SANITIZED}")
        script = (sys.executable, str(SANITIZED))
        if self.rehearses:
            absent = "absent: a rehearsal"
            return {
                TOOLS[0]: Job(TOOLS[0], script, self._log(TOOLS[0]), ONE_THREAD),
                TOOLS[1]: absent,
                TOOLS[2]: absent,
            }
        program = shutil.which("compute-sanitizer")
        if program is None:
            return dict.fromkeys(TOOLS, "absent: compute-sanitizer was not found")
        # Each tensor is an allocation of its own, so that what lies beyond it belongs to nobody.
        variables = {**ONE_THREAD, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return {tool: Job(tool, (program, "--tool", tool, *script), self._log(tool), variables) for tool in TOOLS}

    def warmers(self) -> list[Job]:
        """Compile what will be timed, beside the tests."""
        if self.rehearses:
            return []
        parts = [f"{i}/{WARMERS}" for i in range(WARMERS)]
        return [
            Job(f"warm {part}", (*self._measuring(600), "--warm", part), self._log(f"warm {part}"), ONE_THREAD)
            for part in parts
        ]

    def benchmarks(self, seconds: float, resumes: bool = False) -> Job:
        """Alone on the machine; again after a case that has ended the process."""
        more = ("--resume",) if resumes else ()
        return Job("benchmarks", (*self._measuring(seconds), *more), self._log("benchmarks"), QUIET)

    def row_plans(self, seconds: float) -> dict[str, Job]:
        """The row kernels once under each plan: KDAIF_ROW_PLAN is read when a process uses it first."""
        ways = ("cpu" if self.rehearses else "cuda", "reference")
        jobs = {}
        for plan in ROW_PLANS[:1] if self.rehearses else ROW_PLANS:
            name = f"plan {plan or 'own choice'}"
            out = self.folder / f"{_plain(name)}.json"
            command = (*self._measuring(seconds, out), "--once", "--only", PLANNED, "--ways", *ways)
            jobs[plan] = Job(name, command, self._log(name), {**QUIET, "KDAIF_ROW_PLAN": plan})
        return jobs

    def planned(self, job: Job) -> Path:
        """Where such a job writes."""
        return self.folder / f"{_plain(job.name)}.json"

    @property
    def measured(self) -> Path:
        """Where the benchmarks write what they have found."""
        return self.folder / "measured.json"

    def _measuring(self, seconds: float, out: Path | None = None) -> tuple[str, ...]:
        command = (sys.executable, "-m", "benchmarks.gpu.measuring", "--out", str(out or self.measured))
        where = ("--device", "cpu", "--tiny", "--once") if self.rehearses else ("--device", "cuda")
        return *command, *where, "--seconds", f"{seconds:.0f}"

    def _pytest(self, stage: str, targets: Sequence[str], processes: int) -> list[Job]:
        """One pytest with workers where pytest-xdist is there; else several, each with a share of the files."""
        options = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder", "-m", "not slow")
        begin = (sys.executable, "-m", "pytest", *options)
        if processes == 1 or importlib.util.find_spec("xdist") is not None:
            workers = ("-n", str(processes), "--dist", "load") if processes > 1 else ()
            shares = [[*targets, *workers]]
        else:
            shares = [*shares_of(_test_files(targets), processes)]
            if "kdaif_fast" in targets:
                shares.append(["kdaif_fast"])
        jobs = []
        for i, share in enumerate(shares):
            name = f"{stage} {i}" if len(shares) > 1 else stage
            record = self.folder / f"{_plain(name)}.record"
            jobs.append(Job(name, (*begin, *share), self._log(name), {**ONE_THREAD, VARIABLE: str(record)}))
        return jobs

    def _log(self, name: str) -> Path:
        return self.folder / f"{_plain(name)}.log"


def _plain(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-of-").replace(":", "-").lower()


def _test_files(targets: Iterable[str]) -> list[Path]:
    ignored = [t.removeprefix("--ignore=") for t in targets if t.startswith("--ignore=")]
    roots = [t for t in targets if not t.startswith("--") and t != "kdaif_fast"]
    files = {path.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("test_*.py")}
    files |= {Path(root) for root in roots if root.endswith(".py")}
    return sorted(f for f in files if not any(f.is_relative_to(i) for i in ignored))


def shares_of(files: Iterable[Path], count: int) -> list[list[str]]:
    """Disjoint shares of about the same size in bytes, which is what is known of a file's tests beforehand."""
    shares: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    by_size = sorted(files, key=lambda f: (-(ROOT / f).stat().st_size, str(f)))
    for file in by_size:
        least = sizes.index(min(sizes))
        shares[least].append(str(file))
        sizes[least] += (ROOT / file).stat().st_size
    return [share for share in shares if share]


def cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
