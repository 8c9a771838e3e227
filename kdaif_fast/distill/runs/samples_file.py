"""What a run knows of each training sample: samples.safetensors (arrays), samples.json (some samples' contents)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._files import write_whole

if TYPE_CHECKING:
    from .sample_contents import Content

ARRAYS, CONTENTS = "samples.safetensors", "samples.json"
FORMAT = "kdaif_fast samples 1"
TOP = 24


@dataclass(frozen=True, eq=False)
class SampleFacts:
    """What is known about the N training samples besides what a run measures; for its log and its report only.

    Args:
        flipped: bool [N]: which labels are known to be wrong.
        groups: a name or a number for each sample: source, language, annotator, whatever fairness is a question of.
        class_names: of the labels 0, 1, ...; or by label, as id2label of transformers has them.
        describe: index -> what to show of the sample: a text, an image (of Pillow, or an array), or anything else that
            `sample_contents.describe_samples` can show. Without it the data set's own items are shown.
        true_labels: int [N]: what the labels should be. `flipped` then follows from the labels, unless it is given.
        image_shape: how to see samples that are flat vectors: [H, W], [3, H, W] or [H, W, 3].

    Raises:
        TypeError, ValueError: flips that are not bool, labels that are no whole numbers, facts that differ in length.

    Example:
        >>> facts = SampleFacts(groups=["news", "news", "web"], class_names=["no", "yes"])
        >>> facts.require_for(4)
        Traceback (most recent call last):
        ValueError: facts.groups has 3 entries, expected one for each of the 4 training samples
    """

    flipped: Tensor | None = None
    groups: Sequence[int] | Sequence[str] | Tensor | None = None
    class_names: Sequence[str] | Mapping[int, str] | None = None
    describe: Callable[[int], Any] | None = None
    true_labels: Tensor | None = None
    image_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("flipped", "true_labels"):
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value).detach().cpu()
            wanted = "bool [N]" if name == "flipped" else "whole numbers [N]"
            kind_is_right = value.dtype == torch.bool if name == "flipped" else _are_labels(value)
            if value.dim() != 1 or not kind_is_right:
                raise TypeError(f"facts.{name} is {value.dtype} {tuple(value.shape)}, expected {wanted}")
            object.__setattr__(self, name, value)
        if self.groups is not None:
            groups = [group.item() if hasattr(group, "item") else group for group in self.groups]
            if not all(isinstance(group, (str, int)) for group in groups):
                raise TypeError("facts.groups has entries that are neither texts nor whole numbers")
            object.__setattr__(self, "groups", groups)
        if isinstance(self.class_names, str):
            raise TypeError(f"facts.class_names is the text {self.class_names!r}, expected a list of names")
        if self.class_names is not None:
            named: Any = self.class_names
            if isinstance(named, Mapping):
                named = [named.get(label, label) for label in range(max(named, default=-1) + 1)]
            object.__setattr__(self, "class_names", [str(name) for name in named])
        lengths = {name: len(value) for name, value in self._per_sample().items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"facts.{name} {length}" for name, length in lengths.items())
            raise ValueError(f"facts are of different numbers of samples: {told}")

    def require_for(self, samples: int) -> None:
        """Raise ValueError unless these are facts about so many training samples."""
        for name, value in self._per_sample().items():
            if len(value) != samples:
                raise ValueError(
                    f"facts.{name} has {len(value)} entries, expected one for each of the {samples} training samples"
                )

    def known_flips(self, targets: Tensor | None) -> Tensor | None:
        """Which labels are known to be wrong, as given or by the true ones: bool [N] on the CPU; None if unknown."""
        if self.flipped is not None or self.true_labels is None or targets is None or not _are_labels(targets):
            return self.flipped
        targets = targets.cpu()
        # Negative ones are unlabelled: neither right nor wrong.
        return (targets != self.true_labels) & (targets >= 0) & (self.true_labels >= 0)

    @cached_property
    def group_places(self) -> tuple[Tensor, list[str]]:
        """The groups' names, numbers before texts, and of each sample the place of its group among them: int64 [N]."""
        groups = self.groups or []
        names = sorted(set(groups), key=lambda group: (isinstance(group, str), group))
        place = {name: at for at, name in enumerate(names)}
        return torch.tensor([place[group] for group in groups]), [str(name) for name in names]

    def _per_sample(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("flipped", "groups", "true_labels")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Samples:
    """What a run's folder has of its N training samples."""

    weights: Tensor  # [N]
    phi: Tensor  # [N], as last measured: > 0 harms
    targets: Tensor | None = None  # int64 [N]
    flipped: Tensor | None = None  # bool [N]
    true_labels: Tensor | None = None  # int64 [N]
    groups: Tensor | None = None  # int64 [N], places in group_names
    group_names: list[str] = field(default_factory=list)
    class_names: list[str] | None = None
    contents: dict[int, Content] = field(default_factory=dict)
    top: int = TOP

    def harmful(self, count: int) -> list[int]:
        """Indices of at most so many samples that do harm, the worst first: by phi, or, before any phi, by weight."""
        return self._first(self._harm(), count)

    def helpful(self, count: int) -> list[int]:
        """Indices of at most so many samples that help, the best first."""
        return self._first(-self._harm(), count)

    @property
    def measured(self) -> bool:
        """Whether there is any phi."""
        return bool((self.phi.nan_to_num() != 0).any())

    def _harm(self) -> Tensor:
        return self.phi if self.measured else 1 - self.weights

    @staticmethod
    def _first(score: Tensor, count: int) -> list[int]:
        order = score.nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices[:count]
        return [index for index in order.tolist() if score[index] > 0]

    def class_name(self, label: int) -> str:
        """The name of a label, or the label itself; "none" for negative ones, by which unlabelled samples go."""
        if label < 0:
            return "none"
        names = self.class_names or []
        return names[label] if label < len(names) else str(label)


def write_samples(
    run_dir: str | os.PathLike[str],
    weights: Tensor,
    phi: Tensor,
    targets: Tensor | None = None,
    facts: SampleFacts | None = None,
) -> None:
    """Write the arrays to samples.safetensors, in one step; quick enough for the end of every epoch.

    Args:
        run_dir: the run's folder.
        weights: [N].
        phi: [N], as last measured, NaN or 0 where it was not.
        targets: labels [N]; others, as soft ones, are not kept.
        facts: what else is known about the samples.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: arrays or facts of different lengths.
        OSError: it cannot be written; what was there stays.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError('a run\'s folder needs safetensors: pip install "kdaif-fast[train]"') from error
    if weights.dim() != 1 or phi.shape != weights.shape:
        raise ValueError(f"weights are {tuple(weights.shape)} and phi {tuple(phi.shape)}, expected [N] and [N]")
    facts = facts or SampleFacts()
    facts.require_for(len(weights))
    arrays: dict[str, Tensor | None] = {"weights": weights.float(), "phi": phi.float()}
    if targets is not None and _are_labels(targets):
        if len(targets) != len(weights):
            raise ValueError(f"targets are of {len(targets)} samples, expected {len(weights)}")
        arrays["targets"] = targets.long()
    arrays |= {"flipped": facts.known_flips(arrays.get("targets")), "true_labels": facts.true_labels}
    about: dict[str, Any] = {"class_names": facts.class_names}
    if facts.groups is not None:
        arrays["groups"], about["group_names"] = facts.group_places
    given = {name: array.detach().cpu().contiguous() for name, array in arrays.items() if array is not None}
    content = save(given, {"format": FORMAT, "about": json.dumps(about)})
    write_whole(Path(run_dir) / ARRAYS, content)


def write_contents(
    run_dir: str | os.PathLike[str], dataset: Any = None, facts: SampleFacts | None = None, top: int = TOP
) -> None:
    """Write what the most harmful and most helpful samples of samples.safetensors look like, to samples.json.

    For the end of a run. Items of the data set are drawn, so random augmentation goes on from where it is: who needs
    the random states as they were sets them again.

    Args:
        run_dir: the run's folder.
        dataset: map-style; its items are shown where `facts.describe` does not say what to show.
        facts: as they were given to `write_samples`.
        top: how many of either kind.

    Raises:
        FileNotFoundError: there is no samples.safetensors yet.
        ValueError: a `top` that is not positive.
        OSError: it cannot be written. A sample that cannot be shown is none: the file says why.
    """
    from .sample_contents import describe_samples

    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {top!r}, expected a whole number > 0")
    samples = read_samples(run_dir)
    facts = facts or SampleFacts()
    look = facts.describe or (dataset.__getitem__ if dataset is not None else None)
    shown = [] if look is None else [*samples.harmful(top), *samples.helpful(top)]
    contents = describe_samples(shown, look, facts.image_shape) if look is not None else {}
    told = {
        "format": FORMAT,
        "top": top,
        "samples": [{"index": index, **asdict(content)} for index, content in contents.items()],
    }
    write_whole(Path(run_dir) / CONTENTS, json.dumps(told).encode())


def read_samples(run_dir: str | os.PathLike[str]) -> Samples:
    """What `write_samples` and `write_contents` have written last.

    Raises:
        FileNotFoundError: there are no arrays. Contents may be missing: a run that is killed has none.
        ValueError: a file of that name that is not ours.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('a run\'s folder needs safetensors: pip install "kdaif-fast[train]"') from error
    path = Path(run_dir) / ARRAYS
    if not path.exists():
        raise FileNotFoundError(f"run_dir is {str(run_dir)!r}, which has no {ARRAYS}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}, expected {FORMAT!r}")
    about = {key: value for key, value in json.loads(metadata["about"]).items() if value is not None}
    return Samples(**arrays, **about, **_read_contents(Path(run_dir) / CONTENTS))


def _read_contents(path: Path) -> dict[str, Any]:
    from .sample_contents import Content

    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_bytes())
        contents = {entry.pop("index"): Content(**entry) for entry in told["samples"]}
        return {"contents": contents, "top": int(told["top"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a run writes: {type(error).__name__}: {error}") from error


def _are_labels(targets: Tensor) -> bool:
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return targets.dim() == 1 and whole
