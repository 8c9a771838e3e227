"""Commands in processes of their own, several at a time, until they end or their time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 3.0  # seconds between the wish to end and the end
TICK = 0.2
TAIL = 40  # lines of a log that are kept


@dataclass(frozen=True)
class Job:
    """A command, its variables, and where its output goes."""

    name: str
    command: Sequence[str]
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a job ended. code: its exit status; None where it was stopped or could not be started."""

    name: str
    code: int | None
    seconds: float
    log: str
    was_stopped: bool = False

    @property
    def state(self) -> str:
        """As the tables say it."""
        if self.was_stopped:
            return f"stopped after {self.seconds:.0f} s"
        return "ok" if self.code == 0 else f"failed, status {self.code}"

    def tail(self) -> list[str]:
        """The last lines of the log."""
        return self.log.splitlines()[-TAIL:]


def run_all(
    jobs: Sequence[Job],
    until: float,
    folder: Path,
    when_ended: Callable[[Ended], None] = lambda ended: None,
    now_and_then: Callable[[], None] = lambda: None,
) -> dict[str, Ended]:
    """Start all at once and wait for them, until time.monotonic() is `until`; what runs then is stopped.

    A job is stopped with everything that it has started. One that cannot be started has failed; the others go on.
    """
    start, running, ended = time.monotonic(), {}, {}

    def end(job: Job, code: int | None, was_stopped: bool = False) -> None:
        log = job.log.read_text(errors="replace") if job.log.exists() else ""
        ended[job.name] = Ended(job.name, code, time.monotonic() - start, log, was_stopped)
        when_ended(ended[job.name])

    try:
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            try:
                with job.log.open("w") as log:
                    running[job.name] = (
                        job,
                        subprocess.Popen(
                            job.command,
                            **{"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL},
                            **{"cwd": folder, "env": {**os.environ, **job.variables}, "start_new_session": True},
                        ),
                    )
            except OSError as error:
                job.log.write_text(f"{error}\n")
                end(job, None)
        while running:
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _stop([process])  # what it has left behind
                    end(job, process.returncode)
            if running and time.monotonic() >= until:
                break
            now_and_then()
            if running:
                time.sleep(min(TICK, max(until - time.monotonic(), 0.0)))
    finally:
        _stop([process for _, process in running.values()])
    for job, _ in running.values():
        end(job, None, was_stopped=True)
    return ended


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes and all that they have started: each has a group of its own."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    limit = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes) and time.monotonic() < limit:
        time.sleep(0.05)
    for process in processes:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, what)
