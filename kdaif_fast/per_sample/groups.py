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
    """Parameters that share terms, with all of these: mostly one parameter and one term.

    Attributes:
        names: of the parameters.
        meetings: the terms, those of one junction together.
    """

    names: set[str]
    meetings: list[list[tuple[Path, Term]]] = field(default_factory=list)

    @property
    def members(self) -> list[tuple[Path, Term]]:
        """All terms, each with the path from its parameters."""
        return [member for meeting in self.meetings for member in meeting]

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


def visit_groups(
    recording: Recording,
    receive: Callable[[Group], None],
    cotangent: Tensor | None = None,
    *,
    again: bool = False,
    whole_layers: bool = False,
) -> None:
    """Receive every group as soon as it is complete.

    Args:
        recording: of a batch.
        receive: called with each group.
        cotangent: see Recording.visit; so is `again`.
        again: as there.
        whole_layers: whether parameters that meet the samples at the same junction, as weight and bias of a layer, are
            in one group.
    """
    group_of: dict[str, Group] = {}
    missing = {name: recording.uses(name) for name in recording.parameters}

    def gather(terms: list[tuple[Path, Term]]) -> None:
        for meeting in [terms] if whole_layers and terms else [[member] for member in terms]:
            names = [name for path, _ in meeting for name in path.parameters]
            group = Group(set(names))
            for other in {group_of.get(name) for name in names} - {None}:
                assert other is not None
                group.names |= other.names
                group.meetings += other.meetings
            group.meetings.append(meeting)
            group_of.update(dict.fromkeys(group.names, group))
            for name in names:
                missing[name] -= 1
            if all(missing[name] == 0 for name in group.names):
                receive(group)
                for name in group.names:
                    del group_of[name]

    recording.visit(gather, cotangent, again=again)
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
