"""What a run leaves on disk: its checkpoint, its log, and what is known of its samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import write_whole
from .random_states import random_state, set_random_state
from .run_log import RunLog
from .samples_file import SampleFacts, write_contents, write_samples

CHECKPOINT, SETTINGS = "checkpoint.safetensors", "run.json"

OURS = "Distiller"
"""The table of run.json that the trainer writes."""


class RunFolder:
    """A run's folder, or none; only rank 0 writes more than its checkpoint.

    Args:
        path: the folder, made when it is first written to; None for nothing on disk.
        rank: of this process; each has a checkpoint of its own.
        tensorboard: write numbers for TensorBoard, too.
    """

    def __init__(self, path: str | os.PathLike[str] | None, rank: int = 0, *, tensorboard: bool = False) -> None:
        if tensorboard and path is None:
            raise ValueError("tensorboard is True, but run_dir is None: there is no folder to write to")
        self.path = None if path is None else Path(path)
        self._is_first = rank == 0
        self._name = CHECKPOINT if rank == 0 else f"rank{rank}-{CHECKPOINT}"
        self._tensorboard = tensorboard
        self._log: RunLog | None = None

    @property
    def checkpoint(self) -> Path | None:
        """Where this rank's checkpoint is, or will be."""
        return None if self.path is None else self.path / self._name

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on with."""
        return self.checkpoint is not None and self.checkpoint.exists()

    def make(self) -> None:
        """Make the folder, if there shall be one."""
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, which the report shows, unless another program has written one of its own."""
        if self.path is None or not self._is_first:
            return
        path = self.path / SETTINGS
        if not path.exists() or f'"{OURS}"' in path.read_text():
            told = {OURS: {name: value for name, value in settings.items() if value is not None}}
            write_whole(path, (json.dumps(told, indent=1, default=repr) + "\n").encode())

    def open_log(self, step: int, epoch: int, *, is_inside: bool) -> None:
        """Begin to log at this step; what is there of later, which was not checkpointed, is dropped.

        `epoch` is how many are finished, `is_inside` whether another one is begun.
        """
        self._log = RunLog(self.path if self._is_first else None, tensorboard=self._tensorboard and self._is_first)
        self._log.rewind(step, epoch, is_inside=is_inside)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a record to the log, if it is open."""
        if self._log is not None:
            self._log.write(record)

    def close_log(self) -> None:
        """Close the log, if it is open."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def keep_samples(
        self, weights: Tensor | None, phi: Tensor | None, labels: Tensor | None, facts: SampleFacts | None
    ) -> None:
        """Write each sample's weight, phi and label, for the report."""
        if self.path is not None and weights is not None and self._is_first:
            write_samples(self.path, weights, weights.new_zeros(len(weights)) if phi is None else phi, labels, facts)

    def keep_contents(self, train: Any, facts: SampleFacts | None) -> None:
        """Write what the most harmful and helpful samples look like; random states are left as they are."""
        if self.path is not None and self._is_first and (self.path / "samples.safetensors").exists():
            before = random_state()
            write_contents(self.path, getattr(getattr(train, "dataset", None), "dataset", None), facts)
            set_random_state(before)
