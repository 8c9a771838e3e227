"""persample_inner, which other ops and terms use: its definition, shapes and dtypes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdaif_fast.ops._persample_inner import _persample_inner, persample_inner


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (2, 1, 7), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_sums_of_products(shape, dtype):
    left, right = torch.randn(shape).to(dtype), torch.randn(shape[0], *shape[2:]).to(dtype)
    ours = persample_inner(left, right)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    truth = torch.einsum("nkq,nq->nk", left.double().flatten(2), right.double().flatten(1))
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_any_strides():
    right = torch.randn(2, 5, 3).permute(2, 0, 1).contiguous().as_strided((3, 2, 5), (10, 1, 2))
    left = torch.randn(3, 5, 2, 4).permute(0, 3, 2, 1)
    torch.testing.assert_close(persample_inner(left, right), torch.einsum("nkab,nab->nk", left, right))


def test_fake_tensors_and_opcheck():
    with FakeTensorMode():
        result = persample_inner(torch.empty(3, 2, 4, dtype=torch.bfloat16), torch.empty(3, 4, dtype=torch.bfloat16))
    assert (result.shape, result.dtype) == ((3, 2), torch.float32)
    torch.library.opcheck(_persample_inner, (torch.randn(3, 2, 4), torch.randn(3, 4)))
