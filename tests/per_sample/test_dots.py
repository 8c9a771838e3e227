import pytest
import torch

from kdaif_fast.per_sample import per_sample_grad_dots
from tests.cases import MODELS, Dense, make


@pytest.mark.parametrize("name", MODELS)
def test_against_materialised_gradients(name):
    model, batch, _ = make(name)
    dense = Dense(model)
    grads = dense.grads(batch)
    direction = torch.randn(grads.shape[1], dtype=torch.float64)
    expected = grads @ direction
    torch.testing.assert_close(per_sample_grad_dots(model, batch, direction), expected)
    torch.testing.assert_close(per_sample_grad_dots(model, batch, dense.unflat(direction)), expected)


def test_a_parameter_that_is_not_used():
    model, batch, _ = make("mlp")
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    dense = Dense(model, [name for name, _ in model.named_parameters() if name != "idle"])
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = dense.grads(batch) @ dense.flat({name: direction[name] for name in dense.parameters})
    torch.testing.assert_close(per_sample_grad_dots(model, batch, direction), expected)
