"""Real installs, each into an environment of its own: with and without torch, isolation, compilers.

All but one are slow (up to a minute each); `make test-slow` runs those. torch is lent to an environment by a path file
instead of being installed into it again.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]
BUILD_TOOLS = ["setuptools>=77", "cmake>=3.26", "ninja", "pybind11>=3"]
HAS_CXX = shutil.which("g++") or shutil.which("c++")

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree"),
    pytest.mark.skipif(not HAS_CXX, reason="needs a C++ compiler"),
]

CHECK = """
import kdaif_fast, torch
s = torch.randn(20, 7, requires_grad=True)
loss = kdaif_fast.ops.kd_loss(s, torch.randn(20, 7), torch.arange(20) % 7, reduction="sum")
loss.backward()
assert s.grad.abs().sum() > 0
model = torch.nn.Linear(3, 4)
batch = torch.randn(9, 3), torch.arange(9) % 4
assert kdaif_fast.influence_weights(model, batch, batch).shape == (9,)
print(kdaif_fast.__file__)
print(kdaif_fast.backends()["cpu"])
"""


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder):
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.python = folder / "bin/python"
        self.path_file = next(folder.glob("lib/python*/site-packages")) / "lent.pth"

    def lend_torch(self):
        self.path_file.write_text(f"{SITE}\n")

    def pip(self, *arguments, check=True, **variables):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("KDAIF_", "PYTHONPATH", "CXX", "CUDACXX"))}
        return subprocess.run(
            [self.python, "-m", "pip", "install", "-v", "--no-deps", *arguments],
            env={**clean, **variables},
            capture_output=True,
            text=True,
            check=check,
        )

    def use(self):
        """Import and use the installed package; returns the state of the CPU kernels and what was warned of."""
        result = subprocess.run(
            [self.python, "-c", CHECK], capture_output=True, text=True, cwd=self.folder, check=False
        )
        assert result.returncode == 0, result.stderr
        file, state = result.stdout.splitlines()
        assert Path(file).is_relative_to(self.folder)
        return state, result.stderr


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


@pytest.fixture
def source(tmp_path):
    """The sources as a user gets them: what is under version control, or an unpacked sdist."""
    folder = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = (
        listed.stdout.split()
        if listed.returncode == 0
        else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    )
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def without(tmp_path, *hidden):
    """A PATH on which everything is found but some compilers."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*") if Path(directory).is_dir() else ():
            link = folder / program.name
            if not any(program.name.endswith(name) for name in hidden) and not link.exists():
                link.symlink_to(program)
    return str(folder)


def fetched_torch(log):
    """Whether pip took a torch from an index or a folder of wheels."""
    return re.search(r"Collecting torch\b|(Processing|Downloading|Using cached) \S*\btorch-\d", log.stdout + log.stderr)


COMPILERS = ("g++", "c++", "clang++", "gcc", "cc", "clang")


def test_isolated_build_uses_the_torch_that_is_there(environment, source):
    environment.lend_torch()
    log = environment.pip(str(source), KDAIF_BUILD="cpu")
    output = log.stdout + log.stderr
    assert "Collecting cmake" in output
    assert not fetched_torch(log)
    assert environment.use() == ("loaded", "")


@slow
def test_build_without_isolation(environment, source):
    environment.lend_torch()
    environment.pip(*BUILD_TOOLS)
    environment.pip("--no-build-isolation", str(source), KDAIF_BUILD="cpu")
    assert environment.use() == ("loaded", "")


@slow
def test_isolated_build_without_torch_fetches_one_to_build_with(environment, source):
    log = environment.pip(str(source), KDAIF_BUILD="cpu")
    assert fetched_torch(log)
    environment.lend_torch()
    assert environment.use() == ("loaded", "")


@slow
def test_without_isolation_and_without_torch_it_installs_and_says_why_it_is_slow(environment, source):
    environment.pip(*BUILD_TOOLS)
    environment.pip("--no-build-isolation", str(source))
    environment.lend_torch()
    state, warned = environment.use()
    assert state == "not built: no torch was found to build against (install torch first, or leave build isolation on)"
    assert warned.count("MissingKernelsWarning") == 1


@slow
@pytest.mark.parametrize("isolated", [True, False])
def test_without_a_compiler_it_installs_and_says_so(environment, source, tmp_path, isolated):
    environment.lend_torch()
    options = [] if isolated else ["--no-build-isolation"]
    if not isolated:
        environment.pip("setuptools>=77")
    log = environment.pip(*options, str(source), PATH=without(tmp_path, *COMPILERS, "nvcc"), CUDACXX="none")
    assert "no C++ compiler was found" in log.stdout + log.stderr
    state, warned = environment.use()
    assert "no C++ compiler was found" in state
    assert warned.count("MissingKernelsWarning") == 1


@slow
def test_a_failing_nvcc_ends_in_a_cpu_build(environment, source, tmp_path):
    environment.lend_torch()
    path = without(tmp_path, "nvcc")
    broken = Path(path) / "nvcc"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    log = environment.pip(str(source), PATH=path)
    assert "cuda kernels: " in log.stdout + log.stderr
    assert environment.use() == ("loaded", "")
    assert environment.pip(str(source), PATH=path, KDAIF_BUILD="cuda", check=False).returncode != 0


@slow
def test_asking_for_cuda_without_nvcc_is_an_error(environment, source, tmp_path):
    environment.lend_torch()
    log = environment.pip(str(source), PATH=without(tmp_path, "nvcc"), KDAIF_BUILD="cuda", CUDACXX="none", check=False)
    assert log.returncode != 0
    assert "KDAIF_BUILD=cuda, but the cuda kernels could not be built: nvcc was not found" in log.stdout + log.stderr


@slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_kernels_are_built_where_nvcc_is(environment, source):
    environment.lend_torch()
    environment.pip(str(source), KDAIF_CUDA_ARCHS="90")
    package = next(environment.folder.glob("lib/python*/site-packages/kdaif_fast"))
    assert (package / "_kernels_cuda.so").exists()
    info = subprocess.run([environment.folder / "bin/kdaif-fast", "info"], capture_output=True, text=True, check=True)
    assert "CUDA architectures    90" in info.stdout
    assert environment.use() == ("loaded", "")


@slow
def test_nothing_compiled_on_request(environment, source):
    environment.lend_torch()
    log = environment.pip(str(source), KDAIF_BUILD="none")
    assert "Collecting cmake" not in log.stdout + log.stderr
    assert environment.use()[0] == "not built: not asked for (KDAIF_BUILD=none)"


@slow
def test_editable_install_finds_its_kernels(environment, source):
    environment.lend_torch()
    environment.pip(*BUILD_TOOLS)
    environment.pip("--no-build-isolation", "-e", str(source), KDAIF_BUILD="cpu")
    result = subprocess.run(
        [environment.python, "-c", CHECK], capture_output=True, text=True, cwd=environment.folder, check=True
    )
    assert result.stdout.splitlines() == [str(source / "kdaif_fast/__init__.py"), "loaded"]


@slow
def test_sdist_has_what_a_build_needs(source, tmp_path, environment):
    code = "import sys; sys.path.insert(0, 'build_tools'); import backend; print(backend.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {
        "csrc/cpu/row_divergence.cpp",
        "csrc/cuda/row_divergence.cuh",
        "build_tools/backend.py",
        "CMakeLists.txt",
    } <= names
    assert not any(name.endswith((".so", "_build_report.json")) for name in names)
    environment.lend_torch()
    environment.pip(str(archive), KDAIF_BUILD="cpu")
    assert environment.use() == ("loaded", "")
