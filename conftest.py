"""Doctests of the Triton kernels need Triton to be imported at all."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent
has_triton = importlib.util.find_spec("triton") is not None
collect_ignore = [] if has_triton else [str(path) for path in HERE.glob("kdaif_fast/triton_kernels/*.py")]
