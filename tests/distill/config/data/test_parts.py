import pytest
import torch
from torch.utils.data import TensorDataset

from kdaif_fast.distill import SampleFacts
from kdaif_fast.distill.config.data.parts import DataParts, FlippedLabels, count_classes, draw_flips, hold_out


def numbered(n):
    return TensorDataset(torch.arange(n), torch.arange(n) % 3)


def places(dataset):
    return [int(dataset[i][0]) for i in range(len(dataset))]


@pytest.mark.parametrize("classes", [2, 5])
def test_flips(classes):
    shift = draw_flips(1000, 0.2, classes, seed=4)
    assert int((shift != 0).sum()) == 200
    assert shift.unique().tolist() == list(range(classes))  # every other class occurs, and no sample keeps its own
    assert torch.equal(shift, draw_flips(1000, 0.2, classes, seed=4))
    assert not torch.equal(shift, draw_flips(1000, 0.2, classes, seed=5))


def test_flipped_items():
    shift = torch.tensor([0, 2, 1])
    flipped = FlippedLabels(numbered(3), shift, 3)
    assert [int(flipped[i][1]) for i in range(3)] == [0, 0, 0]
    assert places(flipped) == [0, 1, 2]
    assert FlippedLabels([{"labels": 1, "x": 5}] * 3, shift, 3)[1] == {"labels": 0, "x": 5}
    assert FlippedLabels([(7, 1, "more")] * 3, shift, 3)[2] == (7, 2, "more")


def test_held_out_samples_are_in_one_part_only():
    facts = SampleFacts(
        flipped=torch.arange(50) % 2 == 0,
        groups=[str(i) for i in range(50)],
        true_labels=torch.arange(50),
        describe=lambda index: f"sample {index}",
    )
    parts = hold_out(DataParts(numbered(50), facts=facts), {"validation": 10, "test": 5}, seed=1)
    train, validation, test = places(parts.train), places(parts.validation), places(parts.test)
    assert (len(train), len(validation), len(test)) == (35, 10, 5)
    assert sorted(train + validation + test) == list(range(50))
    assert parts.facts.groups == [str(place) for place in train]
    assert parts.facts.true_labels.tolist() == train
    assert parts.facts.flipped.tolist() == [place % 2 == 0 for place in train]
    assert parts.facts.describe(3) == f"sample {train[3]}"
    again = hold_out(DataParts(numbered(50)), {"validation": 10, "test": 5}, seed=1)
    assert places(again.train) == train
    assert places(hold_out(DataParts(numbered(50)), {"validation": 10}, seed=2).validation) != validation


def test_held_out_samples_are_not_augmented():
    augmented = TensorDataset(torch.arange(20) + 100, torch.arange(20) % 3)
    parts = hold_out(DataParts(augmented, unaugmented=numbered(20)), {"test": 5}, seed=0)
    assert min(places(parts.train)) >= 100
    assert max(places(parts.test)) < 20


def test_counting_classes():
    assert count_classes(numbered(5)) == 3
    assert count_classes([{"labels": 4}, {"labels": 1}]) == 5
    dataset = numbered(5)
    dataset.targets = [0, 7]
    assert count_classes(dataset) == 8
