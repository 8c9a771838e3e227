"""The arguments of row_divergence: checked, brought into the op's form, and put together to a RowCall."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._derive import is_transformed
from ..reference import row_terms as terms
from ..reference.row_terms import accumulation_dtype
from . import _check
from .row_call import PerRow, RowCall

NAME = "row_divergence"
DIVERGENCES = {
    "kl": terms.KL,
    "reverse_kl": terms.KL,
    "cross_entropy": terms.CROSS_ENTROPY,
    "jensen_shannon": terms.JENSEN_SHANNON,
    "skew_kl": terms.SKEW_FORWARD,
    "skew_reverse_kl": terms.SKEW_REVERSE,
    "total_variation": terms.TOTAL_VARIATION,
    "probability_mse": terms.PROBABILITY_MSE,
    "logit_mse": terms.LOGIT_MSE,
    "log_cosh": terms.LOG_COSH,
    "decoupled": terms.DECOUPLED,
}
TEACHER_FORMS = {"logits": terms.LOGITS, "probabilities": terms.PROBABILITIES}


def read_arguments(
    student_logits: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: str = "kl",
    weight: Tensor | None = None,
    temperature: PerRow = 1.0,
    ce_weight: PerRow | None = None,
    kd_weight: PerRow = 1.0,
    other_weight: PerRow = 0.0,
    scale_by_temperature: bool = True,
    skew: float = 0.5,
    teacher_form: str = "logits",
    teacher_indices: Tensor | None = None,
    second_teacher: Tensor | None = None,
    gate: PerRow = 0.0,
    interpolation: PerRow = 1.0,
    label_mix: PerRow = 0.0,
    soft_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    classes: slice | tuple[int, int] | None = None,
    class_mask: Tensor | None = None,
    exclude_label: bool = False,
    ignore_index: int = -100,
    standardize: bool = False,
    check_finite: bool = False,
) -> tuple[RowCall, torch.Size]:
    """A call on rows, and the shape that losses of rows have. What the arguments are is said at row_divergence."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"row_divergence: divergence is {divergence!r}, expected one of {_names(DIVERGENCES)}")
    kind = DIVERGENCES[divergence]
    _check.is_logits(NAME, "student_logits", student_logits)
    shape, device = student_logits.shape[:-1], student_logits.device
    V, wide = student_logits.shape[-1], accumulation_dtype(student_logits)
    indices = second = soft = mask = None
    form, first, count = terms.LOGITS, 0, -1
    if teacher is not None:
        if classes is not None:
            first, count = _class_range(classes, V)
        C = V - first if count < 0 else count
        form = _teacher_form(teacher_form, teacher_indices, kind)
        if form == terms.LOGITS:
            _check.is_logits(NAME, "teacher", teacher)
            teacher = _columns(teacher, shape, first, C, V, "teacher", device)
            if teacher.dtype != student_logits.dtype:
                dtype = torch.promote_types(student_logits.dtype, teacher.dtype)
                student_logits, teacher = student_logits.to(dtype), teacher.to(dtype)
                wide = accumulation_dtype(student_logits)
        elif form == terms.PROBABILITIES:
            teacher = _columns(teacher, shape, first, C, V, "teacher", device).to(wide)
        else:
            teacher, indices = _top_k(teacher, teacher_indices, shape, C, device)
            teacher = teacher.to(wide)
        if second_teacher is not None:
            if form == terms.TOP_K:
                raise ValueError("row_divergence: second_teacher is given with teacher_indices, expected one of them")
            second = _columns(second_teacher, shape, first, C, V, "second_teacher", device)
            second = second.to(student_logits.dtype if form == terms.LOGITS else wide)
        if class_mask is not None:
            mask = _class_mask(class_mask, shape, first, C, V, device)
    elif any(x is not None for x in (second_teacher, teacher_indices, classes, class_mask)):
        raise ValueError("row_divergence: teacher is None, expected logits or probabilities, since more of it is given")
    if labels is not None:
        _check.is_like(NAME, "labels", labels, shape, "student_logits without its last axis", device)
        if labels.dtype != torch.int64:
            raise TypeError(f"row_divergence: labels have dtype {labels.dtype}, expected torch.int64 class indices")
    if soft_labels is not None:
        _check.is_like(NAME, "soft_labels", soft_labels, student_logits.shape, "student_logits", device)
        soft = soft_labels.to(wide)
    if class_weight is not None:
        _check.is_like(NAME, "class_weight", class_weight, torch.Size((V,)), "the classes", device)
        class_weight = class_weight.to(wide)
    if weight is not None:
        _check.is_like(NAME, "weight", weight, shape, "student_logits without its last axis", device)
        if not weight.is_floating_point():
            raise TypeError(f"row_divergence: weight has dtype {weight.dtype}, expected a floating-point dtype")
        weight = weight.to(wide)
    if label_smoothing:
        _check.is_share(NAME, "label_smoothing", label_smoothing)
    _check.is_share(NAME, "skew", skew)
    if standardize:
        student_logits = _standardized(student_logits)
        teacher = _standardized(teacher) if form == terms.LOGITS and teacher is not None else teacher
        second = _standardized(second) if form == terms.LOGITS and second is not None else second
    if check_finite:
        _check.is_finite_logits(NAME, "student_logits", student_logits)
        if teacher is not None:
            _check.is_finite_logits(NAME, "teacher", teacher)

    if ce_weight is None:
        ce_weight = 0.0 if labels is None and soft is None else 1.0
    if divergence not in ("kl", "decoupled") and _is_wanted(other_weight):
        raise ValueError(f"row_divergence: other_weight is {other_weight!r}, but {divergence!r} has one part")
    if second is None and _is_wanted(gate):
        raise ValueError(f"row_divergence: gate is {gate!r}, expected a second_teacher with it")
    if form != terms.LOGITS and _is_not(interpolation, 1):
        raise ValueError(f"row_divergence: interpolation is {interpolation!r}, expected teacher logits with it")
    if kind in (terms.LOGIT_MSE, terms.LOG_COSH) and (second is not None or _is_wanted(label_mix)):
        raise ValueError(f"row_divergence: second_teacher or label_mix is given, but {divergence!r} mixes no targets")
    if divergence == "reverse_kl":
        kd_weight, other_weight = 0.0, kd_weight
    settings: list[PerRow] = [temperature, ce_weight, kd_weight, other_weight, label_mix, interpolation, gate]
    settings = [x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in settings]
    settings = [x.expand(shape) if isinstance(x, Tensor) and x.dim() == 0 else x for x in settings]
    _check_settings(settings, shape, device)
    mixes_label = isinstance(label_mix, Tensor) or label_mix != 0
    needs_class = exclude_label or kind == terms.DECOUPLED
    if labels is None and soft is not None and needs_class:
        labels = soft.argmax(-1)  # of a soft label, the class of largest mass
    if labels is None and soft is None and (needs_class or mixes_label or _is_wanted(ce_weight)):
        raise ValueError("row_divergence: labels is None, expected class indices (or soft_labels, or ce_weight=0)")
    if scale_by_temperature and kind != terms.LOGIT_MSE and teacher is not None:
        square = settings[0] * settings[0]
        settings[2], settings[3] = settings[2] * square, settings[3] * square

    if student_logits.dim() != 2:
        student_logits = student_logits.reshape(-1, V)
        teacher, indices, second, soft, mask = (_rows(x) for x in (teacher, indices, second, soft, mask))
        labels, weight = (None if x is None else x.reshape(-1) for x in (labels, weight))
        settings = [x.reshape(-1) if isinstance(x, Tensor) else x for x in settings]
    elif mask is not None and mask.dim() == 1:
        mask = mask[None]
    choices = [kind, form, int(mixes_label or second is not None), int(exclude_label), first, count, ignore_index]
    call = RowCall(
        [student_logits, teacher, indices, second, labels, soft, class_weight, mask, weight],
        settings,
        [float(label_smoothing), float(skew)],
        choices,
    )
    return call, shape


