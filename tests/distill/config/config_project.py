"""A small project with a config, as a user has one: used by the tests of `kdaif-fast distill`."""

PROJECT = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(90, 4), torch.randint(3, (90,))
number = 3

def make_data(size=90):
    return {"train": TensorDataset(x[:size], y[:size]), "classes": 3}

def make_loaders():
    return DataLoader(TensorDataset(x[:60], y[:60]), 8, shuffle=True), DataLoader(TensorDataset(x[60:], y[60:]), 8)

def make_iterator():
    return iter([(x, y)]), [(x, y)]

def make_pair():
    return x

def make_model(width, classes):
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, classes))

def make_other():
    return torch.nn.Linear(4, 5)

def make_random(classes):
    return torch.nn.Sequential(torch.nn.Linear(4, classes), torch.nn.BatchNorm1d(classes))

def half_squares(outputs, targets, teacher_logits=None):
    return outputs.square().sum(1) / 2

def one_loss(outputs, targets, teacher_logits=None):
    return outputs.square().mean()

class Halves:
    def __init__(self, factor=0.5):
        self.factor = factor

    def __call__(self, stats, phi, epoch):
        return torch.where(phi > 0, self.factor, 1.0)

def flat(stats, phi, epoch, level=1.0):
    return torch.full_like(phi, level)

def confident(stats, phi, epoch):
    return stats.rows.student_max

def negative(stats, phi, epoch):
    return phi.new_full((2,), -1.0)

def fails():
    raise KeyError("gone")
"""

CONFIG = """
[data]
kind = "function"
function = "project.py:make_data"
validation = 20
test = 10
batch_size = 16

[teacher]
model = "project.py:make_model"
arguments = { width = 8 }

[student]
model = "project.py:make_model"
arguments = { width = 4 }

[student.optimizer]
name = "Adam"
lr = 0.01

[distill]
mechanism = "M3"
warmup_epochs = 1

[influence]
max_iter = 5

[run]
dir = "run"
epochs = 2
"""


def changed(folder, *changes):
    """Rewrite run.toml with each (old, new) replaced; old must be there."""
    text = CONFIG
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "run.toml").write_text(text)


def distill(folder, *arguments):
    from click.testing import CliRunner

    from kdaif_fast.cli import main

    return CliRunner().invoke(main, ["distill", str(folder / "run.toml"), "--quiet", *arguments])


def succeeds(folder, *arguments):
    """The output of a run that goes well."""
    result = distill(folder, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refuses(folder, message, *arguments):
    """The command fails with the message, without a traceback, and leaves the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    result = distill(folder, *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert {path: at for path, at in after.items() if path.is_file()} == {
        path: at for path, at in before.items() if path.is_file()
    }
    assert set(after) == set(before)
