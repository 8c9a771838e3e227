"""persample_layer_norm as users call it: against autograd, under transforms and compilers, and what it refuses."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kdaif_fast.ops import persample_layer_norm

EPS = 1e-5


def inputs(dtype=torch.float64):
    x, b = (torch.randn(3, 4, 5, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, b, x.mean(2), (x.var(2, correction=0) + EPS).rsqrt()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_is_what_autograd_gives(norm):
    x, b, mean, rstd = inputs()
    rms_rstd = (x.square().mean(2) + EPS).rsqrt()
    expected = []
    for i in range(3):
        w, c = (torch.zeros(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        z = F.layer_norm(x[i], (5,), w, c, EPS) if norm == "layer" else F.rms_norm(x[i], (5,), w, EPS) + c
        expected.append(torch.autograd.grad(z, (w, c), b[i]))
    ours = persample_layer_norm(x, b, *((mean, rstd) if norm == "layer" else (None, rms_rstd)))
    for mine, truth in zip(ours, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(truth), rtol=1e-10, atol=1e-10)


def test_statistics_of_another_dtype():
    x, b, mean, rstd = inputs(torch.bfloat16)
    ours = persample_layer_norm(x, b, mean, rstd)
    expected = persample_layer_norm(x, b, mean.float(), rstd.double())
    assert all(torch.equal(a, e) for a, e in zip(ours, expected, strict=True))
    assert all(t.dtype == torch.float32 for t in ours)


class TestTransforms:
    """The definition answers there: derivatives are right, not silently zero."""

    def scalar(self, *arguments):
        dw, dq = persample_layer_norm(*arguments)
        return dw.sin().sum() + dq.cos().sum()

    def test_gradients_to_second_order(self):
        arguments = tuple(t.detach().requires_grad_() for t in inputs())
        assert torch.autograd.gradcheck(self.scalar, arguments)
        assert torch.autograd.gradgradcheck(self.scalar, arguments)

    def test_only_output_grads_require_grad(self):
        x, b, mean, rstd = inputs()
        (grad,) = torch.autograd.grad(self.scalar(x, b.requires_grad_(), mean, rstd), b)
        assert grad.abs().min() > 0

    def test_forward_mode(self):
        arguments = inputs()
        tangents = tuple(torch.randn_like(t) for t in arguments)
        _, ours = torch.func.jvp(self.scalar, arguments, tangents)
        gradients = torch.func.grad(self.scalar, (0, 1, 2, 3))(*arguments)
        torch.testing.assert_close(ours, sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))

    def test_vmap(self):
        batches = [inputs() for _ in range(3)]
        stacked = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
        ours = torch.func.vmap(self.scalar)(*stacked)
        torch.testing.assert_close(ours, torch.stack([self.scalar(*batch) for batch in batches]))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compiled(self, requires_grad):
        x, *others = inputs()
        x.requires_grad_(requires_grad)
        ours = torch.compile(self.scalar, fullgraph=True, backend="aot_eager")(x, *others)
        expected = self.scalar(x, *others)
        torch.testing.assert_close(ours, expected)
        if requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (ours, expected)))

    def test_fake_tensors(self):
        arguments = inputs(torch.bfloat16)
        expected = persample_layer_norm(*arguments)
        with FakeTensorMode() as mode:
            ours = persample_layer_norm(*(mode.from_tensor(t) for t in arguments))
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in expected]


X, B, MEAN, RSTD = inputs()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs is [1.0] (list), expected a torch.Tensor"),
        ({"inputs": X.long()}, TypeError, "inputs has dtype torch.int64, expected one of float32"),
        ({"output_grads": B.float()}, TypeError, "output_grads has dtype torch.float32, expected torch.float64"),
        ({"output_grads": B.to("meta")}, ValueError, "output_grads is on device meta, expected cpu as inputs"),
        ({"rstd": None}, TypeError, "rstd is None (NoneType), expected a torch.Tensor"),
        ({"mean": MEAN.long()}, TypeError, "mean has dtype torch.int64, expected one of float32"),
        ({"mean": MEAN.to("meta")}, ValueError, "mean is on device meta, expected cpu"),
        ({"rstd": RSTD.to("meta")}, ValueError, "rstd is on device meta, expected cpu"),
        ({"inputs": X[0]}, ValueError, "inputs has shape (4, 5), expected [N, T, D]"),
        ({"output_grads": B[:, :3]}, ValueError, "output_grads has shape (3, 3, 5), expected (3, 4, 5) as inputs"),
        ({"mean": MEAN[:2]}, ValueError, "mean has shape (2, 4), expected (3, 4) as the positions"),
        ({"rstd": RSTD[:, :, None]}, ValueError, "rstd has shape (3, 4, 1), expected (3, 4) as the positions"),
    ],
)  # fmt: skip
def test_bad_input(changed, error, message):
    arguments = {"inputs": X, "output_grads": B, "mean": MEAN, "rstd": RSTD, **changed}
    with pytest.raises(error, match=re.escape(f"persample_layer_norm: {message}")):
        persample_layer_norm(**arguments)
