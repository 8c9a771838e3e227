"""Hugging Face Trainer with the samples of the training data weighted by their influence."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler
from transformers import Trainer, TrainerCallback

from .._model import Batch, Loss, sample_losses
from .._warn import warn_user
from ..distill.indexed import IndexedCollate, IndexedDataset, IndexedSample, as_batch
from ..distill.modes import evaluating
from ..distill.runs.checkpoint import read_state, write_state
from ..distill.runs.weight_figures import share_below_1
from ..distill.taught import teacher_logits
from ..distill.weighting import InfluenceWeighting
from .measuring import own_randomness

INDEX = "sample_indices"
"""The key of the samples' indices in a training batch, on its way from the collator to the loss."""

STATE = "influence.safetensors"
"""The file of the weighting's state in a checkpoint's folder."""


class InfluenceTrainer(Trainer):
    """A Trainer whose training samples count as much as they help on validation data.

    Trains as Trainer does, but for the loss: sum_i w_i l_i / n over the n samples of an update step (all of them, with
    gradient accumulation and several processes), where l_i is the loss of sample i, and w_i follows from its influence
    on the loss on `val_dataset`, measured again as training goes on. Evaluation is Trainer's, with all weights 1. Once
    `train()` has begun, `trainer.weighting` is the InfluenceWeighting, and `trainer.weighting.weights` the weight of
    every sample by its place in `train_dataset`. Logs get `mean_weight` and `share_below_1`.

    Checkpoints hold the state of the weighting in influence.safetensors, and `resume_from_checkpoint` goes on with the
    weights of then. What measuring draws at random depends on `seed` and the step alone.

    Args:
        model, args, train_dataset, data_collator, ...: as for Trainer. The model gives logits [n, V], and labels are
            int64 [n], unless `loss` is for others. The data set is a map-style one, of datasets or any other; batches
            are mappings with "labels". `label_smoothing_factor` is part of the default loss.
        val_dataset: labelled samples that can be trusted; what the model shall become good at. Default `eval_dataset`,
            whose loss is a rosy one then: keep the test data out of both.
        weighting: options of InfluenceWeighting: rule, refresh ("epoch", "step", or a number of update steps),
            warmup_epochs, ema, combine, normalize, influence, solve_samples, solve_every, batch_size, params, seed. If
            "step", a forward and a backward pass give gradients, influence and weights together.
        teacher: a model for the same batches, which gives logits to distil from; not trained, in evaluation mode.
        loss: function (outputs, targets[, teacher_logits]) -> [n]; default cross-entropy, or kd_loss with a teacher
            (DistillationLoss has its temperature and its alpha).

    Raises:
        TypeError: a training data set without length and items, batches that are no mapping with labels.
        ValueError: no validation data; compute_loss_func, which gives no loss for each sample; label smoothing together
            with `loss` or `teacher`; a model spread over devices (FSDP, DeepSpeed, DataParallel); refresh="step" with
            fp16; what InfluenceWeighting refuses, when training starts.

    Memory: that of InfluenceWeighting.

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705), mechanism M1.
    """

    def __init__(
        self,
        *args: Any,
        val_dataset: Any = None,
        weighting: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
        loss: Loss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.val_dataset = self.eval_dataset if val_dataset is None else val_dataset
        self.teacher = teacher
        self.weighting: InfluenceWeighting | None = None
        self._options = dict(weighting or {})
        self._loss = loss
        self._samples: float = 1  # that the sum of losses is divided by, for this process
        self._indices: Tensor | None = None  # of the batch whose loss is asked for
        self._inputs: Mapping[str, Any] = {}
        self._epoch: int | None = None  # that the weighting knows of
        self._resumed: dict[str, Any] | None = None
        self._check()
        if self.args.label_smoothing_factor:
            self._loss = partial(F.cross_entropy, reduction="none", label_smoothing=self.args.label_smoothing_factor)
        self.compute_loss_func = self._sum_of_losses
        self.add_callback(_Occasions(self))

    def _check(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func gives one loss for a batch, which cannot be weighted by sample; give loss=, a "
                "function (outputs, targets) -> [n]"
            )
        if self.args.label_smoothing_factor and (self._loss is not None or self.teacher is not None):
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, which is for the default loss without "
                "a teacher; expected 0, and label smoothing in loss= where it is wanted"
            )
        if self.val_dataset is None or isinstance(self.val_dataset, (dict, str)):
            raise ValueError(
                f"val_dataset is {'missing' if self.val_dataset is None else 'several'}, expected one data set of "
                "labelled samples: influence is on the loss on it"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
            raise ValueError(
                "InfluenceTrainer needs the whole model in each process: start one process a GPU (torchrun), without "
                "FSDP and DeepSpeed"
            )
        if self._options.get("refresh") == "step" and self.args.fp16:
            raise ValueError("refresh is 'step', which does not scale gradients for fp16; expected bf16 or float32")
        if self.train_dataset is not None and not (
            hasattr(self.train_dataset, "__len__") and hasattr(self.train_dataset, "__getitem__")
        ):
            raise TypeError(
                f"train_dataset is a {type(self.train_dataset).__name__}, whose samples have no index by which weights "
                "could be kept; expected a map-style data set (with __getitem__ and __len__)"
            )

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As Trainer's, with the indices of the samples in every batch."""
        if self.train_dataset is None:
            return super().get_train_dataloader()
        dataset, collate = self._columns(self.train_dataset, "Training")
        kept = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = IndexedDataset(dataset), _CollateWithIndices(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = kept

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Samplers that look at samples, to group them by length, see those of the user."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(dataset.dataset if isinstance(dataset, IndexedDataset) else dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of an update step, and how many samples they have, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = sum(len(batch[INDEX]) for batch in batches)
        if not self.args.average_tokens_across_devices or self.args.world_size == 1:
            self._samples = samples
            return batches, samples
        everywhere = self.accelerator.gather(torch.tensor(samples, device=device)).sum()
        # compute_loss multiplies by the number of processes, whose gradients are averaged.
        self._samples = float(everywhere) / self.accelerator.num_processes
        return batches, everywhere

    def _columns(self, dataset: Any, description: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        """The data set, and the collate function, without the columns that the model does not take."""
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            dataset, collate = self._remove_unused_columns(dataset, description=description), self.data_collator
        else:
            collate = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return dataset, _CollateWithLabels(collate)

    def _measured(self, dataset: Any, collate: Callable[[list[Any]], Any], batch_size: int, sampler: Any) -> Any:
        """A loader of the share of this process of a data set, each sample once."""
        return DataLoader(
            IndexedDataset(dataset),
            batch_size,
            sampler=sampler(range(self.args.process_index, len(dataset), self.args.world_size)),
            collate_fn=IndexedCollate(collate),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As Trainer's; of a training batch weighted, of any other the mean of the losses, on its labels alone."""
        inputs = dict(inputs)
        self._indices, self._inputs = inputs.pop(INDEX, None), inputs
        try:
            if self._indices is None:
                num_items_in_batch = None
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._indices, self._inputs = None, {}

    def _sum_of_losses(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """sum_i w_i l_i / n; Trainer has taken the labels out of the inputs."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        batch = Batch(self._inputs, labels)
        if self._indices is None:
            return sample_losses(self._loss, logits, batch, "an evaluation batch").mean()
        if self.teacher is not None:
            with evaluating(self.teacher):
                batch = batch._replace(teacher_logits=teacher_logits(self.teacher, self._inputs))
        assert self.weighting is not None
        weights = self.weighting(self._indices)
        own = getattr(self._loss, "weighted", None)
        if own is None:
            weighted = weights * sample_losses(self._loss, logits, batch, "a training batch")
        else:
            weighted = own(logits, labels, batch.teacher_logits, weights)
        return weighted.sum() / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's; with refresh="step", once there is a direction, one pass gives weights and gradients."""
        weighting = self.weighting
        if weighting is None or not weighting.is_one_pass:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        to_training = getattr(self.optimizer, "train", None)  # of optimizers without a schedule
        if callable(to_training):
            to_training()
        inputs = dict(self._prepare_inputs(inputs))
        indices = inputs.pop(INDEX)
        with self.compute_loss_context_manager():
            step = weighting.step(as_batch(inputs), indices, divisor=self._samples)
        return (step.weights * step.losses).sum() / self._samples

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the mean weight and the share of weights below 1 beside the loss."""
        if self.weighting is not None and "loss" in logs:
            weights = self.weighting.weights
            logs = {**logs, "mean_weight": float(weights.mean()), "share_below_1": share_below_1(weights)}
        super().log(logs, *args, **kwargs)

    # Occasions to measure

    def _begin(self) -> None:
        """Make the weighting for the model as it is wrapped now; with the state of a checkpoint, if that is resumed."""
        if self.teacher is not None:
            self.teacher.to(self.args.device).requires_grad_(False).eval()
        train = self._columns(self.train_dataset, "Training")
        # One object: the warning about samples that are in both looks for that.
        val = train if self.val_dataset is self.train_dataset else self._columns(self.val_dataset, "Validation")
        self.weighting = InfluenceWeighting(
            self.model_wrapped,
            self._measured(*train, self.args.train_batch_size, SubsetRandomSampler),
            self._measured(*val, self.args.eval_batch_size, list),
            **{
                "loss": self._loss,
                "teacher": self.teacher,
                "group": "world" if self.args.world_size > 1 else None,
                "seed": self.args.seed,
                **self._options,
            },
        )
        self._epoch = None
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self.weighting.load_state_dict(resumed["weighting"])
            self._epoch = resumed["epoch"]

    def _begin_epoch(self) -> None:
        assert self.weighting is not None
        epoch = math.floor((self.state.epoch or 0) + 1e-6)
        if epoch == self._epoch:  # resumed in the middle of it
            return
        with own_randomness(self.args.seed, 0, self.state.global_step):
            self.weighting.start_epoch(epoch)
        self._epoch = epoch

    def _begin_step(self) -> None:
        assert self.weighting is not None
        if isinstance(self.weighting.refresh_schedule, str):
            return
        with own_randomness(self.args.seed, 1, self.state.global_step):
            self.weighting.start_step(self.state.global_step)

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.weighting is None:
            return
        self.weighting.gather()
        if self.args.should_save:
            state = {"weighting": self.weighting.state_dict(), "epoch": self._epoch}
            write_state(os.path.join(output_dir, STATE), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE)
        if os.path.isfile(path):
            self._resumed = read_state(path)
        else:
            warn_user(f"{checkpoint} has no {STATE}: weights begin at 1, until they are measured", UserWarning)


class _Occasions(TrainerCallback):
    """Tells the trainer when training, an epoch or a step begins."""

    def __init__(self, trainer: InfluenceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Everything is prepared, and the model wrapped."""
        self._trainer._begin()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before its first batch."""
        self._trainer._begin_epoch()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first batch of an update step."""
        self._trainer._begin_step()


class _CollateWithLabels:
    """Batches as another collate function makes them, which have to be mappings with labels."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Mapping[str, Any]:
        batch = self._collate(samples)
        if not isinstance(batch, Mapping) or "labels" not in batch:
            form = f"a mapping with {', '.join(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(f"data_collator returned {form}, expected a mapping with labels")
        return batch


class _CollateWithIndices:
    """Such batches with the samples' indices under a key of their own."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = IndexedCollate(collate)

    def __call__(self, samples: list[IndexedSample]) -> dict[str, Any]:
        indices, batch = self._collate(samples)
        return {**batch, INDEX: indices}
