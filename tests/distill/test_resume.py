"""A run that is interrupted at any step goes on as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import CheckpointError, Distiller
from kdaif_fast.distill.rules import Shuffled
from kdaif_fast.distill.settings_told import told

from .cases import SOLVE, adam, assert_same_bits, loaders, make, network, samples, state_of

SETTINGS = {
    "M3 step": {"mechanism": "M3", "refresh": "step", "dropout": 0.2},
    "M4 every 3": {"mechanism": "M4", "refresh": 3, "ema": 0.3, "normalize": True, "solve_samples": 10},
    "M1 draws": {"mechanism": "M1", "rule": "keep_probability", "accumulate": 3, "dropout": 0.2},
    "online": {"mechanism": "online", "dropout": 0.2},
}


def scheduler(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)


def seeded(settings, **more):
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    return make(5, student_scheduler=scheduler, checkpoint_every=1, **settings, **more)


def train(distiller, epochs=3):
    # The seed of the loaders is that of the process: they are made anew, as another process would.
    torch.manual_seed(8)
    return distiller.fit(*loaders(noisy=True), epochs)


class InterruptedAtStepError(Exception):
    pass


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_at_any_step(name, tmp_path):
    whole = seeded(SETTINGS[name], run_dir=tmp_path / "whole")
    train(whole)
    expected = state_of(whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    of_whole = [(line["kind"], line["epoch"], line["step"]) for line in lines]
    for stop in (1, 2, 3, 5, 8, 11):
        run_dir = tmp_path / str(stop)
        first = seeded(SETTINGS[name], run_dir=run_dir)
        calls = {"n": 0}
        original = first._save_run

        def save_and_stop(calls=calls, original=original, stop=stop):
            original()
            calls["n"] += 1
            if calls["n"] == stop:
                raise InterruptedAtStepError

        first._save_run = save_and_stop
        with pytest.raises(InterruptedAtStepError):
            train(first)
        torch.manual_seed(stop)
        second = make(100 + stop, student_scheduler=scheduler, checkpoint_every=1, run_dir=run_dir, **SETTINGS[name])
        train(second)
        assert_same_bits(expected, state_of(second))
        lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        assert [(line["kind"], line["epoch"], line["step"]) for line in lines] == of_whole
        without_times = [
            {k: v for k, v in record.items() if k not in ("seconds", "weight_histogram")} for record in second.history
        ]
        assert without_times == [
            {k: v for k, v in record.items() if k not in ("seconds", "weight_histogram")} for record in whole.history
        ]


@pytest.mark.parametrize("checkpoint_every", [None, 4])
def test_what_was_logged_twice_is_kept_once(checkpoint_every, tmp_path):
    """The end of an epoch, and what was measured at the start of one, before a checkpoint knew of it."""

    class Stopped(Exception):  # noqa: N818
        pass

    settings = {"mechanism": "M1", "run_dir": tmp_path, "checkpoint_every": checkpoint_every}
    for after in (2, 3):
        distiller = make(**settings)
        log, calls = distiller._folder.log, []

        def log_and_stop(record, log=log, calls=calls, after=after):
            log(record)
            calls.append(record)
            if len(calls) == after:
                raise Stopped

        distiller._folder.log = log_and_stop
        with pytest.raises(Stopped):
            distiller.fit(*loaders(), 3)
    make(**settings).fit(*loaders(), 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["epoch"]) for line in lines] == [
        *(("refresh", 0), ("epoch", 1)),
        *(("refresh", 1), ("epoch", 2)),
        *(("refresh", 2), ("epoch", 3)),
    ]


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.distill.test_resume import SETTINGS, seeded, train
from tests.distill.cases import state_of
distiller = seeded(SETTINGS["M3 step"], run_dir=sys.argv[1])
train(distiller, 40)
torch.save(state_of(distiller), sys.argv[1] + "/final.pt")
"""


