"""The names of a row's statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of each row, every one of shape [...]; None where what it needs was not given.

    float32 (float64 for float64 logits), but for the arg-maxima (int64) and `agreement` (bool). q is the student's
    softmax at the temperature, p the teacher's. `row_stats` says more.
    """

    student_max: Tensor | None = None  # largest probability
    student_label: Tensor | None = None  # the label's probability
    student_margin: Tensor | None = None  # log-probability of the label (the arg-max, without labels) - largest other
    student_entropy: Tensor | None = None  # nats
    student_argmax: Tensor | None = None  # lowest index of the largest logit
    student_ce: Tensor | None = None  # -log q[label], nats
    student_mass: Tensor | None = None  # probability of the class slice
    teacher_max: Tensor | None = None
    teacher_label: Tensor | None = None
    teacher_margin: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_argmax: Tensor | None = None
    teacher_ce: Tensor | None = None
    teacher_mass: Tensor | None = None
    forward_kl: Tensor | None = None  # KL(p || q), nats
    reverse_kl: Tensor | None = None  # KL(q || p), nats
    agreement: Tensor | None = None  # whether the arg-maxima are the same
