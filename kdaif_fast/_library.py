"""The operator library: loads the compiled kernels, defines ops, and decides which kernel answers for which device."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._warn import warn_user

NAMESPACE = "kdaif_fast"
HERE = Path(__file__).parent
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")
BACKENDS = ("reference", "cpu", "cuda", "triton")
_references: dict[Any, Callable[..., Any]] = {}
_triton_kernels: dict[Any, Callable[..., Any]] = {}
_compiled_cuda_kernels: dict[Any, Callable[..., Any]] = {}  # of ops for which Triton is asked first
_triton_on_cuda: set[Any] = set()
_composed_on_cuda: set[Any] = set()


class MissingKernelsWarning(UserWarning):
    """The compiled kernels are not there: everything works, in plain PyTorch, slower."""


def build_report() -> dict[str, str]:
    """What the installation built: "built", or the reason why not, for "cpu" and "cuda"."""
    report = HERE / "_build_report.json"
    if not report.exists():
        reason = "the package was not installed by pip"
        if (HERE.parent / "setup.py").exists():
            reason = (
                f"Python imports the source tree {HERE.parent}, not an installed package: start it from another "
                "folder, or `pip install -e .`"
            )
        return dict.fromkeys(("cpu", "cuda"), reason)
    return dict(json.loads(report.read_text()))


def _load(backend: str) -> str:
    """Load one kernel library; returns "loaded" or why it is not."""
    path = HERE / f"_kernels_{backend}.so"
    if os.environ.get("KDAIF_NATIVE", "1") == "0":
        return "switched off (KDAIF_NATIVE=0)"
    if not path.exists():
        reason = build_report()[backend]
        return f"not built: {reason}" if reason != "built" else f"missing: it was built, but {path.name} is gone"
    if backend == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"could not be loaded: {error.__cause__ or error}"
    return "loaded"


def _triton_state() -> str:
    """Whether Triton can answer for CUDA tensors, or for any under its interpreter: "loaded", or why not."""
    if os.environ.get("KDAIF_NATIVE", "1") == "0":
        return "switched off (KDAIF_NATIVE=0)"
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"this torch ({torch.__version__}) has no CUDA"
    return "loaded"


def _load_all() -> dict[str, str]:
    level = os.environ.get("KDAIF_CPU_LEVEL", CPU_LEVELS[-1])
    if level not in CPU_LEVELS:
        raise ValueError(f"KDAIF_CPU_LEVEL is {level!r}, expected one of {', '.join(CPU_LEVELS)}")
    states = {backend: _load(backend) for backend in ("cpu", "cuda")} | {"triton": _triton_state()}
    if states["cpu"] != "loaded" and os.environ.get("KDAIF_NATIVE", "1") != "0":
        warn_user(
            f"kdaif_fast runs in plain PyTorch, correct but slower: CPU kernels {states['cpu']}. "
            "`kdaif-fast info` shows the whole picture.",
            MissingKernelsWarning,
        )
    return states


def backends() -> dict[str, str]:
    """Which backends are active: "loaded", or why one is not.

    Example:
        >>> import kdaif_fast
        >>> kdaif_fast.backends()["reference"]
        'loaded'
    """
    return {"reference": "loaded", **_STATES}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: str | None = None,
    triton_first: bool = False,
    composed: Callable[..., Any] | None = None,
) -> Any:
    """Define an op; each device takes the best kernel that is there: compiled, then Triton (CUDA), then reference.

    Args:
        schema: as torch.library.define takes it.
        fake: gives shapes and dtypes only.
        reference: the definition.
        triton: the module of triton_kernels/ that has a function of the op's name. It is imported at the first launch.
        triton_first: on CUDA Triton answers even where a kernel is compiled, which is registered as <op>_compiled.
        composed: answers on CUDA where there is no kernel: made of torch's own operations, as the vendor's library is
            fast at them, where the definition would be far too slow.
    """
    name = LIBRARY.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _references[op] = reference
    if triton_first:
        _use_compiled(op, name, schema)
    if triton is not None and _STATES["triton"] == "loaded":
        _triton_kernels[op] = _lazy_triton(triton, name, reference)
        if not _has_kernel(op, "CUDA"):
            LIBRARY.impl(name, _triton_kernels[op], "CUDA")
            _triton_on_cuda.add(op)
    if composed is not None and not _has_kernel(op, "CUDA"):
        LIBRARY.impl(name, composed, "CUDA")
        _composed_on_cuda.add(op)
    return op


def _use_compiled(op: Any, name: str, schema: str) -> None:
    """The compiled CUDA kernel of an op that asks Triton first: it answers where Triton is not there."""
    compiled_name = LIBRARY.define(schema.replace(name, f"{name}_compiled", 1))
    compiled = getattr(getattr(torch.ops, NAMESPACE), compiled_name).default
    if _has_kernel(compiled, "CUDA"):
        _compiled_cuda_kernels[op] = compiled
        if _STATES["triton"] != "loaded":
            LIBRARY.impl(name, compiled, "CUDA")


def _has_kernel(op: Any, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _lazy_triton(module: str, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args):
            return reference(*args)  # a Triton kernel's scalar arguments are float32
        return getattr(importlib.import_module(f"kdaif_fast.triton_kernels.{module}"), name)(*args)

    return kernel


def kernel_for(op: Any, device: str) -> str:
    """Which backend answers for an op on a device type ("cpu" or "cuda"); "torch": operations of torch's own."""
    if not _has_kernel(op, device.upper()):
        return "reference"
    if device == "cuda" and op in _composed_on_cuda:
        return "torch"
    return "triton" if device == "cuda" and op in _triton_on_cuda else device


def ops() -> list[Any]:
    """All ops of the library, in the order of their definition."""
    return list(_references)


class _Force(TorchDispatchMode):
    """Answers every op of the library from one table. It sits below autograd and every transform."""

    def __init__(self, kernels: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.kernels.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block, in this thread: to compare, or to rule a kernel out.

    Args:
        name: "reference" answers everything with plain PyTorch, "triton" everything with Triton (CUDA tensors, or any
            where TRITON_INTERPRET=1 was set from the start). "cpu" and "cuda" assert that the compiled kernels are
            loaded; they already answer for tensors on their device.

    Raises:
        ValueError: for an unknown name, or a backend that is not loaded (with the reason).

    Example:
        >>> import kdaif_fast, torch
        >>> with kdaif_fast.backend("reference"):
        ...     loss = kdaif_fast.ops.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: name is {name!r}, expected one of {', '.join(BACKENDS)}")
    if backends()[name] != "loaded":
        raise ValueError(f"backend: {name!r} is not loaded: {backends()[name]}")
    tables = {"reference": _references, "triton": _triton_kernels, "cuda": _compiled_cuda_kernels}
    with _Force(tables[name]) if name in tables else contextlib.nullcontext():
        yield


_STATES = _load_all()
