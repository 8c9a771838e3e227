"""What a model, a batch and a loss are to this library: the forms that users may give them in, checked and unpacked."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ._sharded import is_sharded
from .ops import kd_loss

Loss = Callable[..., Tensor]
"""loss(outputs, targets), or loss(outputs, targets, teacher_logits) for a batch that has them -> [N], one a sample."""

Params = Iterable["str | Tensor | nn.Module"]
"""Which parameters: names of parameters or submodules, parameters, or submodules."""


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of each sample, as the calls of this library want it: cross-entropy, or kd_loss with a teacher.

    Args:
        temperature: T of kd_loss.
        alpha: weight of the cross-entropy part, where there is a teacher.

    Example:
        >>> import torch
        >>> loss = DistillationLoss(temperature=2.0)
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, 0])
        >>> loss(outputs, targets)
        tensor([0.6931, 0.6931, 0.6931])
        >>> loss(outputs, targets, torch.ones(3, 2))
        tensor([0.3466, 0.3466, 0.3466])
    """

    temperature: float = 1.0
    alpha: float = 0.5

    def __call__(self, outputs: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """[N], for outputs [N, V], int64 targets [N] and teacher logits [N, V] or none."""
        if teacher_logits is None:
            return kd_loss(outputs, outputs.detach(), targets, alpha=1.0)  # cross-entropy: the teacher is not read
        return kd_loss(outputs, teacher_logits, targets, temperature=self.temperature, alpha=self.alpha)


class Batch(NamedTuple):
    """Samples: a model's inputs, their targets, and the teacher's logits if there are any."""

    inputs: Any
    targets: Any
    teacher_logits: Tensor | None = None


def unpack_batch(batch: Any, name: str) -> Batch:
    """Read (inputs, targets), (inputs, targets, teacher_logits), or a mapping with those keys."""
    form = "(inputs, targets[, teacher_logits]) or a mapping with those keys"
    if isinstance(batch, Mapping):
        if {"inputs", "targets"} - set(batch) or set(batch) - set(Batch._fields):
            keys = sorted(map(str, batch))
            raise ValueError(
                f"{name} has the keys {keys}, expected inputs, targets and maybe teacher_logits; arguments "
                "of the model by keyword go into inputs: ({'input_ids': ...}, labels)"
            )
        samples = Batch(**batch)
    elif isinstance(batch, (tuple, list)):
        if len(batch) not in (2, 3):
            raise ValueError(f"{name} has {len(batch)} parts, expected {form}")
        samples = Batch(*batch)
    else:
        advice = "; of a DataLoader give one batch, or all of them concatenated" if hasattr(batch, "__iter__") else ""
        raise TypeError(f"{name} is a {type(batch).__name__}, expected {form}{advice}")
    for part, value in zip(Batch._fields, samples, strict=True):
        for leaf in tree_leaves(value):
            if type(leaf).__module__ == "numpy":
                raise TypeError(
                    f"{name}: {part} has a {type(leaf).__name__} of NumPy, expected tensors (torch.as_tensor)"
                )
    # Tensors made in inference mode cannot take part in derivatives; copies of them can.
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(tuple(samples))):
        return Batch(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tuple(samples)))
    return samples


def plain_model(model: Any) -> nn.Module:
    """The module itself, without torch.compile around it: compiled graphs have no second derivatives."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if is_sharded(model):
        raise TypeError(
            "model is spread over processes by fully_shard (FSDP2), which frees its parameters between passes. Give "
            "kdaif_fast.gathered(model), a copy with whole parameters on every rank"
        )
    return model


def select_parameters(model: nn.Module, params: Params | str | Tensor | nn.Module | None) -> dict[str, Tensor]:
    """The parameters that influence is taken over: all that require grad, or those asked for."""
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is None:
        if not trainable:
            raise ValueError("model has no parameter that requires grad")
        return trainable
    if not isinstance(params, (str, Tensor, nn.Module, Iterable)):
        raise TypeError(f"params is a {type(params).__name__}, expected names, parameters or modules")
    wanted = [params] if isinstance(params, (str, Tensor, nn.Module)) else list(params)
    if not wanted:
        raise ValueError("params is empty: name at least one parameter")
    # Tied parameters have several names, and torch.compile adds its own part to them.
    every_name = [(plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    chosen: set[int] = set()
    for item in wanted:
        if isinstance(item, Tensor):
            found, label = [item], f"a tensor of shape {tuple(item.shape)}"
        elif isinstance(item, nn.Module):
            found, label = list(item.parameters()), f"a module {type(item).__name__}"
        elif isinstance(item, str):
            plain = plain_name(item)
            found = [p for name, p in every_name if name == plain or name.startswith(f"{plain}.")]
            label = repr(item)
        else:
            raise TypeError(f"params contains a {type(item).__name__}, expected names, parameters or modules")
        ids = {id(p) for p in found} & {id(p) for p in trainable.values()}
        if not ids:
            raise ValueError(f"params contains {label}, which is no parameter of the model that requires grad")
        chosen |= ids
    return {name: p for name, p in trainable.items() if id(p) in chosen}


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def require_no_batch_statistics(model: nn.Module) -> None:
    """Raise ValueError if a layer normalises by the statistics of the batch: no sample has a gradient of its own then.

    The statistics of a sample (InstanceNorm) are no matter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) is in training mode, where each output depends on the "
                    "whole batch, so that no sample has a loss of its own. Call model.eval() first (statistics as "
                    "learned so far), or use GroupNorm or LayerNorm"
                )
            if module.running_mean is None:
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) has no running statistics and normalises by those of "
                    "the batch, so that no sample has a loss of its own. Use GroupNorm or LayerNorm"
                )


