"""linear_kd_loss: the distillation loss of hidden states and a head, without the logits of all rows at once.

    l = weight * (alpha CE(y, s) + (1 - alpha) T^2 KL(softmax(t / T) || softmax(s / T))),    s = h W^T + b

Two forms. In plain eager code the rows go through in chunks (_linear_chunks.py); for a sum or mean the gradients are
taken in the forward pass, and the backward pass scales them. Under a transform or a compiler, and for derivatives of
derivatives, the decomposed form: all logits, then `kd_loss`, both of which torch differentiates by their own rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _derive
from ..reference import linear_kd_loss as reference
from . import _check
from ._linear_chunks import Options, Projection, default_chunk_rows, run
from .losses import kd_loss

REDUCTIONS = ("mean", "sum", "none")
_OP = "linear_kd_loss"


class _Inputs(NamedTuple):
    """What has a derivative; rows are one axis."""

    hidden: Tensor  # [N, D]
    head_weight: Tensor
    head_bias: Tensor | None
    teacher: Tensor  # [N, E] or [N, V]
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    weight: Tensor | None  # [N], in the accumulation dtype

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return reference.accumulation_dtype(*self[:6])


class _Call(NamedTuple):
    """What has no derivative."""

    labels: Tensor  # [N]
    reduction: str
    ignore_index: int
    options: Options


def _without_autocast(x: Tensor) -> Any:
    """Products of matrices here have the dtypes that they are given."""
    device = x.device.type
    # Asked of other devices only: the compiler of torch 2.11 cannot follow the question.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if has_autocast else nullcontext()


def _decomposed(x: _Inputs, call: _Call) -> Tensor:
    """All logits at once: [N], or a scalar."""
    ignored = (call.labels == call.ignore_index)[:, None]
    # What ignored rows hold, NaN perhaps, must not get into the heads' gradients as 0 * NaN.
    hidden = x.hidden.masked_fill(ignored, 0)
    teacher = x.teacher if x.teacher_head is None else x.teacher.masked_fill(ignored, 0)
    losses = kd_loss(
        reference.logits(hidden, x.head_weight, x.head_bias, x.dtype),
        reference.logits(teacher, x.teacher_head, x.teacher_bias, x.dtype),
        call.labels,
        weight=x.weight,
        temperature=call.options.temperature,
        alpha=call.options.alpha,
        reduction="none",
        ignore_index=call.ignore_index,
    )
    return reference.reduce(losses, call.labels, call.ignore_index, call.reduction)  # looks at no value


def chooses_rows(labels: Tensor) -> bool:
    """Whether ignored rows are left out; else, where to ask how many there are would wait for a GPU, they are zeros."""
    return labels.device.type == "cpu"


class _Rows:
    """The rows that are not ignored, or all, and the two projections of them."""

    def __init__(self, x: _Inputs, call: _Call) -> None:
        self.call = call
        self.N, self.V = call.labels.shape[0], x.head_weight.shape[0]
        is_kept = call.labels != call.ignore_index
        self.kept, self.ignored = None, None
        if chooses_rows(call.labels):
            kept = is_kept.nonzero()[:, 0]
            self.kept = None if kept.shape[0] == self.N else kept
        else:
            self.ignored = ~is_kept
        self.student = Projection(x.hidden, x.head_weight, x.head_bias, self.kept, self.ignored, x.dtype)
        self.teacher = Projection(x.teacher, x.teacher_head, x.teacher_bias, self.kept, self.ignored, x.dtype)
        self.factor = torch.ones((), dtype=x.dtype, device=x.hidden.device)
        if call.reduction == "mean":
            self.factor = self.factor / is_kept.sum().clamp(min=1)
        scale = self.factor.expand(self.N) if x.weight is None else self.factor * x.weight
        self.scale = self.of(scale if self.ignored is None else scale.masked_fill(self.ignored, 0))

    def of(self, values: Tensor) -> Tensor:
        """[N] -> [K], of the rows that are not ignored."""
        return values if self.kept is None else values[self.kept]

    def put_back(self, values: Tensor) -> Tensor:
        """[K] -> [N], 0 in the rows that are."""
        return values if self.kept is None else values.new_zeros(self.N).index_copy(0, self.kept, values)

    def want(self, needs: Sequence[bool]) -> None:
        """Say for which of the inputs the next run forms gradients."""
        self.student.want(*needs[:3])
        self.teacher.want(*needs[3:6])

    def run(self, scale: Tensor | None) -> Tensor:
        """Losses [K] with weight 1, and the gradients wanted if there is a scale."""
        with _without_autocast(self.student.features):
            return run(self.student, self.teacher, self.of(self.call.labels), scale, self.V, self.call.options)

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the six inputs that make logits, in the accumulation dtype."""
        s, t = self.student, self.teacher
        return s.d_features, s.d_head, s.d_bias, t.d_features, t.d_head, t.d_bias

    def reduced(self, losses: Tensor) -> Tensor:
        """The loss that the caller asked for, of losses with weight 1."""
        weighted = self.scale * losses
        return self.put_back(weighted) if self.call.reduction == "none" else weighted.sum()


