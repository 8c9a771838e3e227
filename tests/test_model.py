import threading
import time
from types import SimpleNamespace

import torch
from torch import nn

from kdaif_fast import _model
from tests.cases import Recurrent


def test_kernel_choices_are_put_back():
    def switches():
        flash = torch.backends.cuda.flash_sdp_enabled()
        return torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, flash

    before = switches()
    with _model.twice_differentiable(Recurrent()):
        assert not any(switches())
    assert switches() == before


def test_a_precision_of_convolutions_alone():
    """torch's own switch for cuDNN would raise, and set it to something else meanwhile."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        with _model.twice_differentiable(Recurrent()):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_threads_do_not_put_back_each_others_switches():
    def work():
        for _ in range(30):
            with _model.twice_differentiable(Recurrent()):
                time.sleep(0.001)

    before = torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled()) == before


def test_buffers_of_a_part_in_training_mode_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True))
    model.eval()
    model[2].train()
    before = model[2].running_mean.clone()
    _model.run_model(model, torch.randn(5, 4), "batch")
    assert torch.equal(model[2].running_mean, before)


def test_shared_parameters_appear_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

    assert list(_model.select_parameters(Tied(), None)) == ["a.weight", "a.bias"]


def test_buffers_of_a_module_with_two_names_stay_its_own():
    norm = torch.nn.InstanceNorm1d(2, track_running_stats=True)
    model = torch.nn.Sequential(norm, torch.nn.ReLU(), norm)
    before = norm.running_mean
    values = before.clone()
    _model.call_model(model, torch.randn(3, 2, 5), "batch")
    assert norm.running_mean is before
    assert torch.equal(before, values)
    _model.call_model(model, torch.randn(3, 2, 5), "batch", updates_buffers=True)
    assert not torch.equal(norm.running_mean, values)


def test_generators_are_left_alone_while_a_graph_is_captured(monkeypatch):
    """A GPU's generator refuses to be read then, which would break the capture."""
    read = []
    parameter = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    model = SimpleNamespace(parameters=lambda: [parameter])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: read.append(device) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len(_model.random_states(model)) == 1
    assert not read
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert len(_model.random_states(model)) == 2
    assert read == [parameter.device]