def require_independent_samples(model: nn.Module) -> None:
    """Raise ValueError if a layer mixes the samples of a batch or draws at random: influence has no meaning then."""
    require_no_batch_statistics(model)
    for name, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        inner = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
        if module.training and (drops or inner):
            raise ValueError(f"module {name!r} ({type(module).__name__}) drops units at random. {_RANDOM}")


_RANDOM = "The scores would be those of one random part of the network. Call model.eval() first"


# The switches below are those of the whole process: two threads must not put back each other's.
_SWITCHES = threading.RLock()


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, layers run on kernels that have second derivatives: fused, recurrent and compiled ones have none."""
    with transparent(model), sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def transparent(model: nn.Module) -> Iterator[None]:
    """Within it, recurrent and compiled layers run as the small steps that they are made of, not as one kernel."""
    with _SWITCHES, contextlib.ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # Not torch.backends.cudnn.flags and mkldnn.flags, which touch precisions on the way: they warn, and raise
            # where a precision was set for convolutions alone.
            stack.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
            torch._C._set_cudnn_enabled(False)
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def run_model(model: nn.Module, inputs: Any, name: str) -> Tensor:
    """The model's outputs: the tensor it returns, or the `logits` of what it returns (Hugging Face models).

    Buffers are left as they are: layers that update theirs in training mode update copies.
    """
    states = random_states(model)
    outputs = _tensor_of(call_model(model, inputs, name))
    if any(not torch.equal(a, b) for a, b in zip(states, random_states(model), strict=True)):
        # Somebody drew random numbers: another thread, a model that does not use them, or one that does.
        with torch.no_grad():
            again = _tensor_of(call_model(model, inputs, name))
        if not torch.allclose(
            outputs, again, rtol=1e-2, atol=1e-3 * float(outputs.detach().abs().max()), equal_nan=True
        ):
            raise ValueError(f"the model's outputs on {name} are random. {_RANDOM}")
    return outputs


def random_states(model: nn.Module) -> list[Tensor]:
    """Of the generators that the model may draw from; none of a GPU's while a graph is captured: it gives none then."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    if devices and torch.cuda.is_current_stream_capturing():
        devices.clear()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]


def call_model(model: nn.Module, inputs: Any, name: str, *, updates_buffers: bool = False) -> Any:
    """What the model returns, or the `logits` of that (Hugging Face models).

    Layers that update buffers in training mode update copies, unless `updates_buffers`.
    """
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    positional = (
        () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    )
    try:
        with contextlib.nullcontext() if updates_buffers else _copied_buffers(model):
            outputs = model(*positional, **keywords)
    except (RuntimeError, TypeError) as error:
        if type(error) not in (RuntimeError, TypeError):
            raise
        raise type(error)(f"the model failed on the inputs of {name}: {error}") from error
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return outputs if logits is None else logits


@contextlib.contextmanager
def _copied_buffers(model: nn.Module) -> Iterator[None]:
    """Within it, layers in training mode have copies of their buffers.

    Not torch.func.functional_call, which leaves its copies in a module that the model holds under two names.
    """
    originals = []
    try:
        for module in model.modules():
            if module.training and module._buffers and not isinstance(module, torch.jit.ScriptModule):
                originals.append((module, dict(module._buffers)))
                module._buffers.update({k: None if b is None else b.clone() for k, b in module._buffers.items()})
        yield
    finally:
        for module, buffers in originals:
            module._buffers.update(buffers)


def _tensor_of(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"the model returned a {type(outputs).__name__}, expected a tensor or something with logits")
    return outputs


def sample_losses(loss: Loss | None, outputs: Tensor, batch: Batch, name: str) -> Tensor:
    """The loss of each sample, [N]: the user's loss, or cross-entropy, or kd_loss if there are teacher logits."""
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}, expected a function (outputs, targets) -> [N]")
    if loss is None or isinstance(loss, DistillationLoss):
        _require_classification(outputs, batch.targets, name)
    extra = () if batch.teacher_logits is None else (batch.teacher_logits,)
    try:
        losses = (loss or DistillationLoss())(outputs, batch.targets, *extra)
    except (ValueError, TypeError) as error:
        if type(error) not in (ValueError, TypeError):
            raise
        raise type(error)(f"the loss failed on {name}: {error}") from error
    if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss returned {shape} for {name}, expected ({outputs.shape[0]},): one loss per sample (reduction='none')"
        )
    if outputs.requires_grad and not losses.requires_grad:
        raise ValueError(f"loss returned losses for {name} that do not depend on the outputs")
    return losses


def _require_classification(outputs: Tensor, targets: Any, name: str) -> None:
    if isinstance(targets, Tensor) and outputs.dim() == 2:
        if targets.shape == outputs.shape[:1] and targets.dtype == torch.int64:
            return
        if targets.shape == outputs.shape[:1] and not targets.is_floating_point():
            raise ValueError(
                f"{name}: the targets are {targets.dtype}, expected class indices in int64 (targets.long())"
            )
        if targets.dim() == 1 and len(targets) != len(outputs):
            raise ValueError(f"{name}: {len(targets)} targets for {len(outputs)} samples")
    form = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
    raise ValueError(
        f"{name}: the default loss needs outputs [N, V] and int64 targets [N], but the outputs are "
        f"{tuple(outputs.shape)} and the targets {form}. Give loss=, a function (outputs, targets) -> [N]"
    )
