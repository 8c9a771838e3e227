"""row_divergence in Triton: one program a row, which it reads in blocks; formulas in reference/row_divergence.py.

Floor: 2 reads of V elements for the loss, and 1 write for the gradient. The common case has a kernel of its own, in
row_divergence_light.py; what follows is about all others. A first pass finds maxima and sums together; a
last one forms values and gradient together. Only where the gradient needs a sum over the row that the first pass cannot
know (terms that are not linear in log q, mixed targets, class weights) a pass lies between. Rows of one block are read
once: the compiler merges the passes' reads. Otherwise each pass goes the other way than the one before.

Curvature products: a program works on one row and up to 4 of its K tangents. With S bytes a row, three passes over the
logits and two readings and a writing of each tangent cost 3 * 2 S + 3 K S for K <= 4. A program that took one tangent
at a time would cost 6 S + 3 S for each; one that looped over all K, (2 + 2 K) * 2 S + 3 K S.

float64 is not for Triton, whose scalar arguments are float32: it goes to the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .grids import groups, programs
from .row_divergence_kernels import row_divergence_hvp_kernel, row_divergence_kernel
from .row_divergence_light import row_divergence_light_kernel, squarings_of
from .row_divergence_terms import DECOUPLED, KL, LOGITS, Options
from .tuning import tuned

MOST_TANGENTS = 4  # of a program
LIGHT_ARGUMENTS = (
    "student", "teacher", "labels", "weight", "V", "student_stride", "teacher_stride", "ignore_index",
    "temperature", "ce", "kd",
)  # fmt: skip
# Wider blocks need more registers than there are: no configuration used here spills (tests/triton_kernels).
WIDEST_BLOCK = 4096


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def candidates(V: int, rows_of_tile: int = 1) -> tuple[tuple[int, int], ...]:
    """Block widths and warps to choose from for rows of V elements, of which a program holds several.

    A thread has 8 elements: one load of 16 bytes of the narrow types, and few enough for every option's registers. The
    best guess comes first: with wide programs few rows are in flight, and the L2 cache still has them for later passes.
    """
    widest = WIDEST_BLOCK // rows_of_tile
    if _interpreted():
        return ((min(triton.next_power_of_2(V), 512), 4),)
    if widest >= V:
        block = max(triton.next_power_of_2(V), 32)
        return ((block, max(block * rows_of_tile // 256, 1)),)
    return ((widest, 16), (widest // 2, 8), (widest // 4, 4))


def light_candidates(V: int) -> tuple[tuple[int, int], ...]:
    """The same for the common case's kernel, whose threads meet once a row: of narrower programs more rows fit in."""
    return candidates(V)[-2:]


def register_limit(o: Options, V: int) -> int | None:
    """What a thread may have at most, where the assembler would rather spill a little than have fewer threads at once.

    Left to itself it does well by the simplest losses on rows that begin at multiples of 16 elements.
    """
    return None if _interpreted() or (o.light and V % 16 == 0) else 128


