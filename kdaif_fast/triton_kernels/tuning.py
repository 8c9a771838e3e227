"""The fastest of a kernel's configurations: timed once by triton.autotune, remembered, and not timed where none may be.

Timing launches a kernel many times, allocates, and waits for the GPU. None of that can be while a CUDA graph is
captured; and what is fastest may differ from run to run, and with it the order of a sum. So where deterministic
algorithms are asked for, and where a launch is captured before any was timed, the first configuration that the GPU can
run is taken. List the best guess first.

A launch from here costs Python less than triton.autotune's own, which names every argument again each time.
Not run on a GPU yet; tests/triton_kernels/test_tuning.py says what was checked without one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources

Key = tuple[Any, ...]
WARMUP, TIMED = 5, 20  # milliseconds for a configuration: those worth having differ by more than what this misses


def clock(launch: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Quantiles of the milliseconds that a launch takes on the GPU."""
    return triton.testing.do_bench(launch, warmup=WARMUP, rep=TIMED, quantiles=quantiles)


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def size_class(value: Any) -> Any:
    """Sizes between the same two powers of two share a choice: lengths that differ a little are not timed anew."""
    return value.bit_length() if type(value) is int else value


class Tuned:
    """A kernel and the configurations to choose from.

    Attributes:
        fn: the kernel.
        configs: all configurations.
    """

    def __init__(self, kernel: Any, configurations: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.fn = kernel
        self.configs = list(configurations)
        self._settings = [configuration.all_kwargs() for configuration in self.configs]
        self._key = [(name, kernel.arg_names.index(name)) for name in key]
        self._choices: dict[Key, dict[str, Any]] = {}
        self._first: dict[Key, dict[str, Any]] = {}
        self._tuner = triton.autotune(self.configs, key=list(key), do_bench=clock)(kernel)
        self._one_at_a_time = threading.Lock()  # backward passes on two devices are two threads

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: Any, *args: Any, **named: Any) -> None:
        """Launch in the configuration that is right here.

        Args:
            grid: the programs, or a function from all arguments by name to them.
            *args: of the kernel, as Triton takes them.
            **named: likewise.

        Raises:
            OutOfResources: if the GPU can run none of the configurations.
        """
        if len(self._settings) == 1:
            self.fn[grid](*args, **named, **self._settings[0])
            return
        key = self.key_of(args, named)
        deterministic = torch.are_deterministic_algorithms_enabled()
        chosen = (self._first if deterministic else self._choices).get(key)
        if chosen is not None:
            self.fn[grid](*args, **named, **chosen)
        elif deterministic or capturing():
            self._launch_first(key, grid, args, named)
        else:
            self._launch_tuned(key, grid, args, named)

    def key_of(self, args: Sequence[Any], named: dict[str, Any]) -> Key:
        """What a choice is for: the arguments named in the key, all dtypes, and the device."""
        given = len(args)
        values = [size_class(args[at] if at < given else named[name]) for name, at in self._key]
        tensors = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        return (*values, *[x.dtype for x in tensors], tensors[0].device)

    def _launch_first(self, key: Key, grid: Any, args: Sequence[Any], named: dict[str, Any]) -> None:
        for settings in self._settings:
            try:
                self.fn[grid](*args, **named, **settings)
            except OutOfResources:  # before anything was launched
                if settings is self._settings[-1]:
                    raise
            else:
                self._first[key] = settings
                return

    def _launch_tuned(self, key: Key, grid: Any, args: Sequence[Any], named: dict[str, Any]) -> None:
        with self._one_at_a_time:
            try:
                self._tuner[grid](*args, **named)
                self._choices[key] = self._tuner.best_config.all_kwargs()
                return
            except torch.OutOfMemoryError:  # timing takes memory of its own, which the launch may not need
                self._tuner.nargs = None  # else these arguments stay in memory until it next times any
        self._launch_first(key, grid, args, named)


def tuned(kernel: Any, configurations: Sequence[triton.Config], key: Sequence[str]) -> Tuned:
    """A kernel in the fastest of its configurations; it is launched as any other, with a grid in square brackets.

    The first launch for a key times all configurations, except in deterministic mode and in a CUDA graph's capture. It
    runs the kernel many times on its arguments: one that overwrites what it reads must not be tuned.

    Args:
        kernel: a function under triton.jit.
        configurations: what to choose from, the best guess first. With one only, nothing is ever timed.
        key: names of arguments that the choice depends on, besides dtypes and the device.
    """
    return Tuned(kernel, configurations, key)
