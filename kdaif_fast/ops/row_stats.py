"""row_stats: per-row statistics of two sets of logits in one pass, for weight rules and selectors.

One op returns them packed; `RowStats` gives them names. They are measurements: nothing here has a gradient.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _derive
from .._library import LIBRARY, define
from ..reference import row_stats as reference
from . import _check
from ._row_stats import RowStats


def _kernel(student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """The reference as a kernel: a label out of range raises on the CPU; elsewhere nobody waits to look at it."""
    if labels is not None and labels.device.type == "cpu":
        _check.are_labels("row_stats", "labels", labels, student.shape[1], options[-1])
    return reference.row_stats(student, teacher, labels, *options)


def _fake(student: Tensor, teacher: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    N, count = student.shape[0], reference.packed_size(teacher is not None)
    stats = student.new_empty((count, N), dtype=reference.statistics_dtype(student))
    return stats, student.new_empty((1 if teacher is None else 2, N), dtype=torch.int64)


_row_stats = define(
    "row_stats(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, float temperature, int first_class, "
    "int class_count, int ignore_index) -> (Tensor, Tensor)",
    fake=_fake,
    triton="row_stats",
    reference=_kernel,
)


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """B batches of N rows are B * N rows. Rows are the results' second axis."""
    folded, rows = list(args), 0
    for at, (x, dim) in enumerate(zip(args[:3], in_dims, strict=False)):
        if x is not None:
            batched = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            rows = batched.shape[1]
            folded[at] = batched.reshape(info.batch_size * rows, *batched.shape[2:])
    stats, argmax = _row_stats(*folded)
    return tuple(x.reshape(x.shape[0], info.batch_size, rows) for x in (stats, argmax)), (1, 1)


torch.library.register_vmap(_row_stats.name(), _vmap, lib=LIBRARY)


def row_stats(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    classes: slice | tuple[int, int] | None = None,
    ignore_index: int = -100,
) -> RowStats:
    """What a weight rule or a selector asks about each row's predictions, in one pass over both sets of logits.

    All statistics are of q = softmax(student / temperature) and p = softmax(teacher / temperature), cross-entropies
    included.

    - max, argmax: the largest probability, and the lowest index that has the largest logit.
    - label, ce: the label's probability, and minus its logarithm, in nats.
    - margin: log-probability of the label minus the largest log-probability of any other class; below 0 where the
      prediction is wrong, and +inf where there is no other class. Without labels the arg-max takes the label's place:
      top-1 minus top-2, never below 0.
    - entropy: of the prediction, in nats, from 0 to log V.
    - mass: probability of the classes `classes`.
    - forward_kl, reverse_kl: KL(p || q) and KL(q || p), in nats, never below 0; +inf where the second excludes a class
      (-inf) that the first does not. A class without probability contributes 0.
    - agreement: whether both have the same arg-max (False where either row has no softmax).

    Nothing here is differentiable: the statistics are measurements, and come without a graph from logits that require
    grad. Works under torch.no_grad, torch.inference_mode, torch.func.vmap and torch.compile(fullgraph=True).

    Args:
        student_logits: [..., V], float32, float64, bfloat16 or float16; V classes. -inf masks a class.
        teacher_logits: same shape and device; a different float dtype is converted to the wider of the two (a copy).
            Without it, the teacher's statistics, the divergences and agreement are None.
        labels: int64 [...], 0 <= label < V, or ignore_index. Without it, label and ce are None.
        temperature: T > 0, divides all logits.
        classes: (start, stop) or a slice with step 1, of at least one class: whose mass is wanted. Without it, mass is
            None.
        ignore_index: in rows with this label, what depends on the label (label, margin, ce) is NaN; the rest is there.

    Returns:
        RowStats of tensors [...]: float32 (float64 for float64 logits), int64 arg-maxima, bool agreement. A row with a
        NaN or +inf among its logits, or with -inf only, has no softmax: its network's floats and the divergences are
        NaN, and its arg-max is the first NaN, else the first of the largest. In float32 an entropy or cross-entropy
        below 1e-6 is lost in rounding; small divergences keep their digits.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, labels out of range (on the CPU; a GPU gives NaN for what
            depends on that label), a temperature that is not positive and finite, a class slice that is empty or not
            within [0, V]. Each names the argument and its value.

    Memory: 72 bytes a row (32 without a teacher; for float64 128 and 56), nothing of size V. Logits are read in place
        if a row's classes are contiguous, else copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import row_stats
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
        >>> teacher = torch.tensor([[3.0, -1.0, 0.0], [2.0, 0.0, 0.0]])
        >>> stats = row_stats(student, teacher, torch.tensor([0, 2]))
        >>> stats.student_margin  # the second is wrong
        tensor([ 2.0000, -0.5000])
        >>> stats.student_argmax, stats.agreement
        (tensor([0, 1]), tensor([ True, False]))
        >>> stats.forward_kl
        tensor([0.0697, 0.8549])
    """
    V = _check_arguments(student_logits, teacher_logits, labels, temperature, ignore_index)
    first_class, class_count = _class_range(classes, V)
    student_logits = student_logits.detach()
    shape = student_logits.shape[:-1]
    if teacher_logits is not None:
        dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
        student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype).reshape(-1, V)
    student_logits = student_logits.reshape(-1, V)
    rows = None if labels is None else labels.reshape(-1)
    try:
        packed, argmax = _row_stats(
            student_logits, teacher_logits, rows, float(temperature), first_class, class_count, int(ignore_index)
        )
    except RuntimeError:
        if labels is not None and labels.device.type == "cpu" and not _derive.is_transformed(labels):
            _check.are_labels("row_stats", "labels", labels, V, ignore_index)
        raise
    return _named(packed, argmax, shape, labels is not None, class_count > 0)


