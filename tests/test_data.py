"""Batches: one batch or a loader, gone through again and again."""

import re

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kdaif_fast._data import Batches, size_of
from kdaif_fast._model import Batch

X, Y = torch.arange(10.0).view(5, 2), torch.tensor([0, 1, 2, 0, 1])


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Changing:
    """A loader that gives something else in its second pass."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0))


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"inputs": X, "targets": Y}, Batch(X, Y), (X, Y, X)])
def test_one_batch(batch):
    batches = Batches(batch, "train")
    assert batches.is_one
    assert batches.count == 1
    for _ in range(2):
        ((label, found),) = batches
        assert label == "train"
        assert found.inputs is X
        assert found.targets is Y


@pytest.mark.parametrize(
    ("loader", "count"),
    [
        (DataLoader(TensorDataset(X, Y), 2), 3),
        ([(X[:2], Y[:2]), (X[2:4], Y[2:4]), (X[4:], Y[4:])], 3),
        ([[X[:2], Y[:2]], [X[2:], Y[2:]]], 2),
        ([{"inputs": X, "targets": Y}], 1),
        (((X[i : i + 1], Y[i : i + 1]) for i in range(0)), 0),
        (DataLoader(Stream(), 3), None),
    ],
    ids=["loader", "list", "list of lists", "list of a mapping", "generator", "no length"],
)
def test_loaders(loader, count):
    if count == 0:
        with pytest.raises(TypeError, match="train is a generator, which can be gone through only once"):
            Batches(loader, "train")
        return
    batches = Batches(loader, "train")
    assert not batches.is_one
    assert batches.count == count
    for _ in range(2):
        found = list(batches)
        assert [label for label, _ in found] == [f"batch {i} of train" for i in range(len(found))]
        assert torch.equal(torch.cat([batch.inputs for _, batch in found]), X)
        assert torch.equal(torch.cat([batch.targets for _, batch in found]), Y)


def test_batches_of_loaders_are_moved_and_one_batch_is_not():
    nowhere = torch.device("meta")
    ((_, batch),) = Batches([({"a": X, "b": 3}, Y)], "train", nowhere)
    assert batch.inputs["a"].device == batch.targets.device == nowhere
    assert batch.inputs["b"] == 3
    ((_, batch),) = Batches((X, Y), "train", nowhere)
    assert batch.inputs is X


def test_nothing():
    with pytest.raises(ValueError, match="train is empty: it gave no batch"):
        list(Batches([], "train"))
    assert list(Batches([], "train", may_be_empty=True)) == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([(X, Y), (X, Y)], "gave 2 batches with 10 samples, but 1 with 5 when"),
        ([(X[:4], Y[:4])], "gave 1 batches with 4 samples, but 1 with 5 when"),
        ([], "is empty"),
    ],
)
def test_passes_of_different_length(second, message):
    batches = Batches(Changing([(X, Y)], second), "train")
    assert len(list(batches)) == 1
    with pytest.raises(ValueError, match=f"train {message}"):
        list(batches)


@pytest.mark.parametrize(
    "second",
    [
        (X.flip(0), Y),  # targets alone do not tell
        (X, Y.flip(0)),
        (X + torch.tensor([[1.0], [0], [0], [0], [0]]), Y),
    ],
    ids=["other order", "other targets", "augmented"],
)
def test_other_samples_in_a_later_pass(second):
    batches = Batches(Changing([(X, Y)], [second], [(X, Y)]), "train", in_order=True)
    list(batches)
    with pytest.raises(ValueError, match="train gave other samples, or the same in another order"):
        list(batches)
    list(batches)
    batches = Batches(Changing([(X, Y)], [second]), "train")
    assert len([*batches, *batches]) == 2


def test_what_is_looked_at_may_be_of_any_kind():
    half, sparse = X.bfloat16(), X.to_sparse()
    odd = (half, sparse, Y > 1, torch.tensor(3), X.to("meta"), X[:0], "text", torch.tensor([1j]).conj()), Y
    batches = Batches(Changing([odd], [odd]), "train", in_order=True)
    assert len([*batches, *batches]) == 2
    empty = X[:0], Y[:0]
    batches = Batches(Changing([(X, Y), empty], [(X, Y), empty]), "train", in_order=True)
    assert len([*batches, *batches]) == 4


def test_a_pass_that_is_left_early_counts_for_nothing():
    batches = Batches([(X, Y), (X, Y)], "train")
    next(iter(batches))
    assert len(list(batches)) == len(list(batches)) == 2


@pytest.mark.parametrize("bad", [3, None, X])
def test_what_is_no_batch(bad):
    message = "expected (inputs, targets[, teacher_logits]) or a mapping with those keys"
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        list(Batches(bad, "train"))


def test_the_bad_batch_of_a_loader_is_named():
    with pytest.raises(ValueError, match="batch 1 of train has 1 parts"):
        list(Batches([(X, Y), (X,)], "train"))


def test_sizes():
    assert size_of(Batch(X, Y)) == 5
    assert size_of(Batch({"a": X}, None)) == 5
    assert size_of(Batch([torch.tensor(1.0), X], {"boxes": [X[:3]]})) == 3
    assert size_of(Batch(None, None)) == 0
