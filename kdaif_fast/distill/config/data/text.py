"""Texts as numbers: a plain vocabulary of words, and batches of sentences of different lengths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


class Vocabulary:
    """The most frequent words of some texts, in lower case, each with a number; 0 is padding, 1 any other word.

    Args:
        texts: what to take words from.
        size: how many numbers there are at most, with those two.

    Example:
        >>> vocabulary = Vocabulary(["A fine film.", "A dull film."])
        >>> vocabulary.encode("a dull book"), len(vocabulary)
        ([3, 5, 1], 7)
    """

    def __init__(self, texts: Iterable[str], size: int = 20_000) -> None:
        counts = Counter(word for text in texts for word in words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: max(0, size - 2)]
        self.numbers = {word: number for number, word in enumerate(ranked, 2)}

    def __len__(self) -> int:
        return len(self.numbers) + 2

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """The numbers of the text's words, of its first `longest` ones; that of an unknown word if it has none."""
        return [self.numbers.get(word, UNKNOWN) for word in words(text)[:longest]] or [UNKNOWN]


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case."""
    return _WORD.findall(text.lower())


class PaddedCollate:
    """Batches of samples ({"input_ids": [...], ...}, label): ({"input_ids", "attention_mask", ...: [n, L]}, [n]).

    Every list is filled up to the longest of the batch: the ids with `padding`, everything else with 0. The mask is 1
    where there is a token.
    """

    def __init__(self, padding: int = PADDING) -> None:
        self.padding = padding

    def __call__(self, samples: Sequence[tuple[Mapping[str, Sequence[int]], int]]) -> tuple[dict[str, Tensor], Tensor]:
        """The batch."""
        longest = max(len(inputs["input_ids"]) for inputs, _ in samples)
        batch: dict[str, Any] = {}
        for key in samples[0][0]:
            filler = self.padding if key == "input_ids" else 0
            rows = [[*inputs[key], *[filler] * (longest - len(inputs[key]))] for inputs, _ in samples]
            batch[key] = torch.tensor(rows, dtype=torch.int64)
        if "attention_mask" not in batch:
            lengths = torch.tensor([len(inputs["input_ids"]) for inputs, _ in samples])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch, torch.tensor([int(label) for _, label in samples])


class Encoded(torch.utils.data.Dataset[Any]):
    """Samples ({"input_ids": [...], ...}, label) from lists, one entry a sample."""

    def __init__(self, inputs: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[int]) -> None:
        self.inputs, self.labels = dict(inputs), list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Sequence[int]], int]:
        return {key: rows[index] for key, rows in self.inputs.items()}, self.labels[index]
