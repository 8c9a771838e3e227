"""A small BERT, reviews, and trainers of it; imports transformers, so it is imported where a test needs it."""

import copy

import datasets
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from kdaif_fast.integrations.huggingface import INDEX, InfluenceTrainer

from .scripts import load

example = load("huggingface_trainer")
make_tokenizer, reviews = example.make_tokenizer, example.reviews

TRAIN, VAL = 22, 12
"""22 in batches of 4, two to a step: 4 + 4, 4 + 4, 4 + 2 samples."""

SOLVE = {"damping": 0.1, "max_iter": 20}


def make_model(dropout=0.0, classes=2):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=classes, **size, **drops)
    return BertForSequenceClassification(config)


def tokenized(count, seed):
    """A list of dictionaries, with a column that no model takes."""
    tokenizer = make_tokenizer()
    data, _ = reviews(count, 0.2, seed)
    return [{**tokenizer(row["text"]), "label": row["label"], "text": row["text"]} for row in data]


def as_dataset(rows):
    return datasets.Dataset.from_list(rows)


class Recorder(TrainerCallback):
    """For each update step: the network before it, the samples in it, their weights, and the gradients."""

    def __init__(self):
        self.steps, self.logs = [], []
        self._model = self._indices = None

    def watch(self, trainer):
        self.trainer = trainer
        get = trainer.get_batch_samples

        def get_batch_samples(*args):
            batches, samples = get(*args)
            self._indices = torch.cat([batch[INDEX] for batch in batches])
            return batches, samples

        trainer.get_batch_samples = get_batch_samples

    def on_step_begin(self, args, state, control, model, **kwargs):
        self._model = copy.deepcopy(model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        weights = self.trainer.weighting(self._indices).clone()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append((self._model, self._indices, weights, grads))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)


def trainer_of(folder, rows, *, dropout=0.0, weighting=None, teacher=None, loss=None, dataset=None, **arguments):
    set_seed(0)
    recorder = Recorder()
    trainer = InfluenceTrainer(
        make_model(dropout),
        TrainingArguments(
            **{
                "output_dir": str(folder),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.05,
                "optim": "sgd",
                "max_grad_norm": 0,
                "save_strategy": "no",
                "logging_strategy": "epoch",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                **arguments,
            }
        ),
        data_collator=DataCollatorWithPadding(make_tokenizer()),
        train_dataset=rows if dataset is None else dataset,
        val_dataset=tokenized(VAL, 1),
        weighting={"influence": SOLVE, **(weighting or {})},
        teacher=teacher,
        loss=loss,
        callbacks=[recorder],
    )
    recorder.watch(trainer)
    return trainer, recorder


def whole_batch(rows, indices):
    """(inputs, labels) of some samples at once."""
    columns = [{key: rows[int(i)][key] for key in ("input_ids", "attention_mask", "label")} for i in indices]
    batch = dict(DataCollatorWithPadding(make_tokenizer())(columns))
    return batch, batch.pop("labels")
