import numpy as np
import pytest
import torch

from kdaif_fast.demo.models import transformer
from kdaif_fast.demo.sentences import _BAD, _GOOD, _NEGATED, corpus, sentences


def test_sentences():
    drawn = sentences(600, seed=3)
    texts = [sentence.text for sentence in drawn]
    assert len(set(texts)) == 600
    assert sum(sentence.label for sentence in drawn) == 300
    assert drawn == sentences(600, seed=3)
    assert drawn != sentences(600, seed=4)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 6
    assert max(lengths) >= 18


def test_labels_follow_from_the_grammar():
    """Read again by a parser of its own: the clause that counts, its judgement, its negation."""
    for text, label in sentences(500, seed=1):
        clause = text.split(" , although ")[0] if " , although " in text else text.split(" , but ")[-1]
        parts = clause.split(" , and ")
        assert all(sum(word in part.split() for word in (*_GOOD, *_BAD)) == 1 for part in parts), text
        praises = [
            any(word in part.split() for word in _GOOD) != any(f" {verb} " in f" {part} " for verb in _NEGATED)
            for part in parts
        ]
        assert praises == [bool(label)] * len(parts), text


def test_corpus():
    parts = corpus(size=300, validation=40, test=60, seed=2)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [300, 40, 60]
    inputs, labels = parts.collate([parts.test[i] for i in range(60)])
    lengths = inputs["attention_mask"].sum(1)
    assert len(lengths.unique()) > 8
    assert (inputs["input_ids"] != 0).equal(inputs["attention_mask"].bool())
    assert parts.vocabulary > int(inputs["input_ids"].max())
    assert 20 <= int(labels.sum()) <= 40
    first = parts.facts.describe(0)
    assert len(parts.train[0][0]["input_ids"]) == len(first.split())
    rows = {tuple(part[i][0]["input_ids"]) for part in (parts.train, parts.validation, parts.test) for i in range(40)}
    assert len(rows) > 100  # nothing in two parts, but for words that the training part does not have


@pytest.mark.parametrize("count", [0, True, 2.0])
def test_bad_counts(count):
    with pytest.raises(ValueError, match=rf"count is {count}, expected a whole number >= 1"):
        sentences(count)


def test_words_alone_do_not_tell_but_a_transformer_learns():
    """Counts of words, read by logistic regression, leave much that attention finds."""
    from sklearn.linear_model import LogisticRegression

    parts = corpus(size=2000, validation=1, test=400)
    (train, y), (test, test_y) = (
        parts.collate([part[i] for i in range(len(part))]) for part in (parts.train, parts.test)
    )

    def counts(inputs):
        table = np.zeros((len(inputs["input_ids"]), parts.vocabulary))
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            np.add.at(table[row], ids, 1)
        return table[:, 1:]

    linear = LogisticRegression(max_iter=300).fit(counts(train), y).score(counts(test), test_y)
    model = transformer(parts.vocabulary, width=16, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(8):
        for indices in torch.randperm(len(y)).split(64):
            outputs = model(train["input_ids"][indices], train["attention_mask"][indices])
            torch.nn.functional.cross_entropy(outputs, y[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        learned = float((model(**test).argmax(1) == test_y).float().mean())
    assert 0.5 < linear < 0.75
    assert learned > 0.85
