import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import kdaif_fast
from kdaif_fast import _files
from kdaif_fast.distill.runs.run_folder import RunFolder
from kdaif_fast.distill.runs.run_log import RunLog, numbers, read_log


def epoch(number, **more):
    return {"kind": "epoch", "epoch": number, "step": 10 * number, "mean_weight": 1 - number / 100, **more}


def refresh(number, **more):
    return {"kind": "refresh", "epoch": number, "step": 10 * number - 10, "residual": 0.1, **more}


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_read(tmp_path):
    log = RunLog(tmp_path / "new" / "run")
    written = [refresh(1), epoch(1, seconds={"student": 1.5}, teacher_loss=None), epoch(2, note="ok", edges=[0, 1.5])]
    for record in written:
        log.write(record)
    assert log.records() == read_log(tmp_path / "new" / "run") == RunLog(tmp_path / "new" / "run").records() == written


def test_numbers_of_tensors_and_arrays_are_plain(tmp_path):
    log = RunLog(tmp_path)
    log.write(
        epoch(1, a=torch.tensor(0.5), b=np.float32(0.25), c=np.arange(3), d=torch.ones(2), e=np.bool_(True), f=(1,))
    )
    (found,) = RunLog(tmp_path).records()
    assert {key: found[key] for key in "abcdef"} == {
        "a": 0.5, "b": 0.25, "c": [0, 1, 2], "d": [1.0, 1.0], "e": True, "f": [1],
    }  # fmt: skip
    assert found == log.records()[0]


def test_lines_are_json_whatever_the_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.write(epoch(1, loss=math.nan, high=math.inf, low=[-math.inf], name="x"))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)
    (found,) = RunLog(tmp_path).records()
    assert math.isnan(found["loss"])
    assert (found["high"], found["low"], found["name"]) == (math.inf, [-math.inf], "x")


def test_the_table_has_a_row_an_epoch_and_its_header_grows(tmp_path):
    log = RunLog(tmp_path)
    log.write(epoch(1, teacher_accuracy=None, seconds={"student": 1.5}, histogram={"all": [1, 2]}, note="x"))
    log.write(refresh(2))
    log.write(epoch(2, teacher_accuracy=0.5, seconds={"student": 2.0}))
    first = (tmp_path / "log.csv").stat().st_ino
    log.write(epoch(3, seconds={"student": 2.0, "influence": 0.5}, flip_auc=0.9))
    assert (tmp_path / "log.csv").stat().st_ino != first  # replaced, not written over
    assert rows(tmp_path) == [
        {"epoch": "1", "step": "10", "mean_weight": "0.99", "teacher_accuracy": "", "seconds_student": "1.5",
         "seconds_influence": "", "flip_auc": ""},
        {"epoch": "2", "step": "20", "mean_weight": "0.98", "teacher_accuracy": "0.5", "seconds_student": "2.0",
         "seconds_influence": "", "flip_auc": ""},
        {"epoch": "3", "step": "30", "mean_weight": "0.97", "teacher_accuracy": "", "seconds_student": "2.0",
         "seconds_influence": "0.5", "flip_auc": "0.9"},
    ]  # fmt: skip
    assert (tmp_path / "log.csv").read_text().startswith("epoch,step,")
    log.write(epoch(4))
    RunLog(tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_is_dropped(tmp_path, cut):
    log = RunLog(tmp_path)
    for number in (1, 2, 3):
        log.write(epoch(number))
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])
    table = tmp_path / "log.csv"
    table.write_bytes(table.read_bytes()[:-3])
    before = path.read_bytes()
    assert [record["epoch"] for record in read_log(tmp_path)] == [1, 2]
    assert path.read_bytes() == before  # reading changes nothing
    again = RunLog(tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    again.write(epoch(3))
    assert [record["epoch"] for record in RunLog(tmp_path).records()] == [1, 2, 3]
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_a_last_line_without_its_end_or_its_content(tmp_path):
    log = RunLog(tmp_path)
    log.write(epoch(1))
    log.write(epoch(2))
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    assert len(read_log(tmp_path)) == 2
    path.write_bytes(whole + b"\0" * 40 + b"\n")
    assert len(read_log(tmp_path)) == 2
    path.write_bytes(b"")
    assert RunLog(tmp_path).records() == []


def test_a_line_in_the_middle_that_is_no_record_is_an_error(tmp_path):
    log = RunLog(tmp_path)
    log.write(epoch(1))
    path = tmp_path / "log.jsonl"
    before = b'{"kind": "epoch"}\n' + path.read_bytes()
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: no record"):
        RunLog(tmp_path)
    assert path.read_bytes() == before


def test_rewind_drops_what_came_later(tmp_path):
    log = RunLog(tmp_path)
    for number in (1, 2, 3):
        log.write(refresh(number))
        log.write(epoch(number))
    log.rewind(20)
    expected = [refresh(1), epoch(1), refresh(2), epoch(2), refresh(3)]  # the third refresh was made at step 20
    assert log.records() == read_log(tmp_path) == expected
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    log.write(epoch(3))
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]
    log.rewind(0)
    assert log.records() == read_log(tmp_path) == [refresh(1)]
    log.rewind(-1)
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_rewinding_to_the_end_touches_nothing(tmp_path):
    log = RunLog(tmp_path)
    log.write(epoch(1))
    before = (tmp_path / "log.jsonl").stat()
    log.rewind(10)
    assert (tmp_path / "log.jsonl").stat() == before


