"""The configs of examples/configs, through the command itself."""

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner

import kdaif_fast
from kdaif_fast.cli import main
from kdaif_fast.distill.config.reading import read_config

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"


def run(name, folder, *changes):
    """The output, and the last row of the log."""
    options = [option for change in changes for option in ("--set", change)]
    command = ["distill", str(CONFIGS / name), "--out", str(folder), "--quiet", "--set", "run.threads=1", *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with (folder / "log.csv").open() as file:
        return result.output, list(csv.DictReader(file))[-1]


def test_all_configs_are_tested():
    assert {path.name for path in CONFIGS.iterdir()} == {"digits.toml", "text.toml"}
    for path in CONFIGS.iterdir():
        assert read_config(path).run.folder.resolve() == Path(kdaif_fast.__file__).parents[1] / "runs" / path.stem


def test_digits(tmp_path):
    output, last = run("digits.toml", tmp_path)
    assert "1200 training, 200 validation, 397 test samples" in output
    assert float(last["test_student_accuracy"]) > 0.8
    assert float(last["flip_auc"]) > 0.8
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()


def test_text(tmp_path):
    output, last = run("text.toml", tmp_path)
    assert "2000 training, 600 validation, 500 test samples" in output
    assert "flipped labels: " in output
    assert float(last["flip_auc"]) > 0.75
    assert "the film" in (tmp_path / "report.html").read_text()  # the sentences themselves


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs", "auc"), [("digits.toml", 12, 0.9), ("text.toml", 14, 0.85)])
def test_flips_are_found(tmp_path, name, epochs, auc):
    _, last = run(name, tmp_path, f"run.epochs={epochs}")
    assert float(last["flip_auc"]) > auc