@functools.cache
def _tuned(kernel: Any, V: int, blocks: tuple[tuple[int, int], ...], limit: int | None) -> Any:
    """The kernel in the fastest of its configurations, found out once for each V, dtype and set of options."""
    configurations = [
        triton.Config({"BLOCK": block, "ONE_BLOCK": block >= V}, num_warps=warps, maxnreg=limit)
        for block, warps in blocks
    ]
    return tuned(kernel, configurations, ("V", "o"))


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _options(
    student: Tensor,
    teacher: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> Options:
    kind, form, mixes, excludes, first_class, class_count, _ = choices

    def used(index: int) -> bool:
        return rows is not None or numbers[index] != 0

    has_other = kind in (KL.value, DECOUPLED.value)
    return Options(
        kind=kind,
        form=form,
        mixes=bool(mixes),
        excludes=bool(excludes),
        ce=used(1),
        kd=teacher is not None and used(2),
        other=teacher is not None and has_other and used(3),
        second=second is not None and (form != LOGITS.value or bool(mixes)),
        labels=labels is not None,
        soft=soft_labels is not None,
        class_weight=class_weight is not None,
        mask=mask is not None,
        weight=weight is not None,
        rows=rows is not None,
        interpolates=form == LOGITS.value and (rows is not None or numbers[5] != 1),
        smooths=numbers[7] != 0,
        sliced=(first_class, class_count) != (0, student.shape[1]),
    )


def _arguments(
    student: Tensor,
    teacher: Tensor | None,
    indices: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> tuple[dict[str, Any], Options]:
    """The kernels' common arguments by name."""
    options = _options(
        student, teacher, second, labels, soft_labels, class_weight, mask, weight, rows, numbers, choices
    )
    N, V = student.shape
    top_k = indices.shape[1] if indices is not None else 0

    def dense(x: Tensor | None) -> Tensor:
        return student if x is None else _dense_rows(x)  # a pointer that is not used

    tensors = {
        "student": _dense_rows(student),
        "teacher": dense(teacher),
        "indices": student if indices is None else indices.contiguous(),
        "second": dense(second),
        "labels": student if labels is None else labels.contiguous(),
        "soft_labels": dense(soft_labels),
        "class_weight": student if class_weight is None else class_weight.contiguous(),
        "mask": student if mask is None else _dense_rows(mask).view(torch.uint8),
        "weight": student if weight is None else weight.contiguous(),
        "rows": student if rows is None else rows.contiguous(),
    }
    strides = {
        "student_stride": tensors["student"].stride(0),
        "teacher_stride": tensors["teacher"].stride(0),
        "second_stride": tensors["second"].stride(0),
        "soft_stride": tensors["soft_labels"].stride(0),
        "mask_stride": 0 if mask is None or mask.shape[0] == 1 else tensors["mask"].stride(0),
    }
    names = ("temperature", "ce", "kd", "other", "label_mix", "interpolation", "gate", "smoothing", "skew")
    sizes = {"N": N, "V": V, "C": choices[5], "top_k": top_k, "first_class": choices[4], "ignore_index": choices[6]}
    settings = {name: float(number) for name, number in zip(names, numbers, strict=True)}
    width = triton.next_power_of_2(max(top_k, 1))
    return {**tensors, **strides, **sizes, **settings, "TOP_K_WIDTH": width}, options


def _launch_light(
    arguments: dict[str, Any], results: dict[str, Tensor], options: Options, grid: tuple[int, ...]
) -> None:
    """The common case: its temperature and how its tiles lie are part of what is compiled."""
    student, V = arguments["student"], arguments["V"]
    wide = 16 // student.element_size()  # elements of a load of 16 bytes
    strides = (V, arguments["student_stride"], arguments["teacher_stride"])
    chosen = {name: arguments[name] for name in LIGHT_ARGUMENTS}
    if not options.divergence:
        chosen["temperature"] = 1.0
    both = options.ce and options.divergence
    with _on_device_of(student):
        _tuned(row_divergence_light_kernel, V, light_candidates(V), None)[grid](
            **chosen,
            **results,
            o=options,
            SQUARINGS=squarings_of(chosen["temperature"]) if both else 0,
            GROUP=min(wide, light_candidates(V)[-1][0]),
            ALIGNED=all(stride % wide == 0 for stride in strides),
        )


def _launch(loss: Tensor | None, grad: Tensor | None, args: Sequence[Any]) -> None:
    student = args[0]
    N, V = student.shape
    if N == 0:
        return
    arguments, options = _arguments(*args)
    options = dataclasses.replace(options, loss=loss is not None, grad=grad is not None)
    results = {"loss": student if loss is None else loss, "grad": student if grad is None else grad}
    grid = (programs("row_divergence", N),)
    if options.common:
        return _launch_light(arguments, results, options, grid)
    with _on_device_of(student):
        _tuned(row_divergence_kernel, V, candidates(V), register_limit(options, V))[grid](
            **arguments, **results, o=options
        )


def row_divergence(student: Tensor, *args: Any) -> Tensor:
    """Loss of each row: [N], float32. Arguments as the reference takes them."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    _launch(loss, None, (student, *args))
    return loss


def row_divergence_with_grad(student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Loss of each row, [N], and its gradient, [N, V]."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(loss, grad, (student, *args))
    return loss, grad


def row_divergence_grad(student: Tensor, *args: Any) -> Tensor:
    """Gradient with respect to the student's logits: [N, V]."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(None, grad, (student, *args))
    return grad


def row_divergence_hvp(tangents: Tensor, gauss_newton: bool, student: Tensor, *args: Any) -> Tensor:
    """Hessian, or Gauss-Newton product, of each row's loss times K tangents: [K, N, V]."""
    out = torch.empty(tangents.shape, dtype=student.dtype, device=student.device)
    K, N, V = tangents.shape
    if K == 0 or N == 0:
        return out
    arguments, options = _arguments(student, *args)
    tangents = _dense_rows(tangents)
    tile = min(triton.next_power_of_2(K), MOST_TANGENTS)
    grid = (programs("row_divergence_hvp", N), groups("row_divergence_hvp", triton.cdiv(K, tile), "tangents"))
    with _on_device_of(student):
        _tuned(row_divergence_hvp_kernel, V, candidates(V, tile), register_limit(options, V))[grid](
            tangents=tangents,
            out=out,
            K=K,
            tangent_stride=tangents.stride(0),
            tangent_row_stride=tangents.stride(1),
            o=dataclasses.replace(options, gauss_newton=gauss_newton),
            TILE=tile,
            **arguments,
        )
    return out
