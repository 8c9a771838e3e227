"""Which network sees weights: the mechanisms of KD-AIF, and the two ways of distilling without any."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanism:
    """One way of using the samples' weights, which are always measured at the student.

    Args:
        name: what it is called.
        weighs_student: whether the student's losses are weighted.
        weighs_teacher: whether the teacher's are.
        trains_teacher: whether the teacher learns, from the labels, while the student learns from it.
        combines: whether the weights are those measured at the present student and at the one before, combined.

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705), the caption of figure 4. How M4 combines is
        not said there.
    """

    name: str
    weighs_student: bool = False
    weighs_teacher: bool = False
    trains_teacher: bool = True
    combines: bool = False

    @property
    def weighs(self) -> bool:
        """Whether there are weights at all."""
        return self.weighs_student or self.weighs_teacher


MECHANISMS = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("vanilla", trains_teacher=False),
        Mechanism("online"),
        Mechanism("M1", weighs_student=True),
        Mechanism("M2", weighs_teacher=True),
        Mechanism("M3", weighs_student=True, weighs_teacher=True),
        Mechanism("M4", weighs_student=True, weighs_teacher=True, combines=True),
    )
}


def find_mechanism(mechanism: str | Mechanism) -> Mechanism:
    """The mechanism itself, or that of the name; ValueError with the known names for any other."""
    if isinstance(mechanism, Mechanism):
        return mechanism
    if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
        raise ValueError(f"mechanism is {mechanism!r}, expected one of {', '.join(MECHANISMS)}, or a Mechanism")
    return MECHANISMS[mechanism]
