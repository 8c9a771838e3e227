"""The order of kernels on CUDA follows from the committed results, or says that it is an estimate."""

import json
import sys
from pathlib import Path

import pytest

from kdaif_fast import _cuda_order

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks/gpu").exists(), reason="not a source tree")
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import order, tables  # noqa: E402


def row(way, seconds, *, op="weighted_grad", size="large", shape="a", asking=1e-6, **more):
    return {
        **{"case": op, "op": op, "size": size, "shape": shape, "dtype": "float32", "way": way},
        **{"seconds": [seconds, 1.5 * seconds], "asking": asking, **more},
    }


def results(*rows):
    return {"rehearsal": False, "benchmarks": {"rows": list(rows)}}


class TestRule:
    def order(self, *rows):
        return order.table_of(results(*rows))["weighted_grad"]

    def test_the_fastest_comes_first(self):
        found = self.order(row("triton", 2e-3), row("reference", 1e-3))
        assert found == {"large": ["reference", "triton", "cuda"], "small": ["cuda", "triton", "reference"]}

    def test_what_the_cpu_needs_counts_where_it_is_longer(self):
        found = self.order(row("triton", 1e-5, asking=9e-5), row("reference", 5e-5, asking=1e-5))
        assert found["large"][0] == "reference"

    def test_cases_weigh_alike(self):
        """By factors: ten times slower in a short case is not made up for by 1 % in a long one."""
        short = row("triton", 1e-5, shape="b"), row("reference", 1e-4, shape="b")
        assert self.order(row("triton", 1.01), row("reference", 1.0), *short)["large"][0] == "triton"

    def test_noise_leaves_the_estimate(self):
        assert self.order(row("triton", 1.02), row("reference", 1.0))["large"] == ["triton", "reference", "cuda"]
        assert self.order(row("triton", 1.06), row("reference", 1.0))["large"] == ["reference", "triton", "cuda"]

    @pytest.mark.parametrize("fault", [{"is_right": False}, {"failed": "RuntimeError: no", "seconds": None}])
    def test_a_wrong_kernel_comes_last(self, fault):
        wrong = {**row("triton", 1e-6), **fault}
        if "failed" in fault:
            del wrong["seconds"], wrong["asking"]
        others = row("triton", 1e-6, shape="b"), row("cuda", 1.0, shape="b"), row("reference", 1.0, shape="b")
        assert self.order(wrong, row("cuda", 1.0), row("reference", 1.0), *others)["large"][-1] == "triton"

    def test_peers_and_other_ops_say_nothing(self):
        found = self.order(row("matrix product", 1e-9), row("triton", 1.0), row("reference", 1e-9, op="persample_dot"))
        assert found["large"] == ["cuda", "triton", "reference"]


def test_the_committed_table_is_what_its_source_says():
    source = _cuda_order.read().source
    assert _cuda_order.FILE.read_text() == order.text_from(source)


def test_an_estimate_stands_only_where_no_gpu_has_measured():
    measured = [p for p in (ROOT / "benchmarks/results").glob("*.json") if json.loads(p.read_text()).get("benchmarks")]
    if _cuda_order.read().source == _cuda_order.ESTIMATE:
        assert not measured, f"python -m benchmarks.gpu.order {measured[0]}"
    assert not any(json.loads(p.read_text())["rehearsal"] for p in measured)


def test_a_rehearsal_is_no_source(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "ROOT", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({**results(row("triton", 1.0)), "rehearsal": True}))
    with pytest.raises(SystemExit, match="is of a rehearsal"):
        order.text_from("x.json")
    (tmp_path / "x.json").write_text(json.dumps({"benchmarks": {"rows": []}}))
    with pytest.raises(SystemExit, match="has no measurements"):
        order.text_from("x.json")
    (tmp_path / "x.json").write_text(json.dumps(results(row("triton", 2.0), row("reference", 1.0))))
    written = tmp_path / "order.json"
    written.write_text(order.text_from("x.json"))
    assert _cuda_order.read(written).source == "x.json"
    assert _cuda_order.read(written).for_op("weighted_grad")["large"][0] == "reference"
    assert _cuda_order.read(written).for_op("an op of no measurement")["small"] == list(_cuda_order.USUAL)


def test_the_pages_of_results_are_of_the_results():
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        assert path.with_suffix(".md").read_text() == tables.page(json.loads(path.read_text()))


def test_page_and_summary_of_a_gpu():
    rows = [
        row("triton", 1.2e-3, answers=True, share=0.9, kernels=1, error=1e-3, is_right=True, targets={"t": True}),
        row("reference", 1e-3),
        row("cuda", 1e-3, error=None, is_right=False),
        row("triton", 2e-5, shape="b", answers=True, share=0.2, targets={"t": False, "u": None}),
        {**row("liger", 1.0), "skipped": "not | installed"},
    ]
    del rows[-1]["seconds"]
    found = {
        **{"rehearsal": False, "machine": {"gpu": "NVIDIA H200", "torch": "2"}, "library": {"backend cuda": "loaded"}},
        "stages": {
            "suite": {"state": "failed", "seconds": 3.0, "passed": 2, "failed": 1, "failures": ["tests/x.py::t"]},
            "memcheck": {"state": "absent: no"},
        },
        "benchmarks": {
            **{"ceilings": {"copy": 4.3e12, "bf16": 7.9e14}, "rows": rows, "skipped": ["late case"], "passes": 1},
            "tunings": [{"case": "a", "kernel": "k", "milliseconds": {"slow": 2.0, "fast": 1.0, "big": None}}],
        },
        "row plans": {"own choice": [rows[0]], "ring:256": [rows[2]]},
    }
    page = tables.page(found)
    assert page.startswith("# NVIDIA H200\n")
    for text in (
        *(
            "copy 4.3 TB/s, bf16 790 TFLOP/s",
            "| a | float32 | triton * | 1.2 ms |",
            "90% |",
            "t: met",
            "t: MISSED; u: ?",
        ),
        *("not / installed", "- late case", "- `tests/x.py::t`", "WRONG", "| weighted_grad | large |", "does not fit"),
        *("| own choice | ring:256 |", "| suite | failed | 3 | 2 passed, 1 failed |"),
    ):
        assert text in page, text
    assert page.index("| fast | 1 |") < page.index("| slow | 2 |") < page.index("| big |")
    lines = "\n".join(tables.summary(found))
    assert "targets: 1 met, 1 missed, 1 not to be said" in lines
    assert "missed: weighted_grad b float32: t (20 us, 20% of its ceiling)" in lines
    assert "WRONG: weighted_grad a float32, cuda" in lines
    assert "failed: tests/x.py::t" in lines
