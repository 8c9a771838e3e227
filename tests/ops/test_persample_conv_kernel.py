"""The CPU kernel of persample_conv against the definition: every dtype, option and layout."""

import math

import pytest
import torch

from tests.ops.persample_conv_cases import (
    DTYPES,
    HAS_KERNELS,
    LAYERS,
    Layer,
    assert_close,
    expected_of,
    inputs,
    magnitudes,
    ops,
    square,
    wide,
)
from tests.properties import assume, given, settings, st

pytestmark = [
    pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def run(x, b, V, layer, grads=True, norms=True):
    """G, dots, squared norms, straight from the kernel."""
    return ops._persample_conv(x, b, None if V is None else V.to(wide(x.dtype)), *layer.arguments, grads, norms)


def assert_all_close(x, b, V, layer):
    dtype = x.dtype
    ours, expected = run(x, b, V, layer), expected_of(x, b, V, layer)
    assert [t.dtype for t in ours] == [dtype, wide(dtype), wide(dtype)]
    sizes = magnitudes(x, b, V, layer)
    for mine, truth, size, rounded in zip(ours, expected, sizes, [dtype, wide(dtype), wide(dtype)], strict=True):
        assert_close(mine, truth, rounded, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_against_the_definition(name, dtype):
    assert_all_close(*inputs(LAYERS[name], dtype=dtype), LAYERS[name])


@pytest.mark.parametrize("N", [0, 1, 2, 5])
@pytest.mark.parametrize("K", [None, 0, 1, 3, 4, 9])
@pytest.mark.parametrize("name", ["first", "depthwise"])
def test_every_count_of_samples_and_directions(name, N, K):
    x, b, V = inputs(LAYERS[name], N, K=K or 0)
    assert_all_close(x, b, None if K is None else V, LAYERS[name])


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_only_what_is_asked_for(grads, norms):
    x, b, V = inputs(LAYERS["wide"], dtype=torch.float32)
    everything = run(x, b, V, LAYERS["wide"])
    G, dots, squared_norms = run(x, b, V, LAYERS["wide"], grads, norms)
    assert torch.equal(dots, everything[1])
    assert torch.equal(G, everything[0]) if grads else G.numel() == 0
    assert torch.equal(squared_norms, everything[2]) if norms else squared_norms.numel() == 0


@st.composite
def layers(draw):
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 16, 17]))
    each = st.integers(1, 20 if groups < 16 else 2)

    def numbers(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    kernel, dilation = numbers(1, 4), numbers(1, 3)
    size, stride, padding = numbers(1, 17 if axes < 3 else 6), numbers(1, 3), numbers(0, 3)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    return Layer(groups * draw(each), groups * draw(each), size, kernel, stride, padding, dilation, groups)


@settings(max_examples=100, deadline=None)
@given(layer=layers(), N=st.integers(1, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_any_convolution(layer, N, dtype, seed):
    torch.manual_seed(seed)
    assert_all_close(*inputs(layer, N, dtype), layer)


def layouts(x):
    """The same numbers, otherwise laid out."""
    wider = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    wider[..., 1:-2] = x
    more_channels = torch.cat([x, x], 1)
    return {
        "channels last": x.movedim(1, -1).contiguous().movedim(-1, 1),
        "samples last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "positions backwards": x.transpose(1, -1).contiguous().transpose(1, -1),
        "part of wider rows": wider[..., 1:-2],
        "part of the channels": more_channels[:, : x.shape[1]],
        "every other sample": x.repeat_interleave(2, 0)[::2],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wide", "first", "depthwise", "two groups", "3 axes"])
def test_strides_do_not_matter(name, dtype):
    x, b, V = inputs(LAYERS[name], dtype=dtype)
    expected = run(x, b, V, LAYERS[name])
    for layout in layouts(x):
        ours = run(layouts(x)[layout], layouts(b)[layout], layouts(V)[layout], LAYERS[name])
        assert all(torch.equal(a, e) for a, e in zip(ours, expected, strict=True)), layout


def test_expanded_output_grads():
    """The gradient of a mean over positions is one number a channel."""
    layer = LAYERS["wide"]
    x, b, V = inputs(layer)
    assert_all_close(x, b[:, :, :1, :1].expand_as(b), V, layer)


@pytest.mark.parametrize("name", ["wide", "depthwise", "two groups"])
@pytest.mark.parametrize("N", [1, 7])
def test_result_does_not_depend_on_threads(name, N, threads):
    x, b, V = inputs(LAYERS[name], N, torch.float32)
    ours = run(x, b, V, LAYERS[name])
    torch.set_num_threads(1)  # the fixture restores it
    assert all(torch.equal(a, e) for a, e in zip(ours, run(x, b, V, LAYERS[name]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wide", "depthwise"])
def test_writes_into_a_given_buffer(name, dtype):
    """And into nothing beside it, where samples are parts of wider rows."""
    layer = LAYERS[name]
    x, b, V = inputs(layer, dtype=dtype)
    G, dots, squared_norms = run(x, b, V, layer)
    count = math.prod(layer.weight_shape)
    rows = torch.full((len(x), count + 10), 7.0, dtype=dtype)
    out = rows[:, 4:-6].unflatten(1, layer.weight_shape)
    again = ops._persample_conv_out(x, b, V.to(wide(dtype)), *layer.arguments, True, out)
    assert torch.equal(out, G)
    assert torch.equal(again[0], dots)
    assert torch.equal(again[1], squared_norms)
    assert bool((rows[:, :4] == 7).all())
    assert bool((rows[:, -6:] == 7).all())


def test_padding_is_zero_after_other_samples():
    """Scratch is used again: a NaN of one sample, or of one channel group, reaches no other."""
    for name in ("wide", "two groups", "depthwise"):
        x, b, V = inputs(LAYERS[name], 4, torch.float32)
        clean = run(x, b, V, LAYERS[name])
        x[1], b[1] = math.nan, math.inf
        ours = run(x, b, V, LAYERS[name])
        for mine, before in zip(ours, clean, strict=True):
            assert mine[1].isnan().all()
            assert torch.equal(mine[[0, 2, 3]], before[[0, 2, 3]])


def test_fewer_positions_than_fit():
    """As for the transposed convolution whose output padding exceeds its stride."""
    layer = square(4, 6, 9, 3, dilation=3)
    x, b, V = inputs(layer)
    expected = expected_of(x, torch.cat([b[..., :-1], torch.zeros_like(b[..., -1:])], -1), V, layer)
    for mine, truth in zip(run(x, b[..., :-1], V, layer), expected, strict=True):
        assert_close(mine, truth, torch.float64, truth)


@pytest.mark.parametrize("name", ["first", "depthwise"])
def test_long_sums_keep_their_digits(name):
    """Many positions of one sign: the error grows with blocks, not with positions."""
    layer = LAYERS[name]._replace(size=(128, 128), channels=2, outputs=2, groups=1)
    x, b, V = inputs(layer, 1, torch.float32)
    x, b = x.abs(), b.abs()
    torch.testing.assert_close(run(x, b, V, layer)[0].double(), expected_of(x, b, V, layer)[0], rtol=5e-6, atol=0)


def test_the_kernel_itself_refuses_what_it_cannot_do():
    layer = LAYERS["wide"]
    x, b, V = inputs(layer)
    G = torch.empty(len(x), *layer.weight_shape, dtype=torch.float64)
    kernel, stride, padding, dilation, groups = layer.arguments

    def refused(message, *arguments):
        with pytest.raises(RuntimeError, match=message):
            ops._persample_conv(*arguments, True, True)

    refused("inputs and output_grads must be", x[0], b[0], V, *layer.arguments)
    refused("inputs and output_grads must be", x, b[:2], V, *layer.arguments)
    refused("dtype", x, b.float(), V, *layer.arguments)
    refused("directions must be", x, b, V[:, :-1], *layer.arguments)
    refused("directions must be", x, b, V.float(), *layer.arguments)
    refused("groups do not divide", x, b, V, kernel, stride, padding, dilation, 2)
    refused("one number for each", x, b, V, kernel, stride, padding[:1], dilation, groups)
    refused("must be positive", x, b, V, kernel, [1, 0], padding, dilation, groups)
    refused("must be positive", x, b, V, kernel, stride, [-1, 1], dilation, groups)
    refused("more positions", x, b, V, kernel, stride, [0, 0], dilation, groups)
    for out in (G[:2], G.float(), G.transpose(1, 2).contiguous().transpose(1, 2), G[:1].expand_as(G)):
        with pytest.raises(RuntimeError, match="out must be"):
            ops._persample_conv_out(x, b, V, *layer.arguments, True, out)


def test_opcheck():
    x, b, V = inputs(LAYERS["first"])
    arguments = LAYERS["first"].arguments
    torch.library.opcheck(ops._persample_conv, (x, b, V, *arguments, True, True))
    torch.library.opcheck(ops._persample_conv, (x, b, None, *arguments, False, False))
    out = torch.empty(len(x), *LAYERS["first"].weight_shape, dtype=x.dtype)
    torch.library.opcheck(ops._persample_conv_out, (x, b, V, *arguments, True, out))