def test_killed_and_resumed(tmp_path):
    root = str(Path(__file__).parents[2])
    whole = seeded(SETTINGS["M3 step"])
    train(whole, 40)
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT.format(root=root), str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": root}
    kills = 0
    random_pause = random.Random(0)
    while kills < 2:
        process = subprocess.Popen(command, env=environment)
        checkpoint = run_dir / "checkpoint.safetensors"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(random_pause.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        kills += 1
    assert subprocess.run(command, env=environment, check=True).returncode == 0
    assert_same_bits(state_of(whole), torch.load(run_dir / "final.pt", weights_only=True))


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path):
    first = make(mechanism="M1", run_dir=tmp_path)
    first.fit(*loaders(), 1)
    again = make(mechanism="M1", run_dir=tmp_path)
    with pytest.warns(UserWarning, match="nothing left to train"):
        again.fit(*loaders(), 1)
    assert_same_bits(state_of(first), state_of(again))
    longer = make(mechanism="M1", run_dir=tmp_path)
    assert [record["epoch"] for record in longer.fit(*loaders(), 3)] == [1, 2, 3]


def test_starting_over(tmp_path):
    make(mechanism="M1", run_dir=tmp_path).fit(*loaders(), 2)
    fresh = make(mechanism="M1", run_dir=tmp_path)
    assert len(fresh.fit(*loaders(), 1, resume=False)) == 1
    assert fresh.steps == 4
    assert (tmp_path / "log.jsonl").read_text().count('"kind": "epoch"') == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mechanism": "M3"}, "mechanism 'M1'"),
        ({"mechanism": "M1", "rule": "drop"}, "rule"),
        ({"mechanism": "M1", "refresh": "step"}, "refresh 'epoch'"),
        ({"mechanism": "M1", "clip_norm": 1.0}, "clip_norm None, but this run 1.0"),
        ({"mechanism": "M1", "autocast": torch.bfloat16}, "autocast None, but"),
        ({"mechanism": "M1", "influence": {"damping": 0.2, "tol": 1e-2}}, "influence .*0.1.*0.2"),
        ({"mechanism": "M1", "weights": torch.ones(24)}, "given weights None"),
        ({"mechanism": "M1", "optimizer": lambda p: torch.optim.Adam(p, 1.0)}, "lr=0.01"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(settings, named, tmp_path):
    make(mechanism="M1", run_dir=tmp_path).fit(*loaders(), 1)
    other = make(3, run_dir=tmp_path, **settings)
    train_loader, val_loader = loaders()
    other.prepare(train_loader, val_loader)
    before = state_of(other)
    with pytest.raises(ValueError, match=named):
        other.fit(train_loader, val_loader, 2)
    assert_same_bits(before, state_of(other))


def test_other_given_weights_are_refused(tmp_path):
    make(mechanism="M1", weights=torch.ones(24), run_dir=tmp_path).fit(*loaders(), 1)
    with pytest.raises(ValueError, match="given weights"):
        make(mechanism="M1", weights=torch.rand(24), run_dir=tmp_path).fit(*loaders(), 2)
    assert len(make(mechanism="M1", weights=torch.ones(24), run_dir=tmp_path).fit(*loaders(), 2)) == 2


def test_rules_made_of_functions_are_told_alike_in_another_process():
    first, second = (Shuffled(lambda stats, phi, epoch: phi.sigmoid()) for _ in range(2))
    assert repr(first) != repr(second)
    assert told(first) == told(second)


def test_another_number_of_samples_is_refused(tmp_path):
    make(mechanism="M1", run_dir=tmp_path).fit(*loaders(24), 1)
    with pytest.raises(ValueError, match=r"24 samples, expected 30"):
        make(mechanism="M1", run_dir=tmp_path).fit(*loaders(30), 2)


def test_a_foreign_file_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError):
        make(mechanism="M1", run_dir=tmp_path).fit(*loaders(), 1)


def test_save_and_load_in_ones_own_loop(tmp_path):
    def run(distiller, train, epochs, stop=None):
        for epoch in epochs:
            distiller.start_epoch(epoch)
            for batch in train:
                distiller.step(batch)

    whole, part = make(mechanism="M3", refresh="step"), make(mechanism="M3", refresh="step")
    train_loader, val_loader = loaders(shuffle=False)
    run(whole, whole.prepare(train_loader, val_loader), range(3))
    run(part, part.prepare(train_loader, val_loader), range(2))
    part.save(tmp_path / "state")
    other = make(9, mechanism="M3", refresh="step")
    train = other.prepare(train_loader, val_loader)
    other.load(tmp_path / "state")
    run(other, train, range(2, 3))
    assert_same_bits(state_of(whole), state_of(other))


