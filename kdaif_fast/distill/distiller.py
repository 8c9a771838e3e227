"""The trainer: a teacher and a student learn together, and every sample counts as much as it helps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import Group, gather_over_ranks, rank_in, together
from .._model import DistillationLoss, Loss
from .._warn import warn_user
from .clock import Clock
from .epochs import replays_of, set_epoch
from .evaluation import accuracy
from .finite import FiniteWatch, LossNotFiniteError
from .fitting_state import require_fitting
from .given_weights import given_weights
from .indexed import IndexedBatch, require_indices, sample_count, with_indices
from .measured_data import require_batches, validation_data
from .mechanisms import Mechanism, find_mechanism
from .modes import device_of, is_spread, require_separate, training, unwrapped
from .optimising import OptimizerLike, SchedulerLike, end_epoch, make_optimizer, make_scheduler, take_step
from .rules import WeightRule, make_rule
from .runs.checkpoint import read_state, write_state
from .runs.progress import TrainingProgress
from .runs.random_states import random_state, set_random_state, unchanged_randomness
from .runs.replay import EpochReplay
from .runs.run_folder import RunFolder
from .runs.samples_file import SampleFacts
from .runs.weight_figures import weight_figures
from .schedule import check_counts, check_schedule
from .settings_told import optimizer_told, options_told, told
from .step import JointStep, StepResult, require_same_classes, require_validation_losses
from .tally import Tally
from .weight_book import check_averaging
from .weighting import InfluenceWeighting


class Distiller:
    """Trains a student from a teacher with weights from influence (KD-AIF), in one stage.

    In every step the teacher learns from the labels and the student from labels and teacher. How much a sample counts
    follows from its influence phi on the validation loss, measured at the student: w = rule(phi), w < 1 for harmful
    ones. The mechanism says which network the weights are for: "M1" the student, "M2" the teacher, "M3" both, "M4"
    both, combined with those of the previous student; "online" is the same training without weights, and "vanilla" has
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
        refresh: when phi is measured: "epoch", "step" (in the pass that trains, along a direction that is solved for
            every `solve_every` epochs), or a number of steps. See InfluenceWeighting.
        weights: [N], given weights; then nothing is measured.
        warmup_epochs: epochs before the first measurement, with all weights 1.
        ema: share of the old weight that stays at each new measurement, in [0, 1). Weights of rules that keep a sample
            or leave it out ("keep_probability", "drop", "select") are means of such decisions then; 0 leaves them 0 or
            1.
        combine: how M4 combines: "mean", "product" or "ema".
        normalize: divide weights by their mean over all samples, so that the size of a step does not change.
        influence, solve_samples, solve_every, batch_size, history, params, group, seed: as for InfluenceWeighting.
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

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705), figures 2 and 4.

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
        solve_samples: int | None = 2048,
        solve_every: int = 1,
        batch_size: int | None = None,
        history: int | None = 100,
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
        require_separate(teacher, student)
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
        check_counts(accumulate=accumulate, checkpoint_every=checkpoint_every, warmup_epochs=warmup_epochs)
        check_counts(solve_samples=solve_samples, solve_every=solve_every, batch_size=batch_size, history=history)
        check_averaging(combine, ema)
        self.teacher_optimizer = (
            None if teacher_optimizer is None else make_optimizer(teacher_optimizer, teacher, "teacher_optimizer")
        )
        self.student_optimizer = make_optimizer(student_optimizer, student, "student_optimizer")
        self.teacher_scheduler = make_scheduler(teacher_scheduler, self.teacher_optimizer, "teacher_scheduler")
        self.student_scheduler = make_scheduler(student_scheduler, self.student_optimizer, "student_scheduler")
        self.rule = make_rule(rule) if isinstance(rule, str) else rule
        self.refresh = check_schedule(refresh)
        self._given = given_weights(weights, self.mechanism, self._device)
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
            "history": history,
            "group": group,
            "seed": seed,
        }
        self.weighting: InfluenceWeighting | None = None
        """Measures and keeps the weights, once `fit` or `prepare` has been given data; None without any."""
        if clip_norm is not None and (not isinstance(clip_norm, (int, float)) or not clip_norm > 0):
            raise ValueError(f"clip_norm is {clip_norm!r}, expected a number > 0 or None")
        self.checkpoint_every, self.clip_norm, self.accumulate = checkpoint_every, clip_norm, accumulate
        self.progress, self.facts = progress, facts
        self.clock = Clock()
        self._group = group
        if run_dir is not None and group is None and is_spread(student):
            raise ValueError(
                "group is None, but student is wrapped by DistributedDataParallel on several processes, which would "
                "all write the same files in run_dir; expected group='world'"
            )
        self._folder = RunFolder(run_dir, rank_in(group), tensorboard=tensorboard)
        self._tally = Tally()
        self._autocast = autocast
        self._watch = FiniteWatch()
        self._joint: JointStep | None = None
        self._waiting = 0  # batches whose gradients wait for their step
        self._replays: dict[str, EpochReplay] = {}
        self._resumed: dict[str, Any] | None = None
        self._unused: dict[str, Any] | None = None  # a weighting's state that was loaded before there were data

    @property
    def run_dir(self) -> Path | None:
        """Where the run is kept."""
        return self._folder.path

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record an epoch: losses, accuracies, weights, seconds by part."""
        return self._tally.history

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self._tally.epoch

    @property
    def steps(self) -> int:
        """How many batches both networks were trained on."""
        return self._tally.steps

    @property
    def current_weights(self) -> Tensor | None:
        """The weight of every sample, [N], as measured or given; None for mechanisms without any."""
        if self._given is not None:
            return self._given.weights
        return None if self.weighting is None else self.weighting.weights

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
        train = require_batches(with_indices(train_loader), "train_loader")
        if val_loader is not None:
            require_batches(val_loader, "val_loader")
        if self.facts is not None:
            self.facts.require_for(sample_count(train))
        if self.mechanism.weighs and self._given is None:
            if val_loader is None:
                raise ValueError(f"val_loader is None, but mechanism {self.mechanism.name!r} measures influence on it")
            weighting = InfluenceWeighting(self.student, train, val_loader, **self._weighting_options)
            state = self._state_of_weighting()
            if state is not None:  # of other data before, or of a checkpoint
                weighting.load_state_dict(state)
            self.weighting, self._joint, self._unused = weighting, None, None
        if self._given is not None and len(self._given.weights) != sample_count(train):
            raise ValueError(
                f"{len(self._given.weights)} weights are given for training data of {sample_count(train)} samples"
            )
        if val_loader is not None:
            with unchanged_randomness():  # as a run that is resumed looks again
                first = next(iter(validation_data(val_loader)), None)
            if first is None:
                raise ValueError("val_loader is empty: it gave no batch")
            require_same_classes(self.teacher, self.student, first, self._device)
            require_validation_losses(self.student, self.loss, first, self._device)
        return train

    def fit(
        self, train_loader: Any, val_loader: Any, epochs: int, test_loader: Any = None, *, resume: bool = True
    ) -> list[dict[str, Any]]:
        """Train for so many epochs in all; what a run before has left in `run_dir` counts.

        Args:
            train_loader: a DataLoader over a map-style data set, or a list of batches; indices are added.
                Batches are (inputs, targets), or mappings with "labels" as of Hugging Face data.
            val_loader: labelled batches of the same kind: what influence is on, and accuracy is told of. May be None
                for mechanisms without measured weights.
            epochs: how many in all.
            test_loader: accuracy is told of it, too; nothing is ever decided by it.
            resume: go on with the checkpoint in `run_dir`, if there is one: weights and parameters come out the same,
                bit for bit, as without the interruption (same machine, same settings, same data). False starts over.

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
        check_counts(epochs=epochs)
        train = self.prepare(train_loader, val_loader)
        self._replays = replays_of(train=train, val=val_loader)
        if resume and self._load_run() and self.epoch >= epochs:
            warn_user(
                f"{self.run_dir} has a run of {self.epoch} epochs, so there is nothing left to train: ask for more "
                "epochs, or start over with resume=False or another run_dir",
                UserWarning,
            )
        self._set_modes()
        batches = len(train) if hasattr(train, "__len__") else None
        self._folder.make()
        place = None if self._resumed is None else self._resumed["replays"].get("train")
        is_inside = place is not None and place["start"] is not None
        self._folder.keep_settings(self._settings())
        self._folder.open_log(self.steps if resume else -1, self.epoch, is_inside=is_inside)
        try:
            done = 0 if batches is None else self.steps
            with TrainingProgress(epochs, batches, self.progress, done=done) as bar:
                while self.epoch < epochs:
                    self._train_epoch(train, bar)
                    self._end_epoch(val_loader, test_loader, bar)
            self._folder.keep_contents(train, self.facts)
        finally:
            self._folder.close_log()
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
        train = require_batches(with_indices(train_loader), "train_loader")
        # By a name of its own, as fit's loader can be another one.
        self._replays = replays_of(teacher=train)
        replay = self._replays["teacher"]
        if resume and self._load_run():
            place = {} if self._resumed is None else self._resumed["replays"]
            if "teacher" in place:
                replay.restore(place["teacher"])
        training(self.teacher)
        self._folder.make()
        while self._tally.teacher_epochs < epochs:
            set_epoch(train, self._tally.teacher_epochs)
            waiting = 0
            for given in replay.start():
                indexed = require_indices(given)
                self._joint_step().teach(indexed, len(indexed.indices) * self.accumulate)
                waiting += 1
                if waiting == self.accumulate:
                    self._step_teacher(waiting / self.accumulate)
                    waiting = 0
            if waiting:
                self._step_teacher(waiting / self.accumulate)
            end_epoch(self.teacher_scheduler)
            self._watch.flush()
            self._tally.teacher_epochs += 1
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
        try:
            result = self._joint_step()(indexed, len(indexed.indices) * self.accumulate)
        except LossNotFiniteError:
            self._drop_gradients()
            raise
        self._waiting += 1
        self._tally.steps += 1
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
        """Write all that training depends on into one .safetensors file; the one before stays until that is done.

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
        return {
            "settings": self._settings(),
            "parts": {
                **{name: part.state_dict() for name, part in self._parts().items()},
                **({} if self._unused is None else {"weighting": self._unused}),
            },
            "tally": self._tally.state_dict(),
            "waiting": self._waiting,
            "gradients": self._gradients() if self._waiting else None,
            "seconds": dict(self.clock.seconds),
            "replays": {name: replay.state() for name, replay in self._replays.items()},
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict gave; ValueError, and nothing changed, if it is of other settings or networks."""
        if not isinstance(state, dict) or not {"settings", "parts", "tally", "replays"} <= set(state):
            raise ValueError("the state is none that a Distiller's state_dict or save gives")
        mine, its = self._settings(), state["settings"]
        for name in mine:
            if mine[name] != its.get(name):
                raise ValueError(f"the checkpoint has {name} {its.get(name)!r}, but this run {mine[name]!r}")
        parts, its_parts = self._parts(), dict(state["parts"])
        unused = None
        if self.weighting is None:
            unused = its_parts.pop("weighting", None)  # prepare makes what it is for
        elif "weighting" not in its_parts and not state["tally"]["steps"]:
            del parts["weighting"]  # of the teacher's epochs, before there was any
        if set(parts) != set(its_parts):
            raise ValueError(f"the checkpoint has {sorted(its_parts)}, but this run {sorted(parts)}")
        require_fitting(parts, its_parts)
        for name, part in parts.items():
            part.load_state_dict(its_parts[name])
        self._unused = unused
        self._tally.load_state_dict(state["tally"])
        self._waiting = state["waiting"]
        self._set_gradients(state["gradients"])
        self.clock.seconds.update(state["seconds"])
        self._resumed = {"replays": state["replays"], "random": state["random"]}
        set_random_state(state["random"])

    @property
    def _samples(self) -> int:
        """N, where there are weights; else 0."""
        if self._given is not None:
            return len(self._given.weights)
        return 0 if self.weighting is None else self.weighting.samples

    @property
    def _checkpoint(self) -> Path:
        assert self._folder.checkpoint is not None
        return self._folder.checkpoint

    def _set_modes(self) -> None:
        training(self.student)
        if self.mechanism.trains_teacher:
            training(self.teacher)
        else:
            self.teacher.eval()

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

    def _drop_gradients(self) -> None:
        self._waiting = 0
        for model in (self.student, self.teacher):
            model.zero_grad()

    def _take_steps(self) -> None:
        share, self._waiting = self._waiting / self.accumulate, 0
        with self.clock.part("student"):
            take_step(self.student_optimizer, self.clip_norm, share)
        if self.mechanism.trains_teacher:
            self._step_teacher(share)

    def _step_teacher(self, share: float) -> None:
        if self.teacher_optimizer is not None:
            with self.clock.part("teacher"):
                take_step(self.teacher_optimizer, self.clip_norm, share)

    def _train_epoch(self, train: Any, bar: TrainingProgress) -> None:
        iterator = self._batches(train)
        while True:
            with self.clock.part("data"):
                given = next(iterator, None)
            if given is None:
                break
            refreshed = None if self.weighting is None else self.weighting.record
            result = self.step(given)
            if self.weighting is not None and self.weighting.record is not refreshed:
                self._log_refresh()
            self._tally.add(result)
            if self.run_dir is not None and self._samples:
                self._tally.note_labels(require_indices(given), self._samples)
            bar.step()
            if self.checkpoint_every is not None and self.steps % self.checkpoint_every == 0:
                self._save_run()
        if self._waiting:
            self._take_steps()  # of fewer batches than the others

    def _batches(self, train: Any) -> Iterator[Any]:
        """Those of the epoch that begins, or what is left of one that was interrupted."""
        resumed, self._resumed = self._resumed, None
        set_epoch(train, self.epoch)
        replay = self._replays["train"]
        if resumed is not None:
            for name, state in resumed["replays"].items():
                if name in self._replays:
                    self._replays[name].restore(state)
            place = resumed["replays"].get("train")  # not there, if it is of the teacher's epochs
            if place is not None and place["start"] is not None:
                return replay.resume(place, then=resumed["random"])
            set_random_state(resumed["random"])
        self._tally.new_epoch()
        self.clock.reset()
        if self.start_epoch(self.epoch):
            self._log_refresh()
        return replay.start()

    def _end_epoch(self, val_loader: Any, test_loader: Any, bar: TrainingProgress) -> None:
        end_epoch(self.student_scheduler)
        if self.mechanism.trains_teacher:
            end_epoch(self.teacher_scheduler)
        self._watch.flush()
        if self.weighting is not None:
            self.weighting.gather()
        self._tally.epoch += 1
        record = self._record(val_loader, test_loader)
        self.history.append(record)
        self._folder.log(record)
        shown = ("accuracy", "mean_weight", "share_below_1", "seconds")
        bar.show(**{name: record.get("student_accuracy" if name == "accuracy" else name) for name in shown})
        phi = None if self.weighting is None else self.weighting.phi
        self._folder.keep_samples(self.current_weights, phi, self._tally.labels, self.facts)
        self._save_run()

    def _record(self, val_loader: Any, test_loader: Any) -> dict[str, Any]:
        """What is to be told of the epoch that has ended."""
        record: dict[str, Any] = {"kind": "epoch", "epoch": self.epoch, "step": self.steps, **self._tally.mean_losses()}
        # What is told decides nothing; and workers that stay draw a seed only when they are started.
        with self.clock.part("evaluation"), unchanged_randomness():
            for prefix, data in (("", val_loader), ("test_", test_loader)):
                if data is not None:
                    record[f"{prefix}student_accuracy"] = accuracy(self.student, data)
                    record[f"{prefix}teacher_accuracy"] = accuracy(self.teacher, data)
        weights = self.current_weights
        if weights is not None:
            measured = self._given is not None or (self.weighting is not None and self.weighting.has_measured)
            # Before anything is measured, weights of 1 have found nothing.
            flipped = self.facts.known_flips(self._tally.labels) if self.facts is not None and measured else None
            record |= weight_figures(weights, flipped)
        return {**record, "seconds": dict(self.clock.seconds)}

    def _log_refresh(self) -> None:
        if self.weighting is not None:
            self._folder.log({"kind": "refresh", "epoch": self.epoch, "step": self.steps, **self.weighting.record})

    def _load_run(self) -> bool:
        """Go on with the checkpoint of `run_dir`, if there is one; all ranks are at the same place then."""
        found = self._folder.has_checkpoint
        with together(self._group, self._device):
            if found:
                self.load(self._checkpoint)
        places = gather_over_ranks((self._tally.teacher_epochs, self.epoch, self.steps, found), self._group)
        if len(set(places)) > 1:
            raise ValueError(
                f"the checkpoints of the ranks in {self.run_dir} are of different moments, the steps "
                f"{', '.join(str(steps) for _, _, steps, _ in places)}: the processes were stopped while some had "
                "saved and others had not. Start over with resume=False or another run_dir"
            )
        return found

    def _save_run(self) -> None:
        if self.run_dir is not None:
            self.save(self._checkpoint)

    def _state_of_weighting(self) -> dict[str, Any] | None:
        return self._unused if self.weighting is None else self.weighting.state_dict()

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
        """What a checkpoint has to agree in with the run that goes on with it."""
        settings: dict[str, Any] = {
            "mechanism": self.mechanism.name,
            "loss": told(self.loss),
            "teacher_loss": told(self.teacher_loss),
            "student_optimizer": optimizer_told(self.student_optimizer),
            "teacher_optimizer": optimizer_told(self.teacher_optimizer),
            "accumulate": self.accumulate,
            "clip_norm": self.clip_norm,
            "autocast": None if self._autocast is None else str(self._autocast),
            "given weights": None if self._given is None else self._given.told(),
        }
        if not self.mechanism.weighs or self._given is not None:
            return settings
        options = self._weighting_options
        kept = ("refresh", "warmup_epochs", "ema", "combine", "normalize", "solve_samples", "solve_every", "seed")
        influence = options_told(options["influence"])
        return {**settings, "rule": told(self.rule), "influence": influence, **{name: options[name] for name in kept}}

    def _gradients(self) -> dict[str, list[Tensor | None]]:
        models = {"student": self.student, "teacher": self.teacher}
        return {name: [p.grad for p in model.parameters()] for name, model in models.items()}

    def _set_gradients(self, gradients: dict[str, list[Tensor | None]] | None) -> None:
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            for at, p in enumerate(model.parameters()):
                grad = None if gradients is None else gradients[name][at]
                p.grad = None if grad is None else grad.to(p)
