"""persample_grad: against sample by sample and autograd, strides, out=, directions=, bad input."""

import pytest
import torch

from kdaif_fast.ops import persample_dot, persample_grad
from tests.ops.linear_layer_cases import (
    BAD_DIRECTIONS,
    BAD_LAYERS,
    DTYPES,
    SHAPES,
    STRIDES,
    arguments,
    assert_near,
    gradients,
    gradients_by_autograd,
    layer,
    strided,
)
from tests.properties import given, settings, st


def check(inputs, output_grads, ours):
    assert ours.dtype == inputs.dtype
    scale = gradients(inputs.abs(), output_grads.abs())
    assert_near(ours, gradients(inputs, output_grads), scale, inputs.dtype)


def check_dots(inputs, output_grads, directions, dots):
    wide = torch.promote_types(inputs.dtype, torch.float32)
    assert dots.dtype == wide
    v = directions.double()
    expected = torch.einsum("noi,koi->nk", gradients(inputs, output_grads), v)
    scale = torch.einsum("noi,koi->nk", gradients(inputs.abs(), output_grads.abs()), v.abs())
    assert_near(dots, expected, scale, wide)


def gradient_shape(shape):
    return shape[0], shape[3], shape[2]


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstEachSample:
    def test_fresh(self, shape, dtype):
        inputs, output_grads = layer(*shape, dtype)
        check(inputs, output_grads, persample_grad(inputs, output_grads))

    def test_out(self, shape, dtype):
        inputs, output_grads = layer(*shape, dtype)
        out = torch.full(gradient_shape(shape), torch.nan, dtype=dtype)
        assert persample_grad(inputs, output_grads, out) is out
        check(inputs, output_grads, out)

    @pytest.mark.parametrize(("K", "has_out"), [(0, True), (1, False), (3, True)])
    def test_with_dots(self, shape, dtype, K, has_out):
        inputs, output_grads = layer(*shape, dtype)
        directions = torch.randn(K, shape[3], shape[2])
        out = torch.full(gradient_shape(shape), torch.nan, dtype=dtype) if has_out else None
        grads, dots = persample_grad(inputs, output_grads, out, directions=directions)
        assert out is None or grads is out
        check(inputs, output_grads, grads)
        check_dots(inputs, output_grads, directions, dots)


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 6),
    T=st.integers(0, 40),
    I=st.integers(0, 60),
    O=st.integers(0, 60),
    K=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, T, I, O, K, dtype, seed):  # noqa: E741
    torch.manual_seed(seed)
    inputs, output_grads = layer(N, T, I, O, dtype)
    directions = torch.randn(K, O, I)
    grads, dots = persample_grad(inputs, output_grads, directions=directions)
    check(inputs, output_grads, grads)
    check_dots(inputs, output_grads, directions, dots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("shape", [(5, 1, 19, 24), (3, 18, 35, 70)])
def test_strides(layout, shape, dtype):
    inputs, output_grads = strided(layout, *shape, dtype)
    check(inputs, output_grads, persample_grad(inputs, output_grads))
    directions = STRIDES[layout](torch.randn(2, shape[3], shape[2]))
    check_dots(inputs, output_grads, directions, persample_grad(inputs, output_grads, directions=directions)[1])


@pytest.mark.parametrize("T", [1, 4])
class TestOut:
    def test_part_of_larger_memory(self, T):
        """As one buffer for the gradients of all layers is: only its place is written."""
        inputs, output_grads = layer(3, T, 5, 18, torch.float32)
        buffer = torch.full((3, 200), 7.0)
        out = buffer[:, 20:110].unflatten(1, (18, 5))
        assert persample_grad(inputs, output_grads, out) is out
        check(inputs, output_grads, out)
        assert (buffer[:, :20] == 7).all()
        assert (buffer[:, 110:] == 7).all()

    @pytest.mark.parametrize("with_dots", [False, True])
    def test_that_is_not_dense(self, T, with_dots):
        inputs, output_grads = layer(3, T, 5, 18, torch.float32)
        out = torch.empty(3, 5, 18).mT
        directions = torch.randn(2, 18, 5)
        if with_dots:
            grads, dots = persample_grad(inputs, output_grads, out, directions=directions)
            check_dots(inputs, output_grads, directions, dots)
        else:
            grads = persample_grad(inputs, output_grads, out)
        assert grads is out
        check(inputs, output_grads, out)

    def test_of_inputs_that_require_grad(self, T):
        inputs, output_grads = layer(3, T, 5, 4)
        out = persample_grad(inputs.requires_grad_(), output_grads, torch.empty(3, 4, 5, dtype=torch.float64))
        out.sum().backward()
        torch.testing.assert_close(inputs.grad, output_grads.sum(2, keepdim=True).expand(inputs.shape))

    def test_version_is_counted(self, T):
        """Autograd must notice that a tensor it has saved was overwritten."""
        out = torch.empty(2, 3, 4)
        before = out._version
        persample_grad(torch.ones(2, T, 4), torch.ones(2, T, 3), out)
        assert out._version > before

    def test_in_inference_mode(self, T):
        with torch.inference_mode():
            out = persample_grad(torch.ones(2, T, 4), torch.ones(2, T, 3), torch.empty(2, 3, 4))
        assert (out == T).all()


@pytest.mark.parametrize("T", [1, 6])
def test_against_autograd(T):
    inputs, output_grads = layer(4, T, 9, 5)
    expected = gradients_by_autograd(inputs, output_grads)
    torch.testing.assert_close(persample_grad(inputs, output_grads), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 30])
def test_dots_are_of_unrounded_gradients(T):
    inputs, output_grads = layer(3, T, 40, 50, torch.bfloat16)
    directions = torch.randn(2, 50, 40)
    dots = persample_grad(inputs, output_grads, directions=directions)[1]
    torch.testing.assert_close(dots, persample_dot(inputs, output_grads, directions), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("I", [64, 65])
def test_results_beyond_the_caches(I):  # noqa: E741
    """Written past them where lines are whole; and a buffer whose lines are not is written as ever."""
    inputs, output_grads = layer(20, 1, I, 9000, torch.float32)
    expected = torch.bmm(output_grads.mT, inputs)
    assert torch.equal(persample_grad(inputs, output_grads), expected)
    memory = torch.full((expected.numel() + 1,), torch.nan)
    assert torch.equal(persample_grad(inputs, output_grads, memory[1:].view(expected.shape)), expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets of 32 bits would wrap. Only the last samples are looked at."""
    N, O, I = 33_000, 255, 256  # noqa: E741
    if _free_memory() < 4 * N * O * I:
        pytest.skip("not enough memory")
    inputs, output_grads = layer(N, 1, I, O, torch.bfloat16)
    grads = persample_grad(inputs, output_grads)
    assert grads.numel() > 2**31
    check(inputs[-2:], output_grads[-2:], grads[-2:])


def _free_memory():
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_LAYERS,
        *BAD_DIRECTIONS,
        ({"out": 0}, TypeError, r"out is 0 \(int\), expected a torch.Tensor"),
        ({"out": torch.zeros(2, 4, 6)}, ValueError, r"out has shape \(2, 4, 6\), expected \(2, 6, 4\) as \[N, O, I\]"),
        ({"out": torch.zeros(2, 6, 4).double()}, TypeError, "out has dtype torch.float64, expected torch.float32"),
        ({"out": torch.zeros(2, 6, 4, device="meta")}, ValueError, "out is on device meta, expected cpu"),
    ],
)
def test_message(change, error, message):
    with pytest.raises(error, match="^persample_grad: " + message):
        persample_grad(**arguments(**change))
