"""The samples that the report shows one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sample_contents import Content
from ..samples_file import Samples

TINY = 48
"""Pictures up to so many pixels wide are enlarged with their pixels left as squares."""

NOT_KEPT = Content(note="not kept: contents are written at the end of a run")


@dataclass(frozen=True)
class Card:
    """A sample: what it looks like, and what is known of it."""

    index: int
    content: Content
    weight: float
    phi: float
    label: str | None
    true_label: str | None  # only where it is another one
    is_flipped: bool

    @property
    def is_tiny(self) -> bool:
        """Whether its picture's pixels shall be seen."""
        return max(self.content.width, self.content.height) <= TINY

    @property
    def alt(self) -> str:
        """What to say where the picture cannot be seen."""
        return f"sample {self.index}" + (f", label {self.label}" if self.label is not None else "")


def cards(samples: Samples, indices: Sequence[int]) -> list[Card]:
    """The samples at these places, in this order."""
    return [_card(samples, index) for index in indices]


def _card(samples: Samples, index: int) -> Card:
    label = None if samples.targets is None else int(samples.targets[index])
    true = None if samples.true_labels is None else int(samples.true_labels[index])
    return Card(
        index,
        samples.contents.get(index, NOT_KEPT),
        float(samples.weights[index]),
        float(samples.phi[index]),
        None if label is None else samples.class_name(label),
        samples.class_name(true) if true is not None and true >= 0 and true != label else None,
        samples.flipped is not None and bool(samples.flipped[index]),
    )
