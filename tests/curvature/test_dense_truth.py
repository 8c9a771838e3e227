"""Every operator against a dense matrix in float64, on models of about 2,000 parameters: to 1e-8."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.curvature import CURVATURES, EmpiricalFisher, GaussNewton, Hessian, Identity, MonteCarloFisher, hvp
from kdaif_fast.ops import kd_loss
from tests.curvature.truth import MODELS, Problem, problem

OPERATORS = {GaussNewton: "gauss_newton", Hessian: "hessian", EmpiricalFisher: "empirical_fisher"}
EXACT = 1e-8


def error(found, expected):
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def vectors(P, K=5):
    return torch.randn(K, P, dtype=torch.float64)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
class TestProducts:
    def test_one_batch_and_loaders(self, name, operator):
        """Products from one batch, from batches of unequal size, with graphs kept, and in chunks of one vector."""
        this = problem(name)
        V = vectors(this.P)
        expected = V @ getattr(this, OPERATORS[operator])
        loader = this.batches(4, 1, len(this.batch[0]) - 5)
        options = {"loss": this.loss}
        for made in (
            operator(this.model, this.batch, **options),
            operator(this.model, this.batch, memory=1, **options),
            operator(this.model, loader, **options),
            operator(this.model, loader, keep_graphs=True, **options),
            operator(this.model, DataLoader(TensorDataset(*this.batch), 2), memory=1, **options),
        ):
            for _ in range(2):  # the second pass over a loader is not the first
                assert error(made.matmat(V), expected) < EXACT
            assert error(made.matvec(V[0]), expected[0]) < EXACT
            assert made.samples == len(this.batch[0])
            assert made.size == this.P

    def test_dictionaries(self, name, operator):
        this = problem(name)
        V = vectors(this.P, 3)
        pieces = V.split([p.numel() for p in this.parameters], 1)
        shapes = {n: p.shape for n, p in this.model.named_parameters()}
        stacked = {n: piece.view(3, *shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
        expected = V @ getattr(this, OPERATORS[operator])
        made = operator(this.model, this.batch, loss=this.loss)
        many, one = made.matmat(stacked), made.matvec({n: piece[1] for n, piece in stacked.items()})
        assert list(many) == list(shapes)
        assert {n: v.shape for n, v in one.items()} == shapes
        assert error(torch.cat([v.flatten(1) for v in many.values()], 1), expected) < EXACT
        assert error(torch.cat([v.flatten() for v in one.values()]), expected[1]) < EXACT

    def test_one_call(self, name, operator):
        """hvp takes flat vectors and dictionaries, one or several, and loaders."""
        this = problem(name)
        curvature = next(key for key, made in CURVATURES.items() if made is operator)
        V = vectors(this.P, 2)
        expected = V @ getattr(this, OPERATORS[operator])
        options = {"curvature": curvature, "loss": this.loss}
        assert error(hvp(this.model, this.batch, V, **options), expected) < EXACT
        assert error(hvp(this.model, this.batches(3, len(this.batch[0]) - 3), V[0], **options), expected[0]) < EXACT
        names = [n for n, _ in this.model.named_parameters()]
        pieces = [
            piece.view(-1, *p.shape)
            for piece, p in zip(V.split([p.numel() for p in this.parameters], 1), this.parameters, strict=True)
        ]
        many = hvp(this.model, this.batch, dict(zip(names, pieces, strict=True)), **options)
        assert error(torch.cat([many[n].flatten(1) for n in names], 1), expected) < EXACT
        one = hvp(this.model, this.batch, {n: p[0] for n, p in zip(names, pieces, strict=True)}, **options)
        assert error(torch.cat([one[n].flatten() for n in names]), expected[0]) < EXACT


@pytest.mark.parametrize("operator", OPERATORS)
def test_matrix_itself(operator):
    this = problem("mlp")
    matrix = operator(this.model, this.batch, loss=this.loss).dense()
    assert error(matrix, getattr(this, OPERATORS[operator])) < EXACT
    assert error(matrix, matrix.T.contiguous()) < EXACT


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("mlp", ["0.weight", "4.bias"]),
        ("cnn", ["0.weight", "0.bias", "1.weight"]),
        ("transformer", ["block.self_attn.in_proj_weight", "twice.bias"]),
    ],
)
def test_frozen_parameters(name, frozen, operator):
    this = Problem(name, frozen)
    V = vectors(this.P)
    made = operator(this.model, this.batches(2, len(this.batch[0]) - 2), loss=this.loss)
    assert not set(frozen) & set(made.parameters)
    whole = problem(name)
    kept = torch.cat(
        [torch.full((p.numel(),), n not in frozen) for n, p in whole.model.named_parameters()]
    )  # positions of the others among all
    expected = V @ getattr(whole, OPERATORS[operator])[kept][:, kept]
    assert error(made.matmat(V), expected) < EXACT
    chosen = operator(whole.model, whole.batch, loss=whole.loss, params=list(made.parameters))
    assert error(chosen.matmat(V), expected) < EXACT


class TestMonteCarloFisher:
    """Its matrix is the second moment of gradients for the targets it drew, which are looked at here."""

    def drawn(self, monkeypatch, product):
        """The product, and -log p's gradients at the outputs for every draw."""
        draws, plain = [], MonteCarloFisher._drawn_grads

        def recording(*args):
            draws.append(plain(*args))
            return draws[-1]

        with monkeypatch.context() as patch:
            patch.setattr(MonteCarloFisher, "_drawn_grads", recording)
            return product(), draws

    @pytest.mark.parametrize("name", ["mlp", "transformer"])
    def test_drawn_labels(self, name, monkeypatch):
        this = problem(name)
        V = vectors(this.P)
        made = MonteCarloFisher(this.model, this.batch, draws=3, seed=5, loss=this.loss)
        product, draws = self.drawn(monkeypatch, lambda: made.matmat(V))
        targets = [(draw < 0).double().argmax(-1) for draw in draws]  # p - 1 there, and p elsewhere
        assert len(targets) == 3
        assert not torch.equal(targets[0], targets[1])

        def loss(outputs, targets):  # -log p of all the rows of a sample together
            rows = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.flatten(), reduction="none")
            return rows.view(len(outputs), -1).sum(1)

        expected = sum(V @ this.second_moment(this.grads(y, loss)) for y in targets) / 3
        assert error(product, expected) < EXACT
        assert torch.equal(made.matmat(V), product)

    def test_drawn_errors(self, monkeypatch):
        this = problem("mlp")
        V = vectors(this.P)
        made = MonteCarloFisher(this.model, this.batch, draws=2, likelihood="gaussian")
        product, draws = self.drawn(monkeypatch, lambda: made.matmat(V))
        moments = [this.second_moment(torch.einsum("no,nop->np", draw, this.jacobian)) for draw in draws]
        assert error(product, V @ (sum(moments) / 2)) < EXACT

    def test_is_one_matrix_over_a_loader(self):
        """Batches have draws of their own, the same in every pass, kept graphs or not."""
        this = problem("mlp")
        V = vectors(this.P)
        loader = this.batches(3, 3, 3)
        made = MonteCarloFisher(this.model, loader)
        first = made.matmat(V)
        assert torch.equal(made.matmat(V), first)
        assert error(MonteCarloFisher(this.model, loader, keep_graphs=True, memory=1).matmat(V), first) < EXACT
        assert error(MonteCarloFisher(this.model, loader, seed=1).matmat(V), first) > 0.1
        same = [this.batches(3, 6)[0]] * 2  # the same samples twice: other draws
        parts = [MonteCarloFisher(this.model, data).matmat(V) for data in (same[:1], same)]
        assert error(*parts) > 0.1

    @pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
    def test_tends_to_the_gauss_newton_matrix(self, likelihood):
        this = problem("mlp")
        V = vectors(this.P, 2)
        expected = V @ this.gauss_newton
        if likelihood == "gaussian":
            expected = V @ (this.jacobian.flatten(0, 1).T @ this.jacobian.flatten(0, 1)) / len(this.jacobian)
        few, many = (
            error(MonteCarloFisher(this.model, this.batch, draws=n, likelihood=likelihood).matmat(V), expected)
            for n in (20, 2000)
        )
        assert many < 0.1
        assert 3 < few / many < 30  # 10 on average


