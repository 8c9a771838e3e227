import torch
from torch import nn

from kdaif_fast import _model
from tests.cases import Recurrent


def test_kernel_choices_are_put_back():
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    with _model.twice_differentiable(Recurrent()):
        assert not torch.backends.mkldnn.enabled
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before


def test_shared_parameters_appear_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

    assert list(_model.select_parameters(Tied(), None)) == ["a.weight", "a.bias"]
