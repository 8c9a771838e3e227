"""What a case of the zoo is, and the gradient of every sample's loss as a loop over samples gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

CLASSES = 3

CASES: dict[str, Case] = {}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """[N], the mean over the positions of outputs [N, T, V]."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


def take_rows(inputs: Any, i: int) -> Any:
    return tree_map(lambda x: x[i : i + 1] if isinstance(x, Tensor) else x, inputs)


@dataclass(frozen=True)
class Case:
    """A model, and batches for it.

    Args:
        build: the model; every one in the zoo is run in float64.
        inputs: of n samples, in the first batch.
        later: in all others, if they are of another kind.
        targets: of n samples.
        loss: of each sample; None: the library's default, which is cross-entropy.
        take: the inputs of sample i alone.
        alone: whether a sample's gradient is the same in a batch of its own; if not, truth is the derivative of its
            loss in the whole batch.
        sizes: of the batches in the order in which one model sees them. The second finds what was learned from the
            first.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    later: Callable[[int], Any] | None = None
    targets: Callable[[int], Any] = lambda n: torch.randint(CLASSES, (n,))
    loss: Callable[..., Tensor] | None = None
    take: Callable[[Any, int], Any] = take_rows
    alone: bool = True
    sizes: tuple[int, ...] = (4, 3)

    def model(self) -> nn.Module:
        return self.build().double().eval()

    def batch(self, n: int, is_first: bool = True) -> tuple[Any, Any]:
        inputs = self.inputs if is_first or self.later is None else self.later
        return wide(inputs(n)), self.targets(n)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        for index, n in enumerate(self.sizes):
            yield self.batch(n, is_first=index == 0)

    def losses(self, model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
        return (self.loss or cross_entropy)(run(model, batch[0]), batch[1])

    def truth(self, model: nn.Module, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        return self._each_alone(model, batch) if self.alone else self.each_in_the_batch(model, batch)

    def _each_alone(self, model: nn.Module, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        inputs, targets = batch
        count = len(targets)
        losses = [self.losses(model, (self.take(inputs, i), targets[i : i + 1])).sum() for i in range(count)]
        return _gradients(model, losses)

    def each_in_the_batch(self, model: nn.Module, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        return _gradients(model, list(self.losses(model, batch)))


def add(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any], **options: Any) -> None:
    assert name not in CASES, f"two cases are called {name}"
    CASES[name] = Case(build, inputs, **options)


def wide(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    parameters = trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses:
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        else:
            grads = (None,) * len(parameters)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(parameter) if grad is None else grad.to_dense().detach())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def flat(tree: Mapping[str, Tensor], leading: int = 1) -> Tensor:
    """[N, P]: the entries of a dictionary one after another."""
    return torch.cat([x.reshape(*x.shape[:leading], -1) for x in tree.values()], leading)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-10) -> None:
    """Every entry agrees relative to its own largest element.

    What is zero in exact arithmetic (the bias of an attention's keys) is rounding noise in both: elements below 1e-5
    of what the whole dictionary holds are compared with that.
    """
    assert list(actual) == list(expected)
    largest = max((float(x.abs().max()) for x in expected.values() if x.numel()), default=0.0)
    for name, wanted in expected.items():
        own = float(wanted.abs().max()) if wanted.numel() else 0.0
        tolerance = relative * max(own, 1e-5 * largest)
        torch.testing.assert_close(
            actual[name], wanted, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert_same({"result": actual}, {"result": expected}, relative)
