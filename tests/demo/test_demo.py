import csv
import json

import pytest
import torch

from kdaif_fast.demo import report, run_demo
from kdaif_fast.demo.data import load_digits
from kdaif_fast.demo.training import Settings, train

SHORT = Settings(epochs=4)


def test_data_is_split_and_flipped_as_said():
    data = load_digits(0.2, seed=3)
    assert len(data.train_x) + len(data.val_x) + len(data.test_x) == 1797
    assert data.flipped.sum() == round(0.2 * len(data.train_y))
    assert data.train_y.unique().tolist() == list(range(10))
    assert (data.train_x >= 0).all()
    assert (data.train_x <= 1).all()
    images = torch.cat([data.train_x, data.val_x, data.test_x])
    assert len(images.unique(dim=0)) == 1797  # no image in two parts
    assert not torch.equal(load_digits(0.2, seed=4).train_x, data.train_x)
    assert not load_digits(0.0, seed=3).flipped.any()


def test_students_differ_in_their_weights_only():
    """Without a weighted epoch both students are the same network."""
    data = load_digits(0.2, seed=0)
    outcome = train(data, SHORT._replace(warm_up=4), seed=0)
    assert outcome.accuracy["vanilla"] == outcome.accuracy["weighted"]
    assert (outcome.weights == 1).all()
    assert train(data, SHORT, seed=0).accuracy["vanilla"] == outcome.accuracy["vanilla"]


def test_files(tmp_path):
    lines = []
    figures = run_demo(tmp_path / "new", seeds=1, settings=SHORT, say=lines.append)
    with (tmp_path / "new/weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1200
    assert set(rows[0]) == {"index", "label", "true_label", "flipped", "phi", "w"}
    assert sum(int(row["flipped"]) for row in rows) == 240
    assert all((row["label"] != row["true_label"]) == bool(int(row["flipped"])) for row in rows)
    summary = json.loads((tmp_path / "new/summary.json").read_text())
    assert summary["seeds"] == figures
    assert summary["mean"]["auc"] == figures[0]["auc"]
    for name in ("weights.png", "harmful.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    printed = "\n".join(lines)
    assert all(label in printed for label in report.ROWS.values())


def test_nothing_flipped(tmp_path):
    (figures,) = run_demo(tmp_path, seeds=1, flip=0.0, settings=SHORT, say=lambda line: None)
    assert "auc" not in figures


@pytest.mark.parametrize(("change", "message"), [({"seeds": 0}, "seeds is 0"), ({"flip": 0.95}, r"flip is 0\.95")])
def test_bad_input(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, **change)


def test_influence_finds_flipped_labels_and_helps(tmp_path):
    """The claim of the README: weighted distillation is ahead, and low weights find wrong labels."""
    figures = run_demo(tmp_path, say=lambda line: None)
    mean = json.loads((tmp_path / "summary.json").read_text())["mean"]
    assert len(figures) >= 8
    assert mean["weighted"] > mean["vanilla"]
    assert mean["auc"] >= 0.90
    assert mean["flipped_below_1"] > 0.85
    assert mean["clean_below_1"] < 0.35