def plain_call(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor | None, temperature: PerRow, alpha: float
) -> RowCall | None:
    """read_arguments for cross-entropy and forward KL on rows, in a third of the time: small batches notice.

    None where anything is unusual or wrong, which is then for read_arguments to say.
    """
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor) and isinstance(labels, Tensor)):
        return None
    shape, device = student.shape, student.device
    if (
        len(shape) != 2
        or shape[1] == 0
        or teacher.shape != shape
        or labels.shape != shape[:1]
        or labels.dtype is not torch.int64
        or student.dtype not in _check.FLOAT_DTYPES
        or teacher.dtype is not student.dtype
        or teacher.device != device
        or labels.device != device
        or not (isinstance(temperature, float) and 0 < temperature < math.inf)
    ):
        return None
    if weight is not None:
        is_usual = isinstance(weight, Tensor) and weight.shape == labels.shape and weight.device == device
        if not is_usual or weight.dtype is not accumulation_dtype(student):
            return None
    settings: list[PerRow] = [temperature, float(alpha), (1.0 - alpha) * temperature * temperature, 0.0, 0.0, 1.0, 0.0]
    tensors = [student, teacher, None, None, labels, None, None, None, weight]
    return RowCall(tensors, settings, [0.0, 0.5], [terms.KL, terms.LOGITS, 0, 0, 0, -1, -100])


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _class_range(classes: Any, V: int) -> tuple[int, int]:
    if isinstance(classes, slice):
        first, stop, step = classes.indices(V)
        legal = step == 1
    else:
        legal = isinstance(classes, (tuple, list)) and len(classes) == 2
        first, stop = classes if legal else (0, 0)
    if not (legal and 0 <= first < stop <= V):
        raise ValueError(f"row_divergence: classes is {classes!r}, expected 0 <= start < stop <= {V}")
    return first, stop - first


