"""The scripts of examples/, run for an epoch or two with the real packages."""

import importlib.util
import os
import subprocess
import sys

import pytest

from .scripts import EXAMPLES, load

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:'pin_memory' argument", "ignore:.*many workers"
)


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}")


def check(found, capsys):
    """What is printed is what was found, and the weights tell wrong labels from right ones."""
    accuracy, weights, flipped = found
    printed = capsys.readouterr().out
    assert float(weights[flipped].mean()) < float(weights[~flipped].mean()) - 0.05
    assert f"{weights[flipped].mean():.2f} of wrong ones" in printed
    weighted = accuracy["weighted"] if isinstance(accuracy, dict) else accuracy
    assert f"{weighted:.1%}" in printed
    return weighted


def test_plain_pytorch(capsys):
    assert check(load("plain_pytorch").main(epochs=3), capsys) > 0.8


@needs("accelerate")
def test_accelerate(capsys):
    assert check(load("accelerate_loop").main(epochs=3), capsys) > 0.8


@needs("lightning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
def test_lightning(capsys, tmp_path):
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    assert check(load("lightning_callback").main(epochs=3, **quiet), capsys) > 0.8


@needs("transformers")
def test_huggingface(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    found = load("huggingface_trainer").main(epochs=3, train=200, disable_tqdm=True, use_cpu=True)
    check(found, capsys)  # three epochs teach little


def launched(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distributed", pytest.param("accelerate_loop", marks=needs("accelerate"))])
def test_two_processes(name):
    """Started as users start it, all epochs of it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = launched(*torchrun, str(EXAMPLES / f"{name}.py"))
    assert printed.count("test accuracy: 9") == 1  # of the first process alone
    assert printed.count("of wrong ones") == 1
