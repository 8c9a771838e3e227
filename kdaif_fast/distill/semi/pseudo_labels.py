"""Labels that a teacher gives to unlabelled samples, and the loader that joins these to the labelled ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from ..finite import LossNotFiniteError
from ..indexed import (
    LABELS,
    IndexedBatch,
    IndexedCollate,
    IndexedDataset,
    IndexedSample,
    as_batch,
    visited,
    with_indices,
)

KINDS = ("soft", "hard")


class PseudoLabels:
    """The teacher's word on U unlabelled samples, as it was at the start of a round, and which of them take part in it.

    Samples have one numbering: the L labelled ones first, 0 ... L - 1, the unlabelled ones after, L ... L + U - 1.

    Args:
        labelled: L.
        unlabelled: U.
        kind: "soft", probabilities [U, V], or "hard", the largest one's class, int64 [U].
        threshold: samples of which the teacher is less sure than that take no part.
        generator: what the order of the samples is drawn from; None: torch's own.

    Memory: U * V numbers, or U, on the CPU.
    """

    def __init__(
        self,
        labelled: int,
        unlabelled: int,
        kind: str = "soft",
        threshold: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"pseudo_labels is {kind!r}, expected one of {', '.join(KINDS)}")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold!r}, expected a number in [0, 1)")
        self.labelled, self.unlabelled, self.kind, self.threshold = labelled, unlabelled, kind, float(threshold)
        self.round = 0
        """Rounds begun."""
        self.targets: Tensor | None = None
        """What the unlabelled samples are taught as, [U, V] or int64 [U]; None before the first round."""
        self.confidence = torch.zeros(unlabelled)
        """The largest probability of each unlabelled sample, [U]."""
        self.used = torch.zeros(unlabelled, dtype=torch.bool)
        """Which unlabelled samples take part in this round, [U]."""
        self.sampler = SubsetRandomSampler(range(labelled), generator=generator)

    def renew(self, logits: Iterable[Tensor]) -> Tensor:
        """Begin a round with the teacher's logits of the unlabelled samples, in order.

        Returns:
            The places, in the numbering of all samples, of those whose most likely class is another than before.

        Raises:
            LossNotFiniteError: the teacher's probabilities are not finite.
            ValueError: every sample is below the threshold. In both cases all is as it was.
        """
        probabilities = torch.cat([rows.detach().to(torch.promote_types(rows.dtype, torch.float32)) for rows in logits])
        probabilities = probabilities.softmax(1).cpu()
        confidence, classes = probabilities.max(1)
        bad = (~confidence.isfinite()).nonzero()[:, 0]
        if len(bad):
            raise LossNotFiniteError("the teacher's probability", (bad + self.labelled).tolist())
        used = confidence >= self.threshold
        if not bool(used.any()):
            raise ValueError(
                f"threshold is {self.threshold:g}, but the teacher is sure of no unlabelled sample by more than "
                f"{float(confidence.max()):.4g}, so that none takes part in round {self.round + 1}: expected a lower "
                "threshold, or more teacher_epochs"
            )
        changed = torch.zeros(0, dtype=torch.int64)
        if self.targets is not None:
            before = self.targets.argmax(1) if self.kind == "soft" else self.targets
            changed = (before != classes).nonzero()[:, 0] + self.labelled
        self.targets = probabilities if self.kind == "soft" else classes
        self.confidence, self.used = confidence, used
        self.round += 1
        self._choose()
        return changed

    def merge(self, indices: Tensor, labels: Any) -> Tensor:
        """The targets of the samples at these places, [n, V] or int64 [n]; before the first round the labels alone.

        Args:
            indices: [n].
            labels: int64 [n], which count for the labelled samples only.

        Raises:
            TypeError, ValueError: labels of labelled samples that are no classes.
        """
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            form = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"the labels of labelled_loader are {form}, expected torch.int64 (n,)")
        if self.targets is None:
            return labels
        targets = self.targets.to(labels.device)
        is_labelled = (indices < self.labelled).to(labels.device)
        classes = targets.shape[1] if self.kind == "soft" else None
        self._require_classes(indices, labels, is_labelled, classes)
        own = targets[(indices.to(labels.device) - self.labelled).clamp(min=0)]
        if classes is None:
            return torch.where(is_labelled, labels, own)
        given = torch.nn.functional.one_hot(labels.where(is_labelled, 0), classes)
        return torch.where(is_labelled[:, None], given.to(own.dtype), own)

    def _require_classes(self, indices: Tensor, labels: Tensor, is_labelled: Tensor, classes: int | None) -> None:
        if labels.device.type != "cpu":
            return
        bad = is_labelled & ((labels < 0) | (labels >= (classes or torch.iinfo(torch.int64).max)))
        if bool(bad.any()):
            end = "" if classes is None else f", expected 0 ... {classes - 1}"
            raise ValueError(
                f"the labelled samples at the indices {indices[bad][:10].tolist()} have the labels "
                f"{labels[bad][:10].tolist()}, which are no classes{end}. Samples without a label belong into "
                "unlabelled_loader"
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors and numbers."""
        return {"round": self.round, "targets": self.targets, "confidence": self.confidence, "used": self.used}

    def require_fitting(self, state: Mapping[str, Any]) -> None:
        """ValueError if the state is of another number of samples."""
        if len(state["used"]) != self.unlabelled:
            raise ValueError(f"the state is of {len(state['used'])} unlabelled samples, expected {self.unlabelled}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the round that this state is of; ValueError if it is of another number of samples."""
        self.require_fitting(state)
        self.round, self.targets = state["round"], state["targets"]
        self.confidence, self.used = state["confidence"], state["used"]
        self._choose()

    def _choose(self) -> None:
        """Have the sampler draw from the labelled samples and the unlabelled ones of this round."""
        places = self.used.nonzero()[:, 0] + self.labelled
        self.sampler.indices = [*range(self.labelled), *places.tolist()]


class JoinedSamples(Dataset[Any]):
    """Labelled samples, then unlabelled ones, all in the form of the first labelled one.

    An unlabelled sample may have a target, which is ignored, or none: it gets one to fill the place.
    """

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        first = labelled[0]
        self._key: str | None = None
        self._inputs: Any = None
        if isinstance(first, Mapping):
            self._key = next((key for key in ("targets", *LABELS) if key in first), None)
            if self._key is None:
                raise TypeError(
                    f"a labelled sample has the keys {sorted(map(str, first))}, expected a label among them"
                )
            self._filling = first[self._key]
        elif isinstance(first, (tuple, list)) and len(first) == 2:
            self._inputs, self._filling = tree_structure(first[0]), first[1]
        else:
            raise TypeError(f"a labelled sample is a {type(first).__name__}, expected (inputs, label) or a mapping")

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.labelled):
            return self.labelled[index]
        sample = self.unlabelled[index - len(self.labelled)]
        if self._key is not None:
            if not isinstance(sample, Mapping):
                raise TypeError(
                    f"unlabelled sample {index - len(self.labelled)} is a {type(sample).__name__}, expected a mapping, "
                    "as labelled samples are"
                )
            return {**sample, self._key: self._filling}
        # What looks like the inputs of a labelled sample has no target of its own.
        if isinstance(sample, (tuple, list)) and tree_structure(sample) != self._inputs:
            sample = sample[0]
        return sample, self._filling


