"""How the Triton kernels of per-sample gradients are launched: blocks, parts, offsets and products."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from kdaif_fast.triton_kernels import persample_tiles
from kdaif_fast.triton_kernels.persample_dot import parts_of_direction, sums_over_outputs
from kdaif_fast.triton_kernels.persample_grad import outer_product_blocks
from kdaif_fast.triton_kernels.persample_norm import gram_is_cheaper, gram_tiles
from kdaif_fast.triton_kernels.persample_tiles import (
    ENOUGH_PROGRAMS,
    HOPPER_NARROW,
    HOPPER_TF32,
    IN_FULL,
    NARROW,
    ONE_BY_ONE,
    TF32,
    Product,
    candidates,
    even,
    extent,
    for_offsets,
    index_type,
    parts_for,
    product_of,
    square_candidates,
    square_side,
)
from kdaif_fast.triton_kernels.weighted_grad import parts_of_positions, product_of_weighted, sample_by_sample_first

PRODUCTS = (Product(True, "ieee"), Product(True, "tf32"), Product(False, "ieee"), Product(True, "ieee", False))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_products():
    x = torch.zeros(2, 16, 32)
    assert product_of(x, x).blocks == IN_FULL
    assert product_of(x.half(), x.half()).blocks == NARROW
    assert product_of(x.bfloat16(), x.half()) == Product(True, "ieee")
    assert product_of(x, torch.zeros(2, 16, 33)).blocks == ONE_BY_ONE
    assert product_of_weighted(x.half(), x.half()).blocks == TF32
    assert product_of_weighted(x.bfloat16(), x.bfloat16()).blocks == NARROW


def test_tf32_where_it_is_allowed():
    x = torch.zeros(2, 16, 32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert product_of(x, x).blocks == TF32
        assert product_of(x.bfloat16(), x.bfloat16()).blocks == NARROW
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert product_of(x, x).blocks == IN_FULL


def test_vectors():
    x = torch.zeros(2, 16, 32)
    assert product_of(x.transpose(1, 2)).vectors
    assert product_of(torch.zeros(5, 1, 32)).vectors  # the stride of a dimension of one says nothing
    assert not product_of(torch.zeros(2, 16, 64)[..., ::2]).vectors
    assert not product_of(torch.zeros(2 * 16 * 32 + 1)[1:].view(2, 16, 32)).vectors


@pytest.mark.parametrize("product", PRODUCTS)
def test_candidates(product):
    for rows, columns, depth in ((1, 1, 1), (17, 300, 40), (1000, 1000, 1000)):
        chosen = candidates(rows, columns, depth, product)
        assert len({blocks[:3] for blocks in chosen}) == len(chosen) >= 1
        for blocks in chosen:
            assert all(side >= 16 and side & (side - 1) == 0 for side in blocks[:3])
            assert blocks.rows < 2 * max(rows, 16)
            assert blocks.columns < 2 * max(columns, 16)
            assert blocks.depth < 2 * max(depth, 16)
    for size in (1, 20, 100):
        side = square_side(size, product)
        squares = square_candidates(side, 500, product)
        assert squares
        assert all(blocks.rows == blocks.columns == side for blocks in squares)


def test_a_hopper_has_candidates_of_its_own(monkeypatch):
    monkeypatch.setattr(persample_tiles, "is_hopper", lambda: True)
    assert Product(False, "ieee").blocks == HOPPER_NARROW
    assert Product(True, "tf32").blocks == HOPPER_TF32
    assert Product(True, "ieee").blocks == IN_FULL
    assert for_offsets(Product(False, "ieee"), tl.int64).blocks == ONE_BY_ONE
    assert for_offsets(Product(False, "ieee"), tl.int32).blocks == HOPPER_NARROW


def test_the_first_candidate_keeps_every_multiprocessor_busy(monkeypatch):
    monkeypatch.setattr(persample_tiles, "is_hopper", lambda: True)
    product = Product(False, "ieee")
    assert candidates(32768, 3072, 768, product)[0][:3] == (128, 256, 64)
    assert candidates(512, 512, 768, product)[0][:3] == (64, 64, 64)
    assert candidates(512, 512, 768, product, count=32)[0][:3] == (128, 256, 64)


def test_samples_as_wholes_come_first_where_steps_are_of_one(monkeypatch):
    monkeypatch.setattr(persample_tiles, "is_hopper", lambda: True)
    blocks = candidates(4096, 4096, 4096, Product(False, "ieee"))
    assert [b.columns for b in sample_by_sample_first(blocks, 512)] == [128, 64, 256]
    assert sample_by_sample_first(blocks, 197) == sample_by_sample_first(blocks, 64) == blocks


def test_even():
    assert [even(n, (128, 64)) for n in (1, 48, 64, 192, 768, 4096)] == [1, 1, 64, 64, 128, 128]
    assert even(784, [16]) == 16


def test_the_longer_side_of_a_direction_is_summed_over_first():
    assert not sums_over_outputs(768, 768)
    assert sums_over_outputs(768, 3072)
    assert not sums_over_outputs(3072, 768)


def test_parts_cover_a_direction():
    for positions, features, outputs, K in ((1, 1, 1, 1), (256, 784, 512, 1), (64, 4096, 10, 1), (10**6, 300, 300, 8)):
        parts = parts_of_direction(positions, features, outputs, K)
        assert (parts.over_outputs - 1) * parts.rows < outputs <= parts.over_outputs * parts.rows
        assert (parts.over_features - 1) * parts.columns < features <= parts.over_features * parts.columns
    assert parts[:2] == (1, 1)  # a million positions keep a GPU busy
    few = parts_of_direction(64, 4096, 10, 1)
    assert few.over_outputs == 1 < few.over_features


def test_parts_cover_positions():
    for positions, outputs, features in ((1, 1, 1), (1000, 10, 10), (10**5, 64, 64), (10**6, 4096, 4096)):
        parts = parts_of_positions(positions, outputs, features, positions * max(outputs, features))
        assert (parts.number - 1) * parts.positions < positions <= parts.number * parts.positions
        assert parts.positions % 64 == 0  # a step of 64 positions of one sample does not become one of two
    huge = parts_of_positions(10**6, 4096, 4096, 2**33)
    assert huge.number >= 8
    assert huge.positions * 2**33 // 10**6 < 2**31


def test_parts_are_few_and_none_is_short():
    assert parts_for(10**6, ENOUGH_PROGRAMS, 512) == 1
    assert parts_for(10**6, 1, 512) == ENOUGH_PROGRAMS
    assert parts_for(2000, 1, 512) == 3
    assert parts_for(5, 1, 512) == 1


def test_gram_tiles():
    assert [gram_tiles(T, 64) for T in (1, 64, 65, 129)] == [1, 1, 3, 6]


def test_gram_is_cheaper_for_few_positions_of_wide_layers():
    assert gram_is_cheaper(64, 768, 768)
    assert not gram_is_cheaper(1024, 64, 64)
    assert not gram_is_cheaper(2, 16, 16)  # a tile of 64 positions costs the same, whoever is in it
    for T in (64, 128, 256, 1024):  # whole tiles: T (T + 64) (I + O) / 2 against T I O
        assert gram_is_cheaper(T, 600, 300) == (T * (T + 64) * 900 / 2 <= T * 180_000)


def test_offsets():
    assert index_type(10, 2**30) is tl.int32
    assert index_type(10, 2**31) is tl.int64
    x = torch.zeros(4, 3, 5).transpose(1, 2)
    assert extent(x, 4) >= x.untyped_storage().size() // 4
    assert extent(x[:1].expand(4, 5, 3), 4) < 2 * extent(x, 4)


def test_outer_product_blocks():
    for outputs, features in ((1, 1), (3, 1000), (512, 784)):
        rows, columns = outer_product_blocks(outputs, features)
        assert 256 <= rows * columns <= 4096
