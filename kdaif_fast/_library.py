"""The operator library: loads the compiled kernels, defines ops, and decides which kernel answers for which device."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _cuda_order
from ._warn import warn_user

NAMESPACE = "kdaif_fast"
HERE = Path(__file__).parent
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")
BACKENDS = ("reference", "cpu", "cuda", "triton")
_references: dict[Any, Callable[..., Any]] = {}
_triton_kernels: dict[Any, Callable[..., Any]] = {}
_compiled_cuda_kernels: dict[Any, Callable[..., Any]] = {}
_composed: dict[Any, Callable[..., Any]] = {}
_orders_on_cuda: dict[Any, dict[str, list[str]]] = {}  # of the backends that are there, for each size class


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
    composed: Callable[..., Any] | None = None,
) -> Any:
    """Define an op. CPU tensors take the compiled kernel, CUDA tensors the first of _cuda_order.json that is there.

    Args:
        schema: as torch.library.define takes it.
        fake: gives shapes and dtypes only.
        reference: the definition.
        triton: the module of triton_kernels/ that has a function of the op's name. It is imported at the first launch.
        composed: for CUDA tensors, made of torch's own operations, as the vendor's library is fast at them, where the
            definition would be far too slow: the backend "torch".
    """
    name = LIBRARY.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _references[op] = reference
    if _has_kernel(op, "CUDA"):
        _compiled_cuda_kernels[op] = _compiled_cuda(op)
    if triton is not None and _STATES["triton"] == "loaded":
        _triton_kernels[op] = _lazy_triton(triton, name, reference)
    if composed is not None:
        _composed[op] = composed
    _choose_on_cuda(op, name)
    return op


def kernels_on_cuda(op: Any) -> dict[str, Callable[..., Any]]:
    """Backend -> kernel, of the backends that have one for CUDA tensors; each takes all of the op's arguments."""
    tables = {"cuda": _compiled_cuda_kernels, "triton": _triton_kernels, "torch": _composed, "reference": _references}
    return {name: table[op] for name, table in tables.items() if op in table}


def _compiled_cuda(op: Any) -> Callable[..., Any]:
    """The compiled kernel itself, which stays callable where another one is registered in its place."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return partial(torch.library.get_kernel(op, "CUDA").call_boxed, keys)


def _choose_on_cuda(op: Any, name: str) -> None:
    """Register what answers for CUDA tensors, unless it is registered already."""
    kernels = kernels_on_cuda(op)
    orders = {size: [b for b in order if b in kernels] for size, order in ORDER.for_op(name).items()}
    _orders_on_cuda[op] = orders
    # The compiled kernels have registered themselves and the reference answers for every device: without Python's help.
    if {order[0] for order in orders.values()} == {"cuda" if "cuda" in kernels else "reference"}:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # which is what we mean
        LIBRARY.impl(name, _chooser(name, orders, kernels), "CUDA", allow_override=True)


def _chooser(name: str, orders: dict[str, list[str]], kernels: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A kernel that passes calls on to the best for their size; float64 never to Triton, whose scalars are float32."""
    best = {size: kernels[order[0]] for size, order in orders.items()}
    in_float64 = {size: kernels[next(b for b in order if b != "triton")] for size, order in orders.items()}
    distinguishes = len(set(best.values())) > 1 or len(set(in_float64.values())) > 1
    any_class = next(iter(orders))

    def kernel(*args: Any) -> Any:
        size = _cuda_order.SIZES[name].size_class(*args) if distinguishes else any_class
        return (in_float64 if _has_float64(args) else best)[size](*args)

    return kernel


def _has_float64(args: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args)


def _has_kernel(op: Any, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _lazy_triton(module: str, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if _has_float64(args):
            return reference(*args)
        return getattr(importlib.import_module(f"kdaif_fast.triton_kernels.{module}"), name)(*args)

    return kernel


def kernel_for(op: Any, device: str) -> str:
    """Which backend answers for an op on a device type ("cpu" or "cuda"); of several, which for what size."""
    if device != "cuda":
        return device if _has_kernel(op, device.upper()) else "reference"
    firsts = {size: order[0] for size, order in _orders_on_cuda[op].items()}
    if len(set(firsts.values())) == 1:
        return next(iter(firsts.values()))
    return ", ".join(f"{backend} ({size})" for size, backend in firsts.items())


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
            where TRITON_INTERPRET=1 was set from the start), "cuda" what CUDA tensors are in with the compiled kernels.
            "cpu" asserts that the compiled kernels are loaded; they already answer for CPU tensors. An op without a
            kernel of that backend is answered as always.

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
    compiled: dict[Any, Callable[..., Any]] = {
        op: partial(_if_on_cuda, kernel, op) for op, kernel in _compiled_cuda_kernels.items()
    }
    tables = {"reference": _references, "triton": _triton_kernels, "cuda": compiled}
    with _Force(tables[name]) if name in tables else contextlib.nullcontext():
        yield


def _if_on_cuda(kernel: Callable[..., Any], op: Any, *args: Any) -> Any:
    is_cuda = any(isinstance(a, torch.Tensor) and a.is_cuda for a in args)
    return (kernel if is_cuda else op)(*args)


ORDER = _cuda_order.read()
_STATES = _load_all()
