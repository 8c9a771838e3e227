"""The Triton kernels of kd_loss under Triton's interpreter: run by test_kd_loss.py, with TRITON_INTERPRET=1 set."""

import math

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import kd_loss
from kdaif_fast.reference import kd_loss as reference

# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}


def inputs(N, V, dtype):
    s, t = (3 * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    return s, t, torch.randint(V, (N,)), torch.randn(N)


def error(ours, expected):
    return ((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestInterpreted:
    @pytest.fixture
    def kernels(self):
        from kdaif_fast.triton_kernels import kd_loss

        return kd_loss

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (2, 2), (4, 37), (2, 128), (2, 5000)])
    @pytest.mark.parametrize(("T", "alpha"), [(1.0, 1.0), (2.5, 0.0), (3.0, 0.3)])
    def test_against_reference(self, kernels, dtype, shape, T, alpha):
        s, t, labels, scale = inputs(*shape, dtype)
        loss, grad = kernels.kd_loss_with_grad(s, t, labels, scale, T, alpha)
        hvp = kernels.kd_loss_hvp(scale, t, s, T, alpha)
        wide = (s.double(), t.double(), labels, scale.double())
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, T, alpha)
        expected_hvp = reference.kd_loss_hvp(scale.double(), t.double(), s.double(), T, alpha)
        assert (loss.dtype, grad.dtype, hvp.dtype) == (torch.float32, dtype, dtype)
        assert error(loss, expected_loss) < 1e-5 or loss.abs().max() < 1e-6
        assert error(grad, expected_grad) < TOLERANCE[dtype] or grad.abs().max() < 1e-6
        # u - <p, u> cancels where one class has all the probability, so the tangent is what rounding is measured by.
        tangent = (scale[:, None] * t).double()
        assert (hvp.double() - expected_hvp).norm() <= TOLERANCE[dtype] * tangent.norm()
        assert torch.equal(kernels.kd_loss(s, t, labels, scale, T, alpha), loss)
        assert torch.equal(kernels.kd_loss_grad(scale, s, t, labels, T, alpha), grad)

    def test_masked_classes_wrong_labels_and_nan(self, kernels):
        s, t, labels, scale = inputs(5, 70, torch.float32)
        labels[:] = torch.tensor([0, 0, 70, -1, 0])
        s[:, 3] = t[:, 3] = -math.inf
        s[1, 1:] = t[1, 1:] = -math.inf
        t[4, 60] = math.nan
        loss, grad = kernels.kd_loss_with_grad(s, t, labels, scale, 2.0, 0.5)
        assert loss.isnan().tolist() == [False, False, True, True, True]
        expected = reference.kd_loss_with_grad(s[:2], t[:2], labels[:2], scale[:2], 2.0, 0.5)
        torch.testing.assert_close(loss[:2], expected[0])
        torch.testing.assert_close(grad[:2], expected[1], rtol=1e-4, atol=1e-6)
        assert (grad[:2, 3] == 0).all()

    def test_a_block_of_masked_classes(self, kernels):
        """A whole first block of -inf: a running maximum that was not guarded would give NaN."""
        s, t, labels, scale = inputs(1, 5000, torch.float32)
        s[0, :4096] = t[0, :4096] = -math.inf
        labels[0] = 4999
        loss = kernels.kd_loss(s, t, labels, scale, 2.0, 0.5)
        torch.testing.assert_close(loss, reference.kd_loss(s, t, labels, scale, 2.0, 0.5))

    def test_strides(self, kernels):
        s, t, labels, scale = inputs(4, 40, torch.float32)
        padded = torch.full((4, 64), math.nan)
        padded[:, :40] = s
        ours = kernels.kd_loss_with_grad(padded[:, :40], t.t().contiguous().t(), labels, scale, 2.0, 0.5)
        expected = kernels.kd_loss_with_grad(s, t, labels, scale, 2.0, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_forced_through_the_public_call_and_its_derivatives(self):
        s, t, labels, weight = inputs(3, 5, torch.float32)

        def loss(s):
            return kd_loss(s, t, labels, weight=weight, temperature=2.0).sum()

        expected = torch.func.hessian(loss)(s)
        with kdaif_fast.backend("triton"):
            torch.testing.assert_close(torch.func.hessian(loss)(s), expected)
            torch.testing.assert_close(torch.func.grad(loss)(s), torch.func.grad(loss)(s.double()).float())
