"""kd_loss in Triton: one program a row, three passes over it in blocks; formulas in reference/kd_loss.py.

Floor: 2 reads and 1 write of V elements; the second and third pass find rows of up to some 64 KiB in the caches.
float64 is not for Triton, whose scalar arguments are float32: it goes to the reference.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Wider blocks need more registers than there are: no configuration used here spills (tests/triton_kernels).
WIDEST_BLOCK = 4096


@triton.jit
def _kd_loss_kernel(
    student,  # [N, V], student_stride elements from row to row
    teacher,  # [N, V], teacher_stride elements from row to row; not read without KL
    labels,  # [N]
    scale,  # [N]: multiplies the row's loss and gradient
    loss,  # [N], written if LOSS
    grad,  # [N, V], written if GRAD
    V,
    student_stride,
    teacher_stride,
    temperature,
    alpha,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    CE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * student_stride
    t_row = teacher + row * teacher_stride
    inverse = 1.0 / temperature

    max_s = -float("inf")
    max_t = -float("inf")
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        max_s = tl.maximum(max_s, tl.max(s, 0))
        if KL:
            t = tl.load(t_row + at, mask=at < V, other=-float("inf")).to(tl.float32)
            max_t = tl.maximum(max_t, tl.max(t, 0))

    student_1 = 0.0
    student_T = 0.0
    teacher_T = 0.0
    cross = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s
        if CE:
            student_1 += tl.sum(tl.exp(x), 0)
        if KL:
            log_q = x * inverse
            log_p = (tl.load(t_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_t) * inverse
            p = tl.exp(log_p)
            student_T += tl.sum(tl.exp(log_q), 0)
            teacher_T += tl.sum(p, 0)
            # A class that the teacher excludes contributes nothing, even where the student excludes it too; NaN stays.
            cross += tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), 0)

    label = tl.load(labels + row)
    legal = (label >= 0) & (label < V)
    weight = tl.where(legal, tl.load(scale + row), float("nan"))
    if LOSS:
        value = 0.0
        if CE:
            s_label = tl.load(s_row + tl.where(legal, label, 0)).to(tl.float32) - max_s
            value += alpha * (tl.log(student_1) - s_label)
        if KL:
            kl = cross / teacher_T - tl.log(teacher_T) + tl.log(student_T)
            value += (1 - alpha) * temperature * temperature * tl.where(kl < 0, 0.0, kl)
        tl.store(loss + row, weight * value)
    if GRAD:
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s
            g = tl.zeros((BLOCK,), tl.float32)
            if CE:
                g += alpha * (tl.exp(x) / student_1 - tl.where(at == label, 1.0, 0.0))
            if KL:
                t = (tl.load(t_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_t) * inverse
                g += (1 - alpha) * temperature * (tl.exp(x * inverse) / student_T - tl.exp(t) / teacher_T)
            tl.store(grad + row * V + at, (weight * g).to(grad.dtype.element_ty), mask=at < V)


@triton.jit
def _kd_loss_hvp_kernel(
    student,  # [N, V], student_stride elements from row to row
    tangent,  # [N, V], tangent_stride elements from row to row
    scale,  # [N]
    out,  # [N, V]
    V,
    student_stride,
    tangent_stride,
    temperature,
    alpha,
    CE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * student_stride
    u_row = tangent + row * tangent_stride
    inverse = 1.0 / temperature

    max_s = -float("inf")
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        max_s = tl.maximum(max_s, tl.max(tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32), 0))

    student_1 = 0.0
    student_T = 0.0
    tangent_1 = 0.0
    tangent_T = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s
        u = tl.load(u_row + at, mask=at < V, other=0.0).to(tl.float32)
        if CE:
            e = tl.exp(x)
            student_1 += tl.sum(e, 0)
            tangent_1 += tl.sum(e * u, 0)
        if KL:
            e = tl.exp(x * inverse)
            student_T += tl.sum(e, 0)
            tangent_T += tl.sum(e * u, 0)

    weight = tl.load(scale + row)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s
        u = tl.load(u_row + at, mask=at < V, other=0.0).to(tl.float32)
        h = tl.zeros((BLOCK,), tl.float32)
        if CE:
            h += alpha * tl.exp(x) / student_1 * (u - tangent_1 / student_1)
        if KL:
            h += (1 - alpha) * tl.exp(x * inverse) / student_T * (u - tangent_T / student_T)
        tl.store(out + row * V + at, (weight * h).to(out.dtype.element_ty), mask=at < V)


def block_for(V: int) -> tuple[int, int]:
    """Block width and warps for rows of V elements."""
    block = min(triton.next_power_of_2(V), WIDEST_BLOCK)
    return block, 4 if block <= 1024 else 8


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    scale: Tensor,
    temperature: float,
    alpha: float,
    loss: Tensor | None,
    grad: Tensor | None,
) -> None:
    N, V = student.shape
    if N == 0:
        return
    student, teacher = _dense_rows(student), _dense_rows(teacher)
    block, warps = block_for(V)
    with _on_device_of(student):
        _kd_loss_kernel[(N,)](
            student,
            teacher,
            labels.contiguous(),
            scale.contiguous(),
            scale if loss is None else loss,
            student if grad is None else grad,
            V,
            student.stride(0),
            teacher.stride(0),
            temperature,
            alpha,
            LOSS=loss is not None,
            GRAD=grad is not None,
            CE=alpha != 0,
            KL=alpha != 1,
            BLOCK=block,
            num_warps=warps,
        )


def kd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Loss of each row: [N], float32."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    _launch(student, teacher, labels, weight, temperature, alpha, loss, None)
    return loss


def kd_loss_with_grad(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """Loss of each row, [N], and its gradient, [N, V]."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(student, teacher, labels, weight, temperature, alpha, loss, grad)
    return loss, grad


def kd_loss_grad(
    grad_output: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Gradient with respect to the student's logits: [N, V]."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(student, teacher, labels, grad_output, temperature, alpha, None, grad)
    return grad


def kd_loss_hvp(grad_output: Tensor, tangent: Tensor, student: Tensor, temperature: float, alpha: float) -> Tensor:
    """Hessian of each row times its tangent: [N, V]."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    N, V = student.shape
    if N == 0:
        return out
    student, tangent = _dense_rows(student), _dense_rows(tangent)
    block, warps = block_for(V)
    with _on_device_of(student):
        _kd_loss_hvp_kernel[(N,)](
            student,
            tangent,
            grad_output.contiguous(),
            out,
            V,
            student.stride(0),
            tangent.stride(0),
            temperature,
            alpha,
            CE=alpha != 0,
            KL=alpha != 1,
            BLOCK=block,
            num_warps=warps,
        )
    return out
