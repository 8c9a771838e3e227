"""`kdaif-fast scores --config`."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdaif_fast import influence_scores
from kdaif_fast.cli import main
from kdaif_fast.influence.config import EXAMPLE, KEYS, OPTIONS

PROJECT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x, y = torch.randn(30, 4), torch.randint(3, (30,))
network = torch.nn.Linear(4, 3)
number = 3

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 3))

def train_loader():
    return DataLoader(TensorDataset(x[:20], y[:20]), 8)

def val_loader():
    return DataLoader(TensorDataset(x[20:], y[20:]), 8)

def half_squares(outputs, targets):
    return outputs.square().sum(1) / 2
"""

CONFIG = """
module = "project.py"
model = "make_model"
train = "train_loader"
val = "val_loader"
checkpoint = "model.pt"
out = "scores.npy"
top = 3

[options]
damping = 0.1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "project", raising=False)
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "scores.toml").write_text(CONFIG)
    torch.manual_seed(3)
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 3)).state_dict(), tmp_path / "model.pt")
    yield tmp_path
    sys.modules.pop("project", None)


def run(folder, *arguments):
    return CliRunner().invoke(main, ["scores", "--config", str(folder / "scores.toml"), *arguments])


def expected(folder, **options):
    namespace = {}
    exec((folder / "project.py").read_text(), namespace)
    model = namespace["make_model"]()
    model.load_state_dict(torch.load(folder / "model.pt"))
    return influence_scores(model, namespace["train_loader"](), namespace["val_loader"](), **options)


def test_scores_and_summary(folder):
    result = run(folder)
    assert result.exit_code == 0, result.output
    phi = expected(folder, damping=0.1)
    assert np.array_equal(np.load(folder / "scores.npy"), phi.numpy())
    lines = result.output.splitlines()
    assert lines[0] == "20 samples, 1 losses asked about"
    assert lines[1].startswith("damping 0.1, relative residual ")
    worst, best = phi.argsort(descending=True)[:3].tolist(), phi.argsort()[:3].tolist()
    assert lines[2] == "most harmful: " + ", ".join(f"{i} ({phi[i]:+.3g})" for i in worst)
    assert lines[3] == "most helpful: " + ", ".join(f"{i} ({phi[i]:+.3g})" for i in best)
    assert lines[4] == f"written to {folder / 'scores.npy'}"


def test_options_losses_and_objects(folder):
    text = CONFIG.replace('"make_model"', '"network"').replace('checkpoint = "model.pt"', 'loss = "half_squares"')
    (folder / "scores.toml").write_text(text + 'queries = "per_class"\ncurvature = "identity"\ntol = "none"\n')
    result = run(folder, "--quiet")
    assert result.exit_code == 0, result.output
    assert np.load(folder / "scores.npy").shape == (20, 3)


def test_restart(folder):
    assert run(folder).exit_code == 0
    (folder / "scores.toml").write_text(CONFIG.replace("0.1", "0.2"))
    result = run(folder)
    assert result.exit_code == 1
    assert "damping was 0.1 and is 0.2" in result.output
    assert run(folder, "--restart").exit_code == 0
    assert np.array_equal(np.load(folder / "scores.npy"), expected(folder, damping=0.2).numpy())


def test_in_a_process_of_its_own(folder):
    command = [sys.executable, "-m", "kdaif_fast.cli", "scores", "--config", str(folder / "scores.toml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "most harmful: " in result.stdout
    assert "batch/s" not in result.stderr  # no bars where there is no terminal
    assert np.array_equal(np.load(folder / "scores.npy"), expected(folder, damping=0.1).numpy())


def test_modules_by_name(folder):
    (folder / "scores.toml").write_text(CONFIG.replace("project.py", "project"))
    assert run(folder).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('val = "val_loader"', "", "the key 'val' is missing"),
        ("top = 3", "tops = 3", "the key 'tops' is unknown, expected one of module, model"),
        ("damping = 0.1", "dampin = 0.1", "the key 'options.dampin' is unknown, expected one of"),
        ("damping = 0.1", "out = 'x.npy'", "the key 'options.out' is unknown"),
        ("damping = 0.1", "damping = -1", "damping is -1"),
        ("damping = 0.1", "queries = 'all'", "queries is 'all'"),
        ("top = 3", "top = -3", "top is -3, expected a number >= 0"),
        ('"make_model"', "3", "model is 3, expected text"),
        ('"make_model"', '"made"', "model is 'made', which project does not have"),
        ('"make_model"', '"number"', "model gave a int, expected a torch.nn.Module"),
        ('"project.py"', '"projects.py"', "module is 'projects.py', but there is no file"),
        ('"project.py"', '"no_such_module_here"', "module is 'no_such_module_here', which cannot be imported"),
        ('"model.pt"', '"models.pt"', "which cannot be loaded"),
        ('"model.pt"', '"project.py"', "which cannot be loaded"),
        ('"scores.npy"', '"scores.csv"', "expected a path that ends in .npy or .safetensors"),
        ("top = 3", 'device = "warp"', "device is 'warp'"),
        ("top = 3", "top =", "is not TOML"),
        ("damping = 0.1", 'keep_graphs = "no"', "options.keep_graphs is 'no', expected true or false"),
        ("[options]\ndamping = 0.1", "options = 1", "options is 1, expected a table"),
    ],
)
def test_errors_name_the_key(folder, old, new, message):
    assert old in CONFIG
    (folder / "scores.toml").write_text(CONFIG.replace(old, new))
    result = run(folder)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_help_has_an_example_that_can_be_read(folder):
    output = CliRunner().invoke(main, ["scores", "--help"]).output
    for line in EXAMPLE.splitlines():
        assert line in output
    text = textwrap.dedent(EXAMPLE).replace("sample_losses", "half_squares")
    (folder / "scores.toml").write_text(text)
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert all(f"{key} = " in EXAMPLE or f"[{key}]" in EXAMPLE for key in KEYS)
    assert {"curvature", "damping", "tol", "queries", "memory", "strict"} <= set(OPTIONS)


def test_a_file_that_is_not_there(tmp_path):
    assert run(tmp_path).exit_code == 2