def _teacher_form(teacher_form: str, teacher_indices: Tensor | None, kind: int) -> int:
    if teacher_form not in TEACHER_FORMS:
        raise ValueError(f"row_divergence: teacher_form is {teacher_form!r}, expected one of {_names(TEACHER_FORMS)}")
    form = terms.TOP_K if teacher_indices is not None else TEACHER_FORMS[teacher_form]
    if form != terms.LOGITS and kind in (terms.LOGIT_MSE, terms.LOG_COSH):
        raise ValueError("row_divergence: teacher_form is not 'logits', but the divergence is between logits")
    return form


def _columns(x: Any, shape: torch.Size, first: int, C: int, V: int, name: str, device: torch.device) -> Tensor:
    """x [..., C], or those columns of x [..., V]."""
    _check.is_tensor(NAME, name, x)
    if not x.is_floating_point():
        raise TypeError(f"row_divergence: {name} has dtype {x.dtype}, expected a floating-point dtype")
    if x.dim() and C != V and x.shape[-1] == V:
        x = x[..., first : first + C]
    if x.shape[:-1] == shape and x.dim() and x.shape[-1] < C == V:
        raise ValueError(
            f"row_divergence: {name} has shape {tuple(x.shape)}, expected {(*shape, C)} as student_logits; if it knows "
            "fewer classes, say which: classes=(start, stop)"
        )
    _check.is_like(NAME, name, x, torch.Size((*shape, C)), "student_logits", device)
    return x


def _top_k(values: Any, indices: Any, shape: torch.Size, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    _check.is_tensor(NAME, "teacher", values)
    _check.is_tensor(NAME, "teacher_indices", indices)
    if not values.is_floating_point() or indices.dtype != torch.int64:
        raise TypeError(
            f"row_divergence: teacher and teacher_indices have dtypes {values.dtype} and {indices.dtype}, "
            "expected a floating-point dtype and torch.int64"
        )
    k = indices.shape[-1] if indices.dim() else 0
    if not 1 <= k <= C:
        raise ValueError(f"row_divergence: teacher_indices has k = {k} classes a row, expected 1 <= k <= {C}")
    _check.is_like(NAME, "teacher_indices", indices, torch.Size((*shape, k)), "student_logits and k", device)
    _check.is_like(NAME, "teacher", values, indices.shape, "teacher_indices", device)
    if device.type == "cpu" and not is_transformed(values, indices):
        _check.are_probabilities(NAME, "teacher", values)
    return values, indices


def _class_mask(mask: Any, shape: torch.Size, first: int, C: int, V: int, device: torch.device) -> Tensor:
    _check.is_tensor(NAME, "class_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"row_divergence: class_mask has dtype {mask.dtype}, expected torch.bool")
    if mask.dim() and C != V and mask.shape[-1] == V:
        mask = mask[..., first : first + C]
    expected = torch.Size((C,)) if mask.dim() == 1 else torch.Size((*shape, C))
    _check.is_like(NAME, "class_mask", mask, expected, "the classes of the divergence", device)
    return mask


def _check_settings(settings: list[PerRow], shape: torch.Size, device: torch.device) -> None:
    names = ("temperature", "ce_weight", "kd_weight", "other_weight", "label_mix", "interpolation", "gate")
    for name, value in zip(names, settings, strict=True):
        if isinstance(value, Tensor):
            _check.is_like(NAME, name, value, shape, "student_logits without its last axis", device)
            if not value.is_floating_point():
                raise TypeError(f"row_divergence: {name} has dtype {value.dtype}, expected a floating-point dtype")
            if name == "temperature" and device.type == "cpu" and not is_transformed(value):
                _check.are_positive(NAME, name, value)
        elif name == "temperature":
            _check.is_positive(NAME, name, value)
        elif name.endswith("weight"):
            _check.is_finite(NAME, name, value)
        else:
            _check.is_share(NAME, name, value)


def _is_wanted(weight: PerRow) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _is_not(value: PerRow, neutral: float) -> bool:
    return isinstance(value, Tensor) or value != neutral


def _standardized(logits: Tensor) -> Tensor:
    """Divided by the standard deviation of what is finite, where there is one."""
    is_finite = logits.isfinite()
    count = is_finite.sum(-1, keepdim=True)
    mean = logits.masked_fill(~is_finite, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = (logits - mean).masked_fill(~is_finite, 0).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return logits / variance.masked_fill(variance == 0, 1).sqrt()


def _rows(x: Tensor | None) -> Tensor | None:
    """[..., columns] -> [N, columns]; a mask for all rows -> [1, columns]."""
    return None if x is None else x.reshape(-1, x.shape[-1])