class _Chunked(torch.autograd.Function):
    """The chunked form, for eager code that no transform is looking at."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> Tensor:
        rows, needs = _Rows(_Inputs._make(inputs), call), ctx.needs_input_grad[1:]
        is_early = call.reduction != "none" and any(needs[:6])
        if is_early:
            rows.want(needs)
        losses = rows.run(rows.scale if is_early else None)
        d_weight = rows.put_back(rows.factor * losses) if needs[6] else None
        ctx.call = call
        # Autograd keeps no tensors of inference mode; nothing ever changes those in place, so we can.
        ctx.inference = [x if x is not None and x.is_inference() else None for x in inputs]
        saved = [None if is_ours is not None else x for x, is_ours in zip(inputs, ctx.inference, strict=True)]
        ctx.save_for_backward(*saved, *(rows.gradients if is_early else ()), d_weight)
        return rows.reduced(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs = _Inputs._make(x if mine is None else mine for x, mine in zip(saved[:7], ctx.inference, strict=True))
        is_scalar = ctx.call.reduction != "none"
        if torch.is_grad_enabled() or not (is_scalar or _has_values(upstream)):
            return None, *_gradients_of_decomposed(inputs, needs, upstream, ctx.call)
        if is_scalar:
            gradients = _scaled(saved[7:-1], inputs[:6], upstream)
        elif any(needs[:6]):
            rows = _Rows(inputs, ctx.call)
            rows.want(needs)
            from_above = upstream if rows.ignored is None else upstream.masked_fill(rows.ignored, 0)
            rows.run(rows.scale * rows.of(from_above))
            gradients = rows.gradients
        else:
            gradients = ()
        pairs = zip_longest(gradients, inputs[:6])
        of_logits = [g.to(x.dtype) if g is not None and x is not None else None for g, x in pairs]
        d_weight = saved[-1]
        return None, *of_logits, None if d_weight is None else upstream * d_weight


def _has_values(upstream: Tensor) -> bool:
    """Whether this is no batch of gradients, of torch.func's vmap or of the one that autograd has for itself."""
    try:
        upstream.untyped_storage()  # a batch has none of its own; to look at a value would wait for a GPU
    except RuntimeError:
        return False
    return True


def _scaled(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], factor: Tensor
) -> Sequence[Tensor | None]:
    """factor * gradient in the input's dtype, never in place: the graph may be walked again."""
    has_values = _has_values(factor)
    if has_values and factor.device.type == "cpu" and factor.item() == 1:
        return gradients

    def scaled(gradient: Tensor, x: Tensor) -> Tensor:
        if not has_values:
            return factor * gradient
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=x.dtype))

    pairs = zip_longest(gradients, inputs)
    return [None if g is None or x is None else scaled(g, x) for g, x in pairs]


def _gradients_of_decomposed(
    inputs: _Inputs, needs: Sequence[bool], upstream: Tensor, call: _Call
) -> list[Tensor | None]:
    """What a derivative of the derivative needs: gradients that have a graph of their own."""
    is_differentiated_again = torch.is_grad_enabled()
    with torch.enable_grad(), _without_autocast(upstream):
        # Views: of a head that the hidden states depend on too (tied embeddings), only the direct part is meant here.
        views = [
            x if x is None else x.view_as(x) if need else x.clone() if x.is_inference() else x
            for x, need in zip(inputs, needs, strict=True)
        ]
        wanted = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
        loss = _decomposed(_Inputs._make(views), call)
        found = torch.autograd.grad(
            loss, wanted, upstream, create_graph=is_differentiated_again, materialize_grads=True
        )
    gradients = iter(found)
    return [next(gradients) if need else None for need in needs]


