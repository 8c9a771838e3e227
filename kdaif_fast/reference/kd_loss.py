"""kd_loss by definition: what one row's loss, gradient and Hessian-vector product are (docs/method.md, equation 4).

N rows, V classes. Low-precision logits are widened to float32; losses come out in float32 (float64 for float64).
"""

import torch
from torch import Tensor


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that sums, losses and row weights have for logits of this dtype."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _wide(logits: Tensor) -> Tensor:
    return logits.to(accumulation_dtype(logits))


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Weight * (alpha CE(y, s) + (1 - alpha) T^2 KL(softmax(t / T) || softmax(s / T))), one value per row: [N]."""
    student = _wide(student_logits)
    loss = torch.zeros_like(student[:, 0])
    # A part without weight is left out, so that its infinities (a masked label, say) cannot turn into NaN.
    if alpha != 0:
        loss = loss - alpha * student.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    if alpha != 1:
        log_q = (student / temperature).log_softmax(-1)
        log_p = (_wide(teacher_logits) / temperature).log_softmax(-1)
        p = log_p.exp()
        # Classes that the teacher excludes (p = 0) contribute nothing, even where the student excludes them too.
        kl = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
        # Rounding can put a tiny divergence below zero; lifting it must not take its gradient away.
        kl = kl + (kl.clamp(min=0) - kl).detach()
        loss = loss + (1 - alpha) * temperature**2 * kl
    return weight * loss


def kd_loss_grad(
    grad_output: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Gradient of grad_output . kd_loss (with weight 1) with respect to the student's logits: [N, V]."""
    student = _wide(student_logits)
    grad = torch.zeros_like(student)
    if alpha != 0:
        is_label = labels[:, None] == torch.arange(student.shape[1], device=labels.device)
        grad = grad + alpha * (student.softmax(-1) - is_label.to(student.dtype))
    if alpha != 1:
        q = (student / temperature).softmax(-1)
        p = (_wide(teacher_logits) / temperature).softmax(-1)
        grad = grad + (1 - alpha) * temperature * (q - p)
    return (grad_output[:, None] * grad).to(student_logits.dtype)


def kd_loss_with_grad(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """kd_loss [N] together with its gradient with respect to the student's logits [N, V], row by row."""
    return (
        kd_loss(student_logits, teacher_logits, labels, weight, temperature, alpha),
        kd_loss_grad(weight, student_logits, teacher_logits, labels, temperature, alpha),
    )


def kd_loss_hvp(
    grad_output: Tensor, tangent: Tensor, student_logits: Tensor, temperature: float, alpha: float
) -> Tensor:
    """grad_output times each row's Hessian times the row's tangent: [N, V]. Neither teacher nor label matter."""
    student, u = _wide(student_logits), _wide(tangent)
    hvp = torch.zeros_like(student)
    if alpha != 0:
        p = student.softmax(-1)
        hvp = hvp + alpha * p * (u - (p * u).sum(-1, keepdim=True))
    if alpha != 1:
        q = (student / temperature).softmax(-1)
        hvp = hvp + (1 - alpha) * q * (u - (q * u).sum(-1, keepdim=True))
    return (grad_output[:, None] * hvp).to(student_logits.dtype)


def kd_loss_teacher_grad(
    grad_output: Tensor, student_logits: Tensor, teacher_logits: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Gradient of grad_output . kd_loss (with weight 1) with respect to the teacher's logits: [N, V]."""
    log_q = (_wide(student_logits) / temperature).log_softmax(-1)
    log_p = (_wide(teacher_logits) / temperature).log_softmax(-1)
    p = log_p.exp()
    excess = (log_p - log_q).masked_fill(p == 0, 0)
    grad = (1 - alpha) * temperature * p * (excess - (p * excess).sum(-1, keepdim=True))
    return (grad_output[:, None] * grad).to(teacher_logits.dtype)


def kd_loss_third(
    grad_output: Tensor, tangent: Tensor, other: Tensor, student_logits: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Third derivative of each row's loss, applied to two tangents (their order is immaterial): [N, V]."""
    student, u, v = _wide(student_logits), _wide(tangent), _wide(other)
    third = torch.zeros_like(student)
    for share, scale in ((alpha, 1.0), (1 - alpha, temperature)):
        if share == 0:
            continue
        p = (student / scale).softmax(-1)
        centred_u, centred_v = u - (p * u).sum(-1, keepdim=True), v - (p * v).sum(-1, keepdim=True)
        both = p * centred_u * centred_v
        third = third + share / scale * (both - p * both.sum(-1, keepdim=True))
    return (grad_output[:, None] * third).to(student_logits.dtype)
