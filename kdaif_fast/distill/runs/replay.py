"""An epoch of a loader that can be entered again in its middle, with the batches it would have given."""

from __future__ import annotations

import hashlib
import random
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from .random_states import random_state, set_random_state

_PARTS = ("sampler", "batch_sampler", "dataset", "transform", "collate_fn")
"""Attributes of a loader, and of these in turn, that may have a random generator of their own, or a state_dict."""

_SEVERAL = ("datasets", "transforms")
"""Those that are lists of such."""


class EpochReplay:
    """A loader, gone through epoch by epoch, whose place in an epoch can be noted and found again in a new process.

    At the start of an epoch the random states are noted, and how many batches it has given out ever after. To go on
    in the middle, the states are set as they were at the start and as many batches are drawn and dropped: the order
    of the samples is the same again, and so are the draws of workers. What is drawn after that in this process, as
    augmentation does without workers, goes on from the random states of the checkpoint.

    Noted are the global generators of torch, numpy and Python, and those that the loader, its samplers, its data set,
    its transform or its collate_fn have as attributes (torch.Generator, numpy's Generator and RandomState,
    random.Random). A sampler with state_dict and load_state_dict is asked for its state at the start of the epoch. A
    loader with them that is no DataLoader is asked for its place, and then nothing is drawn and dropped.

    Workers that are persistent are started anew in every epoch: their random states go on from one epoch to the next,
    and nobody can read them.

    What cannot be replayed: a sampler that draws from the global generators after it has given its first index; a
    loader that draws samples ahead of the step in this process, or with in_order=False; a data set that keeps a
    generator where it is not found; augmentation with another number of workers than before. And where something else
    goes through the same loader in the middle of an epoch: a sampler with a state_dict, one that draws from a generator
    of its own as it goes, and persistent workers (which draw a seed when they are started, and none when they are used
    again).

    Args:
        loader: something that can be iterated again and again: a DataLoader, a list of batches. One process of
            several has its own share and its own replay.

    Raises:
        TypeError: an iterator, which can be gone through only once, or nothing to iterate over.

    Example:
        >>> loader = DataLoader(range(6), batch_size=2, shuffle=True)
        >>> replay = EpochReplay(loader)
        >>> batches = replay.start()
        >>> _ = next(batches)
        >>> checkpoint = replay.state(), random_state()
        >>> rest = [batch.tolist() for batch in batches]
        >>> place, states = checkpoint
        >>> rest == [batch.tolist() for batch in EpochReplay(loader).resume(place, then=states)]
        True
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                f"loader is a {type(loader).__name__}, expected something that can be gone through again and again: a "
                "DataLoader or a list of batches"
            )
        self.loader = loader
        self.given = 0  # batches of this epoch, with those before a resume; 0 between epochs
        self._start: dict[str, Any] | None = None  # None between epochs
        self._first: str | None = None

    def start(self) -> Iterator[Any]:
        """The batches of a new epoch. The random states are noted now, and the loader's iterator is made."""
        self._start = {
            "random": random_state(),
            "generators": _states(self.loader),
            "samplers": _sampler_states(self.loader),
            "epochs": _epochs(self.loader),
        }
        self.given, self._first = 0, None
        return self._give(_iterator(self.loader))

    def state(self) -> dict[str, Any]:
        """Where it is, as a tree for write_state: to be asked for after a batch was worked on, before the next."""
        return {
            "start": self._start,
            "given": self.given,
            "first_batch": self._first,
            "batches": _length(self.loader),
            "now": _states(self.loader),
            "samplers": _sampler_states(self.loader) if self._start is None else None,
            "loader": self.loader.state_dict() if _finds_its_place(self.loader) else None,  # type: ignore[attr-defined]
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Set the generators that the loader has of its own as they were when the state was noted.

        Returns whether that was in the middle of an epoch: then go on with resume, else with start. Needed only if
        something else goes through the loader before that.

        Raises ValueError if the loader has others than it had.
        """
        _set_states(self.loader, state["now"])
        if state["start"] is not None:
            return True
        _set_sampler_states(self.loader, state["samplers"])
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        return False

    def resume(self, state: Mapping[str, Any], then: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The batches that were still to come when `state` was noted; a new epoch, if none had been begun.

        Those given out before are drawn and dropped now, before this returns. Between this call and the first batch
        nothing else may draw random numbers. A sampler's set_epoch has to be called before.

        Args:
            state: of state(), of this loader or an equal one.
            then: of random_state(), taken together with `state`; set when all is dropped. None leaves the global
                generators as the dropped batches do.

        Raises:
            ValueError: the loader is not equal to the one that was checkpointed: another number of batches, another
                epoch of its sampler, other generators, or another first batch (its whole numbers are compared: indices,
                labels). The global generators are as before then.
        """
        if state["start"] is None:
            self.restore(state)
            if then is not None:
                set_random_state(then)
            return self.start()
        before = random_state()
        try:
            batches = self._replayed(state)
        except BaseException:
            set_random_state(before)
            raise
        if then is not None:
            set_random_state(then)
        self._start, self.given, self._first = state["start"], state["given"], state["first_batch"]
        return self._give(batches)

    def _replayed(self, state: Mapping[str, Any]) -> Iterator[Any]:
        """The loader's iterator, of which the batches that had been given out are drawn."""
        self._require_equal(state)
        start = state["start"]
        set_random_state(start["random"])
        _set_states(self.loader, start["generators"])
        _set_sampler_states(self.loader, start["samplers"])
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        batches = _iterator(self.loader)
        if state["loader"] is None:
            self._drop(batches, state["given"], state["first_batch"])
        _set_states(self.loader, state["now"])
        return batches

    def _give(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.given += 1
            if self.given == 1:
                self._first = _look_at(batch)
            yield batch
        self._start, self.given, self._first = None, 0, None

    def _drop(self, batches: Iterator[Any], given: int, first: str | None) -> None:
        for number in range(given):
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(
                    f"loader gave {number} batches, but {given} had been given out when the run was checkpointed: it "
                    "has other data than in that run"
                ) from None
            if number == 0 and _look_at(batch) != first:
                raise ValueError(
                    "loader gave another first batch than in the run that was checkpointed: it has other data, or "
                    "gives them in another order"
                )

    def _require_equal(self, state: Mapping[str, Any]) -> None:
        batches = _length(self.loader)
        if batches != state["batches"]:
            raise ValueError(
                f"loader has {batches} batches, but had {state['batches']} in the run that was checkpointed"
            )
        if (state["loader"] is None) == _finds_its_place(self.loader):
            raise ValueError("loader has a state_dict in only one of this run and the one that was checkpointed")
        for name, epoch in _epochs(self.loader).items():
            before = state["start"]["epochs"].get(name, epoch)
            if epoch != before:
                raise ValueError(
                    f"{name} is at epoch {epoch}, but was at {before} when the run was checkpointed: call its "
                    f"set_epoch({before}) before resume"
                )


def _iterator(loader: Any) -> Iterator[Any]:
    if not getattr(loader, "persistent_workers", False) or not isinstance(loader, DataLoader):
        return iter(loader)
    # Workers of its own for this epoch: those of the epoch before have random states that nobody can note, and a
    # second pass over the loader while this one goes on would end it.
    loader._iterator = None
    batches = iter(loader)
    loader._iterator = None
    return batches


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an iterable data set has no length
        return None


def _is_stateful(part: Any) -> bool:
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def _finds_its_place(loader: Any) -> bool:
    # torchdata's StatefulDataLoader is a DataLoader, and replayed as one: its own state brings back the order of the
    # samples, but not the random states of its workers.
    return _is_stateful(loader) and not isinstance(loader, DataLoader)


def _parts(loader: Any) -> dict[str, Any]:
    """The loader and what it is made of, each once, by names such as "loader.dataset.transform"."""
    found: dict[str, Any] = {}
    todo = [("loader", loader)]
    for path, part in todo:  # which grows meanwhile
        if any(part is other for other in found.values()):
            continue
        found[path] = part
        attributes = _attributes(part)
        for name in _PARTS:
            if attributes.get(name) is not None:
                todo.append((f"{path}.{name}", attributes[name]))
        for name in _SEVERAL:
            if isinstance(attributes.get(name), (list, tuple)):
                todo += [(f"{path}.{name}.{i}", item) for i, item in enumerate(attributes[name])]
    return found


def _attributes(part: Any) -> Mapping[str, Any]:
    return getattr(part.__self__ if isinstance(part, types.MethodType) else part, "__dict__", {})


def _stateful_samplers(loader: Any) -> list[tuple[str, Any]]:
    if _finds_its_place(loader):
        return []  # which takes care of them
    samplers = [(name, part) for name, part in _parts(loader).items() if name.endswith("sampler")]
    return [(name, part) for name, part in samplers if _is_stateful(part)]


def _sampler_states(loader: Any) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in _stateful_samplers(loader)}


def _set_sampler_states(loader: Any, states: Mapping[str, Any]) -> None:
    for name, part in _stateful_samplers(loader):
        if name in states:
            part.load_state_dict(states[name])


def _epochs(loader: Any) -> dict[str, int]:
    """The epoch of each sampler or data set that is told of it, as DistributedSampler is."""
    parts = _parts(loader).items()
    told = {name: getattr(part, "epoch", None) for name, part in parts if callable(getattr(part, "set_epoch", None))}
    return {name: epoch for name, epoch in told.items() if isinstance(epoch, int)}


def _generators(loader: Any) -> dict[str, Any]:
    """The random generators that the loader and its parts hold, by the names of the attributes."""
    import numpy as np

    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found = {}
    for path, part in _parts(loader).items():
        for name, value in _attributes(part).items():
            if isinstance(value, kinds) and not isinstance(value, random.SystemRandom):  # which has no state
                found[f"{path}.{name}"] = value
    return found


def _states(loader: Any) -> dict[str, Any]:
    return {name: _state_of(generator) for name, generator in _generators(loader).items()}


def _state_of(generator: Any) -> Any:
    import numpy as np

    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_states(loader: Any, states: Mapping[str, Any]) -> None:
    import numpy as np

    generators = _generators(loader)
    if set(generators) != set(states):
        raise ValueError(
            f"loader has the random generators {sorted(generators)}, but had {sorted(states)} in the run that was "
            "checkpointed"
        )
    for name, generator in generators.items():
        if isinstance(generator, torch.Generator):
            generator.set_state(states[name])
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = states[name]
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(states[name])
        else:
            generator.setstate(states[name])


def _look_at(batch: Any) -> str:
    """A hash of a batch's whole numbers on the CPU: others mean other samples. Not of bytes: pixels may be rounded."""
    seen = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or leaf.layout != torch.strided:
            continue
        if not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype != torch.uint8:
            seen.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            seen.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