def linear_kd_loss(
    hidden: Tensor,
    head_weight: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """`kd_loss` of the logits hidden @ head_weight^T + head_bias, of which only a few rows are there at a time.

    alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), in nats. For "mean" and "sum" the gradients are
    formed in the forward pass, chunk by chunk, if anything needs them; the backward pass scales them by what comes from
    above. For "none" the backward pass goes through the chunks again. Rows that are ignored cost nothing on a CPU; on a
    GPU, which nothing waits for, as much as others.

    Args:
        hidden: [..., D], the student's last hidden states; float32, float64, bfloat16 or float16.
        head_weight: [V, D], the student's head, of any of these dtypes; V classes.
        teacher: hidden states [..., E] if there is a teacher_head, else logits [..., V]. Not read if alpha is 1.
        labels: int64 [...], the class of each row, 0 <= label < V, or ignore_index.
        head_bias: [V].
        teacher_head: [V, E].
        teacher_bias: [V]; only with a teacher_head.
        weight: [...], factor of each row's loss; may be negative, and is differentiable. Default 1.
        temperature: T > 0, divides both sets of logits in the KL part; its gradient is brought back to scale by T^2.
        alpha: weight of the cross-entropy part, in [0, 1].
        reduction: "none", "sum", or "mean" over the rows that are not ignored (0 if there are none; not divided by the
            sum of weights).
        ignore_index: rows with this label have the loss 0 and no gradient, whatever else they hold.
        chunk_rows: rows at a time. Default: 64 to 1024 on a CPU, 256 to 8192 on a GPU, fewer for more classes. The
            result does not depend on it beyond rounding.

    Returns:
        [...] for "none", else a scalar; float64 if a tensor that makes logits is, else float32. So are the logits, also
        of low-precision hidden states: rounding them would cost percents of the gradient. Under autocast too; only on
        a GPU do hidden states and heads get autocast's dtype first. Gradients have their input's dtype, and are summed
        in the loss's.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, labels out of range (on the CPU), a teacher_bias without a
            teacher_head, a temperature that is not positive, alpha outside [0, 1], an unknown reduction, chunk_rows
            below 1. Each names the argument and its value, before anything is computed.

    Memory: with compiled kernels, at most two chunks besides inputs, outputs and what follows; a chunk is chunk_rows x
        V numbers of the logits' dtype (32 MiB by default on a CPU for 8,000 to 130,000 classes, 512 MiB on a GPU).
        Besides: the hidden states of a chunk's rows; for low precision on a CPU, 4 MiB of a head. From the forward to
        the backward pass: gradients of what needs them, in the logits' dtype; a second copy of them while the backward
        pass scales or casts them. A teacher that requires a gradient gets it in chunks too, which takes time: detach
        it if that is not meant.
        Transforms of torch.func, forward mode, torch.compile and derivatives of gradients (create_graph=True) are right
        too, but take the decomposed form: N x V logits of student and teacher, and their gradients.

    Speed: bound by the products of matrices, on a CPU in float32. For bfloat16 on a processor with bfloat16 units,
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" (yours to set: it is the whole process's) halves the time,
        and loses nothing in the logits.

    Source: as `kd_loss`; chunks of logits with the gradient in the forward pass as in Liger Kernel (arXiv 2410.10989).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import linear_kd_loss
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 3.0, 0.0]])
        >>> loss = linear_kd_loss(hidden, head, teacher_logits, torch.tensor([0, 1]), temperature=2.0)
        >>> print(loss.detach())
        tensor(0.3593)
        >>> loss.backward()
    """
    tensors = {
        "hidden": hidden,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "teacher": teacher,
        "teacher_head": teacher_head,
        "teacher_bias": teacher_bias,
        "weight": weight,
    }
    _check_tensors(tensors, labels)
    _check_options(temperature, alpha, reduction, ignore_index, chunk_rows)
    V = head_weight.shape[0]
    is_plain = _is_plain(labels, *tensors.values())
    if is_plain and labels.device.type == "cpu":
        _check.are_labels(_OP, "labels", labels, V, ignore_index)
    rows = chunk_rows or (default_chunk_rows(V, hidden.device) if is_plain else 1)
    options = Options(float(temperature), float(alpha), rows, ignore_index)
    call = _Call(labels.reshape(-1), reduction, ignore_index, options)
    inputs = _inputs(tensors)
    with _without_autocast(hidden):
        loss = _loss(inputs, call, is_plain)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _inputs(tensors: dict[str, Any]) -> _Inputs:
    """Rows in one axis, in the dtypes they are multiplied in."""
    x = _Inputs(**tensors)
    device = x.hidden.device.type
    is_cast = device == "cuda" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else None

    def low(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    return _Inputs(
        low(x.hidden).reshape(-1, x.hidden.shape[-1]),
        low(x.head_weight),
        x.head_bias,
        low(x.teacher).reshape(-1, x.teacher.shape[-1])
        if x.teacher_head is not None
        else x.teacher.reshape(-1, x.teacher.shape[-1]),
        None if x.teacher_head is None else low(x.teacher_head),
        x.teacher_bias,
        None if x.weight is None else x.weight.to(x.dtype).reshape(-1),
    )


def _loss(inputs: _Inputs, call: _Call, is_plain: bool) -> Tensor:
    if not is_plain:
        return _decomposed(inputs, call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Chunked.apply(call, *inputs)
    with torch.no_grad():
        rows = _Rows(inputs, call)
        return rows.reduced(rows.run(None))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether this is eager code on ordinary tensors, whose values are there to look at."""
    there = [x for x in tensors if x is not None]
    if _derive.is_transformed(*there):
        return False
    # Also where none of ours is transformed: an autograd.Function may not run inside a transform. If torch has moved
    # this name it will say so itself, in an error.
    is_inside = getattr(torch._C, "_are_functorch_transforms_active", bool)
    return not is_inside() and all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" for x in there)


def _check_tensors(tensors: dict[str, Any], labels: Any) -> None:
    hidden, head, teacher_head = tensors["hidden"], tensors["head_weight"], tensors["teacher_head"]
    for name, shape in (("hidden", "[..., D]"), ("head_weight", "[V, D]"), ("teacher", "[..., E] or [..., V]")):
        _check.is_floating(_OP, name, tensors[name], shape)
    for name, shape in (("head_bias", "[V]"), ("teacher_head", "[V, E]"), ("teacher_bias", "[V]"), ("weight", "[...]")):
        if tensors[name] is not None:
            _check.is_floating(_OP, name, tensors[name], shape)
    teacher, rows, device = tensors["teacher"], hidden.shape[:-1], hidden.device
    if head.dim() != 2 or head.shape[0] == 0 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{_OP}: head_weight has shape {tuple(head.shape)}, expected [V, {hidden.shape[-1]}] with V >= 1 classes "
            "(hidden's last axis is the second)"
        )
    V = head.shape[0]
    if teacher_head is None:
        if tensors["teacher_bias"] is not None:
            raise ValueError(f"{_OP}: teacher_bias is given without teacher_head, expected None beside teacher logits")
        _check.is_like(_OP, "teacher", teacher, (*rows, V), "logits (there is no teacher_head)", device)
    else:
        _check.is_like(_OP, "teacher", teacher, (*rows, teacher.shape[-1]), "hidden states of hidden's rows", device)
        _check.is_like(_OP, "teacher_head", teacher_head, (V, teacher.shape[-1]), "[V, teacher's last axis]", device)
    _check.is_like(_OP, "head_weight", head, head.shape, "hidden", device)
    _check.is_like(_OP, "labels", labels, rows, "hidden without its last axis", device)
    if labels.dtype != torch.int64:
        raise TypeError(f"{_OP}: labels have dtype {labels.dtype}, expected torch.int64 class indices")
    for name, like, other in (("head_bias", (V,), "[V]"), ("teacher_bias", (V,), "[V]"), ("weight", rows, "labels")):
        if tensors[name] is not None:
            _check.is_like(_OP, name, tensors[name], like, other, device)


def _check_options(temperature: Any, alpha: Any, reduction: Any, ignore_index: Any, chunk_rows: Any) -> None:
    _check.is_positive(_OP, "temperature", temperature)
    _check.is_share(_OP, "alpha", alpha)
    _check.is_choice(_OP, "reduction", reduction, REDUCTIONS)
    _check.is_integer(_OP, "ignore_index", ignore_index)
    if chunk_rows is not None:
        _check.is_integer(_OP, "chunk_rows", chunk_rows, least=1)
