"""`make gpu`: build, tests, sanitizer and benchmarks on the GPU that is there, in nine minutes, in files of results.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results] [--only STAGE ...] [--rehearse]

Stages: build; tests (the GPU's and all others, and beside them the sanitizer's three tools, and whatever the benchmarks
will need compiled); benchmarks, alone, for which a third of the time is kept. A stage that runs out of its time is
stopped, and what it had found by then counts. The results are written after every stage: OUT/<gpu>.json and .md. The
exit status is 0 unless a build, a test, the sanitizer or a result of the benchmarks was wrong.

`--only plans`, which is not among them, measures the row kernels under each plan that KDAIF_ROW_PLAN can ask for.

--rehearse runs every stage on the CPU, with tiny sizes, to see that the runner works; nothing of it is a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_tools.environment import toolkit_folders

from .files import read_json, write, write_json
from .plan import ROOT, Plan, cores
from .processes import Ended, Job, run_all
from .recorder import counts
from .sanitizer import TOOLS, kernel_names, read_log
from .tables import page, summary, wrong_rows

PLANS = "plans"
STAGES = ("build", "tests", "sanitizer", "benchmarks")
SHARE = 0.34  # of the time, kept for the benchmarks
BUILD_SHARE = 0.4  # at most
LAST = 6.0  # seconds, for what is to be done at the end
AGAIN, MOST_STARTS = 25.0, 5  # seconds that are worth another start of the benchmarks; starts
EVERY = 10.0  # seconds between looks at what the benchmarks have written


class Runner:
    """One run of the command.

    Args:
        out: the folder of results.
        minutes: for everything.
        only: the stages to run.
        rehearses: on the CPU.
    """

    def __init__(self, out: Path, minutes: float, only: tuple[str, ...] = STAGES, rehearses: bool = False) -> None:
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        self.out, self.only, self.rehearses = out, only, rehearses
        self.folder = ROOT / "build" / ("rehearsal" if rehearses else "gpu")
        self.looked = 0.0
        self.results: dict[str, Any] = {
            "rehearsal": rehearses,
            "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": {},
            "library": {},
            "stages": {},
            "benchmarks": None,
            "row plans": {},
        }

    def run(self) -> int:
        """All stages; the exit status."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        plan = Plan(self.folder, None, self.rehearses, cores())
        self.results["machine"] = self._facts(plan, "machine")
        if not self.rehearses and self.results["machine"].get("gpu") is None:
            print("no GPU: torch sees none here. `python -m benchmarks.gpu --rehearse` runs on the CPU.")
            return 2
        plan = plan._replace(architecture=self.results["machine"].get("architecture"))
        self._keep_what_is_not_run()
        if "build" in self.only:
            until = min(self.start + BUILD_SHARE * (self.end - self.start), self.end)
            self._note_job(self._alone(plan.build(), until))
        self.results["library"] = self._facts(plan, "library")
        self.write()
        if {"tests", "sanitizer"} & set(self.only):
            self._check(plan)
        if "benchmarks" in self.only:
            self._measure(plan)
        if PLANS in self.only:
            self._sweep(plan)
        self.results["seconds"] = round(time.monotonic() - self.start)
        self.write()
        print("\n".join(["", *summary(self.results), f"results: {self.path}.json and .md"]), flush=True)
        return self.status()

    @property
    def path(self) -> Path:
        """Of the results, without a suffix."""
        name = "rehearsal" if self.rehearses else str(self.results["machine"]["gpu"])
        return self.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def status(self) -> int:
        """0 unless something was wrong; of the suite, having been stopped is not."""
        states = {name: stage["state"] for name, stage in self.results["stages"].items()}
        is_wrong = [
            state.startswith("failed") or (state.startswith("stopped") and name not in ("suite", "benchmarks"))
            for name, state in states.items()
        ]
        return int(any(is_wrong) or bool(wrong_rows(self.results)))

    def write(self) -> None:
        """Both files, each in one step."""
        write_json(self.path.with_name(self.path.name + ".json"), self.results)
        write(self.path.with_name(self.path.name + ".md"), page(self.results))

    def _keep_what_is_not_run(self) -> None:
        """With --only, the other stages of the file that is there stay, each marked with the code that it is of."""
        before = read_json(self.path.with_name(self.path.name + ".json"))
        if before is None or set(self.only) == set(STAGES):
            return
        for name in ("stages", "benchmarks", "row plans"):
            self.results[name] = before.get(name, self.results[name])

    def _facts(self, plan: Plan, what: str) -> dict[str, Any]:
        ended = self._alone(plan.facts(what), min(time.monotonic() + 90, self.end))
        try:
            return dict(json.loads(ended.log.strip().splitlines()[-1]))
        except (IndexError, ValueError):
            return {"unknown": f"{ended.state}: {' '.join(ended.tail()[-3:])}"}

    def _alone(self, job: Job, until: float) -> Ended:
        self._say(job.name)
        return run_all([job], until, ROOT)[job.name]

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def _note(self, name: str, stage: dict[str, Any]) -> None:
        machine = self.results["machine"]
        self.results["stages"][name] = {**stage, "commit": machine.get("commit"), "sources": machine.get("sources")}
        self._say(f"{name}: {stage['state']}")
        self.write()

    def _note_job(self, ended: Ended) -> None:
        self._note(ended.name, {"state": ended.state, "seconds": ended.seconds, "tail": ended.tail()})

    def _check(self, plan: Plan) -> None:
        """Tests and sanitizer side by side, until the benchmarks' time begins."""
        until = self.end - SHARE * (self.end - self.start) if "benchmarks" in self.only else self.end - LAST
        tests = plan.tests() if "tests" in self.only else {}
        stage_of = {job.name: stage for stage, jobs in tests.items() for job in jobs}
        sanitizers = plan.sanitizers() if "sanitizer" in self.only else {}
        for tool, job in sanitizers.items():
            if isinstance(job, str):
                self._note(tool, {"state": job})
        jobs = [job for each in tests.values() for job in each]
        jobs += [job for job in sanitizers.values() if isinstance(job, Job)]
        warmers = plan.warmers() if "benchmarks" in self.only else []
        ours, done = kernel_names(ROOT), {stage: [] for stage in tests}  # type: dict[str, list[Ended]]

        def when_ended(ended: Ended) -> None:
            if ended.name in stage_of:
                stage = stage_of[ended.name]
                done[stage].append(ended)
                if len(done[stage]) == len(tests[stage]):
                    self._note(stage, tests_stage(plan, stage, done[stage]))
            elif ended.name in TOOLS:
                self._note(ended.name, sanitizer_stage(ended, ours, self.rehearses))

        self._say(f"{', '.join([*tests, *(t for t, job in sanitizers.items() if isinstance(job, Job))])}, side by side")
        run_all([*jobs, *warmers], until, ROOT, when_ended)

    def _measure(self, plan: Plan) -> None:
        seconds = self.end - time.monotonic() - 2 * LAST
        self._say(f"benchmarks, {seconds:.0f} s")
        plan.measured.unlink(missing_ok=True)
        codes: list[int | None] = []
        # One case may take longer than the process thinks: it is stopped, and has written all before it. One that ends
        # the process, as an illegal access to memory does, costs itself.
        while not codes or (codes[-1] not in (0, None) and seconds > AGAIN and len(codes) < MOST_STARTS):
            job = plan.benchmarks(seconds, resumes=bool(codes))
            ended = run_all([job], self.end - LAST, ROOT, now_and_then=lambda: self._look(plan))[job.name]
            self._look(plan, at_once=True)
            codes.append(ended.code)
            seconds = self.end - time.monotonic() - 2 * LAST
        died = len([code for code in codes if code not in (0, None)])
        self._note_job(ended if not died else replace(ended, code=ended.code or 1))

    def _sweep(self, plan: Plan) -> None:
        """Each plan of the row kernels, one after the other."""
        start, states = time.monotonic(), []
        jobs = plan.row_plans(60)
        for wish, job in jobs.items():
            ended = self._alone(job, min(time.monotonic() + 75, self.end - LAST))
            found = read_json(plan.planned(job)) or {"rows": []}
            self.results["row plans"][wish or "own choice"] = found["rows"]
            states.append(ended.state)
            self.write()
        state = next((state for state in states if state != "ok"), "ok")
        self._note(PLANS, {"state": state, "seconds": time.monotonic() - start})

    def _look(self, plan: Plan, at_once: bool = False) -> None:
        if at_once or time.monotonic() > self.looked + EVERY:
            self.looked = time.monotonic()
            found = read_json(plan.measured)
            if found is not None:
                self.results["benchmarks"] = found
                self.write()


