"""Every sample's gradient, materialised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .independence import require_independence
from .paths import Path
from .recording import Recording
from .terms import Term


@torch.inference_mode(False)
def per_sample_grads(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    params: Params | None = None,
    out: Mapping[str, Tensor] | None = None,
    check_independence: bool = False,
) -> dict[str, Tensor]:
    """The gradient of each sample's loss in every parameter.

    N x P elements: where only products of these gradients are wanted, per_sample_grad_dots, per_sample_grad_norms and
    pairwise_grad_dots need far less. Into fresh memory, page faults cost more than the arithmetic: pass `out` where the
    call is repeated.

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        out: buffers to write into, contiguous, of the shapes and dtypes that are returned; what they hold is lost.
        check_independence: make sure that samples do not influence each other's outputs, at the cost of two more
            forward passes.

    Returns:
        {name: [N, *parameter.shape]}, in the parameter's dtype; zeros for a parameter that takes no part.

    Raises:
        ValueError: buffers that do not fit, a module that mixes samples, a loss that is not [N].

    Memory: the result, and that of one training step without the gradients.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> per_sample_grads(model, batch)["weight"]
        tensor([[[-0.5000, -1.0000],
                 [ 0.5000,  1.0000]],
        <BLANKLINE>
                [[ 1.5000,  2.0000],
                 [-1.5000, -2.0000]]])
    """
    if check_independence:
        require_independence(model, batch)
    recording = Recording(model, batch, loss, params, checks=check_independence)
    buffers = _read_buffers(out, recording)
    grads: dict[str, Tensor] = {}

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            _add_term(grads, buffers, recording, path, term)

    recording.visit(receive)
    for name, parameter in recording.parameters.items():
        if name not in grads:
            buffer = buffers.get(name)
            grads[name] = parameter.new_zeros(recording.samples, *parameter.shape) if buffer is None else buffer.zero_()
    owned: set[int] = set()
    for name, grad in grads.items():  # two biases of one sum have the same gradient, but not the same memory
        if name not in buffers and grad.numel():
            if grad.untyped_storage().data_ptr() in owned:
                grads[name] = grad = grad.clone()
            owned.add(grad.untyped_storage().data_ptr())
    return {name: buffers.get(name, grads[name].detach()) for name in recording.parameters}


def _add_term(
    grads: dict[str, Tensor], buffers: dict[str, Tensor], recording: Recording, path: Path, term: Term
) -> None:
    first = next(iter(path.parameters))
    if first not in grads and first in buffers:
        view = path.leaf_view(buffers[first])
        if view is not None and view.dtype == term.dtype:
            term.grads(out=view)
            grads[first] = buffers[first]
            return
    for name, pulled in path.pull(term.grads()).items():
        if name in grads:
            grads[name] += pulled
        elif name in buffers:
            grads[name] = buffers[name].copy_(pulled)
        else:
            # One that others will be added to must be its own memory.
            pulled = pulled.to(recording.parameters[name].dtype)
            grads[name] = pulled.clone() if recording.uses(name) > 1 else pulled.contiguous()


def _read_buffers(out: Mapping[str, Tensor] | None, recording: Recording) -> dict[str, Tensor]:
    if out is None:
        return {}
    if set(out) != set(recording.parameters):
        different = sorted(set(out) ^ set(recording.parameters))
        raise ValueError(f"out and the parameters differ in their names: {', '.join(different[:5])}")
    for name, parameter in recording.parameters.items():
        buffer, shape = out[name], (recording.samples, *parameter.shape)
        if not isinstance(buffer, Tensor) or tuple(buffer.shape) != shape or buffer.dtype != parameter.dtype:
            form = f"{tuple(buffer.shape)} {buffer.dtype}" if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"out[{name!r}] is {form}, expected {shape} {parameter.dtype}")
        if buffer.device != parameter.device or not buffer.is_contiguous() or buffer.requires_grad:
            raise ValueError(
                f"out[{name!r}] must be a contiguous tensor on {parameter.device} that does not require grad"
            )
    return dict(out)
