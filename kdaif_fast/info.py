"""What is installed, built and active, and why something is not: for `kdaif-fast info` and bug reports."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch

from . import __version__, _derive, _library
from ._cuda_order import ESTIMATE


def info() -> dict[str, str]:
    """The facts, in the order in which `kdaif-fast info` prints them.

    Example:
        >>> from kdaif_fast.info import info
        >>> info()["torch"].split(".")[0]
        '2'
    """
    facts = {
        "kdaif_fast": __version__,
        "imported from": str(_library.HERE),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        **_build_facts(),
    }
    for backend, state in _library.backends().items():
        facts[f"backend {backend}"] = state
    facts["CPU instruction set"] = _cpu_level()
    facts["GPU"] = _gpu()
    facts["triton version"] = _version_of("triton")
    facts["order on CUDA"] = f"by {_library.ORDER.source}" + (
        ", as no GPU has measured it" if _library.ORDER.source == ESTIMATE else ""
    )
    facts["derivative rules"] = _derivative_rules()
    for op in _library.ops():
        on_gpu = _library.kernel_for(op, "cuda")
        facts[f"op {op._opname}"] = f"{_library.kernel_for(op, 'cpu')} on CPU tensors, {on_gpu} on CUDA tensors"
    return facts


def _build_facts() -> dict[str, str]:
    try:
        build = importlib.import_module("kdaif_fast._build_info").BUILD
    except ImportError:
        return {"built with": "unknown (no build facts: no kernels, or no Python headers or pybind11 when building)"}
    return {f"built with {name}": value or "none" for name, value in build.items()}


def _cpu_level() -> str:
    if _library.backends()["cpu"] != "loaded":
        return "torch's own"
    return str(torch.ops.kdaif_fast.cpu_level())


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none (torch has no CUDA)" if torch.version.cuda is None else "none (torch sees no device)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _derivative_rules() -> str:
    if not _derive.AVAILABLE:
        return "off: this torch has moved what they rest on; the reference formulas are differentiated instead"
    from .ops.row_rules import rules_work

    return "active" if rules_work() else "off: this torch ignores them; under a transform the reference is used"


def format_info() -> str:
    """The facts as lines."""
    facts = info()
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())
