"""What a model, a batch and a loss are to this library: the forms that users may give them in, checked and unpacked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ops import kd_loss

Loss = Callable[..., Tensor]
"""loss(outputs, targets), or loss(outputs, targets, teacher_logits) for a batch that has them -> [N], one a sample."""


class Batch(NamedTuple):
    """Samples: a model's inputs, their targets, and the teacher's logits if there are any."""

    inputs: Any
    targets: Any
    teacher_logits: Tensor | None = None


def unpack_batch(batch: Any, name: str) -> Batch:
    """Read (inputs, targets), (inputs, targets, teacher_logits), or a mapping with those keys."""
    if isinstance(batch, Mapping):
        missing, unknown = {"inputs", "targets"} - set(batch), set(batch) - set(Batch._fields)
        if missing or unknown:
            raise ValueError(
                f"{name} has the keys {sorted(map(str, batch))}, expected inputs, targets and maybe teacher_logits"
            )
        return Batch(**batch)
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (2, 3):
            raise ValueError(f"{name} has {len(batch)} parts, expected (inputs, targets[, teacher_logits])")
        return Batch(*batch)
    raise TypeError(
        f"{name} is a {type(batch).__name__}, expected a tuple (inputs, targets[, teacher_logits]) or a mapping"
    )


def select_parameters(model: nn.Module, params: Iterable[str | Tensor] | None) -> dict[str, Tensor]:
    """The parameters that influence is taken over: all that require grad, or those asked for, by name or by themselves.

    A name may also be that of a submodule, for all of its parameters.
    """
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is None:
        if not trainable:
            raise ValueError("model has no parameter that requires grad")
        return trainable
    if isinstance(params, str):
        params = [params]
    chosen: dict[str, Tensor] = {}
    for wanted in params:
        if isinstance(wanted, Tensor):
            found = {name: p for name, p in trainable.items() if p is wanted}
            label = f"a tensor of shape {tuple(wanted.shape)}"
        else:
            found = {name: p for name, p in trainable.items() if name == wanted or name.startswith(f"{wanted}.")}
            label = repr(wanted)
        if not found:
            raise ValueError(f"params contains {label}, which is no parameter of the model that requires grad")
        chosen.update(found)
    if not chosen:
        raise ValueError("params is empty: name at least one parameter")
    return {name: p for name, p in trainable.items() if name in chosen}


def require_independent_samples(model: nn.Module) -> None:
    """Raise ValueError if a layer mixes the samples of a batch or draws at random: influence has no meaning then."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is in training mode, where each output depends on the "
                "whole batch, so that no sample has a loss of its own. Call model.eval() first (statistics as "
                "learned so far), or use GroupNorm or LayerNorm"
            )
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        inner = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
        if random or inner:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) drops units at random, so that every product of the solve "
                "would see another network. Call model.eval() first"
            )


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, layers run on kernels that have second derivatives: fused attention and recurrences have none."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Not mkldnn.flags(enabled=False), which warns about settings that it touches on the way.
            stack.callback(setattr, torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        yield


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs: the tensor it returns, or the `logits` of what it returns (Hugging Face models)."""
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model returned a {type(outputs).__name__}, expected a tensor or an object with .logits")
    return outputs


def sample_losses(loss: Loss | None, outputs: Tensor, batch: Batch, name: str) -> Tensor:
    """The loss of each sample, [N]: the user's loss, or cross-entropy, or kd_loss if there are teacher logits."""
    if loss is None:
        return _default_loss(outputs, batch, name)
    extra = () if batch.teacher_logits is None else (batch.teacher_logits,)
    losses = loss(outputs, batch.targets, *extra)
    if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss returned {shape} for {name}, expected ({outputs.shape[0]},): one loss per sample (reduction='none')"
        )
    return losses


def _default_loss(outputs: Tensor, batch: Batch, name: str) -> Tensor:
    targets = batch.targets
    is_classification = (
        outputs.dim() == 2
        and isinstance(targets, Tensor)
        and targets.dtype == torch.int64
        and targets.shape == outputs.shape[:1]
    )
    if not is_classification:
        form = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"{name}: the default loss needs outputs [N, V] and int64 targets [N], but the outputs are "
            f"{tuple(outputs.shape)} and the targets {form}. Give loss=, a function (outputs, targets) -> [N]"
        )
    if batch.teacher_logits is None:
        return kd_loss(outputs, outputs.detach(), targets, alpha=1.0)  # cross-entropy: the teacher is not read
    return kd_loss(outputs, batch.teacher_logits, targets)
