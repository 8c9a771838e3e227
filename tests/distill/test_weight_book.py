import pytest
import torch

from kdaif_fast.distill.weight_book import WeightBook

CPU = torch.device("cpu")


def test_weights_are_1_until_they_are_measured():
    book = WeightBook(4, CPU, ema=0.9)
    assert book.read().tolist() == [1, 1, 1, 1]
    book.record(torch.tensor([2]), torch.tensor([0.5]))
    assert book.read().tolist() == [1, 1, 0.5, 1]  # the first measurement is not averaged with anything


def test_later_measurements_are_averaged():
    book = WeightBook(2, CPU, ema=0.75)
    index = torch.tensor([1])
    for measured, expected in ((0.0, 0.0), (1.0, 0.25), (1.0, 0.4375)):
        assert book.record(index, torch.tensor([measured])).item() == expected
    assert book.read(torch.tensor([1, 0])).tolist() == [0.4375, 1]


@pytest.mark.parametrize(("combine", "expected"), [("mean", 1.25), ("product", 1.0), ("ema", (0.5 + 2.0) / 2)])
def test_combinations(combine, expected):
    book = WeightBook(1, CPU, combine=combine)
    at = torch.tensor([0])
    book.record(at, torch.tensor([0.5]))
    assert book.record(at, torch.tensor([2.0])).item() == expected


def test_normalised_by_what_was_measured():
    book = WeightBook(4, CPU, normalize=True)
    where = torch.tensor([0, 1])
    assert book.record(where, torch.tensor([0.5, 1.5])).tolist() == [0.5, 1.5]
    book.record(where, torch.tensor([0.25, 0.75]))
    book.settle()
    assert book.read(where).mean().item() == 1.0
    assert book.record(where, torch.tensor([0.5, 0.5])).tolist() == [1.0, 1.0]  # the factor stays until settled again
    book.record(where, torch.zeros(2))
    book.settle()
    assert book.read(where).tolist() == [0, 0]


def test_changes_go_from_one_book_to_another():
    first, second = WeightBook(5, CPU, combine="mean", ema=0.5), WeightBook(5, CPU, combine="mean", ema=0.5)
    for weights in ([0.5, 2.0], [1.0, 1.0]):
        first.record(torch.tensor([3, 1]), torch.tensor(weights))
    second.merge(first.take_changes())
    assert torch.equal(first.read(), second.read())
    assert len(first.take_changes()["indices"]) == 0
    for book in (first, second):
        book.record(torch.tensor([3]), torch.tensor([0.1]))
    assert torch.equal(first.read(), second.read())


def test_state_goes_into_another_book():
    book, other = (WeightBook(3, CPU, combine="ema", ema=0.5, normalize=True) for _ in range(2))
    book.record(torch.tensor([0, 2]), torch.tensor([0.5, 1.5]))
    book.settle()
    other.load_state_dict(book.state_dict())
    for each in (book, other):
        each.record(torch.tensor([0]), torch.tensor([1.0]))
    assert torch.equal(book.read(), other.read())
    with pytest.raises(ValueError, match="3 samples, expected 4"):
        WeightBook(4, CPU).load_state_dict(book.state_dict())


@pytest.mark.parametrize("ema", [1.0, -0.1, True, "0.5"])
def test_shares_that_are_none(ema):
    with pytest.raises(ValueError, match="ema is"):
        WeightBook(3, CPU, ema=ema)


def test_combinations_that_are_none():
    with pytest.raises(ValueError, match="mean, product, ema"):
        WeightBook(3, CPU, combine="median")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_what_is_no_weight_is_not_kept(bad):
    book = WeightBook(3, CPU, ema=0.5)
    where = torch.tensor([0, 1])
    book.record(where, torch.tensor([0.5, 0.5]))
    found = book.record(torch.tensor([1, 2]), torch.tensor([bad, bad]))
    torch.testing.assert_close(found, torch.tensor([bad, bad]), equal_nan=True)
    assert book.read().tolist() == [0.5, 0.5, 1]
    assert book.record(torch.tensor([2]), torch.tensor([0.25])).tolist() == [0.25]  # its first
