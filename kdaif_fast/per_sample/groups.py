"""The terms of a pass, gathered by parameter: what needs all that act on a parameter at once, such as norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .paths import Path
from .recording import Recording
from .terms import LinearTerm, Term
from .terms.base import BLOCK_ELEMENTS


@dataclass(eq=False)
class Group:
    """Parameters that share terms, with all of these: mostly one parameter and one term."""

    names: set[str]
    members: list[tuple[Path, Term]] = field(default_factory=list)

    def single(self) -> Term | None:
        """One term that stands for all, with norms and dots of the parameter's own; None if there is none."""
        paths, terms = [path for path, _ in self.members], [term for _, term in self.members]
        if len({path.kind for path in paths}) != 1 or not paths[0].rearranges:
            return None
        if len(terms) == 1:
            return terms[0]
        linear = [term for term in terms if isinstance(term, LinearTerm)]
        if len(linear) == len(terms) and len({(t.transposed, t.shape, t.inputs.dtype) for t in linear}) == 1:
            return LinearTerm.joined(linear)
        return None

    def grads(self, start: int, stop: int) -> dict[str, Tensor]:
        """Gradients of some of the samples: {name: [stop - start, *shape]}."""
        total: dict[str, Tensor] = {}
        for path, term in self.members:
            for name, pulled in path.pull(term.block(start, stop).grads()).items():
                total[name] = total[name] + pulled if name in total else pulled
        return total


def visit_groups(recording: Recording, receive: Callable[[Group], None]) -> None:
    """Receive every group as soon as it is complete."""
    group_of: dict[str, Group] = {}
    missing = {name: recording.uses(name) for name in recording.parameters}

    def gather(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            groups = {group_of.get(name) for name in path.parameters} - {None}
            group = Group(set(path.parameters))
            for other in groups:
                assert other is not None
                group.names |= other.names
                group.members += other.members
            group.members.append((path, term))
            group_of.update(dict.fromkeys(group.names, group))
            for name in path.parameters:
                missing[name] -= 1
            if all(missing[name] == 0 for name in group.names):
                receive(group)
                for name in group.names:
                    del group_of[name]

    recording.visit(gather)
    with torch.no_grad():
        unfinished: list[Group] = []
        for group in group_of.values():  # junctions that no gradient has reached
            if group not in unfinished:
                unfinished.append(group)
        for group in unfinished:
            receive(group)


def blocks(group: Group, samples: int) -> list[tuple[int, int]]:
    """Ranges of samples whose gradients together are of a bearable size."""
    parameters = {name: p for path, _ in group.members for name, p in path.parameters.items()}
    width = sum(p.numel() for p in parameters.values())
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]
