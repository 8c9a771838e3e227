"""tol="rank": the ranking it stops at is that of the converged solution."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from kdaif_fast import influence_scores
from kdaif_fast._data import Batches
from kdaif_fast._model import Batch
from kdaif_fast.demo.data import load_digits
from kdaif_fast.influence import rank
from kdaif_fast.influence.rank import LOOKS_EVERY, SAMPLE, RankSettled, ranks_of, some_samples, spearman
from tests.cases import make
from tests.influence.test_streaming import pieces


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    )


def trained(build, epochs):
    """A network on digits of which a tenth are flipped."""
    torch.manual_seed(0)
    data, model = load_digits(0.1, seed=0), build()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
            optimizer.step()
    return model, (data.train_x, data.train_y), (data.val_x, data.val_y)


@pytest.mark.parametrize("damping", ["auto", 1e-2, 1e-3])
@pytest.mark.parametrize(("build", "epochs"), [(mlp, 1), (mlp, 8), (cnn, 4)])
def test_it_is_safe_on_digits(build, epochs, damping):
    model, batch, val = trained(build, epochs)
    options = {"damping": damping, "return_solution": True}
    phi, early = influence_scores(model, batch, val, tol="rank", **options)
    truth, late = influence_scores(model, batch, val, tol=1e-5, max_iter=2000, **options)
    assert late.converged
    assert early.converged
    assert early.reason in ("stopped", "tolerance")
    assert spearmanr(phi, truth).statistic >= 0.99
    assert early.iterations < 0.8 * late.iterations


def classification(seed):
    from sklearn.datasets import make_classification

    x, y = make_classification(900, 20, n_informative=8, n_classes=4, flip_y=0.1, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y), None, 4


def regression(seed):
    from sklearn.datasets import make_friedman1

    x, y = (torch.tensor(part, dtype=torch.float32) for part in make_friedman1(900, 20, noise=1.0, random_state=seed))
    return x, (y - y.mean()) / y.std(), lambda outputs, targets: (outputs[:, 0] - targets) ** 2, 1


@pytest.mark.parametrize("damping", ["auto", 1e-3])
@pytest.mark.parametrize("problem", [classification, regression])
def test_it_is_safe_on_other_problems(problem, damping):
    """Its constants were chosen on digits."""
    x, y, loss, outputs = problem(seed=5)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, outputs))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        for index in torch.randperm(700).split(64):
            optimizer.zero_grad()
            (loss or nn.functional.cross_entropy)(model(x[index]), y[index]).mean().backward()
            optimizer.step()
    data = (x[:700], y[:700]), (x[700:], y[700:])
    phi = influence_scores(model, *data, loss=loss, damping=damping, tol="rank")
    truth = influence_scores(model, *data, loss=loss, damping=damping, tol=1e-5, max_iter=2000)
    assert spearmanr(phi, truth).statistic >= 0.99


def test_every_query_has_to_settle():
    model, batch, val = trained(mlp, 4)
    options = {"damping": 1e-3, "return_solution": True, "queries": "per_class"}
    phi, early = influence_scores(model, pieces(batch, 300), val, tol="rank", **options)
    truth, late = influence_scores(model, batch, val, tol=1e-5, max_iter=2000, **options)
    assert set(early.reason) <= {"stopped", "tolerance"}
    assert early.iterations < late.iterations
    assert min(spearmanr(a, b).statistic for a, b in zip(phi.T, truth.T, strict=True)) >= 0.99


def test_spearman_is_scipys():
    scores = torch.randn(40, 3), torch.randn(40, 3)
    ours = spearman(*map(ranks_of, scores))
    theirs = [spearmanr(a, b).statistic for a, b in zip(*(x.T.numpy() for x in scores), strict=True)]
    assert ours.tolist() == pytest.approx(theirs)
    assert spearman(ranks_of(scores[0]), ranks_of(3 * scores[0] + 1)).tolist() == [1, 1, 1]
    assert spearman(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [1, 1]


def test_looks_move_apart_and_two_in_a_row_are_needed():
    torch.manual_seed(0)
    one, other, looks = torch.randn(50, 1), torch.randn(50, 1), []
    current = one

    def score(x):
        looks.append(iterations)
        return current

    settled = RankSettled(score)
    for iterations in range(LOOKS_EVERY, 205, LOOKS_EVERY):  # noqa: B007, `score` reads it
        current = one if len(looks) % 2 else other  # never the same twice in a row
        assert not settled(torch.zeros(1, 3))
    assert looks[:5] == [5, 10, 15, 20, 25]
    assert all(later >= 1.1 * earlier for earlier, later in pairwise(looks))
    assert looks[-1] - looks[-2] > LOOKS_EVERY
    answers = []
    for iterations in range(205, 400, LOOKS_EVERY):  # noqa: B007
        before = len(looks)
        answer = settled(torch.zeros(1, 3))
        answers += [answer] * (len(looks) - before)
        if answer:
            break
    assert answers[-3:] in ([False, False, True], [False, True])


class TestSample:
    def test_of_one_batch(self):
        batch = Batch(torch.arange(2000.0)[:, None], torch.arange(2000))
        part = some_samples(batch, SAMPLE)
        assert len(part.targets) == SAMPLE
        assert torch.equal(part.inputs[:, 0], part.targets.float())
        assert (part.targets[0], part.targets[-1]) == (0, 1999)
        assert part.targets.diff().unique().tolist() == [3, 4]
        assert some_samples(batch, 2000) is batch

    def test_inputs_that_cannot_be_cut(self):
        batch = Batch((torch.ones(10, 2), torch.ones(3)), torch.arange(10))
        assert some_samples(batch, 5) is batch

    def test_of_a_loader_it_is_spread(self):
        """A data set in the order of its classes must not give samples of one class only."""
        loader = [(torch.full((100, 1), float(i)), torch.full((100,), i)) for i in range(80)]
        sample = [batch for _, batch in rank._sample(Batches(loader, "batch"))]
        assert [int(batch.targets[0]) for batch in sample] == list(range(4, 80, 10))
        assert sum(len(batch.targets) for batch in sample) == SAMPLE

    def test_of_a_few_batches_all(self):
        _, batch, _ = make("mlp")
        sample = [part for _, part in rank._sample(Batches(pieces(batch, 5), "batch"))]
        assert torch.equal(torch.cat([part.targets for part in sample]), batch[1])