@pytest.mark.parametrize("mechanism", ["M1", "vanilla"])
def test_both_stages_in_one_run_dir(mechanism, tmp_path):
    """The teacher alone, then the student; wherever that was interrupted, the same script goes on with it."""

    def script(distiller, epochs):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(8)
        # A loader of its own for the teacher, with a generator that fit's has not.
        distiller.fit_teacher(loaders(generator=torch.Generator().manual_seed(3))[0], 2)
        return distiller.fit(*loaders(noisy=True), epochs)

    def new(seed, **settings):
        distiller = make(seed, mechanism=mechanism, teacher_scheduler=None, **settings)
        distiller.teacher_optimizer = adam(distiller.teacher.parameters())
        return distiller

    whole = new(0)
    script(whole, 3)
    for epochs in (None, 1, 2):
        run_dir = tmp_path / str(epochs)
        first = new(0, run_dir=run_dir)
        if epochs is None:
            torch.manual_seed(8)
            np.random.seed(8)
            random.seed(8)
            first.fit_teacher(loaders(generator=torch.Generator().manual_seed(3))[0], 1)
        else:
            script(first, epochs)
        second = new(5, run_dir=run_dir)
        script(second, 3)
        assert_same_bits(state_of(whole), state_of(second))


def test_a_state_is_for_data_to_come(tmp_path):
    first = make(mechanism="M1")
    first.fit(*loaders(), 1)
    first.save(tmp_path / "state")
    second = make(3, mechanism="M1")
    second.load(tmp_path / "state")
    second.save(tmp_path / "again")
    second.prepare(*loaders())
    assert torch.equal(first.weighting.weights, second.weighting.weights)
    third = make(4, mechanism="M1")
    third.prepare(*loaders())
    third.load(tmp_path / "again")
    assert torch.equal(first.weighting.weights, third.weighting.weights)


def test_other_data_are_measured_from_then_on():
    distiller = make(mechanism="M1")
    distiller.fit(*loaders(), 1)
    train_loader, val_loader = loaders()
    train_loader.dataset.tensors[1].copy_(samples(24, 1, 0.9)[1])
    before = distiller.weighting.weights
    distiller.prepare(train_loader, val_loader)
    assert torch.equal(distiller.weighting.weights, before)
    distiller.weighting.start_epoch(1)
    reference = make(mechanism="M1")
    reference.prepare(train_loader, val_loader)
    for mine, its in ((distiller.student, reference.student), (distiller.teacher, reference.teacher)):
        its.load_state_dict(mine.state_dict())
    reference.weighting.start_epoch(1)
    torch.testing.assert_close(distiller.weighting.phi, reference.weighting.phi)
    with pytest.raises(ValueError, match=r"24 samples, expected 30"):
        distiller.fit(*loaders(30), 2)


@pytest.mark.parametrize("other", ["teacher", "student", "samples", "groups"])
def test_what_does_not_fit_changes_nothing(other, tmp_path):
    first = make(mechanism="M1", run_dir=tmp_path)
    first.fit(*loaders(), 1)

    def grouped(parameters):
        return torch.optim.Adam([{"params": [p]} for p in parameters], 1e-2)

    torch.manual_seed(3)
    second = Distiller(
        network(20 if other == "teacher" else 16),
        network(9 if other == "student" else 8),
        adam,
        grouped if other == "groups" else adam,
        mechanism="M1",
        **{"warmup_epochs": 0, "influence": SOLVE, "loss": DistillationLoss(2.0, 0.5), "run_dir": tmp_path},
    )
    data = loaders(30 if other == "samples" else 24)
    second.prepare(*data)
    before = state_of(second)
    with pytest.raises(ValueError, match=r"checkpoint's|24 samples, expected 30"):
        second.fit(*data, 2)
    assert_same_bits(before, state_of(second))
    assert not second.student_optimizer.state
    assert second.steps == 0


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="none that a Distiller"):
        make(mechanism="M1").load_state_dict({"weighting": {}, "epoch": 1})


def test_the_teachers_epochs_are_kept(tmp_path):
    train_loader, _ = loaders()
    first = make(mechanism="online", run_dir=tmp_path)
    first.fit_teacher(train_loader, 2)
    second = make(1, mechanism="online", run_dir=tmp_path)
    second.fit_teacher(train_loader, 2)
    for a, b in zip(first.teacher.parameters(), second.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.steps == 0
