"""InfluenceCallback with the real lightning, against a loop by hand."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.distill import InfluenceWeighting, with_indices

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="no lightning"),
    # Of Lightning itself: few workers, an old place of pytrees, folders that are there, loops that are cut short.
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*isinstance.treespec, LeafSpec",
        "ignore:.*exists and is not empty",
        "ignore:The dirpath has changed",
        "ignore:You defined a `validation_step` but have no",
        "ignore:The number of training batches",
        "ignore:You're resuming from a checkpoint that ended before the epoch ended",
        "ignore::DeprecationWarning",
    ),
]

SOLVE = {"damping": 0.1, "max_iter": 50, "tol": 1e-6}
EPOCHS = 3


@pytest.fixture(scope="module")
def lightning():
    """It takes seconds to import."""
    import lightning

    return lightning


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    train, val = (TensorDataset(torch.randn(n, 5), torch.randint(3, (n,))) for n in (22, 9))
    return model, DataLoader(train, 4), DataLoader(val, 5)  # six batches, the last one of two


def make_module(lightning, by_hand=False):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, _, _ = problem()
            self.automatic_optimization = not by_hand
            self.seen = []

        def forward(self, x):
            return self.network(x)

        def training_step(self, indexed, batch_idx):
            indices, (x, y) = indexed
            self.seen.append((indices, self.sample_weights))
            if not by_hand:
                return (self.sample_weights * F.cross_entropy(self(x), y, reduction="none")).mean()
            optimizer = self.optimizers()
            optimizer.zero_grad()
            step = self.influence.step((x, y), indices)
            optimizer.step()
            return {"loss": (step.weights * step.losses).mean()}

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            assert len(batch) == 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    return Module()


def make_trainer(lightning, folder, callbacks, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": EPOCHS, **options},
    )


def trained_by_hand(accumulate, **options):
    model, train, val = problem()
    train = with_indices(train)
    weighting = InfluenceWeighting(model, train, val, influence=SOLVE, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    steps = 0
    for epoch in range(EPOCHS):
        weighting.start_epoch(epoch)
        for at, (indices, (x, y)) in enumerate(train):
            if at % accumulate == 0:
                weighting.start_step(steps)
            if weighting.is_one_pass:
                weighting.step((x, y), indices)
            else:
                losses = F.cross_entropy(model(x), y, reduction="none")
                ((weighting(indices) * losses).mean() / accumulate).backward()
            if (at + 1) % accumulate == 0 or at + 1 == len(train):
                steps += 1
                optimizer.step()
                optimizer.zero_grad()
    return model, weighting


def assert_same(module, weighting, expected, by_hand):
    torch.testing.assert_close(weighting.weights, by_hand.weights)
    for p, q in zip(module.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert len(by_hand.weights.unique()) > 2


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("options", [{"ema": 0.5, "warmup_epochs": 1}, {"refresh": 2}], ids=str)
def test_trains_as_a_loop_by_hand(lightning, tmp_path, options, accumulate):
    from kdaif_fast.integrations.lightning import InfluenceCallback

    _, train, val = problem()
    module, callback = make_module(lightning), InfluenceCallback(influence=SOLVE, **options)
    trainer = make_trainer(lightning, tmp_path, [callback], accumulate_grad_batches=accumulate)
    trainer.fit(module, with_indices(train), val)
    assert_same(module, callback.weighting, *trained_by_hand(accumulate, **options))
    assert [indices.tolist() for indices, _ in module.seen[:6]] == [*map(list, torch.arange(22).split(4))]
    weights = callback.weighting.weights
    assert float(trainer.callback_metrics["mean_weight"]) == pytest.approx(float(weights.mean()))
    assert float(trainer.callback_metrics["share_below_1"]) == pytest.approx(float((weights < 1).float().mean()))


def test_one_pass_where_the_module_optimises_by_hand(lightning, tmp_path):
    from kdaif_fast.integrations.lightning import InfluenceCallback

    _, train, val = problem()
    module, callback = make_module(lightning, by_hand=True), InfluenceCallback(influence=SOLVE, refresh="step")

    class Hand(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            object.__setattr__(pl_module, "influence", callback.weighting)

    make_trainer(lightning, tmp_path, [callback, Hand()]).fit(module, with_indices(train), val)
    assert_same(module, callback.weighting, *trained_by_hand(1, refresh="step"))


def test_data_module_and_a_part_of_the_module(lightning, tmp_path):
    from kdaif_fast.integrations.lightning import InfluenceCallback

    _, train, val = problem()

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return with_indices(train)

    module = make_module(lightning)
    callback = InfluenceCallback(val, model="network", influence=SOLVE)
    make_trainer(lightning, tmp_path, [callback]).fit(module, datamodule=Data())
    assert_same(module, callback.weighting, *trained_by_hand(1))


@pytest.mark.parametrize("options", [{"ema": 0.5, "rule": "keep_probability"}, {"refresh": 4}], ids=str)
def test_resumed_is_as_uninterrupted(lightning, tmp_path, options):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from kdaif_fast.integrations.lightning import InfluenceCallback

    def train(path):
        _, loader, val = problem()
        module, callback = make_module(lightning), InfluenceCallback(influence=SOLVE, **options)
        keeping = ModelCheckpoint(tmp_path / str(path), "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(lightning, tmp_path, [callback, keeping], enable_checkpointing=True)
        trainer.fit(module, with_indices(loader), val, ckpt_path=path and tmp_path / "None" / path)
        return module, callback.weighting

    whole, expected = train(None)
    module, weighting = train("step=12.ckpt")  # at the end of the second epoch of three
    assert torch.equal(weighting.weights, expected.weights)
    assert len(weighting.measurements) == len(expected.measurements) >= 3
    for p, q in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
    if "refresh" in options:
        return
    # In the middle of it. Lightning begins a loader that keeps no state anew; weights are those of then.
    module, weighting = train("step=9.ckpt")
    of_then = {int(i): w for indices, weights in whole.seen[6:12] for i, w in zip(indices, weights, strict=True)}
    for indices, weights in module.seen[:3]:
        assert weights.tolist() == [of_then[int(i)] for i in indices]


def test_what_does_not_fit(lightning, tmp_path):
    from kdaif_fast.integrations.lightning import InfluenceCallback

    _, train, val = problem()
    indexed = with_indices(train)
    for callback, loaders, kind, message in (
        (InfluenceCallback(), (train, val), TypeError, "without the indices of its samples"),
        (InfluenceCallback(), ([indexed, indexed], val), TypeError, "without the indices of its samples"),
        (InfluenceCallback(), (indexed, [val, val]), ValueError, "has 2 validation loader"),
        (InfluenceCallback(), (indexed,), ValueError, "has none validation loader"),
        (InfluenceCallback(model="head"), (indexed, val), TypeError, "model is 'head', expected the name of a part"),
        (InfluenceCallback(refresh="step"), (indexed, val), ValueError, "automatic_optimization = False"),
        (InfluenceCallback(rule="none"), (indexed, val), ValueError, "'none'"),
    ):
        with pytest.raises(kind, match=message):
            make_trainer(lightning, tmp_path, [callback]).fit(make_module(lightning), *copy.copy(loaders))
