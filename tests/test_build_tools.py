"""What a build asks for and finds, without building."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "build_tools"
pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="not a source tree")


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(monkeypatch):
    for name in ("environment", "backend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("KDAIF_BUILD", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield load("environment"), load("backend")
    for name in ("environment", "backend"):
        sys.modules.pop(name, None)


def requirements(tools):
    return [text.split("=")[0].split(">")[0] for text in tools[1]._requirements()]


def public(version):
    """Without what comes after a plus sign, which not every wheel says in its metadata too."""
    return version.split("+")[0]


def test_finds_the_torch_of_this_environment(tools):
    found = tools[0].find_torch()
    assert found.root == Path(torch.__file__).parent
    assert public(found.version) == public(torch.__version__)
    assert found.can_build_kernels()


def test_finds_it_behind_the_isolation_of_a_build(tools, monkeypatch, tmp_path):
    """pip puts its own folders first through PYTHONPATH; a module there that hides torch must not be believed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert public(tools[0].find_torch().version) == public(torch.__version__)


def test_torch_is_asked_for_only_where_there_is_none(tools, monkeypatch):
    environment, backend = tools
    monkeypatch.setattr(backend, "find_cxx", lambda: "/usr/bin/c++")
    assert requirements(tools) == ["cmake", "ninja", "pybind11"]
    for useless in (None, environment.Torch(Path("/nowhere"), "2.9.1"), environment.Torch(Path("/nowhere"), "2.13.0")):
        monkeypatch.setattr(backend, "find_torch", lambda useless=useless: useless)
        assert requirements(tools) == ["cmake", "ninja", "pybind11", "torch"]
        assert backend._requirements()[-1] == environment.TORCH_FOR_BUILDING


def test_nothing_is_asked_for_where_nothing_will_be_compiled(tools, monkeypatch):
    monkeypatch.setattr(tools[1], "find_cxx", lambda: None)
    assert requirements(tools) == []
    monkeypatch.setattr(tools[1], "find_cxx", lambda: "c++")
    monkeypatch.setenv("KDAIF_BUILD", "none")
    assert requirements(tools) == []


def make_program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    os.chmod(path, 0o755)
    return str(path)


def test_compilers(tools, monkeypatch, tmp_path):
    environment = tools[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "USUAL_TOOLKIT", str(tmp_path / "no toolkit"))
    assert environment.find_cxx() is None
    assert environment.find_nvcc() is None
    for name in ("g++", "nvcc", "my-cxx"):
        make_program(tmp_path / name)
    assert environment.find_cxx() == str(tmp_path / "g++")
    assert environment.find_nvcc() == str(tmp_path / "nvcc")
    monkeypatch.setenv("CXX", "my-cxx -m64")  # the flags are CMake's to read
    assert environment.find_cxx() == str(tmp_path / "my-cxx")
    monkeypatch.setenv("CXX", "missing")
    assert environment.find_cxx() is None


def test_nvcc_of_a_toolkit_that_is_not_on_the_path(tools, monkeypatch, tmp_path):
    """The nearer to what was asked for, the sooner it is taken."""
    environment = tools[0]
    for name in ("usual", "home", "other"):
        make_program(tmp_path / name / "bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(environment, "USUAL_TOOLKIT", str(tmp_path / "usual"))
    assert environment.find_nvcc() == str(tmp_path / "usual/bin/nvcc")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    assert environment.find_nvcc() == str(tmp_path / "other/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert environment.find_nvcc() == str(tmp_path / "home/bin/nvcc")
    on_path = make_program(tmp_path / "empty/nvcc")
    assert environment.find_nvcc() == on_path
    monkeypatch.setenv("CUDACXX", "none")
    assert environment.find_nvcc() is None


def test_unknown_build_mode(tools, monkeypatch):
    monkeypatch.setenv("KDAIF_BUILD", "gpu")
    with pytest.raises(SystemExit, match="KDAIF_BUILD='gpu': expected auto, cpu, cuda or none"):
        tools[0].wanted_build()
