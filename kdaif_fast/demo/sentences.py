"""A corpus of short film reviews from a small grammar: two classes, sentences of different lengths, as SST-2 has them.

What a sentence says is no matter of one word. Negation turns a judgement round ("not at all dull"), and so does
"hardly" or "far from"; of two judgements joined by "but" the second one counts, of two joined by "although" the first.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from ..distill import SampleFacts
from ..distill.config.data import DataParts, PaddedCollate, Vocabulary
from ..distill.config.data.text import Encoded

CLASSES = ("negative", "positive")

_THINGS = (
    *("the film", "the plot", "the acting", "the ending", "the music", "the script", "the first half", "every scene"),
    *("the dialogue", "the camera work", "the lead", "this remake", "the pacing", "the humour", "the whole story"),
)
_GOOD = (
    *("brilliant", "moving", "clever", "fresh", "funny", "gripping", "lovely", "subtle", "warm", "sharp", "charming"),
    *("honest", "inventive", "graceful", "memorable", "tender"),
)
_BAD = (
    *("dull", "clumsy", "tedious", "stale", "hollow", "messy", "shallow", "forced", "lazy", "bland", "confusing"),
    *("tiresome", "lifeless", "predictable", "sloppy", "cold"),
)
_STRENGTHS = ("", "", "", "really", "quite", "deeply", "surprisingly", "at times", "so very")
_PLAIN = ("is", "was", "felt", "seemed", "remains")
_NEGATED = ("is not", "was never", "is hardly", "is far from", "was not at all", "is anything but", "never felt")
_OPENINGS = ("", "", "", "to be fair ,", "in the end", "for me", "on second viewing", "as so often ,", "well ,")
_ENDINGS = ("", "", "", "from start to finish", "in my view", "this time", "for what it is", "on the big screen")


class Sentence(NamedTuple):
    """A sentence, and whether it praises: 1, or 0."""

    text: str
    label: int


def sentences(count: int, seed: int = 0) -> list[Sentence]:
    """So many different sentences, half of them positive; the same ones for the same seed.

    Example:
        >>> for sentence in sentences(2, seed=0):
        ...     print(sentence.label, sentence.text)
        1 to be fair , the dialogue seemed quite moving , although the camera work felt deeply cold .
        0 well , the whole story never felt warm .
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}, expected a whole number >= 1")
    draw = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        label = (len(found) + 1) % 2
        found.setdefault(_sentence(draw, bool(label)), label)
    return [Sentence(text, label) for text, label in found.items()]


def corpus(size: int = 2000, validation: int = 300, test: int = 500, seed: int = 0) -> DataParts:
    """The corpus as the data of a config: `kind = "function"`, `function = "kdaif_fast.demo.sentences:corpus"`.

    Args:
        size: sentences to train on.
        validation, test: sentences of these parts. No sentence is in two parts.
        seed: of what the grammar draws.

    Returns:
        Samples ({"input_ids": [...]}, label), brought together with a mask; the vocabulary is that of the training
        part.

    Example:
        >>> parts = corpus(size=8, validation=2, test=2)
        >>> inputs, labels = parts.collate([parts.train[0], parts.train[1]])
        >>> inputs["input_ids"].shape == inputs["attention_mask"].shape, labels.tolist()
        (True, [1, 0])
    """
    drawn = sentences(size + validation + test, seed)
    train, rest = drawn[:size], drawn[size:]
    vocabulary = Vocabulary(sentence.text for sentence in train)

    def encoded(part: list[Sentence]) -> Encoded:
        ids = [vocabulary.encode(sentence.text) for sentence in part]
        return Encoded({"input_ids": ids}, [sentence.label for sentence in part])

    return DataParts(
        encoded(train),
        encoded(rest[:validation]),
        encoded(rest[validation:]),
        facts=SampleFacts(class_names=CLASSES, describe=_Texts(train)),
        collate=PaddedCollate(),
        classes=2,
        vocabulary=len(vocabulary),
    )


class _Texts:
    """The text of a sample, to look at."""

    def __init__(self, part: list[Sentence]) -> None:
        self.part = part

    def __call__(self, index: int) -> str:
        return self.part[index].text


def _sentence(draw: random.Random, is_good: bool) -> str:
    """A sentence that praises or does not: one judgement, or two of which one counts."""
    shape = draw.random()
    if shape < 0.6:
        body = _judgement(draw, is_good)
    elif shape < 0.76:
        body = f"{_judgement(draw, not is_good)} , but {_judgement(draw, is_good)}"
    elif shape < 0.88:
        body = f"{_judgement(draw, is_good)} , although {_judgement(draw, not is_good)}"
    else:
        body = f"{_judgement(draw, is_good)} , and {_judgement(draw, is_good)}"
    words = (draw.choice(_OPENINGS), body, draw.choice(_ENDINGS), draw.choice((".", ".", "!")))
    return " ".join(word for word in words if word)


def _judgement(draw: random.Random, is_good: bool) -> str:
    """Something is good or bad; now and then by saying that it is not the opposite."""
    is_negated = draw.random() < 0.3
    verb = draw.choice(_NEGATED if is_negated else _PLAIN)
    word = draw.choice(_GOOD if is_good != is_negated else _BAD)
    strength = "" if is_negated else draw.choice(_STRENGTHS)
    return " ".join(part for part in (draw.choice(_THINGS), verb, strength, word) if part)
