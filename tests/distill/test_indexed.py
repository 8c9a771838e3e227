import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from kdaif_fast.distill import IndexedBatch, IndexedCollate, with_indices
from kdaif_fast.distill.indexed import (
    as_batch,
    in_order,
    own_share,
    require_indices,
    sample_count,
    shared_samples,
    visited,
)

DATA = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10) % 3)


def named(loader):
    """{index: input} of all that a loader gives."""
    return {int(i): float(x) for indices, (inputs, _) in loader for i, x in zip(indices, inputs, strict=True)}


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
        {"batch_size": 4, "sampler": SubsetRandomSampler([1, 5, 7])},
        {"batch_sampler": [[1, 2], [9], [0, 3]]},
        {"batch_size": 3, "num_workers": 1, "persistent_workers": True, "shuffle": True},
    ],
)
def test_indices_are_places_in_the_data_set(options):
    loader = DataLoader(DATA, **options)
    indexed = with_indices(loader)
    found = named(indexed)
    assert all(float(i) == x for i, x in found.items())
    assert len(indexed) == len(loader)
    assert with_indices(indexed) is indexed


def test_batches_are_as_they_were():
    def reversed_collate(samples):
        return default_collate(samples[::-1])

    loader = DataLoader(DATA, batch_size=4, collate_fn=reversed_collate)
    for (indices, batch), old in zip(with_indices(loader), loader, strict=True):
        for new, before in zip(batch, old, strict=True):
            assert torch.equal(new, before)
        assert len(indices) == len(batch[1])


def test_the_same_order_with_the_same_seed():
    def run(indexed):
        torch.manual_seed(4)
        loader = DataLoader(DATA, batch_size=3, shuffle=True)
        loader = with_indices(loader) if indexed else loader
        return [batch.batch[0] if indexed else batch[0] for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_data_sets_that_fetch_several_at_once():
    class Several(TensorDataset):
        asked = 0

        def __getitems__(self, indices):
            Several.asked += 1
            return [self[i] for i in indices]

    loader = with_indices(DataLoader(Several(*DATA.tensors), batch_size=5))
    assert named(loader) == {i: float(i) for i in range(10)}
    assert Several.asked == 2


def test_lists_are_numbered_on():
    batches = with_indices([tuple(DATA[:4]), tuple(DATA[4:10])])
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert sample_count(batches) == 10
    some = in_order(batches, torch.tensor([1, 5]), 4)
    assert named(some) == {1: 1.0, 5: 5.0}


def test_in_order_gives_what_is_asked_for():
    loader = with_indices(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True))
    ordered = in_order(loader, torch.tensor([2, 3, 8]), 2)
    assert [batch.indices.tolist() for batch in ordered] == [[2, 3], [8]]


def test_what_is_visited():
    subset = with_indices(DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([7, 1, 4])))
    assert visited(subset).tolist() == [1, 4, 7]
    drawn = with_indices(DataLoader(DATA, batch_size=2, sampler=WeightedRandomSampler([1.0] * 10, 10)))
    assert visited(drawn).tolist() == list(range(10))
    ranks = [DistributedSampler(DATA, num_replicas=3, rank=rank) for rank in range(3)]
    shares = [
        own_share(DataLoader(DATA, batch_size=2, sampler=sampler), torch.arange(10)).tolist() for sampler in ranks
    ]
    assert sorted(place for share in shares for place in share) == list(range(10))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class OwnLoader(DataLoader):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Stream(), batch_size=2), "an iterable one"),
        (OwnLoader(DATA, batch_size=2), "in a way of its own"),
        (DataLoader(DATA, batch_size=None), "in a way of its own"),
        (iter([1]), "whose samples have no index"),
        (torch.zeros(3), "whose samples have no index"),
    ],
)
def test_data_without_places(data, message):
    with pytest.raises(TypeError, match=message):
        with_indices(data)


def test_a_batch_without_indices_says_how_to_get_them():
    with pytest.raises(TypeError, match=r"with_indices\(loader\)"):
        require_indices((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))
    plain = (torch.tensor([3, 1]), (torch.zeros(2, 3), torch.tensor([0, 1])))
    assert isinstance(require_indices(plain), IndexedBatch)


def test_mappings_of_hugging_face():
    ids, labels = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])
    batch = as_batch({"input_ids": ids, "labels": labels})
    assert batch.inputs == {"input_ids": ids}
    assert batch.targets is labels
    assert as_batch({"inputs": ids, "targets": labels}).inputs is ids


def test_shared_samples():
    def loader(dataset, **options):
        return DataLoader(dataset, batch_size=2, **options)

    assert shared_samples(with_indices(loader(Subset(DATA, range(6)))), loader(Subset(DATA, range(4, 10)))) == 2
    assert shared_samples(with_indices(loader(DATA)), loader(DATA)) == 10
    assert shared_samples(loader(Subset(Subset(DATA, range(5)), [0, 1])), loader(Subset(DATA, [1, 7]))) == 1
    assert shared_samples(loader(DATA), loader(TensorDataset(*DATA.tensors))) == 0
    assert shared_samples(loader(DATA, sampler=SubsetRandomSampler([1, 2])), loader(Subset(DATA, [2]))) == 1
    assert shared_samples(loader(ConcatDataset([DATA])), [tuple(DATA[:2])]) == 0


def test_collate_is_public():
    loader = DataLoader(with_indices(DATA), batch_size=4, collate_fn=IndexedCollate(default_collate))
    assert named(loader) == {i: float(i) for i in range(10)}
