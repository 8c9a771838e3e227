"""`make gpu` without a GPU: stages and their clocks, what is written, what the sanitizer's reports mean, the tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks/gpu").exists(), reason="not a source tree")
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as runner  # noqa: E402
from benchmarks.gpu import files, plan, processes, recorder, sanitizer, tables, timing  # noqa: E402
from benchmarks.gpu.cases import Bench, Case, SkippedError, Target, finish  # noqa: E402


def job(tmp_path, name, code):
    return processes.Job(name, (sys.executable, "-c", code), tmp_path / f"{name}.log")


class TestProcesses:
    def test_all_run_at_once_and_none_loses_the_others(self, tmp_path):
        jobs = [
            job(tmp_path, "right", "print('done')"),
            job(tmp_path, "wrong", "print('first'); raise SystemExit(3)"),
            job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
            processes.Job("absent", (str(tmp_path / "no such program"),), tmp_path / "absent.log"),
        ]
        told = []
        ended = processes.run_all(jobs, time.monotonic() + 60, tmp_path, lambda e: told.append(e.name))
        assert sorted(told) == sorted(ended) == ["absent", "killed", "right", "wrong"]
        assert ended["right"].state == "ok"
        assert ended["right"].log == "done\n"
        assert ended["wrong"].state == "failed, status 3"
        assert ended["wrong"].tail() == ["first"]
        assert ended["killed"].state == "failed, status -9"
        assert "No such file" in ended["absent"].log

    def test_what_runs_out_of_time_is_stopped_with_its_children(self, tmp_path):
        mark = tmp_path / "alive"
        child = f"while :; do touch '{mark}'; sleep 0.05; done"
        code = (
            "import subprocess, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"print('said', flush=True); subprocess.Popen(['sh', '-c', {child!r}]); time.sleep(600)"
        )
        quick = job(tmp_path, "quick", "pass")
        looks = []
        start = time.monotonic()
        while_running = processes.run_all(
            [job(tmp_path, "slow", code), quick], start + 4, tmp_path, now_and_then=lambda: looks.append(1)
        )
        assert while_running["quick"].state == "ok"
        assert while_running["slow"].was_stopped
        assert while_running["slow"].state.startswith("stopped after ")
        assert while_running["slow"].log == "said\n"
        assert time.monotonic() - start < 4 + processes.GRACE + 20
        assert looks
        mark.unlink()  # it has lived
        time.sleep(0.5)
        assert not mark.exists(), "a child of the stopped process goes on"


class TestRecorder:
    def test_outcomes_are_written_as_they_come(self, tmp_path):
        (tmp_path / "test_some.py").write_text(
            "import pytest, os\n"
            "def test_right(): pass\n"
            "def test_wrong(): assert False\n"
            "def test_skipped(): pytest.skip('no such thing here')\n"
            "@pytest.fixture\ndef broken(): raise ValueError\n"
            "def test_error(broken): pass\n"
            "def test_end(): os._exit(7)\n"
            "def test_never(): pass\n"
        )
        (tmp_path / "test_unreadable.py").write_text("import no_such_module_at_all\n")
        record = tmp_path / "a.record"
        for file in ("test_some.py", "test_unreadable.py"):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder"]
            subprocess.run(
                [*command, "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path / file)],
                env={**os.environ, recorder.VARIABLE: str(record), "PYTHONPATH": str(ROOT)},
                capture_output=True,
                cwd=tmp_path,
                check=False,
            )
        record.write_text(record.read_text() + '["passed", "cut o')
        found = recorder.counts([record, tmp_path / "absent.record"])
        assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (1, 1, 2, 1)
        assert [name.split("::")[-1] for name in found["failures"]] == [
            "test_wrong",
            "test_error",
            "test_unreadable.py",
        ]
        assert found["skip_reasons"] == {"no such thing here": 1}


class TestSanitizer:
    CLEAN = "========= COMPUTE-SANITIZER\nok\n========= ERROR SUMMARY: 0 errors\n"
    INVALID = (
        "========= Invalid __global__ write of size 4 bytes\n"
        "=========     at {}+0x60 in file.cu:10\n"
        "=========     by thread (0,0,0) in block (0,0,0)\n"
        "=========     Host Frame:cuLaunchKernel [0x2b8d0e] in libcuda.so\n"
    )
    OURS = ("kdaif::", "_persample_dot_kernel")

    @pytest.mark.parametrize(
        ("log", "code", "expected"),
        [
            (CLEAN, 0, ("ok", 0, 0)),
            (CLEAN, 1, ("failed", 0, 0)),
            (
                INVALID.format("void kdaif::rows<float>(Rows<float>)") + "========= ERROR SUMMARY: 1 error\n",
                0,
                ("failed", 1, 0),
            ),
            (INVALID.format("_persample_dot_kernel") + "========= ERROR SUMMARY: 1 error\n", 0, ("failed", 1, 0)),
            (INVALID.format("void at::native::other(int)") + "========= ERROR SUMMARY: 1 error\n", 0, ("ok", 0, 1)),
            (
                "========= Host API memory access error at host access to 0x500 of size 64 bytes\n"
                "=========     Uninitialized access at 0x500 on access by cudaMemcpy source\n"
                "========= ERROR SUMMARY: 1 error\n",
                0,
                ("failed", 1, 0),
            ),
            ("========= Something new\n========= ERROR SUMMARY: 2 errors\n", 0, ("failed", 0, 0)),
            ("========= Error: Device not supported. Please refer to the list.\n", 1, ("refused the device", 0, 0)),
            ("Segmentation fault\n", -11, ("failed: it wrote no summary", 0, 0)),
            ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, ("ok", 0, 0)),
            (
                "========= Error: Race reported between Write access at kdaif::sum(int *)+0x90 in a.cu:3\n"
                "=========     and Read access at kdaif::sum(int *)+0x100 in a.cu:4 [4 hazards]\n"
                "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
                0,
                ("failed", 1, 0),
            ),
            (
                "========= Program hit CUDA_ERROR_NOT_FOUND (error 500) on CUDA API call to cuGetProcAddress.\n"
                "=========     Host Frame: [0x1] in libtorch_cuda.so\n"
                "========= ERROR SUMMARY: 1 error\n",
                0,
                ("ok", 0, 1),
            ),
            (
                "========= Program hit cudaErrorInvalidValue (error 1) on CUDA API call to cudaLaunchKernel.\n"
                "=========     Host Frame: [0x1] in _kernels_cuda.so\n"
                "========= ERROR SUMMARY: 1 error\n",
                0,
                ("failed", 1, 0),
            ),
        ],
    )
    def test_verdicts(self, log, code, expected):
        found = sanitizer.read_log(log, code, set(self.OURS))
        assert (found["state"], found["ours"], found["others"]) == expected

    def test_kernels_are_known_by_name(self):
        names = sanitizer.kernel_names(ROOT)
        assert {"kdaif::", "_persample_dot_kernel", "row_divergence_kernel"} <= names


class TestPlan:
    def real(self, tmp_path, **more):
        return plan.Plan(tmp_path, "90", False, 16)._replace(**more)

    def test_the_build_is_of_the_gpu_that_is_there(self, tmp_path):
        build = self.real(tmp_path).build()
        assert build.variables["KDAIF_BUILD"] == "cuda"
        assert build.variables["KDAIF_CUDA_ARCHS"] == "90"
        assert "build_ext" in build.command

    @pytest.mark.parametrize("has_xdist", [True, False])
    def test_every_test_is_in_one_process(self, tmp_path, monkeypatch, has_xdist):
        monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: has_xdist or None)
        stages = self.real(tmp_path).tests()
        for jobs in stages.values():
            assert all("benchmarks.gpu.recorder" in each.command for each in jobs)
            assert len({each.variables[recorder.VARIABLE] for each in jobs}) == len(jobs)
        suite = [part for each in stages["suite"] for part in each.command]
        assert suite.count("kdaif_fast") == 1
        if has_xdist:
            assert {"tests", "--ignore=tests/gpu", "-n"} <= set(suite)
        else:
            files = [part for part in suite if part.endswith(".py")]
            expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
            assert sorted(files) == sorted(f for f in expected if not f.startswith("tests/gpu/"))
            assert len(stages["suite"]) == 8 + 1

    def test_what_is_absent_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan.shutil, "which", lambda name: None)
        for tool, why in self.real(tmp_path).sanitizers().items():
            assert tool in sanitizer.TOOLS
            assert why.startswith("absent: ")

    def test_plans_of_rows_are_told_by_the_variable(self, tmp_path):
        jobs = self.real(tmp_path).row_plans(10)
        assert {each.variables["KDAIF_ROW_PLAN"] for each in jobs.values()} == set(plan.ROW_PLANS)
        assert len({self.real(tmp_path).planned(each) for each in jobs.values()}) == len(jobs)


class TestStates:
    """What a run of the command comes to."""

    @pytest.mark.parametrize(
        ("states", "status"),
        [
            ({"build": "ok", "suite": "stopped after 200 s", "memcheck": "refused the device"}, 0),
            ({"suite": "failed"}, 1),
            ({"GPU tests": "stopped after 200 s"}, 1),
            ({"racecheck": "failed"}, 1),
            ({"build": "failed, status 1"}, 1),
            ({"benchmarks": "stopped after 100 s"}, 0),
            ({"memcheck": "absent: compute-sanitizer was not found"}, 0),
        ],
    )
    def test_status(self, tmp_path, states, status):
        run = runner.Runner(tmp_path, 1.0)
        run.results["stages"] = {name: {"state": state} for name, state in states.items()}
        assert run.status() == status
        run.results["benchmarks"] = {"rows": [{"way": "cuda", "is_right": False}]}
        assert run.status() == 1

    def ended(self, code, was_stopped=False):
        return processes.Ended("suite", code, 5.0, "", was_stopped)

    def test_a_stage_of_tests(self, tmp_path):
        where = plan.Plan(tmp_path, None, False, 2)
        (tmp_path / "suite-0.record").write_text('["passed", "a", ""]\n')
        (tmp_path / "suite-1.record").write_text('["passed", "b", ""]\n')
        stage = runner.tests_stage(where, "suite", [self.ended(0), self.ended(5)])
        assert (stage["state"], stage["passed"]) == ("ok", 2)
        assert runner.tests_stage(where, "suite", [self.ended(0), self.ended(-11)])["state"] == "failed"
        assert runner.tests_stage(where, "suite", [self.ended(5)])["state"] == "failed"
        stopped = [self.ended(0), self.ended(None, True)]
        assert runner.tests_stage(where, "suite", stopped)["state"] == "stopped after 5 s"
        (tmp_path / "suite-1.record").write_text('["failed", "b", ""]\n')
        assert runner.tests_stage(where, "suite", stopped)["state"] == "failed"

    def test_only_some_stages_leave_the_others(self, tmp_path):
        first = runner.Runner(tmp_path, 1.0, rehearses=True)
        first.results |= {"stages": {"suite": {"state": "ok"}}, "benchmarks": {"rows": []}}
        files.write_json(tmp_path / "rehearsal.json", first.results)
        second = runner.Runner(tmp_path, 1.0, ("build",), rehearses=True)
        second._keep_what_is_not_run()
        assert second.results["stages"] == {"suite": {"state": "ok"}}
        whole = runner.Runner(tmp_path, 1.0, rehearses=True)
        whole._keep_what_is_not_run()
        assert whole.results["stages"] == {}


def test_files_are_whole_and_json(tmp_path):
    path = tmp_path / "folder/x.json"
    files.write_json(path, {"a": [float("nan"), -float("inf"), 1.5], "NaN": "Infinity", "path": tmp_path})
    assert json.loads(path.read_text()) == {"a": [None, None, 1.5], "NaN": "Infinity", "path": str(tmp_path)}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    path.write_text("{")
    assert files.read_json(path) is None
    assert files.read_json(tmp_path / "absent") is None


class TestCases:
    def bench(self):
        return Bench("cpu", timing.Timer("cpu", 1e-4), {"copy": 1e9, "bf16": 1e12}, 2**20)

    def case(self, **ways):
        import torch

        def skipped(inputs):
            raise SkippedError("not here")

        def broken(inputs):
            raise ValueError("no such shape")

        ways = {
            "cpu": lambda x: lambda: x + 1,
            "reference": lambda x: lambda: x + 1.0,
            "triton": lambda x: lambda: x + 2,
            "missing": skipped,
            "broken": broken,
            "nan": lambda x: lambda: x * float("nan"),
        }
        targets = (
            Target("some share", share=1e-9),
            Target("fast", times=1e-9, against="reference"),
            Target("?", share=2),
        )
        return Case(
            *("a", "[2]", "float32", lambda: torch.ones(2), ways), bytes=8.0, right="reference", targets=targets[:2]
        )

    def test_a_way_that_fails_costs_no_other(self):
        case, bench = self.case(), self.bench()
        rows = bench.run(case)
        finish(bench, case, rows)
        by_way = {row["way"]: row for row in rows}
        assert by_way["cpu"]["is_right"] is True
        assert by_way["triton"]["is_right"] is False
        assert by_way["triton"]["error"] == pytest.approx(0.5)
        assert by_way["nan"]["is_right"] is False
        assert by_way["missing"]["skipped"] == "not here"
        assert by_way["broken"]["failed"] == "ValueError: no such shape"
        assert by_way["cpu"]["share"] == pytest.approx(8e-9 / by_way["cpu"]["seconds"][0])
        assert by_way["cpu"]["targets"] == {"some share": True, "fast": False}
        assert "targets" not in by_way["reference"]

    def test_results_are_kept_until_they_overflow_the_cache(self):
        import torch

        bench, live, most = self.bench(), [], []
        bench.cache = 4 * 300

        def way(inputs):
            import weakref

            def call():
                result = torch.ones(400)  # 1,600 of 3 * 1,200 bytes
                live.append(weakref.ref(result))
                most.append(sum(ref() is not None for ref in live))
                return result

            return call

        sets, case = [0] * 8, self.case(cpu=way)
        assert bench.results_kept(torch.ones(400), len(sets)) == 3
        assert bench.results_kept(torch.ones(400), 2) == 2
        assert bench.results_kept(None, 2) == 0
        bench._time(case, {"way": "cpu"}, [way(None) for _ in sets], 3)
        assert max(most) == 4  # three, and the new one
        assert not any(ref() is not None for ref in live)

    def test_floors_are_the_longer_of_bytes_and_operations(self):
        case, bench = self.case(), self.bench()
        from dataclasses import replace

        assert bench.floor(replace(case, bytes=1e9, operations=1e12, rate="bf16")) == pytest.approx(1)
        assert bench.floor(replace(case, bytes=1.0, operations=2e12, rate="bf16")) == pytest.approx(2)
        assert bench.floor(replace(case, bytes=0.0)) is None


@pytest.mark.parametrize(("asking", "together"), [(1e-5, 20), (2e-4, 20), (4e-3, 1), (0.3, 1), (0.0, 1)])
def test_the_gpu_sleeps_until_everything_is_asked_for(asking, together, monkeypatch):
    import torch

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def elapsed_time(self, other):
            return 7.0

    asked, batches = [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: batches.append((len(asked), cycles)))
    timer = timing.Timer("cuda")
    monkeypatch.setattr(timer, "wait", lambda: None)
    found = timer._events([lambda: asked.append("call")] * 3, 100, together, asking)
    assert found == [pytest.approx(7e-3 / together)] * 100
    assert asked.count("call") == 100 * together
    assert bool(batches) == (asking > 0)
    ends = [begin for begin, _ in batches[1:]] + [len(asked)]
    for (begin, cycles), end in zip(batches, ends[: len(batches)], strict=True):
        calls = asked[begin:end].count("call")
        assert cycles <= timing.LONGEST_SLEEP * timing.CYCLES
        assert cycles / timing.CYCLES > 1.2 * asking * calls or calls == together


def test_a_case_that_ends_the_process_costs_only_itself(tmp_path):
    """As an illegal access to memory does on a GPU: the next process goes on after it."""
    code = (
        "import os, sys, torch; from benchmarks.gpu import measuring; from benchmarks.gpu.cases import Case\n"
        "def case(name, f): return Case(name, 's', 'float32', lambda: torch.ones(1), {'cpu': lambda x: f})\n"
        "found = [case('a', lambda: None), case('b', lambda: os._exit(9)), case('c', lambda: None)]\n"
        "measuring.cases = lambda *args: found\n"
        "measuring.main()\n"
    )
    out = tmp_path / "measured.json"
    codes = []
    for more in ((), ("--resume",)):
        command = [sys.executable, "-c", code, "--out", str(out), "--tiny", "--device", "cpu", "--once", *more]
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode)
    assert codes == [9, 0]
    rows = {row["case"]: row for row in files.read_json(out)["rows"]}
    assert set(rows) == {"a", "b s float32", "c"}
    assert rows["a"]["seconds"]
    assert rows["c"]["seconds"]
    assert rows["b s float32"]["failed"] == "it ended the process"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """One run of the command, all stages; of the benchmarks what the time allows."""
    out = tmp_path_factory.mktemp("results")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), "--minutes", "0.5"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return out, done


def test_rehearsal(rehearsal):
    """The command itself. On a slow machine a stage may be stopped, which is excused; nothing else is."""
    out, done = rehearsal
    assert sorted(p.name for p in out.iterdir()) == ["rehearsal.json", "rehearsal.md"], done.stdout + done.stderr
    found = files.read_json(out / "rehearsal.json")
    states = {name: stage["state"] for name, stage in found["stages"].items()}
    assert {"build", "GPU tests", "suite", "benchmarks", *sanitizer.TOOLS} == set(states)
    assert all(state == "ok" or state.startswith(("stopped after", "absent")) for state in states.values()), states
    assert done.stdout.splitlines()[-1].startswith("results: ")
    assert "Nothing here is a measurement" in (out / "rehearsal.md").read_text()
    assert found["rehearsal"] is True
    assert found["machine"]["torch"]


def test_every_case_runs_and_is_right():
    """In this process, each way once: what the benchmarks are made of."""
    from benchmarks.gpu.measuring import cases
    from benchmarks.gpu.scale import Scale

    bench = Bench("cpu", timing.Timer("cpu", 0.0), {"copy": 1e9}, 2**20)
    bench.timer.time = lambda calls, asks_ahead=True: (calls[0](), timing.Timing(1.0, 1.0, 1.0, 1.0, 1))[1]
    titles = []
    for case in cases(Scale("cpu", True)):
        titles.append(case.title)
        rows = bench.run(case)
        finish(bench, case, rows)
        for row in rows:
            assert "failed" not in row, f"{case.title}, {row['way']}: {row.get('failed')}"
            assert row.get("is_right") is not False, f"{case.title}, {row['way']}: {row['error']}"
    assert len(titles) == len(set(titles))
    results = {"benchmarks": {"ceilings": {}, "rows": rows, "skipped": ["x"], "passes": 1, "tunings": []}}
    page = tables.page({"machine": {}, "stages": {}, "rehearsal": True, **results})
    assert "## Measurements" in page


def test_full_sizes_can_be_described():
    """Every case of the GPU's sizes is made (not its inputs), with a floor and a size class."""
    from benchmarks.gpu.measuring import cases
    from benchmarks.gpu.scale import Scale
    from kdaif_fast import _cuda_order

    found = cases(Scale("meta", False))
    assert {case.op for case in found} >= set(_cuda_order.SIZES)
    for case in found:
        assert case.op is None or case.size in _cuda_order.CLASSES
    assert len({case.title for case in found}) == len(found)
