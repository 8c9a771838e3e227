"""The teacher's word on unlabelled samples, and the loader that has both kinds of samples."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from kdaif_fast.distill import IndexedCollate, LossNotFiniteError, with_indices
from kdaif_fast.distill.indexed import visited
from kdaif_fast.distill.semi.pseudo_labels import JoinedSamples, PseudoLabels, joined

LOGITS = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 2.0]])


def test_soft_and_hard():
    soft, hard = PseudoLabels(2, 3, "soft"), PseudoLabels(2, 3, "hard")
    for pseudo in (soft, hard):
        assert pseudo.targets is None
        assert pseudo.renew([LOGITS[:2], LOGITS[2:]]).tolist() == []
        torch.testing.assert_close(pseudo.confidence, LOGITS.softmax(1).amax(1))
        assert pseudo.round == 1
    torch.testing.assert_close(soft.targets, LOGITS.softmax(1))
    assert hard.targets.tolist() == [0, 1, 2]


def test_targets_of_a_mixed_batch():
    indices, labels = torch.tensor([4, 0, 2]), torch.tensor([7, 1, 7])  # what unlabelled ones have is not looked at
    hard = PseudoLabels(2, 3, "hard")
    assert hard.merge(indices, labels) is labels
    hard.renew([LOGITS])
    assert hard.merge(indices, labels).tolist() == [2, 1, 0]
    soft = PseudoLabels(2, 3, "soft")
    soft.renew([LOGITS])
    p = LOGITS.softmax(1)
    torch.testing.assert_close(soft.merge(indices, labels), torch.stack([p[2], torch.tensor([0.0, 1, 0]), p[0]]))


def test_those_whose_class_changes_are_told():
    for kind in ("soft", "hard"):
        pseudo = PseudoLabels(2, 3, kind)
        pseudo.renew([LOGITS])
        assert pseudo.renew([torch.tensor([[1.0, 0, 0], [0.0, 0, 1.0], [0, 1.0, 0]])]).tolist() == [3, 4]


def test_threshold():
    pseudo = PseudoLabels(2, 3, "soft", 0.6)
    pseudo.renew([LOGITS])
    assert pseudo.used.tolist() == [True, False, True]
    assert sorted(pseudo.sampler.indices) == [0, 1, 2, 4]
    before = pseudo.state_dict()
    with pytest.raises(ValueError, match=r"threshold is 0.6, but .* more than 0.4767.* in round 2"):
        pseudo.renew([0.2 * LOGITS])
    assert pseudo.state_dict() == before


def test_word_that_is_not_finite():
    pseudo = PseudoLabels(2, 3)
    logits = LOGITS.clone()
    logits[1, 0] = torch.nan
    with pytest.raises(LossNotFiniteError, match="at the indices 3") as raised:
        pseudo.renew([logits])
    assert raised.value.indices == [3]
    assert pseudo.round == 0


@pytest.mark.parametrize(("label", "kind"), [(-1, "soft"), (-1, "hard"), (3, "soft")])
def test_labelled_samples_without_a_class(label, kind):
    pseudo = PseudoLabels(2, 3, kind)
    pseudo.renew([LOGITS])
    with pytest.raises(ValueError, match=rf"indices \[1\] have the labels \[{label}\].*unlabelled_loader"):
        pseudo.merge(torch.tensor([0, 1]), torch.tensor([0, label]))


def test_labels_that_are_no_classes():
    with pytest.raises(TypeError, match=r"labelled_loader are torch\.float32"):
        PseudoLabels(2, 3).merge(torch.tensor([0, 1]), torch.zeros(2))


@pytest.mark.parametrize("threshold", [-0.1, 1.0, True, "high"])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match=r"threshold is .*expected a number in \[0, 1\)"):
        PseudoLabels(2, 3, "soft", threshold)


def test_kinds_that_are_none():
    with pytest.raises(ValueError, match="pseudo_labels is 'mild', expected one of soft, hard"):
        PseudoLabels(2, 3, "mild")


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


A, B = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "expected"),
    [
        ((A, 1), B, (B, 1)),
        ((A, 1), (B,), (B, 1)),  # a TensorDataset of inputs alone
        ((A, 1), (B, -1), (B, 1)),
        ([A, 1], [B, 5], (B, 1)),
        (((A, A), 1), (B, B), ((B, B), 1)),
        (((A, A), 1), ((B, B), 0), ((B, B), 1)),
        (({"x": A}, 1), {"x": B}, ({"x": B}, 1)),
        ({"x": A, "labels": 1}, {"x": B}, {"x": B, "labels": 1}),
        ({"x": A, "label": 1}, {"x": B, "label": -1}, {"x": B, "label": 1}),
        ({"inputs": A, "targets": 1}, {"inputs": B}, {"inputs": B, "targets": 1}),
    ],
)
def test_forms_of_samples(labelled, unlabelled, expected):
    data = JoinedSamples(Items([labelled]), Items([unlabelled, unlabelled]))
    assert len(data) == 3
    assert data[0] is labelled
    assert repr(data[2]) == repr(expected)  # which has only 0 and 1


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "named"),
    [
        (A, B, "a labelled sample is a Tensor"),
        ({"x": A}, {"x": B}, r"has the keys \['x'\]"),
        ({"x": A, "label": 1}, B, "unlabelled sample 0 is a Tensor"),
    ],
)
def test_forms_that_are_none(labelled, unlabelled, named):
    with pytest.raises(TypeError, match=named):
        JoinedSamples(Items([labelled]), Items([unlabelled]))[1]


def data(count, start=0, labels=True):
    x = torch.arange(start, start + count).float()[:, None]
    return TensorDataset(x, x[:, 0].long() % 3) if labels else TensorDataset(x)


@pytest.mark.parametrize("workers", [0, 2])
def test_joined_loader(workers):
    unlabelled = DataLoader(
        data(3, 100, labels=False), batch_size=2, num_workers=workers, persistent_workers=workers > 0
    )
    loader, pseudo = joined(DataLoader(data(4), batch_size=4), unlabelled, "hard", 0.6)
    pseudo.renew([LOGITS])
    for _ in range(2):
        found = [(i, float(x), int(y)) for batch in loader for i, x, y in zip(*flat(batch), strict=True)]
        assert sorted(found) == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 100, 0), (6, 102, 2)]
    assert visited(loader).tolist() == [0, 1, 2, 3, 4, 6]
    pseudo.renew([LOGITS.flip(1)])  # workers must not keep those of before
    assert {i: y for batch in loader for i, _, y in zip(*flat(batch), strict=True)}[4] == 2


def flat(batch):
    return batch.indices.tolist(), batch.batch.inputs[:, 0].tolist(), batch.batch.targets.tolist()


def test_parts_of_one_data_set():
    whole = data(10)
    first = DataLoader(whole, 2, sampler=SubsetRandomSampler([7, 1]))
    second = with_indices(DataLoader(whole, 3, sampler=SubsetRandomSampler([2, 9, 4])))
    loader, pseudo = joined(first, second, "hard", 0.0)
    assert (pseudo.labelled, pseudo.unlabelled) == (2, 3)
    pseudo.renew([LOGITS])
    found = {i: x for batch in loader for i, x, _ in zip(*flat(batch), strict=True)}
    assert found == {0: 1.0, 1: 7.0, 2: 2.0, 3: 4.0, 4: 9.0}
    assert not isinstance(loader.collate_fn.collate_fn, IndexedCollate)


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "error", "named"),
    [
        (data(3), None, ValueError, "unlabelled_loader is None"),
        (None, data(3), ValueError, "labelled_loader is None"),
        (data(3), data(0), ValueError, "unlabelled_loader is empty"),
        (data(0), data(3), ValueError, "labelled_loader is empty"),
        (data(3), DataLoader(data(3), sampler=SubsetRandomSampler([])), ValueError, "unlabelled_loader is empty"),
        ([(A, B)], data(3), TypeError, "labelled_loader is a list"),
        (data(3), iter(data(3)), TypeError, "unlabelled_loader: data is a"),
    ],
)
def test_no_data(labelled, unlabelled, error, named):
    with pytest.raises(error, match=named):
        joined(labelled, unlabelled, "soft", 0.0)


def test_state():
    pseudo = PseudoLabels(2, 3, "soft", 0.6)
    pseudo.renew([LOGITS])
    other = PseudoLabels(2, 3, "soft", 0.6)
    other.load_state_dict(pseudo.state_dict())
    assert other.sampler.indices == pseudo.sampler.indices
    assert torch.equal(other.targets, pseudo.targets)
    assert other.round == 1
    with pytest.raises(ValueError, match="3 unlabelled samples, expected 4"):
        PseudoLabels(2, 4).load_state_dict(pseudo.state_dict())
