"""persample_conv out of torch's own operations, as CUDA tensors get it: here on the CPU, against the definition."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdaif_fast
from kdaif_fast import _library
from tests.ops.persample_conv_cases import (
    DTYPES,
    LAYERS,
    assert_close,
    expected_of,
    inputs,
    magnitudes,
    ops,
    square,
    wide,
)
from tests.ops.test_persample_conv_kernel import layers, layouts

module = importlib.import_module("kdaif_fast.ops._conv_by_torch")


def run(x, b, V, layer, grads=True, norms=True):
    """G, dots, squared norms."""
    return module.persample_conv(x, b, V, *layer.arguments, grads, norms)


def assert_all_close(x, b, V, layer):
    """Dots to the rounding of the inputs' dtype: the convolution's result has no more digits."""
    dtype = x.dtype
    sizes, expected = magnitudes(x, b, V, layer), expected_of(x, b, V, layer)
    for grads, norms in ((True, True), (True, False), (False, True)):
        ours = run(x, b, V, layer, grads, norms)
        assert [t.dtype for t in ours] == [dtype, wide(dtype), wide(dtype)]
        for mine, truth, size, rounded, asked in zip(
            ours, expected, sizes, [dtype, dtype, wide(dtype)], [grads, True, norms], strict=True
        ):
            if asked:
                assert_close(mine, truth, rounded, size)
            else:
                assert mine.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_against_the_definition(name, dtype):
    assert_all_close(*inputs(LAYERS[name], dtype=dtype), LAYERS[name])


@pytest.mark.parametrize("N", [0, 1, 2])
@pytest.mark.parametrize("K", [None, 0, 1, 3])
@pytest.mark.parametrize("name", ["first", "depthwise"])
def test_every_count_of_samples_and_directions(name, N, K):
    x, b, V = inputs(LAYERS[name], N, K=K or 0)
    assert_all_close(x, b, None if K is None else V, LAYERS[name])


@settings(max_examples=60, deadline=None)
@given(layer=layers(), N=st.integers(1, 3), dtype=st.sampled_from(DTYPES[:3]), seed=st.integers(0, 2**31))
def test_any_convolution(layer, N, dtype, seed):
    torch.manual_seed(seed)
    assert_all_close(*inputs(layer, N, dtype), layer)


@pytest.mark.parametrize("name", ["wide", "depthwise", "two groups", "3 axes"])
def test_strides_do_not_matter(name):
    x, b, V = inputs(LAYERS[name])
    for layout in layouts(x):
        assert_all_close(layouts(x)[layout], layouts(b)[layout], layouts(V)[layout], LAYERS[name])
    assert_all_close(x, b[:, :, :1].expand_as(b) if b.dim() == 3 else b[..., :1].expand_as(b), V, LAYERS[name])


@pytest.mark.parametrize("name", ["wide", "two groups", "depthwise", "1 axis"])
def test_parts(name, monkeypatch):
    """Samples and directions, one or two at a time."""
    x, b, V = inputs(LAYERS[name], 5, K=3)
    for most in (1, 2 * b.numel()):
        monkeypatch.setattr(module, "CONVOLVED_ELEMENTS", most)
        monkeypatch.setattr(module, "PATCH_ELEMENTS", most)
        assert_all_close(x, b, V, LAYERS[name])


@pytest.mark.parametrize("name", ["wide", "first", "two groups"])
def test_norms_by_pairs_of_positions_and_by_gradients(name, monkeypatch):
    x, b, V = inputs(LAYERS[name])
    for pairs in (False, True):
        monkeypatch.setattr(module, "pairs_are_cheaper", lambda *_, pairs=pairs: pairs)
        assert_all_close(x, b, V, LAYERS[name])


def test_which_norms_are_cheaper():
    assert module.pairs_are_cheaper(49, 512, 4608)
    assert not module.pairs_are_cheaper(3136, 64, 576)
    assert not module.pairs_are_cheaper(1, 1, 1)


@pytest.mark.parametrize("name", ["wide", "depthwise", "two groups"])
@pytest.mark.parametrize("norms", [False, True])
def test_writes_into_a_given_buffer(name, norms):
    """And into nothing beside it, where samples are parts of wider rows."""
    layer = LAYERS[name]
    x, b, V = inputs(layer, dtype=torch.float32)
    G, dots, squared_norms = run(x, b, V, layer, norms=norms)
    count = torch.Size(layer.weight_shape).numel()
    rows = torch.full((len(x), count + 10), 7.0)
    for out in (rows[:, 4:-6].unflatten(1, layer.weight_shape), torch.empty_like(G)):
        again = module.persample_conv_out(x, b, V, *layer.arguments, norms, out)
        assert torch.equal(out, G)
        assert torch.equal(again[0], dots)
        assert torch.equal(again[1], squared_norms)
    assert bool((rows[:, :4] == 7).all())
    assert bool((rows[:, -6:] == 7).all())


def test_fewer_positions_than_fit():
    """As for the transposed convolution whose output padding exceeds its stride."""
    layer = square(4, 6, 9, 3, dilation=3)
    x, b, V = inputs(layer)
    expected = expected_of(x, torch.cat([b[..., :-1], torch.zeros_like(b[..., -1:])], -1), V, layer)
    for mine, truth in zip(run(x, b[..., :-1], V, layer), expected, strict=True):
        assert_close(mine, truth, torch.float64, truth)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_directions_of_any_size_in_float16(size):
    """The convolution's result stays within float16's range, and keeps its digits."""
    layer = LAYERS["wide"]
    x, b, V = inputs(layer, dtype=torch.float16)
    V = V.double() * torch.tensor([size, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
    dots = run(x, b, V.float(), layer)[1]
    truth, sizes = expected_of(x, b, V, layer)[1], magnitudes(x, b, V, layer)[1]
    for k in range(2):
        assert_close(dots[:, k], truth[:, k], torch.float16, sizes[:, k])
    assert not run(x, b, torch.zeros_like(V), layer)[1].any()


def test_a_sample_keeps_its_nan_to_itself():
    for name in ("wide", "two groups", "depthwise"):
        x, b, V = inputs(LAYERS[name], 4, torch.float32)
        clean = run(x, b, V, LAYERS[name])
        x[1], b[1] = torch.nan, torch.inf
        for mine, before in zip(run(x, b, V, LAYERS[name]), clean, strict=True):
            assert mine[1].isnan().all()
            torch.testing.assert_close(mine[[0, 2, 3]], before[[0, 2, 3]])


def test_a_caller_may_be_under_autocast():
    x, b, V = inputs(LAYERS["wide"], dtype=torch.float32)
    before = run(x, b, V, LAYERS["wide"])
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(x, b, V, LAYERS["wide"])
    assert all(torch.equal(mine, same) for mine, same in zip(ours, before, strict=True))


def test_no_patches_of_all_samples_at_once(monkeypatch):
    """What is held beside the results stays within its bounds."""
    layer = square(8, 8, 16, 3, padding=1)
    x, b, _ = inputs(layer, 32, torch.float32)
    monkeypatch.setattr(module, "PATCH_ELEMENTS", 4 * 72 * 256)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return result

    with Largest():
        run(x, b, None, layer, grads=False)
    assert max(x.numel(), 4 * 72 * 256) <= largest < 5 * 72 * 256


def test_answers_for_cuda_tensors():
    """Unless there is a kernel; and `info` says so."""
    for op in (ops._persample_conv, ops._persample_conv_out):
        assert _library.kernel_for(op, "cuda") == "torch"
        assert _library.kernel_for(op, "cpu") == ("cpu" if kdaif_fast.backends()["cpu"] == "loaded" else "reference")
