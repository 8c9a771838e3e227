"""InfluenceTrainer with the real transformers: what it trains on, and what it goes on with."""

import os

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import LabelRevisionLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif("not __import__('importlib.util').util.find_spec('transformers')", reason="no transformers"),
]


@pytest.fixture(scope="module")
def hf():
    """The library takes seconds to import: only where one of these tests runs."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from tests.integrations import reviews

    return reviews


@pytest.fixture(scope="module")
def rows(hf):
    return hf.tokenized(hf.TRAIN, 0)


class Halved:
    """A loss that weighs its terms by itself."""

    def __call__(self, outputs, targets, teacher_logits=None):
        return F.cross_entropy(outputs, targets, reduction="none")

    def weighted(self, outputs, targets, teacher_logits, weights):
        return (1 + weights) / 2 * self(outputs, targets)


KINDS = {
    "classification": {},
    "step": {"weighting": {"refresh": "step", "warmup_epochs": 1}},
    "every step": {"weighting": {"refresh": 1, "ema": 0.5}},
    "distillation": {"teacher": True, "loss": DistillationLoss(2.0, 0.3), "dataset": "datasets"},
    "distillation, step": {"teacher": True, "weighting": {"refresh": "step"}},
    "label smoothing": {"label_smoothing_factor": 0.1, "dataset": "datasets"},
    "own weights": {"loss": Halved()},
    "lengths": {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1},
}


def hand_losses(name, model, batch, labels, weights, teacher):
    logits = model(**batch).logits
    if name == "label smoothing":
        return weights * F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    if name == "own weights":
        weights = (1 + weights) / 2
    losses = F.cross_entropy(logits, labels, reduction="none")
    if teacher is not None:
        T, alpha = (2.0, 0.3) if name == "distillation" else (1.0, 0.5)
        p = (teacher(**batch).logits / T).softmax(1)
        kl = (p * (p.log() - (logits / T).log_softmax(1))).sum(1)
        losses = alpha * losses + (1 - alpha) * T**2 * kl
    return weights * losses


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_the_weighted_mean_over_a_step(hf, rows, tmp_path, name):
    options = dict(KINDS[name])
    if options.get("dataset"):
        options["dataset"] = hf.as_dataset(rows)
    teacher = None
    if options.get("teacher"):
        torch.manual_seed(5)
        teacher = options["teacher"] = hf.make_model(dropout=0.5).train()
    trainer, recorder = hf.trainer_of(tmp_path, rows, **options)
    trainer.train()
    assert [len(indices) for _, indices, _, _ in recorder.steps] == [8, 8, 6] * 2
    for epoch in (recorder.steps[:3], recorder.steps[3:]):
        assert torch.cat([indices for _, indices, _, _ in epoch]).unique().tolist() == list(range(hf.TRAIN))
    for model, indices, weights, grads in recorder.steps:
        batch, labels = hf.whole_batch(rows, indices)
        losses = hand_losses(name, model.train(), batch, labels, weights, teacher)
        (losses.sum() / len(indices)).backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(grads[key], p.grad, rtol=1e-4, atol=1e-6, msg=key)
    last = recorder.steps[-1][2]
    assert len(last.unique()) > 1
    warm = name == "step"
    assert bool((recorder.steps[0][2] == 1).all()) == warm
    assert teacher is None or (not teacher.training and all(p.grad is None for p in teacher.parameters()))
    logged = [logs for logs in recorder.logs if "loss" in logs]
    assert len(logged) == 2
    weights = trainer.weighting.weights
    assert logged[-1]["mean_weight"] == pytest.approx(float(weights.mean()))
    assert logged[-1]["share_below_1"] == pytest.approx(float((weights < 1).double().mean()))


def test_evaluation_is_without_weights(hf, rows, tmp_path):
    trainer, _ = hf.trainer_of(tmp_path, rows, num_train_epochs=1, per_device_eval_batch_size=5)
    trainer.train()
    batch, labels = hf.whole_batch(rows, range(10))
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    metrics = trainer.evaluate(rows[:10])
    assert metrics["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert trainer.predict(rows[:10]).predictions == pytest.approx(logits.numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("weighting", [{"ema": 0.5}, {"refresh": "step", "ema": 0.5}, {"refresh": 2}], ids=str)
def test_resumed_is_as_uninterrupted(hf, rows, tmp_path, weighting):
    """In the middle of an epoch, where nothing is measured again, and at the end of one."""
    options = {
        "dropout": 0.3,
        "weighting": weighting,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
    }
    trainer, _ = hf.trainer_of(tmp_path / "all", rows, **options)
    trainer.train()
    for step in (2, 3):
        resumed, _ = hf.trainer_of(tmp_path / "resumed", rows, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "all" / f"checkpoint-{step}"))
        assert torch.equal(resumed.weighting.weights, trainer.weighting.weights)
        assert len(resumed.weighting.measurements) == len(trainer.weighting.measurements)
        for p, q in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)
    (tmp_path / "all" / "checkpoint-3" / "influence.safetensors").unlink()
    resumed, _ = hf.trainer_of(tmp_path / "resumed", rows, **options)
    with pytest.warns(UserWarning, match=r"has no influence\.safetensors: weights begin at 1"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "all" / "checkpoint-3"))


def test_training_again_starts_again(hf, rows, tmp_path):
    trainer, _ = hf.trainer_of(tmp_path, rows, num_train_epochs=1)
    trainer.train()
    first = trainer.weighting
    trainer.train()
    assert trainer.weighting is not first
    assert len(trainer.weighting.measurements) == 1


def test_bfloat16(hf, rows, tmp_path):
    for refresh in ("epoch", "step"):
        trainer, _ = hf.trainer_of(tmp_path, rows, bf16=True, weighting={"refresh": refresh})
        trainer.train()
        assert len(trainer.weighting.weights.unique()) > 2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"teacher": torch.nn.Linear(1, 1), "label_smoothing_factor": 0.1},
            ValueError,
            "label_smoothing_factor is 0.1",
        ),
        ({"dataset": Stream(), "max_steps": 2}, TypeError, "train_dataset is a Stream, whose samples have no index"),
        ({"loss": LabelRevisionLoss(), "weighting": {"refresh": "step"}}, ValueError, "weighs its terms by itself"),
        ({"weighting": {"refresh": "never"}}, ValueError, "refresh is 'never', expected"),
        ({"dataset": [{"input_ids": [1, 2]}] * 4}, TypeError, "expected a mapping with labels"),
    ],
)
def test_what_does_not_fit(hf, rows, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        hf.trainer_of(tmp_path, rows, **options)[0].train()


def test_arguments_that_do_not_fit(hf, rows, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    model = hf.make_model()
    with pytest.raises(ValueError, match="val_dataset is missing"):
        hf.InfluenceTrainer(model, args, train_dataset=rows)
    with pytest.raises(ValueError, match="val_dataset is several"):
        hf.InfluenceTrainer(model, args, train_dataset=rows, eval_dataset={"a": rows})
    with pytest.raises(ValueError, match="compute_loss_func gives one loss for a batch"):
        hf.InfluenceTrainer(model, args, train_dataset=rows, eval_dataset=rows, compute_loss_func=print)


def test_a_warning_where_training_data_validate(hf, rows, tmp_path):
    trainer, _ = hf.trainer_of(tmp_path, rows, dataset=hf.as_dataset(rows), max_steps=1)
    trainer.val_dataset = trainer.train_dataset
    with pytest.warns(UserWarning, match="22 samples are both in the training and in the validation data"):
        trainer.train()
