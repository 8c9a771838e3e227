"""The experiment's own code, on a small scale; and docs/results.md, whose tables are those of the files of results."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("sklearn")

from experiments import results, tables  # noqa: E402
from experiments.methods import METHODS, Settings  # noqa: E402
from experiments.problems import PROBLEMS, load  # noqa: E402
from experiments.run import run  # noqa: E402
from experiments.supervised import PAGE, main, run_missing  # noqa: E402

SMALL = Settings(epochs=2, warmup=1, batch=400, teacher=(8,), student=(4,))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method):
    found = run("flips-20", method, 0, SMALL)
    assert json.loads(json.dumps(found)) == found
    assert 0 <= found["student"] <= 1
    assert 0 <= found["teacher"] <= 1
    assert found["seconds"]["student"] > 0
    is_weighted = method not in ("vanilla", "online")
    assert ("flip_auc" in found) == is_weighted
    assert (found["seconds"]["influence"] > 0) == (is_weighted and method != "oracle")
    if method == "oracle":
        assert found["flip_auc"] == found["flipped_below_1"] == 1
        assert found["clean_below_1"] == 0


def test_methods_of_a_seed_start_alike():
    """Before anything is measured all joint methods are the same training."""
    settings = SMALL._replace(warmup=2)
    found = {method: run("flips-20", method, 3, settings) for method in ("online", "M1", "M3", "M4", "random")}
    assert len({(each["student"], each["teacher"]) for each in found.values()}) == 1
    again = run("flips-20", "M3", 3, settings)
    assert (again["student"], again["teacher"]) == (found["M3"]["student"], found["M3"]["teacher"])


def test_flips():
    data = load(PROBLEMS["flips-20"], 5)
    assert len(data.train[1]) == 1200
    assert int(data.flipped.sum()) == 240
    assert torch.equal(data.oracle, 1.0 - data.flipped.float())
    assert not data.is_rare.any()
    assert not load(PROBLEMS["flips-0"], 5).flipped.any()


def test_shift():
    data = load(PROBLEMS["shift"], 5)
    counts = torch.bincount(data.train[1], minlength=10)
    assert counts[:5].max() < 20 < 80 < counts[5:].min()
    assert torch.equal(data.is_rare, data.train[1] < 5)
    # With the oracle's weights each class counts as much as in the validation data.
    total = torch.zeros(10).index_add_(0, data.train[1], data.oracle) / len(data.oracle)
    torch.testing.assert_close(total, torch.bincount(data.validation[1], minlength=10) / 200)


def made_up(method, seed, student, influence=0.0):
    seconds = {"data": 0.0, "teacher": 1.0, "student": 1.0, "influence": influence}
    return {
        "problem": "flips-20",
        "method": method,
        "seed": seed,
        "student": student,
        "teacher": 0.9,
        "seconds": seconds,
        "flip_auc": 0.95,
        "flipped_below_1": 0.9,
        "clean_below_1": 0.1,
    }


def test_figures_of_the_tables(tmp_path):
    kept = results.Results(tmp_path, "flips-20", SMALL)
    students = {"vanilla": (0.80, 0.82), "online": (0.82, 0.84), "M1": (0.85, 0.89), "oracle": (0.90, 0.92)}
    for method, found in students.items():
        for seed, student in enumerate(found):
            kept.add(made_up(method, seed, student, influence=3.0 if method == "M1" else 0.0))
    rows = tables.rows_of(tmp_path, "flips-20")
    assert tables.differences(rows, "M1", "vanilla") == pytest.approx([5, 7])
    assert tables.gap_closed(rows, "M1") == pytest.approx(0.06 / 0.10)
    assert tables.gap_closed(rows, "M1", "online") == pytest.approx(0.04 / 0.08)
    assert tables.time_ratios(rows, "M1") == pytest.approx([2.5, 2.5])
    assert tables.influence_share(rows, "M1") == pytest.approx(3 / 5)
    found = tables.all_tables(tmp_path)
    cells = (
        next(line for line in found["flips-20"].splitlines() if METHODS["M1"].title in line).strip("| ").split(" | ")
    )
    assert cells[1:4] == ["87.0 ± 2.8", "+6.0 ± 1.4", "60 %"]
    assert cells[-2:] == ["2.50", "60 %"]
    text = "before\n<!-- table flips-20 -->\nold\n<!-- end -->\nafter\n<!-- table other -->\nkept\n<!-- end -->\n"
    page = tables.put_into(text, found)
    assert page.startswith("before\n<!-- table flips-20 -->\n| method |")
    assert "old" not in page
    assert page.endswith("<!-- end -->\nafter\n<!-- table other -->\nkept\n<!-- end -->\n")
    assert tables.put_into(page, found) == page


def test_finished_runs_are_kept(tmp_path):
    first = results.Results(tmp_path, "flips-20", SMALL)
    first.add(made_up("M1", 1, 0.5))
    again = results.Results(tmp_path, "flips-20", SMALL)
    assert again.has("M1", 1)
    assert not again.has("M1", 0)
    assert again.runs == first.runs
    run_missing(tmp_path, SMALL, [1], 1, ["flips-20"], ["M1"])  # nothing to do
    assert not results.Results(tmp_path, "flips-20", SMALL._replace(epochs=3)).runs  # of other settings
    assert list(tmp_path.iterdir()) == [tmp_path / "flips-20.json"]


def test_the_command(tmp_path):
    from click.testing import CliRunner

    page = tmp_path / "page.md"
    page.write_text("<!-- table flips-0 -->\n<!-- end -->\n")
    options = ["--seeds", "1", "--epochs", "2", "--processes", "1", "--problem", "flips-0", "--method", "online"]
    done = CliRunner().invoke(main, [*options, "--results", str(tmp_path), "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert "| online KD | " in page.read_text()
    assert [r["seed"] for r in results.read(tmp_path / "flips-0.json")["runs"]] == [0]


def test_the_page_has_the_tables_of_the_results():
    page = PAGE.read_text()
    found = tables.all_tables(results.FOLDER)
    assert set(found) == {*PROBLEMS, "claims", "made-with"}
    assert tables.put_into(page, found) == page
    for name in found:
        assert f"<!-- table {name} -->" in page
