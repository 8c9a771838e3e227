import math

import pytest
import torch

from kdaif_fast import influence_scores, influence_weights, sigmoid_weights
from kdaif_fast.influence.weights import score_width
from tests.cases import make
from tests.properties import given, st

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


@given(phi=scores, gamma=st.floats(0, 1e308), scale=st.sampled_from(["range", "robust", 1e-320, 1.0, 1e3]))
def test_conditions_of_theorem_1(phi, gamma, scale):
    w = sigmoid_weights(phi, gamma=gamma, scale=scale)
    assert w.isfinite().all()
    assert ((w >= 0) & (w <= 2)).all()
    assert (w[phi == 0] == 1).all()
    assert (w[phi > 0] <= 1).all()
    assert (w[phi < 0] >= 1).all()
    order = phi.argsort()
    assert (w[order].diff() <= 0).all()


def test_formula():
    phi = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    torch.testing.assert_close(sigmoid_weights(phi, gamma=4.0), 2 / (1 + torch.exp(4.0 * phi / 5)))
    torch.testing.assert_close(sigmoid_weights(phi, gamma=4.0, scale=10), 2 / (1 + torch.exp(0.4 * phi)))


def test_robust_scale_is_not_moved_by_an_outlier():
    phi = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([1e6])])
    w = sigmoid_weights(phi, scale="robust")
    assert w[0] > 1.9
    assert sigmoid_weights(phi)[0] < 1.01


def test_the_width_of_other_scores():
    """A batch is measured against all samples."""
    everything = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    batch = everything[1:3]
    for scale in ("range", "robust", 4.0):
        w = sigmoid_weights(batch, scale=score_width(everything, scale))
        assert torch.equal(w, sigmoid_weights(everything, scale=scale)[1:3])
    assert score_width(torch.tensor([1.0, 2.0])) == 2
    assert score_width(torch.tensor([-1.0, -2.0])) == 2
    assert score_width(torch.zeros(0)) == 0
    assert score_width(torch.zeros(2), 1e300) == torch.finfo(torch.float32).max
    assert sigmoid_weights(torch.tensor([0.0, 1.0]), scale=score_width(torch.zeros(2), 1e-300)).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"scale is torch.float32 \(2,\), expected 'range', .* no dimensions"):
        sigmoid_weights(batch, scale=torch.ones(2))
    with pytest.raises(TypeError, match="scores is list"):
        score_width([1.0])


def test_scores_at_the_end_of_the_dtype():
    largest = torch.finfo(torch.float32).max
    phi = torch.tensor([-largest, 0.0, largest])  # max - min is infinite
    w = sigmoid_weights(phi)
    assert (w[0] > 1 == w[1]) & (w[1] > w[2])


@pytest.mark.parametrize(("phi", "w"), [([], []), ([0.0, 0.0], [1.0, 1.0])])
def test_nothing_to_tell_apart(phi, w):
    assert sigmoid_weights(torch.tensor(phi)).tolist() == w


def test_made_in_inference_mode_they_still_weight_a_loss():
    with torch.inference_mode():
        w = sigmoid_weights(torch.randn(3))
    losses = torch.randn(3, requires_grad=True)
    (w * losses).sum().backward()
    assert torch.equal(losses.grad, w)


def test_scores_of_one_sign():
    w = sigmoid_weights(torch.tensor([1.0, 1.001, 1.002]))
    assert ((w > 0) & (w < 1)).all()
    assert (sigmoid_weights(-torch.tensor([1.0, 1.001, 1.002])) > 1).all()


def test_equal_scores_keep_their_sign():
    assert (sigmoid_weights(torch.tensor([0.3, 0.3])) < 1).all()
    assert (sigmoid_weights(torch.tensor([-0.3])) > 1).all()


def test_nan_stays_nan():
    phi = torch.tensor([math.nan, 1.0, -1.0])
    assert sigmoid_weights(phi, scale=1.0).isnan().tolist() == [True, False, False]
    assert sigmoid_weights(phi).isnan().all()
    assert sigmoid_weights(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"phi": [1.0]}, TypeError, "phi is list"),
        ({"phi": torch.tensor([1])}, TypeError, "phi is Tensor"),
        ({"phi": torch.ones(2, 2)}, ValueError, r"phi has shape \(2, 2\)"),
        ({"gamma": "steep"}, TypeError, "gamma is 'steep'"),
        ({"gamma": -1}, ValueError, "gamma is -1"),
        ({"gamma": math.nan}, ValueError, "gamma is nan"),
        ({"scale": "std"}, ValueError, "scale is 'std'"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        sigmoid_weights(**{"phi": torch.ones(2), **change})


def test_influence_weights_are_the_weights_of_the_scores():
    model, batch, val = make("mlp")
    phi = influence_scores(model, batch, val, damping=0.1)
    w = influence_weights(model, batch, val, damping=0.1, gamma=3.0, scale="robust")
    assert torch.equal(w, sigmoid_weights(phi, gamma=3.0, scale="robust"))
    assert not w.requires_grad
    with pytest.raises(TypeError, match="influence_scores"):
        influence_weights(model, batch, val, return_solution=True)
    with pytest.raises(ValueError, match="queries is 'per_class', but a sample has one weight"):
        influence_weights(model, batch, val, queries="per_class")
    loader = list(zip(*(part.split(5) for part in batch), strict=True))
    options = {"damping": 0.1, "tol": 1e-8, "gamma": 3.0}
    streamed = influence_weights(model, loader, [val], **options)
    torch.testing.assert_close(streamed, influence_weights(model, batch, val, **options))
