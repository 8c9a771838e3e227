"""Random states: what is drawn after they are set is what was drawn after they were read."""

import random

import numpy as np
import pytest
import torch

from kdaif_fast.distill.runs.checkpoint import read_state, write_state
from kdaif_fast.distill.runs.random_states import random_state, set_random_state


@pytest.fixture(autouse=True)
def generators_as_before():
    before = random_state()
    yield
    set_random_state(before)


def draw():
    """Of every generator, by more than one road; the gaussian ones keep a second number for later."""
    return [
        *(torch.rand(3).tolist(), torch.randn(20).tolist(), torch.randperm(5).tolist()),
        *(np.random.rand(3).tolist(), np.random.standard_normal(), np.random.randint(2**31)),
        *(random.random(), random.gauss(0, 1), random.randrange(2**70)),
    ]


def test_the_same_again():
    np.random.standard_normal()  # which leaves its second number
    random.gauss(0, 1)
    torch.randn(1)
    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first
    set_random_state(state)  # the state is not used up
    assert draw() == first


def test_through_a_file(tmp_path):
    pytest.importorskip("safetensors")
    random.gauss(0, 1)
    np.random.standard_normal()
    state = random_state()
    write_state(tmp_path / "state.safetensors", {"random": state})
    first = draw()
    set_random_state(read_state(tmp_path / "state.safetensors")["random"])
    assert draw() == first


def test_nothing_is_drawn():
    state = random_state()
    for _ in range(3):
        random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: None, TypeError),
        (lambda state: [], TypeError),
        (lambda state: {}, ValueError),
        (lambda state: {**state, "jax": 1}, ValueError),
        (lambda state: {**state, "torch": torch.zeros(3, dtype=torch.uint8)}, ValueError),
        (lambda state: {**state, "torch": None}, ValueError),
        (lambda state: {**state, "cuda": None}, ValueError),
        (lambda state: {**state, "numpy": {"bit_generator": "MT19937"}}, ValueError),
        (lambda state: {**state, "python": (3, (1, 2), None)}, ValueError),
        (lambda state: {**state, "python": (3, (2**80,) * 625, None)}, ValueError),
    ],
)
def test_a_wrong_state_changes_nothing(change, error):
    other = random_state()
    draw()
    before = random_state()
    first = draw()
    set_random_state(before)
    with pytest.raises(error, match="state "):
        set_random_state(change(other))
    assert draw() == first


def test_states_of_devices_that_are_not_here():
    state = {**random_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    if torch.cuda.device_count():
        state["cuda"][: torch.cuda.device_count()] = torch.cuda.get_rng_state_all()
    first = draw()
    with pytest.warns(UserWarning, match=f"states of {len(state['cuda'])} CUDA devices") as caught:
        set_random_state(state)
    assert caught[0].filename == __file__
    assert draw() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda():
    torch.rand(1, device="cuda")
    state = random_state()
    assert len(state["cuda"]) == torch.cuda.device_count()
    first = torch.rand(5, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), first)


class Gpus:
    """Stands for torch.cuda on a machine with some GPUs, whose generators are numbers."""

    def __init__(self, monkeypatch, count):
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]
        answers = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: len(self.states),
            "get_rng_state_all": lambda: [state.clone() for state in self.states],
            "set_rng_state": self.set,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def set(self, state, device):
        self.states[device] = state


def test_gpus_are_set_device_by_device(monkeypatch):
    gpus = Gpus(monkeypatch, 2)
    state = random_state()
    gpus.states = [torch.tensor([7], dtype=torch.uint8)] * 2
    set_random_state(state)
    assert [int(x) for x in gpus.states] == [0, 1]


def test_fewer_gpus_than_before(monkeypatch):
    Gpus(monkeypatch, 2)
    state = random_state()
    gpus = Gpus(monkeypatch, 1)
    gpus.states[0] += 5
    with pytest.warns(UserWarning, match="2 CUDA devices to set, but 1"):
        set_random_state(state)
    assert int(gpus.states[0]) == 0
