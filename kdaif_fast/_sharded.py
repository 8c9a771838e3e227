"""Models whose parameters are spread over processes by fully_shard (FSDP2)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# Where the hooks are from that gather a layer's parameters before it runs and free them afterwards.
HOOKS_OF = "torch.distributed.fsdp"

# What a module's attributes are called in which torch.distributed keeps what it knows of it.
STATE_OF = "__composable_api"


def gathered(model: nn.Module) -> nn.Module:
    """A copy of a model that fully_shard has spread over processes, with whole parameters on every one of them.

    Influence and curvature walk a kept graph many times, in both directions; fully_shard frees a layer's parameters as
    soon as it has run, and gathers them for one backward pass only. The copy is an ordinary module: every call of this
    library takes it, flat vectors [P] are over the whole parameters, and the same on every rank. With `group="world"`
    every rank brings its own samples, as it does in training.

    Args:
        model: a module after fully_shard, all of it or parts; any other module is copied too.

    Returns:
        The copy, in the same mode, with the parameters of now: it does not follow the training. What is not sharded
        (buffers, other parameters) it shares with the model. It computes in the dtype that the parameters are kept in,
        whatever MixedPrecisionPolicy says.

    Raises:
        TypeError: this is no module.

    Memory: all parameters on every rank, once, for as long as the copy lives. All ranks have to call together.

    Example:
        >>> import torch
        >>> from kdaif_fast.curvature import GaussNewton
        >>> whole = gathered(torch.nn.Linear(2, 3))  # after fully_shard, in a real run
        >>> GaussNewton(whole, (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))).size
        9
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    modules = list(model.modules())
    for module in modules:
        if _is_sharded(module):
            module.reshard()  # type: ignore[operator]  # what a forward pass has gathered may be freed at any time
    copies: dict[int, Any] = {}  # what deepcopy takes instead, by id
    for tensor in (*model.parameters(), *model.buffers()):
        copies[id(tensor)] = _whole(tensor)
    for module in modules:
        kind = type(module)
        copies[id(module)] = object.__new__(kind.__bases__[1] if _is_sharded(module) else kind)
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith(STATE_OF):
                continue
            if name.endswith("hooks") and isinstance(value, dict):
                value = type(value)({key: hook for key, hook in value.items() if not _is_of_sharding(hook)})
            vars(copies[id(module)])[name] = copy.deepcopy(value, copies)
    whole: nn.Module = copies[id(model)]
    return whole


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has been called on the model or on a part of it."""
    return any(map(_is_sharded, model.modules()))


def _is_sharded(module: nn.Module) -> bool:
    # fully_shard makes a class of (FSDPModule, the module's own class).
    return any(kind.__name__ == "FSDPModule" and kind.__module__.startswith(HOOKS_OF) for kind in type(module).__mro__)


def _is_of_sharding(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # some are wrapped
    return str(getattr(function, "__module__", "")).startswith(HOOKS_OF)


def _whole(tensor: Any) -> Any:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.detach().full_tensor()  # a DTensor's
    if not isinstance(tensor, nn.Parameter):
        return full
    return nn.Parameter(full, requires_grad=tensor.requires_grad)
