"""Lightning with the samples of the training data weighted by their influence."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ..distill.indexed import IndexedBatch, has_indices
from ..distill.runs.weight_figures import share_below_1
from ..distill.weighting import InfluenceWeighting
from .measuring import own_randomness


class InfluenceCallback(Callback):
    """Gives a LightningModule the weight of each sample of its training batches, by influence on the validation loss.

    What the module and its data have to do:

    - the training loader, of `fit` or of a DataModule, is `with_indices(DataLoader(...))`;
    - `training_step` gets `indices, batch` then, and multiplies the samples' losses by `self.sample_weights`, [n],
      which the callback has put there:

        def training_step(self, indexed, batch_idx):
            indices, (x, y) = indexed
            losses = cross_entropy(self(x), y, reduction="none")
            return (self.sample_weights * losses).mean()

    Measured is before epochs, or every n update steps, as `refresh` says. With refresh="step" the module optimises by
    hand (`automatic_optimization = False`): `callback.weighting.step((x, y), indices)` in the place of forward and
    backward pass gives losses, influence, weights and gradients together.

    The callback logs `mean_weight` and `share_below_1` each epoch, and its state is in Lightning's checkpoints. What
    measuring draws at random depends on `seed` and the step alone, so that a run that is resumed goes on with the same
    weights.

    Args:
        val: labelled batches that can be trusted: a loader, or one batch. Default the validation loader of the trainer,
            with (inputs, targets) as batches.
        model: name of the part of the module that gives outputs for inputs; default the module itself (`forward`).
        options: of InfluenceWeighting: loss, teacher, params, rule, refresh ("epoch", "step", or a number of update
            steps), warmup_epochs, ema, combine, normalize, influence, solve_samples, solve_every, batch_size, seed.

    Raises (when training starts):
        TypeError: a training loader without indices, several of them, or a module without the part `model`.
        ValueError: no validation data; refresh="step" with automatic optimization or on several devices; a strategy
            that spreads the model; what InfluenceWeighting refuses.

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705).

    Example:
        >>> from kdaif_fast.integrations.lightning import InfluenceCallback
        >>> callback = InfluenceCallback(refresh="epoch", warmup_epochs=2, ema=0.5)
        >>> callback.weighting is None  # until training starts
        True
    """

    def __init__(self, val: Any = None, *, model: str | None = None, **options: Any) -> None:
        self._val, self._model, self._options = val, model, options
        self.weighting: InfluenceWeighting | None = None
        self._resumed: dict[str, Any] | None = None
        self._epoch: int | None = None  # for which start_epoch was last called
        self._step: int | None = None  # likewise start_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the weighting; with the state of a checkpoint, if there is one."""
        refresh = self._options.get("refresh")
        if refresh == "step" and (pl_module.automatic_optimization or trainer.world_size > 1):
            raise ValueError(
                "refresh is 'step', which takes the place of forward and backward pass; expected a module with "
                "automatic_optimization = False that calls callback.weighting.step, on one device; or refresh='epoch'"
            )
        strategy = type(trainer.strategy).__name__
        if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"the strategy is a {strategy}, expected one device or DDP: the whole model in each process"
            )
        self.weighting = InfluenceWeighting(
            self._network(pl_module),
            _training_loader(trainer),
            _validation_loader(trainer) if self._val is None else self._val,
            **{"group": "world" if trainer.world_size > 1 else None, **self._options},
        )
        self._epoch = self._step = None
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self.weighting.load_state_dict(resumed["weighting"])
            self._epoch = resumed["epoch"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time to."""
        self._begin_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the module the weights of the batch's samples."""
        # Lightning says nothing at the start of an epoch after a checkpoint that was made by the last batch of another.
        self._begin_epoch(trainer)
        assert self.weighting is not None
        # Batches that are accumulated are one step.
        if not isinstance(self.weighting.refresh_schedule, str) and trainer.global_step != self._step:
            self._step = trainer.global_step
            with own_randomness(self._seed, 1, self._step):
                self.weighting.start_step(self._step)
        pl_module.sample_weights = self.weighting(_indexed(batch).indices)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the weights are like."""
        assert self.weighting is not None
        weights = self.weighting.weights
        pl_module.log("mean_weight", weights.mean())
        pl_module.log("share_below_1", share_below_1(weights))

    def state_dict(self) -> dict[str, Any]:
        """The state of the weighting, for a checkpoint."""
        if self.weighting is None:
            return self._resumed or {}
        return {"weighting": self.weighting.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._resumed = state_dict or None

    def _begin_epoch(self, trainer: Trainer) -> None:
        if trainer.current_epoch == self._epoch:  # resumed in the middle of it, too
            return
        assert self.weighting is not None
        with own_randomness(self._seed, 0, trainer.global_step):
            self.weighting.start_epoch(trainer.current_epoch)
        self._epoch = trainer.current_epoch

    @property
    def _seed(self) -> int:
        return int(self._options.get("seed", 0))

    def _network(self, module: LightningModule) -> nn.Module:
        network = module if self._model is None else getattr(module, self._model, None)
        if not isinstance(network, nn.Module):
            raise TypeError(f"model is {self._model!r}, expected the name of a part of {type(module).__name__}")
        return network


def _training_loader(trainer: Trainer) -> Any:
    loader = trainer.train_dataloader
    if not has_indices(loader):
        raise TypeError(
            f"the training loader is a {type(loader).__name__} without the indices of its samples, by which their "
            "weights are kept; expected one with_indices(DataLoader(...)), from kdaif_fast.distill"
        )
    return loader


def _validation_loader(trainer: Trainer) -> Any:
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    if len(loaders) != 1 or loaders[0] is None:
        found = "none" if loaders[0] is None else len(loaders)
        raise ValueError(f"the trainer has {found} validation loader(s), expected one, or val=, that influence is on")
    return loaders[0]


def _indexed(batch: Any) -> IndexedBatch:
    assert isinstance(batch, IndexedBatch)  # the loader has IndexedCollate
    return batch