def _named(packed: Tensor, argmax: Tensor, shape: torch.Size, has_labels: bool, has_classes: bool) -> RowStats:
    missing = set() if has_labels else {"label", "ce"}
    missing |= set() if has_classes else {"mass"}
    if len(shape) != 1:
        packed, argmax = (x.reshape(x.shape[0], *shape) for x in (packed, argmax))
    values, tops = packed.unbind(), argmax.unbind()
    names = [(side, statistic) for side in ("student", "teacher")[: len(tops)] for statistic in reference.SIDE]
    fields = {f"{x}_{y}": value for (x, y), value in zip(names, values, strict=False) if y not in missing}
    fields["student_argmax"] = tops[0]
    if len(tops) == 2:
        fields["teacher_argmax"] = tops[1]
        fields["forward_kl"], fields["reverse_kl"] = values[-2:]
        defined = (fields["student_max"] + fields["teacher_max"]).isfinite()
        fields["agreement"] = (tops[0] == tops[1]) & defined
    return RowStats(**fields)


def _check_arguments(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, temperature: float, ignore_index: int
) -> int:
    """Raise what the docstring says, but for label values; returns V."""
    _check.is_logits("row_stats", "student_logits", student)
    if teacher is not None:
        _check.is_logits("row_stats", "teacher_logits", teacher)
        _check.is_like("row_stats", "teacher_logits", teacher, student.shape, "student_logits", student.device)
    if labels is not None:
        shape = student.shape[:-1]
        _check.is_like("row_stats", "labels", labels, shape, "student_logits without classes", student.device)
        if labels.dtype != torch.int64:
            raise TypeError(f"row_stats: labels have dtype {labels.dtype}, expected torch.int64 class indices")
    _check.is_positive("row_stats", "temperature", temperature)
    _is_integer("row_stats", "ignore_index", ignore_index)
    return student.shape[-1]


def _is_integer(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {reprlib.repr(value)} ({type(value).__name__}), expected an integer")


def _class_range(classes: slice | tuple[int, int] | None, V: int) -> tuple[int, int]:
    """The first class and the number of classes; (0, 0) if no slice is wanted."""
    if classes is None:
        return 0, 0
    if isinstance(classes, slice):
        start = 0 if classes.start is None else classes.start
        stop = V if classes.stop is None else classes.stop
        if classes.step not in (None, 1):
            raise ValueError(f"row_stats: classes is {classes!r}, expected a slice with step 1")
    elif isinstance(classes, tuple) and len(classes) == 2:
        start, stop = classes
    else:
        raise TypeError(
            f"row_stats: classes is {reprlib.repr(classes)} ({type(classes).__name__}), expected a slice or "
            "(start, stop)"
        )
    _is_integer("row_stats", "classes.start", start)
    _is_integer("row_stats", "classes.stop", stop)
    if not 0 <= start < stop <= V:
        raise ValueError(
            f"row_stats: classes is {classes!r}, expected 0 <= start < stop <= {V} (the number of classes)"
        )
    return start, stop - start
