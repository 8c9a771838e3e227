"""Finds where code waits for a GPU, without one.

Two ways. Meta tensors stand in for a GPU's: they have no values, are not on the CPU, and autograd and transforms know
them. And on CPU tensors everything is noted that would wait if they were a GPU's.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1] / "kdaif_fast"
aten = torch.ops.aten
# Each needs a value on the host: for itself, or for the shape of its result.
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.repeat_interleave,
    aten.histc,
}
MAKERS = {"tensor", "as_tensor", "new_tensor"}
METHODS = {"cpu", "tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"}


def place():
    """The line of the package that runs now, as "file:line"; None outside of it."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return None


def tensors_of(args):
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_of(x)


def is_on(device, x):
    return x.device.type == device


def holds_numbers(index):
    """Whether a list of places is in it, which goes from Python to the device."""
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(x, list) for x in index))


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, self.waits.device
        if self.waits.waits(func, args, kwargs):
            self.waits.note(func.overloadpacket.__name__)
            if device == "meta":
                return self.stand_in(func, args)
        return func(*args, **kwargs)

    @staticmethod
    def stand_in(func, args):
        """Something to go on with where there is no value: healthy, and nothing to complain of."""
        x = args[0]
        if func.overloadpacket is aten._local_scalar_dense:
            return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if func.overloadpacket is aten.nonzero:
            return x.new_empty((0, x.dim()), dtype=torch.int64)
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            return torch.ones(x.shape, dtype=x.dtype)
        raise AssertionError(f"{func} needs values")


class _Called(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in MAKERS and not isinstance(args[-1], torch.Tensor) and self.is_for_device(args, kwargs or {}):
            self.waits.note(name)
        if name in ("__getitem__", "__setitem__") and holds_numbers(args[1]) and is_on(self.waits.device, args[0]):
            self.waits.note("numbers as an index")
        if self.waits.device == "cpu" and name in METHODS and isinstance(args[0], torch.Tensor):
            self.waits.note(name)
            with torch._C.DisableTorchFunction(), self.waits.suspended():
                return func(*args, **(kwargs or {}))
        if name == "to" and self.waits.device == "cpu" and "cpu" in (*args[1:], *(kwargs or {}).values()):
            self.waits.note("to")
        return func(*args, **(kwargs or {}))

    def is_for_device(self, args, kwargs):
        """Whether numbers go from Python to the device: through the CPU's memory, which the copy waits for."""
        if isinstance(args[0], torch.Tensor):  # new_tensor
            return is_on(self.waits.device, args[0])
        to = kwargs.get("device")
        return to is not None and torch.device(to).type == self.waits.device


class Waits:
    """Notes, as a context manager, every wait in `found`: a count for each "file:line function operation"."""

    def __init__(self, device, without=()):
        """`device`: "meta" or "cpu". `without`: beginnings of files whose waits are not noted."""
        self.device, self.without, self.found, self._off = device, without, Counter(), 0
        self._modes = [_Dispatched(self), _Called(self)]

    @contextlib.contextmanager
    def suspended(self):
        """Nothing is noted in here."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def waits(self, func, args, kwargs):
        if self._off:
            return False
        packet, given = func.overloadpacket, list(tensors_of(args))
        if packet is aten.repeat_interleave and (
            func._overloadname == "self_int" or kwargs.get("output_size") is not None
        ):
            return False
        if packet in READS:
            return any(is_on(self.device, x) for x in given)
        if packet in (aten.index, aten.index_put_, aten.index_put):
            given = [x for x in args[1] if x is not None]
            # A mask's true places are counted; a list of numbers is copied over from the CPU.
            return any(x.dtype in (torch.bool, torch.uint8) or x.device != args[0].device for x in given)
        if self.device == "meta" and packet is aten._to_copy:
            to = kwargs.get("device")
            crosses = to is not None and torch.device(to).type != given[0].device.type
            return crosses and not kwargs.get("non_blocking")  # which is for pinned memory
        if self.device == "meta" and packet is aten.copy_:
            return len({x.device.type for x in given[:2]}) == 2
        return False

    def note(self, name):
        where = place()
        if where is not None and not where.startswith(tuple(self.without)):
            self.found[f"{where} {name}"] += 1

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception):
        for mode in reversed(self._modes):
            mode.__exit__(*exception)
