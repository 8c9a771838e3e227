"""Doctests of modules that need an optional package to be imported at all are run where it is."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent
NEEDED = {
    "kdaif_fast/triton_kernels/*.py": "triton",
    "kdaif_fast/integrations/huggingface.py": "transformers",
    "kdaif_fast/integrations/lightning.py": "lightning",
}
collect_ignore = [
    str(path)
    for pattern, package in NEEDED.items()
    if importlib.util.find_spec(package) is None
    for path in HERE.glob(pattern)
]
