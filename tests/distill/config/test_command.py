"""`kdaif-fast distill`: runs, and what they leave."""

import csv
import json
import subprocess
import sys

import torch
from safetensors.torch import load_file

from kdaif_fast.distill.config.assembly import assemble
from kdaif_fast.distill.config.reading import read_config

from .config_project import CONFIG, changed, refuses, succeeds

FILES = {
    *("run.json", "log.jsonl", "log.csv", "checkpoint.safetensors", "samples.safetensors", "samples.json"),
    *("student.safetensors", "report.html"),
}


def table(folder):
    """The log's rows without times."""
    with (folder / "log.csv").open() as file:
        return [{key: text for key, text in row.items() if "seconds" not in key} for row in csv.DictReader(file)]


def student(folder):
    return load_file(folder / "student.safetensors")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def built(project, *changes):
    """The Distiller of run.toml."""
    return assemble(read_config(project / "run.toml", changes)).distiller


def test_a_run_and_its_files(project):
    changed(project, ("batch_size = 16", "batch_size = 16\nflip = 0.3"))
    output = succeeds(project)
    run = project / "run"
    assert {path.name for path in run.iterdir()} == FILES
    lines = output.splitlines()
    assert lines[0].startswith("60 training, 20 validation, 10 test samples; teacher of 67 parameters, student of 35")
    assert lines[1].startswith("student: ")
    assert lines[1].endswith(" % on test data, after 2 epochs")
    assert lines[2].startswith("teacher: ")
    last = table(run)[-1]
    assert (
        f"weights: mean {float(last['mean_weight']):.3f}, {100 * float(last['share_below_1']):.1f} % below 1" in lines
    )
    assert f"AUC {float(last['flip_auc']):.3f}" in output
    assert str(run / "report.html") in output
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["distill"]["mechanism"] == "M3"
    assert settings["distill"]["alpha"] == 0.5
    assert settings["student"]["optimizer"] == {"name": "Adam", "lr": 0.01}
    assert settings["run"]["seed"] == 0


def test_runs_repeat_and_go_on(project):
    succeeds(project, "--set", "run.epochs=3")
    succeeds(project, "--out", str(project / "other"), "--set", "run.epochs=3")
    assert table(project / "run") == table(project / "other")
    assert same(student(project / "run"), student(project / "other"))
    stopped = project / "stopped"
    succeeds(project, "--out", str(stopped), "--set", "run.epochs=1")
    output = succeeds(project, "--out", str(stopped), "--set", "run.epochs=3")
    assert "after 3 epochs" in output
    assert table(stopped) == table(project / "run")
    assert same(student(stopped), student(project / "run"))
    # A finished run gives its summary again, and trains no more.
    assert "after 3 epochs" in succeeds(project, "--out", str(stopped), "--set", "run.epochs=3")
    assert len(table(stopped)) == 3
    succeeds(project, "--out", str(project / "seed"), "--set", "run.seed=1", "--set", "run.epochs=3")
    assert not same(student(project / "seed"), student(project / "run"))


def test_a_run_of_other_settings_is_left_alone(project):
    succeeds(project)
    (project / "run" / "notes.txt").write_text("mine")
    message = "which has a run of other settings: distill.rule was 'sigmoid' and is 'drop'. Take another run.dir"
    refuses(project, message, "--set", "distill.rule=drop")
    refuses(project, "student.optimizer.lr was 0.01 and is 0.02", "--set", "student.optimizer.lr=0.02")
    refuses(project, "data.flip was 0.0 and is 0.1", "--set", "data.flip=0.1")
    # What is asked for cannot be run, so that nothing is removed for it.
    refuses(project, "student.optimizer: Adam with lr = -1.0", "--restart", "--set", "student.optimizer.lr=-1.0")
    before = student(project / "run")
    succeeds(project, "--set", "distill.rule=drop", "--restart")
    assert not same(before, student(project / "run"))
    assert (project / "run" / "notes.txt").read_text() == "mine"
    assert {path.name for path in (project / "run").iterdir()} == {*FILES, "notes.txt"}
    (project / "run" / "run.json").unlink()
    refuses(project, "which has a run without run.json")
    (project / "run" / "run.json").write_text("{")
    refuses(project, "run.json cannot be read")


def test_checking_writes_nothing(project):
    before = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    output = succeeds(project, "--check")
    assert "run.toml can be run: 60 training, 20 validation, 10 test samples" in output
    assert {path for path in project.rglob("*") if "__pycache__" not in path.parts} == before


def test_checking_leaves_no_trace_in_what_follows(project):
    """Trying out draws no random number and changes no network."""
    first, second = built(project), built(project, "distill.mechanism=vanilla", "run.teacher_epochs=0")
    assert same(first.student.state_dict(), second.student.state_dict())
    assert not first.history


def test_vanilla_in_two_stages_and_from_a_checkpoint(project):
    output = succeeds(project, "--set", "distill.mechanism=vanilla", "--set", "run.teacher_epochs=2")
    assert "weights" not in output
    rows = table(project / "run")
    assert rows[0]["teacher_accuracy"] == rows[1]["teacher_accuracy"]
    (project / "trained.safetensors").write_bytes((project / "run" / "student.safetensors").read_bytes())
    changed(
        project,
        ("arguments = { width = 8 }", 'arguments = { width = 4 }\ncheckpoint = "trained.safetensors"'),
        ('"M3"', '"vanilla"'),
    )
    distiller = built(project)
    assert same(distiller.teacher.state_dict(), student(project / "run"))
    assert distiller.teacher_optimizer is None
    assert succeeds(project, "--out", str(project / "second"))


