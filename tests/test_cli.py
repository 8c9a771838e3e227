import re

import torch
from click.testing import CliRunner

import kdaif_fast
from kdaif_fast import _library
from kdaif_fast.cli import main
from kdaif_fast.info import info


def run(*arguments):
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_info_says_what_is_there_and_why_something_is_not():
    code, output = run("info")
    assert code == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())
    assert lines["kdaif_fast"] == kdaif_fast.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["backend reference"] == "loaded"
    for backend in ("cpu", "cuda"):
        assert lines[f"backend {backend}"] == kdaif_fast.backends()[backend]
    assert lines["derivative rules"] == "active"
    assert {f"op {op._opname}" for op in _library.ops()} <= set(lines)
    assert "GPU" in lines


def test_info_without_kernels(monkeypatch):
    monkeypatch.setitem(_library._STATES, "cpu", "not built: no compiler")
    assert info()["backend cpu"] == "not built: no compiler"
    assert info()["CPU instruction set"] == "torch's own"


def test_version_and_help():
    assert run("--version")[1].strip().endswith(kdaif_fast.__version__)
    assert "demo" in run("--help")[1]


def test_demo_refuses_nonsense():
    assert run("demo", "--flip", "1.5")[0] == 2
    assert run("demo", "--seeds", "0")[0] == 2


def test_demo_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, output = run("demo", "--out", str(tmp_path))
    assert code == 1
    assert output.count("pip install scikit-learn matplotlib") == 1
    assert not list(tmp_path.iterdir())
