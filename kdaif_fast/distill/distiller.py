"""The trainer: a teacher and a student learn together, and every sample counts as much as it helps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import Group, rank_in
from .._model import DistillationLoss, Loss
from .checkpoint import read_state, write_state
from .clock import Clock
from .evaluation import accuracy, describe_weights
from .finite import FiniteWatch, sum_of
from .indexed import IndexedBatch, as_batch, has_indices, require_indices, with_indices
from .mechanisms import Mechanism, find_mechanism
from .modes import device_of, training, unwrapped
from .optimising import OptimizerLike, SchedulerLike, make_optimizer, make_scheduler, take_step
from .progress import TrainingProgress
from .random_states import random_state, set_random_state
from .replay import EpochReplay
from .rules import WeightRule, make_rule
from .run_log import RunLog
from .samples_file import SampleFacts, write_contents, write_samples
from .step import JointStep, StepResult, require_same_classes
from .weighting import InfluenceWeighting, check_schedule

CHECKPOINT = "checkpoint.safetensors"


class Distiller:
    """Trains a student from a teacher with weights from influence (KD-AIF), in one stage.

    In every step the teacher learns from the labels and the student from labels and teacher. How much a sample counts
    follows from its influence phi on the validation loss, measured at the student: w = rule(phi), w < 1 for harmful
    ones. The mechanism says which network the weights are for: "M1" the student, "M2" the teacher, "M3" both, "M4" both,
    with the weights of the previous student combined; "online" is the same training without weights, and "vanilla" has
    a teacher that is fixed.

    Args:
        teacher, student: modules with outputs of the same shape, on the same device. They may be wrapped by
            DistributedDataParallel or torch.compile. Parts that are in evaluation mode by themselves stay in it.
        teacher_optimizer, student_optimizer: optimizers, or functions that make one of the parameters. The teacher's is
            None if the mechanism is "vanilla" and the teacher is trained already.
        loss: of the student, (outputs, targets[, teacher_logits]) -> [n], one a sample. Default DistillationLoss(). A
            loss with a method `weighted(outputs, targets, teacher_logits, weights)` says itself what its weights do.
        teacher_loss: of the teacher, (outputs, targets) -> [n]; default cross-entropy.
        mechanism: a name in MECHANISMS, or a Mechanism.
        rule: how phi becomes a weight: a name in RULES, or any function (stats, phi, epoch) -> weights.
        refresh: when phi is measured: "epoch", "step" (in the pass that trains, along a direction that is solved for once
            every `solve_every` epochs), or a number of steps. See InfluenceWeighting.
        weights: [N], given weights; then nothing is measured.
        warmup_epochs: epochs before the first measurement, with all weights 1.
        ema: share of the old weight that stays at each new measurement, in [0, 1).
        combine: how M4 combines: "mean", "product" or "ema".
        normalize: divide weights by their mean over all samples, so that the size of a step does not change.
        influence, solve_samples, solve_every, batch_size, params, group, seed: as for InfluenceWeighting.
        teacher_scheduler, student_scheduler: schedulers of the optimizers, or functions that make one; they take a step
            at the end of each epoch.
        clip_norm: the largest norm that the gradients of one network may have in a step.
        accumulate: batches whose gradients make one step.
        autocast: torch.bfloat16 for mixed precision in the steps; influence is measured without.
        run_dir: a folder for checkpoints, log and report; None leaves nothing on disk.
        checkpoint_every: steps between checkpoints, beside the one at the end of each epoch.
        progress: show a progress bar; None shows it on a terminal only.
        tensorboard: write numbers for TensorBoard, too.
        facts: what is known of the training samples beyond their labels (which are wrong, which group they are of, what
            they look like): for log and report only, training never sees it.

    Raises:
        TypeError, ValueError: arguments that do not fit together; see fit.

    Memory: both networks with optimizers, as any training has; what InfluenceWeighting needs.

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705), figures 2 and 4; docs/method.md, section 10.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from kdaif_fast.distill import Distiller
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
        >>> train = DataLoader(TensorDataset(x[:40], y[:40]), batch_size=8, shuffle=True)
        >>> validation = DataLoader(TensorDataset(x[40:], y[40:]), batch_size=20)
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> student = torch.nn.Linear(4, 3)
        >>> distiller = Distiller(teacher, student, torch.optim.Adam, torch.optim.Adam, mechanism="M3", warmup_epochs=1)
        >>> records = distiller.fit(train, validation, epochs=2)
        >>> records[-1]["epoch"], distiller.weighting.weights.shape
        (2, torch.Size([40]))
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_optimizer: OptimizerLike | None,
        student_optimizer: OptimizerLike,
        *,
        loss: Loss | None = None,
        teacher_loss: Loss | None = None,
        mechanism: str | Mechanism = "M3",
        rule: str | WeightRule = "sigmoid",
        refresh: str | int = "epoch",
        weights: Tensor | None = None,
        warmup_epochs: int = 2,
        ema: float = 0.5,
        combine: str = "mean",
        normalize: bool = False,
        influence: Mapping[str, Any] | None = None,
        solve_samples: int | None = 4096,
        solve_every: int = 1,
        batch_size: int | None = None,
        params: Any = None,
        group: Group = None,
        seed: int = 0,
        teacher_scheduler: SchedulerLike | None = None,
        student_scheduler: SchedulerLike | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
        tensorboard: bool = False,
        facts: SampleFacts | None = None,
    ) -> None:
        self.mechanism = find_mechanism(mechanism)
        self.teacher, self.student = teacher, student
        self.loss: Loss = DistillationLoss() if loss is None else loss
        self.teacher_loss = teacher_loss
        if teacher_optimizer is None and self.mechanism.trains_teacher:
            raise ValueError(f"teacher_optimizer is None, but mechanism {self.mechanism.name!r} trains the teacher")
        self._device = device_of(student)
        if device_of(teacher) != self._device:
            raise ValueError(f"teacher is on {device_of(teacher)} and student on {self._device}, expected one device")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast is {autocast}, expected None or torch.bfloat16 (float16 would need loss scaling)"
            )
        for name, count in (("accumulate", accumulate), ("checkpoint_every", checkpoint_every or 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}, expected a whole number >= 1")
        self.teacher_optimizer = (
            None if teacher_optimizer is None else make_optimizer(teacher_optimizer, teacher, "teacher_optimizer")
        )
        self.student_optimizer = make_optimizer(student_optimizer, student, "student_optimizer")
        self.teacher_scheduler = make_scheduler(teacher_scheduler, self.teacher_optimizer, "teacher_scheduler")
        self.student_scheduler = make_scheduler(student_scheduler, self.student_optimizer, "student_scheduler")
        self.rule = make_rule(rule) if isinstance(rule, str) else rule
        self.refresh = check_schedule(refresh)
        self._given = _given_weights(weights, self.mechanism, self._device)
        self._weighting_options: dict[str, Any] = {
            "loss": self.loss,
            "teacher": unwrapped(teacher),
            "params": params,
            "rule": self.rule,
            "refresh": refresh,
            "warmup_epochs": warmup_epochs,
            "ema": ema,
            "combine": combine if self.mechanism.combines else None,
            "normalize": normalize,
            "influence": influence,
            "solve_samples": solve_samples,
            "solve_every": solve_every,
            "batch_size": batch_size,
            "group": group,
            "seed": seed,
        }
        self.weighting: InfluenceWeighting | None = None
        """Measures and keeps the weights, once `fit` or `prepare` has been given data; None without any."""
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.checkpoint_every, self.clip_norm, self.accumulate = checkpoint_every, clip_norm, accumulate
        self.progress, self.tensorboard, self.facts = progress, tensorboard, facts
        self.history: list[dict[str, Any]] = []
        """One record an epoch: losses, accuracies, weights, seconds by part."""
        self.epoch = self.steps = self.teacher_epochs = 0
        self.clock = Clock()
        self._autocast, self._group = autocast, group
        self._watch = FiniteWatch()
        self._joint: JointStep | None = None
        self._waiting = 0  # batches whose gradients wait for their step
        self._sums: dict[str, Any] = {}
        self._labels: Tensor | None = None
        self._replay: EpochReplay | None = None
        self._resumed: dict[str, Any] | None = None

    def prepare(self, train_loader: Any, val_loader: Any) -> Any:
        """Look at the data before anything is trained, and make ready to measure; `fit` does this itself.

        Args:
            train_loader: as for fit.
            val_loader: as for fit.

        Returns:
            The training data with indices: what `step` takes its batches from.

        Raises:
            ValueError, TypeError: as fit.
        """
        train = train_loader if has_indices(train_loader) else with_indices(train_loader)
        if self.mechanism.weighs and self._given is None:
            if val_loader is None:
                raise ValueError(f"val_loader is None, but mechanism {self.mechanism.name!r} measures influence on it")
            if self.weighting is None:
                self.weighting = InfluenceWeighting(self.student, train, val_loader, **self._weighting_options)
        if val_loader is not None:
            first = next(iter([val_loader] if isinstance(val_loader, (tuple, Mapping)) else val_loader), None)
            if first is None:
                raise ValueError("val_loader is empty: it gave no batch")
            require_same_classes(self.teacher, self.student, first, self._device)
        return train

    def fit(
        self, train_loader: Any, val_loader: Any, epochs: int, test_loader: Any = None, *, resume: bool = True
    ) -> list[dict[str, Any]]:
        """Train for so many epochs in all; what a run before has left in `run_dir` counts.

        Args:
            train_loader: a DataLoader over a map-style data set, or a list of batches; indices are added if it has none.
                Batches are (inputs, targets), or mappings with "labels" as of Hugging Face data.
            val_loader: labelled batches of the same kind: what influence is on, and accuracy is told of. May be None for
                mechanisms without measured weights.
            epochs: how many in all.
            test_loader: accuracy is told of it, too; nothing is ever decided by it.
            resume: go on with the checkpoint in `run_dir`, if there is one: weights and parameters come out the same, bit
                for bit, as without the interruption (same machine, same settings, same data). False starts over.

        Returns:
            One record an epoch, `history`.

        Raises:
            TypeError: training data without indices, in a form that cannot be given any.
            ValueError: a teacher with another number of classes; an empty val_loader; samples without a label; a
                checkpoint of other settings.
            LossNotFiniteError: names the samples. What was saved before is intact.

        Warns:
            UserWarning: training and validation data have samples in common.
        """
        train = self.prepare(train_loader, val_loader)
        if self.run_dir is not None and resume and self._checkpoint.exists():
            self.load(self._checkpoint)
        log = RunLog(self.run_dir if rank_in(self._group) == 0 else None, tensorboard=self.tensorboard)
        log.rewind(self.steps if resume else -1)
        for model in (self.student, self.teacher) if self.mechanism.trains_teacher else (self.student,):
            training(model)
        if not self.mechanism.trains_teacher:
            self.teacher.eval()
        batches = len(train) if hasattr(train, "__len__") else None
        try:
            with TrainingProgress(epochs - self.epoch, batches, self.progress) as bar:
                while self.epoch < epochs:
                    self._train_epoch(train, log, bar)
                    self._end_epoch(val_loader, test_loader, log, bar)
            self._keep_contents(train)
        finally:
            log.close()
        return self.history

    def fit_teacher(self, train_loader: Any, epochs: int, *, resume: bool = True) -> None:
        """Train the teacher alone, on the labels: the first of the two stages of vanilla distillation.

        Args:
            train_loader: as for fit.
            epochs: how many in all; what a run before has left in `run_dir` counts, epoch by epoch.
            resume: whether it does.
        """
        if self.teacher_optimizer is None:
            raise ValueError("teacher_optimizer is None, but fit_teacher trains the teacher")
        train = train_loader if has_indices(train_loader) else with_indices(train_loader)
        if self.run_dir is not None and resume and self._checkpoint.exists():
            self.load(self._checkpoint)
        training(self.teacher)
        while self.teacher_epochs < epochs:
            _set_epoch(train, self.teacher_epochs)
            for given in train:
                indexed = require_indices(given)
                self._joint_step().teach(indexed, len(indexed.indices))
                take_step(self.teacher_optimizer, self.clip_norm)
            if self.teacher_scheduler is not None:
                self.teacher_scheduler.step()
            self.teacher_epochs += 1
            self._save_run()

    def step(self, batch: IndexedBatch | tuple[Tensor, Any]) -> StepResult:
        """Train both networks on one batch, for those who own their loop.

        Call `prepare` first, and `start_epoch` before each epoch.

        Args:
            batch: IndexedBatch(indices, batch), as `prepare`'s loader gives it.

        Returns:
            Losses, weights and phi of the samples, [n] each.

        Raises:
            TypeError: a batch without indices.
            ValueError, LossNotFiniteError: as fit.
        """
        indexed = require_indices(batch)
        if self.weighting is None and self.mechanism.weighs and self._given is None:
            raise RuntimeError("there is no validation data yet: call prepare(train_loader, val_loader) before step")
        if self.weighting is not None:
            with self.clock.part("influence"):
                self.weighting.start_step(self.steps)
        result = self._joint_step()(indexed, len(indexed.indices) * self.accumulate)
        self._waiting += 1
        self.steps += 1
        if self._waiting == self.accumulate:
            self._take_steps()
        return result

    def start_epoch(self, epoch: int) -> bool:
        """Say that an epoch begins, counted from 0: measures influence if it is time to, and returns whether it did."""
        if self.weighting is None:
            return False
        with self.clock.part("influence"):
            return self.weighting.start_epoch(epoch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that training depends on into one .safetensors file; what was there stays until all is written.

        Networks, optimizers, schedulers, random states, weights, phi and its history, the direction, epoch and step.
        """
        self._watch.flush()
        write_state(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where `save` was called; the next `fit` continues there, in the middle of an epoch if need be.

        Raises:
            CheckpointError: no file of save.
            ValueError: of other settings, networks or data; nothing is changed then.
        """
        self.load_state_dict(read_state(path))

    def state_dict(self) -> dict[str, Any]:
        """What `save` writes: tensors and plain values."""
        parts = self._parts()
        return {
            "settings": self._settings(),
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "epoch": self.epoch,
            "steps": self.steps,
            "teacher_epochs": self.teacher_epochs,
            "waiting": self._waiting,
            "gradients": self._gradients() if self._waiting else None,
            "sums": dict(self._sums),
            "labels": self._labels,
            "seconds": dict(self.clock.seconds),
            "history": self.history,
            "replay": None if self._replay is None else self._replay.state(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict gave; ValueError, and nothing changed, if it is of other settings or networks."""
        mine, its = self._settings(), state["settings"]
        for name in mine:
            if mine[name] != its.get(name):
                raise ValueError(f"the checkpoint has {name} {its.get(name)!r}, but this run {mine[name]!r}")
        parts = self._parts()
        if set(parts) != set(state["parts"]):
            raise ValueError(f"the checkpoint has {sorted(state['parts'])}, but this run {sorted(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self.epoch, self.steps, self.teacher_epochs = state["epoch"], state["steps"], state["teacher_epochs"]
        self._waiting, self._sums = state["waiting"], dict(state["sums"])
        self._set_gradients(state["gradients"])
        self._labels = state["labels"]
        self.clock.seconds.update(state["seconds"])
        self.history = list(state["history"])
        self._resumed = {"replay": state["replay"], "random": state["random"]}
        set_random_state(state["random"])

    @property
    def _checkpoint(self) -> Path:
        assert self.run_dir is not None
        rank = rank_in(self._group)
        return self.run_dir / (CHECKPOINT if rank == 0 else f"rank{rank}-{CHECKPOINT}")

    def _joint_step(self) -> JointStep:
        if self._joint is None:
            self._joint = JointStep(
                self.teacher,
                self.student,
                self.loss,
                self.teacher_loss,
                self.mechanism,
                self.weighting if self._given is None else self._given,
                device=self._device,
                autocast=self._autocast,
                clock=self.clock,
                watch=self._watch,
            )
        return self._joint

    def _take_steps(self) -> None:
        self._waiting = 0
        with self.clock.part("student"):
            take_step(self.student_optimizer, self.clip_norm)
        if self.teacher_optimizer is not None and self.mechanism.trains_teacher:
            with self.clock.part("teacher"):
                take_step(self.teacher_optimizer, self.clip_norm)

    def _train_epoch(self, train: Any, log: RunLog, bar: TrainingProgress) -> None:
        resumed, self._resumed = self._resumed, None
        _set_epoch(train, self.epoch)
        self._replay = EpochReplay(train)
        if resumed is not None and resumed["replay"] is not None:
            batches = self._replay.resume(resumed["replay"], then=resumed["random"])
        else:
            self._sums = {}
            self.clock.reset()
            self._log_refresh(self.start_epoch(self.epoch), log)
            batches = self._replay.start()
        iterator = iter(batches)
        while True:
            with self.clock.part("data"):
                given = next(iterator, None)
            if given is None:
                break
            refreshed = None if self.weighting is None else self.weighting.record
            result = self.step(given)
            if self.weighting is not None and self.weighting.record is not refreshed:
                self._log_refresh(True, log)
            self._add_up(result)
            self._note_labels(given)
            bar.step()
            if self.checkpoint_every is not None and self.steps % self.checkpoint_every == 0:
                self._save_run()
        if self._waiting:
            self._take_steps()

    def _end_epoch(self, val_loader: Any, test_loader: Any, log: RunLog, bar: TrainingProgress) -> None:
        self._replay = None
        for scheduler in (self.student_scheduler, self.teacher_scheduler if self.mechanism.trains_teacher else None):
            if scheduler is not None:
                scheduler.step()
        self._watch.flush()
        self.epoch += 1
        record = {"kind": "epoch", "epoch": self.epoch, "step": self.steps, **self._mean_losses()}
        with self.clock.part("evaluation"):
            for prefix, data in (("", val_loader), ("test_", test_loader)):
                if data is not None:
                    record[f"{prefix}student_accuracy"] = accuracy(self.student, data)
                    record[f"{prefix}teacher_accuracy"] = accuracy(self.teacher, data)
        weights = self.current_weights
        if weights is not None:
            record |= describe_weights(weights, None if self.facts is None else self.facts.known_flips(self._labels))
        record["seconds"] = dict(self.clock.seconds)
        self.history.append(record)
        log.write(record)
        bar.show(
            accuracy=record.get("student_accuracy"),
            mean_weight=record.get("mean_weight"),
            share_below_1=record.get("share_below_1"),
            seconds=record["seconds"],
        )
        self._keep_samples()
        self._save_run()

    @property
    def current_weights(self) -> Tensor | None:
        """The weight of every sample, [N], as measured or given; None for mechanisms without any."""
        if self._given is not None:
            return self._given.weights
        return None if self.weighting is None else self.weighting.weights

    def _log_refresh(self, measured: bool, log: RunLog) -> None:
        if measured and self.weighting is not None:
            log.write({"kind": "refresh", "epoch": self.epoch, "step": self.steps, **self.weighting.record})

    def _add_up(self, result: StepResult) -> None:
        for name, losses in (("student_loss", result.student_losses), ("teacher_loss", result.teacher_losses)):
            if losses is not None:
                total = self._sums.get(name)
                self._sums[name] = sum_of(losses) if total is None else total + sum_of(losses)
        self._sums["samples"] = self._sums.get("samples", 0) + len(result.student_losses)

    def _note_labels(self, given: Any) -> None:
        """Remember the labels, where they are classes on the CPU."""
        indexed = require_indices(given)
        targets = as_batch(indexed.batch).targets
        if self.run_dir is None or not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
            return
        weights = self.current_weights
        if weights is None or targets.device.type != "cpu":
            return
        if self._labels is None:
            self._labels = torch.full((len(weights),), -1)
        self._labels[indexed.indices] = targets.long()

    def _mean_losses(self) -> dict[str, float | None]:
        samples = self._sums.get("samples", 0)
        names = ("student_loss", "teacher_loss")
        return {name: float(self._sums[name]) / samples if name in self._sums else None for name in names}

    def _save_run(self) -> None:
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.save(self._checkpoint)

    def _keep_samples(self) -> None:
        """Each sample's weight, phi and label, for the report."""
        weights = self.current_weights
        if self.run_dir is None or weights is None or rank_in(self._group):
            return
        phi = torch.zeros_like(weights) if self.weighting is None else self.weighting.phi
        write_samples(self.run_dir, weights, phi, self._labels, self.facts)

    def _keep_contents(self, train: Any) -> None:
        """What the most harmful and helpful samples look like, drawn from the data set."""
        if self.run_dir is None or self.current_weights is None or rank_in(self._group):
            return
        before = random_state()
        write_contents(self.run_dir, getattr(getattr(train, "dataset", None), "dataset", None), self.facts)
        set_random_state(before)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by name."""
        found = {
            "student": unwrapped(self.student),
            "teacher": unwrapped(self.teacher),
            "student_optimizer": self.student_optimizer,
            "teacher_optimizer": self.teacher_optimizer,
            "student_scheduler": self.student_scheduler,
            "teacher_scheduler": self.teacher_scheduler,
            "weighting": self.weighting,
        }
        return {name: part for name, part in found.items() if part is not None}

    def _settings(self) -> dict[str, Any]:
        options = self._weighting_options
        kept = ("refresh", "warmup_epochs", "ema", "combine", "normalize", "solve_samples", "solve_every", "seed")
        return {
            "mechanism": self.mechanism.name,
            "rule": repr(self.rule) if self.mechanism.weighs else None,
            "accumulate": self.accumulate,
            **{name: options[name] for name in kept},
        }

    def _gradients(self) -> dict[str, list[Tensor | None]]:
        models = {"student": self.student, "teacher": self.teacher}
        return {name: [p.grad for p in model.parameters()] for name, model in models.items()}

    def _set_gradients(self, gradients: dict[str, list[Tensor | None]] | None) -> None:
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            for at, p in enumerate(model.parameters()):
                grad = None if gradients is None else gradients[name][at]
                p.grad = None if grad is None else grad.to(p)


class _Given:
    """Weights that were given, read as measured ones are."""

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        self.weights = weights.detach().to(device)

    def __call__(self, indices: Tensor) -> Tensor:
        return self.weights[indices.to(self.weights.device)]


def _given_weights(weights: Any, mechanism: Mechanism, device: torch.device) -> _Given | None:
    if weights is None:
        return None
    if not mechanism.weighs:
        raise ValueError(f"weights are given, but mechanism {mechanism.name!r} uses none")
    if not isinstance(weights, Tensor) or weights.dim() != 1 or not weights.is_floating_point():
        form = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights are {form}, expected a floating-point tensor [N]")
    if not bool(weights.isfinite().all()):
        raise ValueError(f"weights are not finite at {(~weights.isfinite()).nonzero()[:10, 0].tolist()}")
    return _Given(weights, device)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch, as DistributedSampler does."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch: Callable[[int], Any] | None = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