def tests_stage(plan: Plan, stage: str, ended: list[Ended]) -> dict[str, Any]:
    """What the processes of a stage of tests have found together."""
    found = counts(plan.records(stage))
    # 5: nothing was collected, which is a failure only if it is so of every process.
    codes = [each.code for each in ended if each.code != 5] or [5]
    state = "ok" if codes == [0] * len(codes) else "failed"
    if any(each.was_stopped for each in ended):
        state = "failed" if found["failures"] else f"stopped after {max(each.seconds for each in ended):.0f} s"
    tail = [line for each in ended if each.code not in (0, 5) for line in each.tail()]
    return {"state": state, "seconds": max(each.seconds for each in ended), "tail": tail[-60:], **found}


def sanitizer_stage(ended: Ended, ours: set[str], rehearses: bool) -> dict[str, Any]:
    """What one tool says."""
    stage: dict[str, Any] = {"state": ended.state, "seconds": ended.seconds, "tail": ended.tail()}
    if not rehearses and not ended.was_stopped and ended.code is not None:
        stage |= read_log(ended.log, ended.code, ours)
    return stage


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=(*STAGES, PLANS), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so through what stops the stages
    out = arguments.out or (ROOT / "build/rehearsal-results" if arguments.rehearse else ROOT / "benchmarks/results")
    # The sanitizer's program and nvcc, which tests ask for too, may be there without being on the PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *toolkit_folders()])
    only = tuple(stage for stage in (*STAGES, PLANS) if stage in arguments.only)
    sys.exit(Runner(out.resolve(), arguments.minutes, only, arguments.rehearse).run())


if __name__ == "__main__":
    main()
