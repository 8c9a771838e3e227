"""What Kronecker-factored curvature is made of, added up over the batches of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group as Ranks
from .._distributed import add_number_over_ranks, add_over_ranks, gather_over_ranks, rank_in, together
from .._model import Loss
from ..per_sample.groups import Group, visit_groups
from ..per_sample.groups import blocks as sample_blocks
from ..per_sample.recording import Recording
from .blocks import DiagonalBlock, KroneckerBlock
from .layers import Layer, Shape, find_layer
from .output_roots import Fisher, cotangents

Blocks = dict[str, KroneckerBlock | DiagonalBlock]
"""By the name of the weight, in the order of the parameters."""


class Statistics:
    """The passes over the data.

    Args:
        model, batches, parameters, loss: of the operator; so are fisher, draws and seed.
        memory: bytes of layer inputs and gradients that the first pass may keep for the second.
        ranks: over which sums are taken.
        like: a tensor of the device and dtype that statistics have.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        parameters: Mapping[str, Tensor],
        loss: Loss | None,
        fisher: Fisher,
        draws: int,
        seed: int,
        memory: int,
        ranks: Ranks,
        like: Tensor,
    ) -> None:
        self._model, self._batches, self._parameters, self._loss = model, batches, parameters, loss
        self._fisher: Fisher = fisher
        self._draws, self._seed, self._memory, self._ranks, self._like = draws, seed, memory, ranks, like
        self.samples = 0
        self._plain: set[str] = set()  # parameters that have turned out to be used in several ways
        self._layers: list[Layer] | None = None

    def blocks(self, corrects: bool) -> Blocks:
        """The blocks with their bases; `corrects`: and with eigenvalues of their own, which takes a second pass."""
        self._layers = [] if corrects else None
        blocks = self._first_pass()
        for block in blocks.values():
            if isinstance(block, KroneckerBlock):
                block.decompose(self.samples)
        if corrects:
            self._second_pass(blocks)
        return blocks

    # --- the first pass: moments --------------------------------------------------------------------------------

    def _first_pass(self) -> Blocks:
        while True:
            with together(self._ranks, self._like.device):
                owners, several = self._attempt()
            several |= self._agree(owners, several)
            if not several:
                break
            self._plain |= several
        found: Blocks = {}
        for name, parameter in self._parameters.items():
            block = owners.get(name) or DiagonalBlock(name, parameter.numel(), self._like)
            found[block.names[0]] = block
        self._reduce(found)
        return found

    def _agree(self, owners: Blocks, several: set[str]) -> set[str]:
        """The parameters for which ranks differ in what block they call for; what only others have is added, empty."""
        own = {name: block.shape if isinstance(block, KroneckerBlock) else None for name, block in owners.items()}
        kinds: dict[str, Shape | None] = {}
        different: set[str] = set()
        for shapes, others in gather_over_ranks((own, several), self._ranks):
            different |= others | {name for name, shape in shapes.items() if kinds.setdefault(name, shape) != shape}
        for name, shape in kinds.items():
            if shape is not None and name not in owners:
                block = KroneckerBlock(shape, self._like)
                owners.update(dict.fromkeys(block.names, block))
        return different

    def _attempt(self) -> tuple[Blocks, set[str]]:
        """The block of each parameter, and the parameters for which batches differ in what block they call for."""
        owners: Blocks = {}
        several: set[str] = set()
        held: set[int] = set()
        self._bytes = 0
        self._layers = None if self._layers is None else []

        def receive(group: Group, samples: int, first: bool) -> None:
            layer = None if group.names & self._plain else find_layer(group)
            if layer is not None:
                if not self._add_layer(layer, owners, first):
                    several.update(group.names)
                elif self._layers is not None:
                    self._keep(layer, held)
            elif any(isinstance(owners.get(name), KroneckerBlock) for name in group.names):
                several.update(group.names)
            else:
                self._add_squares(group, samples, owners)

        self.samples = self._stream(receive)
        return owners, several

    def _add_layer(self, layer: Layer, owners: Blocks, first: bool) -> bool:
        """Whether the layer is what it was in earlier batches; if so its moments have been added."""
        shape = layer.shape
        names = {shape.weight, shape.bias} - {None}
        block = owners.get(shape.weight)
        if block is None and not any(name in owners for name in names):
            block = KroneckerBlock(shape, self._like)
            owners.update(dict.fromkeys(block.names, block))
        if not isinstance(block, KroneckerBlock) or block.shape != shape:
            return False
        block.add(layer, first)
        return True

    def _add_squares(self, group: Group, samples: int, owners: Blocks) -> None:
        """Add sum_i G_i^2 to the diagonal blocks of the group's parameters."""
        members = group.members

        def add(name: str, squares: Tensor) -> None:
            block = owners.get(name)
            if block is None:
                block = owners[name] = DiagonalBlock(name, self._parameters[name].numel(), self._like)
            block.values += squares.reshape(-1).to(self._like.dtype)

        if all(path.leaf is not None for path, _ in members) and len(members) == len(group.names):
            for path, term in members:
                squares = term.squares()
                add(next(iter(path.parameters)), squares.mT if path.transposes else squares)
            return
        for start, stop in sample_blocks(group, samples):
            for name, grads in group.grads(start, stop).items():
                add(name, torch.linalg.vector_norm(grads, dim=0, dtype=self._like.dtype).square_())

    def _keep(self, layer: Layer, held: set[int]) -> None:
        """Keep a layer for the second pass, as long as the memory for that lasts."""
        assert self._layers is not None
        for tensor in layer.tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                held.add(storage.data_ptr())
                self._bytes += storage.nbytes()
        self._layers.append(layer)
        if self._bytes > self._memory:
            self._layers = None

    def _reduce(self, blocks: Blocks) -> None:
        """Add up over ranks, and make means of squares of the sums."""
        self.samples = int(add_number_over_ranks(self.samples, self._ranks, self._like.device))
        if not self.samples:
            raise ValueError(f"{self._batches.name} is empty on every rank")
        finite = []
        for block in blocks.values():
            for tensor in block.sums():
                add_over_ranks(tensor, self._ranks)
                finite.append(tensor.isfinite().all())
            if isinstance(block, DiagonalBlock):
                block.values /= self.samples
        if not torch.stack(finite).all():
            bad = next(n for n, b in blocks.items() if not all(bool(t.isfinite().all()) for t in b.sums()))
            raise ValueError(f"{self._batches.name}: the gradients in {bad!r} are not finite")

    # --- the second pass: eigenvalues ---------------------------------------------------------------------------

    def _second_pass(self, blocks: Blocks) -> None:
        corrected = [block for block in blocks.values() if isinstance(block, KroneckerBlock)]
        for block in corrected:
            block.values.zero_()

        def add(layer: Layer | None) -> None:
            block = None if layer is None else blocks.get(layer.shape.weight)
            if layer is not None and isinstance(block, KroneckerBlock):
                layer.squares(block.grad_basis, block.input_basis, block.values)

        with together(self._ranks, self._like.device):
            if self._layers is not None:
                while self._layers:
                    add(self._layers.pop())
            else:
                self._stream(
                    lambda group, samples, first: add(None if group.names & self._plain else find_layer(group))
                )
        for block in corrected:
            add_over_ranks(block.values, self._ranks).div_(self.samples)

    def _stream(self, receive: Callable[[Group, int, bool], None]) -> int:
        """Go through the data once; receive every group of parameters with the number of samples, and whether it is
        the first backward pass over the batch. Returns the number of samples.
        """
        # Every pass over the data has the same draws.
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * rank_in(self._ranks))
        chosen, total = list(self._parameters.values()), 0
        for label, batch in self._batches:
            recording = Recording(self._model, batch, self._loss, chosen, name=label)
            if not recording.losses.isfinite().all():
                index = int((~recording.losses.isfinite()).nonzero()[0])
                value = recording.losses[index].item()
                raise ValueError(f"{label}: sample {index} has the loss {value}")
            samples, first = recording.samples, True
            again = self._fisher == "ggn" or self._draws > 1

            def pass_on(group: Group) -> None:
                receive(group, samples, first)  # noqa: B023

            for cotangent in cotangents(recording, self._loss, self._fisher, self._draws, generator, label):
                visit_groups(recording, pass_on, cotangent, again=again, whole_layers=True)
                first = False
            total += samples
        return total