def test_a_teacher_that_was_taught_before_is_weighted_too(project):
    """The stage before must not hide the weights from the joint one."""
    succeeds(project, "--set", "run.teacher_epochs=1", "--set", "run.epochs=3")
    succeeds(project, "--set", "run.teacher_epochs=1", "--set", "run.epochs=3", "--out", str(project / "plain"),
             "--set", "distill.rule=project.py:flat")  # fmt: skip
    assert not same(student(project / "run"), student(project / "plain"))


def test_rules_and_losses_of_the_user(project):
    changed(project, ('"M3"', '"M1"\nrule = { name = "project.py:Halves", factor = 0.25 }\nema = 0.0'))
    succeeds(project)
    weights = load_file(project / "run" / "samples.safetensors")["weights"]
    assert set(weights.tolist()) == {0.25, 1.0}
    # Its name tells that it is the same rule, in another process too.
    assert "after 3 epochs" in succeeds(project, "--set", "run.epochs=3")
    assert repr(built(project).rule) == "project.py:Halves(factor=0.25)"
    changed(
        project, ('"M3"', '"M1"\nrule = { name = "project.py:flat", level = 0.5 }\nloss = "project.py:half_squares"')
    )
    succeeds(project, "--restart")
    weights = load_file(project / "run" / "samples.safetensors")["weights"]
    assert set(weights.tolist()) == {0.5}
    assert built(project).loss(torch.ones(2, 4), None).tolist() == [2.0, 2.0]
    changed(project, ('"M3"', '"M1"\nrule = "project.py:confident"'))
    succeeds(project, "--restart")


def test_settings_reach_the_distiller(project):
    distiller = built(
        project,
        *("distill.temperature=3", "distill.alpha=0.2", "distill.normalize=true", "distill.refresh=7"),
        *("run.accumulate=2", "run.clip_norm=1.5", "run.checkpoint_every=4", "run.precision=bfloat16", "run.seed=3"),
        *("influence.solve_samples=30", "influence.params=0.weight", "influence.damping=0.1", "influence.tol=none"),
    )
    assert (distiller.loss.temperature, distiller.loss.alpha) == (3, 0.2)
    assert (distiller.accumulate, distiller.clip_norm, distiller.checkpoint_every) == (2, 1.5, 4)
    options = distiller._weighting_options
    assert (options["normalize"], options["refresh"], options["solve_samples"], options["seed"]) == (True, 7, 30, 3)
    assert options["params"] == ["0.weight"]
    assert options["influence"] == {"max_iter": 5, "damping": 0.1, "tol": None}
    assert distiller._autocast is torch.bfloat16


def test_label_revision(project):
    changed(project, ('mechanism = "M3"', 'preset = { name = "label_revision", share = 0.5, eta = 0.7 }'))
    distiller = built(project)
    assert distiller.mechanism.name == "M1"
    assert distiller.rule.share == 0.5
    assert (distiller.loss.eta, distiller.loss.temperature) == (0.7, 4.0)
    succeeds(project)
    weights = load_file(project / "run" / "samples.safetensors")["weights"]
    assert sorted(weights.tolist()) == [0.0] * 30 + [1.0] * 30
    refuses(project, "share is 0", "--set", "distill.preset.share=0")


def test_optimizers_and_schedulers(project):
    scheduler = '\n[teacher.scheduler]\nname = "CosineAnnealingLR"\n[student.scheduler]\nname = "StepLR"\nstep_size = 1'
    optimizer = '[teacher.optimizer]\nname = "AdamW"\nlr = 0.5\nbetas = [0.8, 0.9]\n'
    changed(project, ("lr = 0.01", "lr = 0.01" + scheduler), ("[student]", optimizer + "[student]"))
    distiller = built(project, "run.teacher_epochs=1")
    assert isinstance(distiller.teacher_optimizer, torch.optim.AdamW)
    assert distiller.teacher_optimizer.defaults["betas"] == (0.8, 0.9)
    assert distiller.teacher_scheduler.T_max == 3  # one alone, two together
    assert distiller.student_scheduler.step_size == 1
    succeeds(project)


def test_data_as_loaders(project):
    changed(project, ("make_data", "make_loaders"), ("validation = 20\ntest = 10", "classes = 3"))
    output = succeeds(project)
    assert "60 training, 30 validation samples" in output


def test_digits(project):
    text = CONFIG.split("[teacher]")[1].replace("project.py:make_model", "kdaif_fast.demo.models:mlp")
    text = text.replace("{ width = 8 }", "{ hidden = [16] }").replace("{ width = 4 }", "{ hidden = [8] }")
    (project / "run.toml").write_text('[data]\nkind = "digits"\nflip = 0.2\ntest = 0.5\n[teacher]\n' + text)
    run = assemble(read_config(project / "run.toml"))
    assert [len(data.dataset) for data in (run.data.train, run.data.validation, run.data.test)] == [699, 200, 898]
    assert int(run.data.facts.flipped.sum()) == round(0.2 * 699)
    assert run.data.classes == 10
    images, labels = next(iter(run.data.validation))
    assert images.shape == (64, 1, 8, 8)
    assert 0 <= float(images.min()) < float(images.max()) == 1
    assert labels.dtype == torch.int64


def test_in_a_process_of_its_own(project):
    """A run that is killed in the middle goes on where it was."""
    command = [sys.executable, "-m", "kdaif_fast.cli", "distill", str(project / "run.toml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "after 2 epochs" in result.stdout
    assert result.stderr == ""  # no bars where there is no terminal
    own = student(project / "run")
    succeeds(project, "--restart")
    assert same(own, student(project / "run"))