def test_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.write(epoch(1))
    log.write(epoch(2))
    log.rewind(10)
    assert log.records() == [epoch(1)]
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"kind": "batch", "epoch": 1, "step": 1}, ValueError, "kind 'batch', expected one of epoch, refresh"),
        ({"epoch": 1, "step": 1}, ValueError, "kind None"),
        ({"kind": "epoch", "epoch": 1}, TypeError, r"record\['step'\] is None, expected an int"),
        ({"kind": "epoch", "epoch": 1.0, "step": 1}, TypeError, r"record\['epoch'\] is 1.0"),
        (epoch(1, seconds={"student": object()}), TypeError, r"record\['seconds'\]\['student'\] is a object"),
        (epoch(1, values=[1, {2}]), TypeError, r"record\['values'\]\[1\] is a set"),
        (epoch(1, table={3: 1}), TypeError, r"record\['table'\] has the key 3"),
    ],
)
def test_bad_records_change_nothing(tmp_path, record, error, message):
    log = RunLog(tmp_path)
    log.write(epoch(1))
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(error, match=message):
        log.write(record)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert log.records() == [epoch(1)]


def test_no_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a run: it has no log\.jsonl"):
        read_log(tmp_path)


def test_flat_numbers():
    record = epoch(1, seconds={"a": 1, "deep": {"b": 2.5}}, note="x", nothing=None, many=[1, 2])
    expected = {"epoch": 1, "step": 10, "mean_weight": 0.99, "seconds_a": 1, "seconds_deep_b": 2.5}
    assert numbers(record) == expected


# Without kdaif_fast/__init__.py, which imports torch and takes its time.
LOOP = """
import sys, itertools, types
for name, folder in (("kdaif_fast", sys.argv[2]), ("kdaif_fast.distill", sys.argv[2] + "/distill")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from kdaif_fast.distill.runs.run_log import RunLog
log = RunLog(sys.argv[1])
for number in itertools.count(len(log.records()) + 1):
    log.write({"kind": "epoch", "epoch": number, "step": number, "filling": list(range(300))})
    if number % 7 == 0:
        log.rewind(number - 1)
        log.write({"kind": "epoch", "epoch": number, "step": number, "again": 1.0})
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_log_to_go_on_with(tmp_path):
    command = [sys.executable, "-c", LOOP, str(tmp_path), str(Path(kdaif_fast.__file__).parent)]
    for delay in (0.0, 0.001, 0.003, 0.007, 0.02, 0.05):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        told = [int(line) for line in process.communicate()[0].split()]
        found = [record["epoch"] for record in read_log(tmp_path)]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= max(told, default=1)
        assert [int(row["epoch"]) for row in rows(tmp_path)][: max(told, default=1)] == found[: max(told, default=1)]


def test_a_disk_without_room_cuts_no_line(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log.write(epoch(1))
    before = (tmp_path / "log.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.write(epoch(2))
    assert (tmp_path / "log.jsonl").read_bytes() == before
    log.write(epoch(3))
    assert [record["epoch"] for record in log.records()] == [record["epoch"] for record in read_log(tmp_path)] == [1, 3]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    _files.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


needs_tensorboard = pytest.mark.filterwarnings("default")  # tensorboard's own imports warn of one another


@needs_tensorboard
def test_tensorboard_gets_numbers_and_histogram_and_forgets_what_is_rewound(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    histogram = {"edges": [0.0, 1.0, 2.0], "all": [3, 1]}
    log = RunLog(tmp_path, tensorboard=True)
    for number in (1, 2, 3):
        log.write(refresh(number))
        log.write(epoch(number, seconds={"student": 1.5}, weight_histogram=histogram))
    log.close()
    log = RunLog(tmp_path, tensorboard=True)
    log.rewind(20)
    log.write(epoch(3, mean_weight=0.5))
    log.rewind(20)
    log.write(epoch(3, mean_weight=0.25))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("mean_weight")] == [
        (10, pytest.approx(0.99)),
        (20, pytest.approx(0.98)),
        (30, 0.25),
    ]
    assert [event.step for event in events.Scalars("refresh/residual")] == [0, 10, 20]
    assert [event.value for event in events.Scalars("seconds_student")] == [1.5, 1.5]
    (first, _) = events.Histograms("weights/all")
    assert first.histogram_value.bucket_limit == [1.0, 2.0]
    assert first.histogram_value.bucket == [3.0, 1.0]


def test_tensorboard_needs_a_folder_and_the_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run_dir is None"):
        RunLog(None, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_other_ranks_log_nothing(tmp_path):
    folder = RunFolder(tmp_path, rank=1, tensorboard=True)
    folder.make()
    folder.open_log(0, 0, is_inside=False)
    folder.log({"kind": "epoch", "epoch": 1, "step": 4})
    folder.close_log()
    assert list(tmp_path.iterdir()) == []
