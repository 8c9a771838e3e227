"""The closed form of normalisation's second derivatives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast.batched.norms import closed_form_norms

CASES = {
    "one group": (nn.GroupNorm(1, 4), (3, 4, 2, 2)),
    "two groups": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "two groups, one position": (nn.GroupNorm(2, 4), (3, 4)),
    "rows": (nn.LayerNorm(4), (3, 2, 4)),
    "not affine": (nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "over two axes": (nn.LayerNorm((2, 4)), (3, 2, 4)),
    "without bias": (nn.LayerNorm(4, bias=False), (3, 4)),
}


def nodes(y):
    found, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() not in found:
            found.add(node.name())
            stack += [child for child, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    module, shape = CASES[name]
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def normalised(x, *parameters):
        with closed_form_norms(module):
            return module(x)

    for parameter in module.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(normalised(x), module(x))
    inputs = (x, *module.parameters())
    torch.autograd.gradcheck(normalised, inputs)
    torch.autograd.gradgradcheck(normalised, inputs)


def test_is_used_where_it_is_meant():
    x = torch.randn(3, 4, requires_grad=True)
    module = nn.LayerNorm(4)
    with closed_form_norms(module):
        assert "_NormBackward" in nodes(module(x))
        assert "_NormBackward" not in nodes(module.bfloat16()(x.bfloat16()))
        with pytest.raises(RuntimeError):
            F.group_norm(x, 3)  # says what PyTorch says
    assert "_NormBackward" not in nodes(module.float()(x))
