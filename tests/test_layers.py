"""The rooms of the house: imports point one way, down."""

import ast
import subprocess
import sys
from pathlib import Path

import kdaif_fast

PACKAGE = Path(kdaif_fast.__file__).parent

# A room may import from itself and from the rooms below it. Private modules of the package are rooms of one file.
BELOW = {
    "_warn": set(),
    "_cuda_order": set(),
    "_library": {"_cuda_order", "_warn"},
    "_derive": {"_library"},
    "_tree": set(),
    "reference": set(),
    "triton_kernels": set(),
    "ops": {"reference", "_derive", "_library"},
    "_sharded": set(),
    "_model": {"ops", "_sharded"},
    "_data": {"_model"},
    "_files": set(),
    "_progress": set(),
    "_config": set(),
    "_distributed": set(),
    "_objective": {"_model", "_tree", "batched"},
    "solvers": {"_tree", "_warn", "ops"},
    "curvature": {"_data", "_distributed", "_model", "_objective", "_tree", "batched", "per_sample"},
    "batched": set(),
    "per_sample": {"ops", "_model", "_tree"},
    "influence": {
        *("solvers", "curvature", "per_sample", "_objective", "_model", "_data", "_distributed", "_tree", "_warn"),
        *("_config", "_files", "_progress"),
    },
    "distill": {
        *("influence", "curvature", "solvers", "per_sample", "ops"),
        *("_config", "_data", "_distributed", "_files", "_model", "_progress", "_tree", "_warn"),
    },
    "integrations": {"distill", "_model", "_warn"},
    "demo": {"distill", "influence", "ops", "_model", "_progress"},
    "info": {"_cuda_order", "_library", "_derive", "ops", "__init__", "_build_info"},
    "cli": {"_config", "demo", "distill", "influence", "info", "__init__"},
    "__init__": {"ops", "solvers", "curvature", "per_sample", "influence", "distill", "_library", "_model", "_sharded"},
}
OPTIONAL = {
    *("sklearn", "matplotlib", "tqdm", "triton", "transformers", "lightning", "scipy", "safetensors", "jinja2", "PIL"),
    *("accelerate", "datasets", "tensorboard", "torchvision"),
}

INTEGRATES = {"huggingface": "transformers", "lightning": "lightning"}
"""Modules of integrations, and the package that each of them is for."""


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(imported room or outside package, whether it is imported inside a function) of every import in a file."""
    tree = ast.parse(path.read_text())
    nested = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
        if inner is not outer
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module.split(".")[0], id(node) in nested
            elif node.level == depth:  # from .. or, at the top, from .
                for alias in node.names:
                    name = (node.module or alias.name).split(".")[0]
                    is_room = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() or name == "_build_info"
                    yield (name if is_room else "__init__"), id(node) in nested
            else:
                assert node.level < depth, f"{path}: an import from above the package"


def test_imports_point_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(path) for path in files} == set(BELOW)
    for path in files:
        here = room(path)
        for name, _ in imports(path):
            if name in BELOW:
                assert name == here or name in BELOW[here], f"{path.name} in {here} imports {name}, which is not below"


def test_optional_packages_are_imported_where_they_are_used():
    for path in PACKAGE.rglob("*.py"):
        for name, nested in imports(path):
            is_itself_optional = (room(path), name) == ("triton_kernels", "triton") or (
                room(path) == "integrations" and INTEGRATES.get(path.stem) == name
            )
            assert name not in OPTIONAL or nested or is_itself_optional, f"{path} imports {name} at its top"


def test_triton_is_imported_at_its_first_launch_only():
    code = (
        "import sys, kdaif_fast; assert 'triton' not in sys.modules and 'kdaif_fast.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_is_enough_to_import_it():
    """A machine with GPUs may have torch, Triton and compilers, and no more: ops, scores and steps run there."""
    code = f"""
import sys, warnings
sys.modules |= dict.fromkeys({sorted(OPTIONAL | {"numpy", "click"})})  # importing one of them is an ImportError now
warnings.simplefilter("ignore")  # torch's own, of the missing numpy
import torch, kdaif_fast
model = torch.nn.Linear(4, 3)
batch = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
logits = model(batch[0])
kdaif_fast.ops.kd_loss(logits, torch.randn(6, 3), batch[1])
assert kdaif_fast.per_sample_grad_norms(model, batch).shape == (6,)
assert kdaif_fast.influence_weights(model, batch, batch).shape == (6,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_imports_integrations():
    names = [name for path in PACKAGE.rglob("*.py") if room(path) != "integrations" for name, _ in imports(path)]
    assert "integrations" not in names


def test_only_the_library_loads_kernels():
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "_library.py" or "load_library" not in path.read_text()
