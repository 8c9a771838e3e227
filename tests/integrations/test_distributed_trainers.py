"""Other people's trainers on two processes: samples are measured once, and gradients are those of the whole step."""

import importlib.util
import os

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.distill import InfluenceWeighting, with_indices
from tests.distributed.processes import start

pytestmark = [
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.slow,  # each process imports the library anew
]

TIGHT = {"damping": 0.1, "max_iter": 200, "tol": 1e-6}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}")


def as_torchrun(rank, world):
    """What torchrun tells each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}


def gathered(tensor):
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, tensor)
    return torch.cat(found)


def check_huggingface(rank, world, folder):
    as_torchrun(rank, world)
    from tests.integrations import reviews

    rows = reviews.tokenized(reviews.TRAIN, 0)
    for options in ({"ema": 0.5}, {"refresh": "step"}):
        trainer, recorder = reviews.trainer_of(folder, rows, weighting={**options, "influence": TIGHT})
        assert trainer.args.world_size == world
        trainer.train()
        assert [len(indices) for _, indices, _, _ in recorder.steps] == [8, 4] * 2
        for model, indices, weights, grads in recorder.steps:
            everywhere, all_weights = gathered(indices), gathered(weights)
            batch, labels = reviews.whole_batch(rows, everywhere)
            losses = F.cross_entropy(model(**batch).logits, labels, reduction="none")
            (all_weights * losses).mean().backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(grads[name.removeprefix("module.")], p.grad, rtol=1e-3, atol=1e-6)
        alone, _ = reviews.trainer_of(folder, rows, weighting={**options, "influence": TIGHT})
        loaders = [DataLoader(data, 4, collate_fn=alone._columns(data, "")[1]) for data in (rows, alone.val_dataset)]
        expected = InfluenceWeighting(alone.model, with_indices(loaders[0]), loaders[1], influence=TIGHT)
        expected.start_epoch(0)
        model, indices, weights, _ = recorder.steps[0]
        if "ema" in options:
            torch.testing.assert_close(weights, expected(indices), rtol=1e-3, atol=1e-3)
            assert len(weights.unique()) > 2
        trainer.weighting.gather()
        assert gathered(trainer.weighting.weights).view(world, -1).diff(dim=0).abs().max() == 0


@needs("transformers")
@needs("accelerate")
def test_huggingface(tmp_path):
    start(check_huggingface, 2, str(tmp_path))


def check_accelerate(rank, world):
    as_torchrun(rank, world)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    plain = nn.Linear(5, 3).double()
    plain.load_state_dict(model.state_dict())
    train, val = (TensorDataset(torch.randn(n, 5).double(), torch.randint(3, (n,))) for n in (21, 9))
    loaders = [with_indices(DataLoader(train, 4, shuffle=True)), DataLoader(val, 4)]
    expected = InfluenceWeighting(plain, *loaders, influence={**TIGHT, "tol": 1e-10})
    model, *prepared = accelerator.prepare(model, *loaders)
    weighting = InfluenceWeighting(model, *prepared, influence={**TIGHT, "tol": 1e-10}, group="world")
    for made in (expected, weighting):
        assert made.start_epoch(0)
    torch.testing.assert_close(weighting.weights, expected.weights, rtol=1e-6, atol=1e-6)
    seen = []
    for indices, (x, y) in prepared[0]:
        assert torch.equal(x, train[indices][0])
        losses = F.cross_entropy(model(x), y, reduction="none")
        accelerator.backward((weighting(indices) * losses).mean())
        seen.append(indices)
    assert gathered(torch.cat(seen)).unique().tolist() == list(range(21))


@needs("accelerate")
def test_accelerate():
    start(check_accelerate, 2)


def check_lightning(rank, world, folder):
    as_torchrun(rank, world)
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    import lightning

    from kdaif_fast.integrations.lightning import InfluenceCallback
    from tests.integrations.test_lightning import make_module, make_trainer, problem

    callback = InfluenceCallback(influence=TIGHT)
    module = make_module(lightning)
    _, train, val = problem()
    trainer = make_trainer(lightning, folder, [callback], devices=world, strategy="ddp", max_epochs=1)
    trainer.fit(module, with_indices(train), val)
    assert trainer.world_size == world
    model, train, val = problem()
    expected = InfluenceWeighting(model, with_indices(train), val, influence=TIGHT)
    expected.start_epoch(0)
    torch.testing.assert_close(callback.weighting.weights, expected.weights, rtol=1e-3, atol=1e-3)
    assert len(expected.weights.unique()) > 2
    seen = torch.cat([indices for indices, _ in module.seen])
    assert len(seen) == 11


@needs("lightning")
def test_lightning(tmp_path):
    start(check_lightning, 2, str(tmp_path))