def test_identity():
    this = problem("mlp")
    made = Identity(this.model, this.batch)
    V = vectors(this.P)
    assert torch.equal(made.matmat(V), V)
    assert torch.equal(made.matvec(V[0]), V[0])
    assert torch.equal(made.dense(), torch.eye(this.P, dtype=torch.float64))
    assert torch.equal(made.diagonal(probes=1), torch.ones(this.P, dtype=torch.float64))


@pytest.mark.parametrize("operator", OPERATORS)
def test_losses_with_teachers(operator):
    """A teacher's logits travel with their samples through a loader."""
    this = problem("mlp")
    teacher = torch.randn(len(this.batch[0]), 10, dtype=torch.float64)
    batch = (*this.batch, teacher)
    loader = list(zip(*(part.split((2, 7)) for part in batch), strict=True))
    other = Problem("mlp")
    other.loss = lambda outputs, targets: kd_loss(outputs, teacher, targets)
    V = vectors(this.P)
    assert error(operator(this.model, loader).matmat(V), V @ getattr(other, OPERATORS[operator])) < EXACT


class TestEstimates:
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_mean_eigenvalue(self, operator):
        this = problem("mlp")
        exact = float(getattr(this, OPERATORS[operator]).diagonal().mean())
        made = operator(this.model, this.batch)
        assert made.mean_eigenvalue(probes=200) == pytest.approx(exact, rel=0.15)
        assert made.mean_eigenvalue(seed=1) != made.mean_eigenvalue()

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_diagonal(self, operator):
        this = problem("mlp")
        matrix = getattr(this, OPERATORS[operator])
        made = operator(this.model, this.batch)
        found, exact = made.diagonal(probes=200), matrix.diagonal()
        # One probe's entry has the variance of twice the squares of the rest of its row, over random signs: sum c_ij^2.
        deviation = ((matrix**2).sum(1) - exact**2).sqrt() / 200**0.5
        scores = (found - exact) / deviation.clamp(min=1e-12)
        assert scores[deviation > 1e-9].abs().max() < 6
        assert 0.8 < scores[deviation > 1e-9].std() < 1.2  # as wide as it should be, and no wider