class JoinedCollate(IndexedCollate):
    """Batches whose targets are labels for the labelled samples and pseudo-labels for the others."""

    def __init__(self, collate: Any, pseudo: PseudoLabels) -> None:
        super().__init__(collate)
        self.pseudo = pseudo

    def __call__(self, samples: Sequence[IndexedSample]) -> IndexedBatch:
        """From a list of IndexedSample."""
        indices, batch = super().__call__(samples)
        given = as_batch(batch)
        return IndexedBatch(indices, given._replace(targets=self.pseudo.merge(indices, given.targets)))


def joined(labelled: Any, unlabelled: Any, kind: str, threshold: float) -> tuple[DataLoader[Any], PseudoLabels]:
    """One loader over labelled and unlabelled samples, shuffled together, and the pseudo-labels that it gives.

    Args:
        labelled: a DataLoader over a map-style data set of (inputs, label) or mappings, or such a data set. How samples
            are brought together is that of this loader.
        unlabelled: likewise, of inputs, or of the same with targets that are ignored. Batch size, workers and the
            generator are those of this loader.
        kind, threshold: of PseudoLabels.

    Raises:
        TypeError: data without a length and places; lists of batches.
        ValueError: no data; a kind or threshold that is none.
    """
    loaders = as_loader(labelled, "labelled_loader"), as_loader(unlabelled, "unlabelled_loader")
    first, second = map(_samples, loaders, ("labelled_loader", "unlabelled_loader"))
    own, loader = loaders[0].collate_fn, loaders[1]
    assert isinstance(own, IndexedCollate)
    pseudo = PseudoLabels(len(first), len(second), kind, threshold, loader.generator)
    # Workers that stay would go on with the pseudo-labels of the round before.
    joined_loader: DataLoader[Any] = DataLoader(
        IndexedDataset(JoinedSamples(first, second)),
        batch_size=loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 64,
        sampler=pseudo.sampler,
        collate_fn=JoinedCollate(own.collate_fn, pseudo),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    return joined_loader, pseudo


def as_loader(data: Any, name: str) -> DataLoader[Any]:
    """A loader with indices: the one that is given, or one that shuffles the data set that is given.

    Raises:
        TypeError, ValueError: as `joined`.
    """
    if data is None:
        raise ValueError(f"{name} is None, expected a DataLoader or a data set")
    if isinstance(data, (list, tuple)):
        raise TypeError(f"{name} is a {type(data).__name__}, expected a DataLoader over a map-style data set, or that")
    try:
        indexed = with_indices(data)
        if isinstance(indexed, IndexedDataset) and len(indexed):
            return with_indices(DataLoader(indexed.dataset, 64, shuffle=True))
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    if not len(indexed.dataset):
        raise ValueError(f"{name} is empty: its data set has no sample")
    return indexed


def _samples(loader: DataLoader[Any], name: str) -> Any:
    """The data set, or the part of it that the loader comes to."""
    indexed: Any = loader.dataset
    dataset, places = indexed.dataset, visited(loader)
    if not len(places):
        raise ValueError(f"{name} is empty: its sampler comes to no sample")
    return Subset(dataset, places.tolist()) if len(places) < len(dataset) else dataset
