"""Hugging Face Trainer with weighted samples: a small BERT on generated reviews, 20 % with wrong labels.

    python examples/huggingface_trainer.py

What a script with Trainer has to change: the class, a data set of trusted labels, and how weights are measured.
"""

import random
import tempfile

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kdaif_fast.integrations.huggingface import InfluenceTrainer

PRAISE = ["great", "warm", "clever", "lovely", "moving", "bright", "honest", "funny"]
BLAME = ["dull", "cold", "stupid", "awful", "tired", "dark", "false", "boring"]
OTHER = ["the", "film", "a", "story", "and", "plot", "with", "actor", "was", "scene", "it", "music", "of", "camera"]


def reviews(count, flip, seed):
    """Sentences of words of one kind among others, a share of them with the wrong label: (data set, flipped)."""
    draw = random.Random(seed)
    texts, labels = [], [draw.randrange(2) for _ in range(count)]
    for label in labels:
        words = draw.choices(PRAISE if label else BLAME, k=2) + draw.choices(OTHER, k=draw.randint(4, 10))
        texts.append(" ".join(draw.sample(words, len(words))))
    flipped = torch.tensor([draw.random() < flip for _ in range(count)])
    given = [1 - label if wrong else label for label, wrong in zip(labels, flipped, strict=True)]
    return datasets.Dataset.from_dict({"text": texts, "label": given}), flipped


def make_tokenizer():
    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", *PRAISE, *BLAME, *OTHER])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def make_model():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=2, **size))


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main(epochs=15, train=400, compare=False, **arguments):
    set_seed(0)
    tokenizer = make_tokenizer()
    (train_data, flipped), (val_data, _), (test_data, _) = (
        reviews(train, 0.2, seed=0),
        reviews(100, 0, seed=1),
        reviews(300, 0, seed=2),
    )
    tokenized = [data.map(lambda rows: tokenizer(rows["text"])) for data in (train_data, val_data, test_data)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "args": TrainingArguments(
                folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                learning_rate=2e-3,
                eval_strategy="epoch",
                logging_strategy="epoch",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                **arguments,
            ),
            "data_collator": DataCollatorWithPadding(tokenizer),
            "train_dataset": tokenized[0],
            "eval_dataset": tokenized[2],
            "compute_metrics": accuracy,
        }
        if compare:
            set_seed(0)
            plain = Trainer(make_model(), **settings)
            plain.train()
            print(f"test accuracy: {plain.evaluate()['eval_accuracy']:.1%} with transformers.Trainer")
        set_seed(0)
        trainer = InfluenceTrainer(
            make_model(),
            **settings,
            val_dataset=tokenized[1],  # what influence is measured on: trusted labels
            weighting={"warmup_epochs": 1, "batch_size": 128, "influence": {"max_iter": 15, "keep_graphs": True}},
        )
        trainer.train()
        result = trainer.evaluate()
    weights = trainer.weighting.weights.cpu()
    print(f"test accuracy: {result['eval_accuracy']:.1%} with InfluenceTrainer")
    print(f"mean weight: {weights[~flipped].mean():.2f} of right labels, {weights[flipped].mean():.2f} of wrong ones")
    return result["eval_accuracy"], weights, flipped


if __name__ == "__main__":
    main(compare=True)
