"""persample_conv as users call it: against autograd, under transforms and compilers, and what it refuses."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdaif_fast.ops import persample_conv
from tests.ops.persample_conv_cases import LAYERS, inputs, ops, square, wide

DEFINITIONS = list(LAYERS)


def weight_grads(layer, x, b):
    """One backward a sample."""
    grads = []
    for i in range(len(x)):
        weight = torch.zeros(layer.weight_shape, dtype=x.dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x[i : i + 1], weight), weight, b[i : i + 1])
        grads.append(grad)
    return torch.stack(grads)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_what_autograd_gives(name, dtype):
    layer = LAYERS[name]
    x, b, V = inputs(layer, dtype=dtype)
    G = weight_grads(layer, x, b)
    ours = persample_conv(x, b, V, grads=True, norms=True, **layer.options)
    exact = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(ours.grads, G, **exact)
    torch.testing.assert_close(ours.dots, torch.einsum("nq,kq->nk", G.flatten(1), V.flatten(1)), **exact)
    torch.testing.assert_close(ours.squared_norms, G.flatten(1).square().sum(1), **exact)


@pytest.mark.parametrize("output_padding", [0, 1, 2])
def test_transposed_convolution_with_inputs_and_output_grads_exchanged(output_padding):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    weight = torch.zeros(3, 4, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    z = torch.stack(
        [
            torch.nn.functional.conv_transpose2d(
                x[i], weight[i], stride=2, padding=1, dilation=3, output_padding=output_padding
            )
            for i in range(3)
        ]
    )
    b = torch.randn_like(z)
    (expected,) = torch.autograd.grad(z, weight, b)
    ours = persample_conv(b, x, kernel=[3, 2], stride=[2, 2], padding=[1, 1], dilation=[3, 3], grads=True)
    torch.testing.assert_close(ours.grads, expected)


class TestResult:
    layer = LAYERS["first"]

    def test_none_for_what_was_not_asked_for(self):
        x, b, V = inputs(self.layer)
        assert persample_conv(x, b, **self.layer.options) == (None, None, None)
        G, dots, squared_norms = persample_conv(x, b, V, **self.layer.options)
        assert (G, squared_norms) == (None, None)
        assert dots.shape == (3, 2)
        G, dots, squared_norms = persample_conv(x, b, grads=True, norms=True, **self.layer.options)
        assert (dots, G.shape, squared_norms.shape) == (None, (3, 32, 3, 3, 3), (3,))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        x, b, V = inputs(self.layer, dtype=dtype)
        for directions in (V, V.float(), V.double(), V.bfloat16()):
            G, dots, squared_norms = persample_conv(x, b, directions, grads=True, norms=True, **self.layer.options)
            assert (G.dtype, dots.dtype, squared_norms.dtype) == (dtype, wide(dtype), wide(dtype))
            truth = torch.einsum(
                "nq,kq->nk", weight_grads(self.layer, x.double(), b.double()).flatten(1), directions.double().flatten(1)
            )
            torch.testing.assert_close(dots.double(), truth, rtol=1e-4, atol=1e-3)

    def test_no_samples(self):
        x, b, V = inputs(self.layer, 0)
        G, dots, squared_norms = persample_conv(x, b, V, grads=True, norms=True, **self.layer.options)
        assert (G.shape, dots.shape, squared_norms.shape) == ((0, 32, 3, 3, 3), (0, 2), (0,))


class TestOut:
    layer = LAYERS["wide"]

    def outs(self):
        """Buffers that a kernel can write to, and others."""
        shape = (3, *self.layer.weight_shape)
        yield torch.empty(shape)
        yield torch.empty(3, 20 + torch.Size(shape[1:]).numel())[:, 13:-7].unflatten(1, shape[1:])
        yield torch.empty(shape).movedim(1, -1).contiguous().movedim(-1, 1)
        yield torch.empty(6, *shape[1:])[::2]

    def test_is_written_and_returned(self):
        x, b, V = inputs(self.layer, dtype=torch.float32)
        expected = persample_conv(x, b, V, grads=True, norms=True, **self.layer.options)
        for out in self.outs():
            ours = persample_conv(x, b, V, norms=True, out=out, **self.layer.options)
            assert ours.grads is out
            assert all(torch.equal(a, e) for a, e in zip(ours, expected, strict=True))

    def test_nothing_of_its_size_is_allocated(self):
        """One per-sample gradient more would be a hidden copy; what is allocated is small beside it."""
        layer = square(64, 64, 4, 3, padding=1)
        x, b, _ = inputs(layer, 16, torch.float32)
        out = torch.empty(16, *layer.weight_shape)
        persample_conv(x, b, out=out, **layer.options)
        with torch.profiler.profile(profile_memory=True) as profile:
            persample_conv(x, b, out=out, **layer.options)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert allocated < out.nbytes / 100

    def test_under_autograd(self):
        x, b, _ = inputs(self.layer, dtype=torch.float32)
        out = torch.empty(3, *self.layer.weight_shape)
        persample_conv(x, b.requires_grad_(), out=out, **self.layer.options)
        assert out.requires_grad
        torch.testing.assert_close(out.detach(), weight_grads(self.layer, x, b.detach()), rtol=1e-4, atol=1e-4)


class TestTransforms:
    """The definition answers there: derivatives are right, not silently zero."""

    layer = square(2, 3, 5, 2, stride=2, padding=1)

    def scalar(self, x, b, V):
        G, dots, squared_norms = persample_conv(x, b, V, grads=True, norms=True, **self.layer.options)
        return G.sin().sum() + dots.cos().sum() + squared_norms.sum()

    def test_gradients_to_second_order(self):
        x, b, V = (t.requires_grad_() for t in inputs(self.layer, 2))
        assert torch.autograd.gradcheck(self.scalar, (x, b, V))
        assert torch.autograd.gradgradcheck(self.scalar, (x, b, V))

    def test_forward_mode(self):
        arguments = inputs(self.layer, 2)
        tangents = tuple(torch.randn_like(t) for t in arguments)
        _, ours = torch.func.jvp(self.scalar, arguments, tangents)
        expected = sum(
            (g * t).sum() for g, t in zip(torch.func.grad(self.scalar, (0, 1, 2))(*arguments), tangents, strict=True)
        )
        torch.testing.assert_close(ours, expected)
        assert ours != 0

    def test_vmap(self):
        batches = [inputs(self.layer, 2) for _ in range(3)]
        stacked = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
        ours = torch.func.vmap(self.scalar)(*stacked)
        torch.testing.assert_close(ours, torch.stack([self.scalar(*batch) for batch in batches]))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compiled(self, requires_grad):
        x, b, V = inputs(self.layer, 2)
        x.requires_grad_(requires_grad)
        ours = torch.compile(self.scalar, fullgraph=True, backend="aot_eager")(x, b, V)
        expected = self.scalar(x, b, V)
        torch.testing.assert_close(ours, expected)
        if requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (ours, expected)))

    def test_compiled_into_a_buffer(self):
        x, b, _ = inputs(self.layer, 2)

        def write(x, b, out):
            persample_conv(x, b, out=out, **self.layer.options)

        out = torch.zeros(2, *self.layer.weight_shape, dtype=x.dtype)
        torch.compile(write, fullgraph=True, backend="aot_eager")(x, b, out)
        torch.testing.assert_close(out, weight_grads(self.layer, x, b))

    def test_fake_tensors(self):
        with FakeTensorMode() as mode:
            x, b, V = (mode.from_tensor(t) for t in inputs(self.layer, 2, torch.bfloat16))
            G, dots, squared_norms = persample_conv(x, b, V, grads=True, norms=True, **self.layer.options)
        assert (G.shape, G.dtype) == ((2, *self.layer.weight_shape), torch.bfloat16)
        assert (dots.shape, dots.dtype) == ((2, 2), torch.float32)
        assert (squared_norms.shape, squared_norms.dtype) == ((2,), torch.float32)

    def test_export_keeps_the_op(self):
        arguments, geometry = inputs(self.layer, 2), self.layer.arguments

        class Module(torch.nn.Module):
            def forward(self, x, b, V):
                return ops._persample_conv(x, b, V, *geometry, True, True)

        program = torch.export.export(Module(), arguments)
        assert "kdaif_fast.persample_conv.default" in program.graph_module.code
        for mine, truth in zip(program.module()(*arguments), Module()(*arguments), strict=True):
            torch.testing.assert_close(mine, truth)


LAYER = LAYERS["wide"]
X, B, V = inputs(LAYER)
OUT = torch.empty(3, *LAYER.weight_shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs is [1.0] (list), expected a torch.Tensor"),
        ({"inputs": X.long()}, TypeError, "inputs has dtype torch.int64, expected one of float32"),
        ({"inputs": X[0, 0]}, ValueError, "inputs has shape (7, 7), expected [N, C, *S] with 1 to 3 spatial axes"),
        ({"output_grads": B.float()}, TypeError, "output_grads has dtype torch.float32, expected torch.float64"),
        ({"output_grads": B.to("meta")}, ValueError, "output_grads is on device meta, expected cpu as inputs"),
        ({"output_grads": B[:2]}, ValueError, "output_grads has shape (2, 50, 7, 7), expected [3, O, 7, 7] for"),
        ({"output_grads": B[..., :6]}, ValueError, "output_grads has shape (3, 50, 7, 6), expected [3, O, 7, 7]"),
        ({"output_grads": B[..., 0]}, ValueError, "output_grads has shape (3, 50, 7), expected [3, O, 7, 7]"),
        ({"output_grads": B[:, :0]}, ValueError, "output_grads has 0 channels, expected a positive multiple of"),
        ({"stride": [2, 1]}, ValueError, "output_grads has shape (3, 50, 7, 7), expected [3, O, 4, 7]"),
        ({"kernel": [3]}, ValueError, "kernel is [3], expected 2 numbers, one for each axis of inputs"),
        ({"padding": [1, 1, 1]}, ValueError, "padding is [1, 1, 1], expected 2 numbers"),
        ({"kernel": [3, 0]}, ValueError, "kernel[1] is 0, expected an integer >= 1"),
        ({"kernel": [3, 2.0]}, TypeError, "kernel[1] is 2.0 (float), expected an integer >= 1"),
        ({"stride": [0, 1]}, ValueError, "stride[0] is 0, expected an integer >= 1"),
        ({"padding": [1, -1]}, ValueError, "padding[1] is -1, expected an integer >= 0"),
        ({"dilation": [0, 1]}, ValueError, "dilation[0] is 0, expected an integer >= 1"),
        ({"groups": 0}, ValueError, "groups is 0, expected an integer >= 1"),
        ({"groups": 2}, ValueError, "inputs has 17 channels, expected a positive multiple of groups, 2"),
        ({"groups": 17}, ValueError, "output_grads has 50 channels, expected a positive multiple of groups, 17"),
        ({"directions": V[0]}, ValueError, "directions has shape (50, 17, 3, 3), expected (50, 50, 17, 3, 3) as [K, O"),
        ({"directions": V[:, :, :1]}, ValueError, "directions has shape (2, 50, 1, 3, 3), expected (2, 50, 17, 3, 3)"),
        ({"directions": V.long()}, TypeError, "directions has dtype torch.int64, expected one of float32"),
        ({"directions": V.to("meta")}, ValueError, "directions is on device meta, expected cpu"),
        ({"out": OUT[:2]}, ValueError, "out has shape (2, 50, 17, 3, 3), expected (3, 50, 17, 3, 3) as [N, O"),
        ({"out": OUT.float()}, TypeError, "out has dtype torch.float32, expected torch.float64"),
        ({"out": OUT.to("meta")}, ValueError, "out is on device meta, expected cpu"),
        ({"out": 3}, TypeError, "out is 3 (int), expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_input(changed, error, message):
    arguments = {"inputs": X, "output_grads": B, **LAYER.options, **changed}
    with pytest.raises(error, match=re.escape(f"persample_conv: {message}")):
        persample_conv(**arguments)
