import pytest
import torch

from kdaif_fast.demo.models import cnn, mlp, transformer


def test_shapes():
    images = torch.rand(3, 1, 8, 8)
    assert cnn(width=4)(images).shape == (3, 10)
    assert cnn(width=4, classes=3)(torch.rand(2, 1, 4, 6)).shape == (2, 3)
    assert mlp(hidden=[8, 4], classes=5)(images).shape == (3, 5)
    assert mlp(hidden=[])(images).shape == (3, 10)


def test_padding_changes_nothing():
    model = transformer(vocabulary=20, width=16, layers=2).eval()
    ids = torch.randint(1, 20, (4, 7))
    lengths = torch.tensor([7, 3, 5, 1])
    mask = (torch.arange(7) < lengths[:, None]).long()
    together = model(input_ids=ids, attention_mask=mask)
    for i, length in enumerate(lengths.tolist()):
        alone = model(input_ids=ids[i : i + 1, :length], attention_mask=mask[i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1], alone)
    other = torch.where(mask.bool(), ids, 13)
    assert torch.equal(model(input_ids=other, attention_mask=mask), together)


def test_order_matters():
    model = transformer(vocabulary=20, width=16).eval()
    mask = torch.ones(1, 3, dtype=torch.int64)
    first, second = (model(torch.tensor([ids]), mask) for ids in ([4, 5, 6], [6, 5, 4]))
    assert not torch.allclose(first, second)


def test_bad_input():
    with pytest.raises(ValueError, match="width is 10, expected a multiple of heads, 4"):
        transformer(vocabulary=5, width=10)
    model = transformer(vocabulary=5, longest=3)
    with pytest.raises(ValueError, match="input_ids has 4 tokens a sample, expected at most 3"):
        model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
