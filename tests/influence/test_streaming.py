"""Scores of loaders: the same as those of one batch, for every kind of query, and what loaders must not do."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from kdaif_fast import ConvergenceWarning, datainf_scores, influence_scores
from kdaif_fast.curvature import CURVATURES
from kdaif_fast.influence import scores as scores_module
from kdaif_fast.influence.loaders import require_every_sample
from kdaif_fast.solvers import ConvergenceError
from tests.cases import CLASSES, MODELS, Dense, make

EXACT = {"damping": 0.1, "tol": 1e-10, "max_iter": 1000}


def pieces(batch, size):
    """A batch cut into a list of batches, the last of them smaller."""
    return list(zip(*(part.split(size) for part in batch), strict=True))


def query_grads(dense, val, queries):
    grads = dense.grads(val)
    if queries == "mean":
        return grads.mean(0, keepdim=True)
    if queries == "per_sample":
        return grads
    return torch.stack([grads[val[1] == c].mean(0) for c in val[1].unique()])


@pytest.mark.parametrize("queries", ["mean", "per_sample", "per_class"])
@pytest.mark.parametrize("name", MODELS)
def test_against_brute_force(name, queries):
    model, batch, val = make(name)
    dense = Dense(model)
    matrix = dense.gauss_newton(batch)
    matrix.diagonal().add_(EXACT["damping"])
    expected = -dense.grads(batch) @ torch.linalg.solve(matrix, query_grads(dense, val, queries).T)
    expected = expected[:, 0] if queries == "mean" else expected
    tolerances = {"rtol": 1e-6, "atol": 1e-8 * expected.abs().max().item()}
    for train, validation in ((batch, val), (pieces(batch, 5), pieces(val, 3)), (pieces(batch, 5), val)):
        phi = influence_scores(model, train, validation, queries=queries, **EXACT)
        torch.testing.assert_close(phi, expected, **tolerances)


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "empirical_fisher", "identity"])
def test_every_curvature_streams(curvature):
    model, batch, val = make("mlp")
    options = {**EXACT, "damping": 1.0, "curvature": curvature}
    expected = influence_scores(model, batch, val, **options)
    for options["keep_graphs"] in (False, True):
        torch.testing.assert_close(influence_scores(model, pieces(batch, 5), val, **options), expected)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_closed_form_inverses(curvature):
    model, batch, val = make("mlp")
    train = pieces(batch, 5)
    operator = CURVATURES[curvature](model, train)
    for queries in ("mean", "per_class"):
        s = operator.solve(query_grads(Dense(model), val, queries), 0.1)
        expected = -Dense(model).grads(batch) @ s.T
        phi = influence_scores(
            model, train, val, queries=queries, curvature=curvature, solver="ekfac", damping=0.1, tol=None
        )
        torch.testing.assert_close(phi, expected[:, 0] if queries == "mean" else expected)


def test_data_loaders_with_and_without_a_length():
    model, batch, val = make("mlp")
    expected = influence_scores(model, batch, val, **EXACT)

    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*batch, strict=True)

    class Reader:
        """Anything that can be iterated again and again."""

        def __iter__(self):
            yield from pieces(batch, 5)

    for loader in (DataLoader(TensorDataset(*batch), 5), DataLoader(Stream(), 5), Reader()):
        torch.testing.assert_close(
            influence_scores(model, loader, DataLoader(TensorDataset(*val), 2), **EXACT), expected
        )
        identity = influence_scores(model, loader, val, curvature="identity")
        torch.testing.assert_close(identity, influence_scores(model, batch, val, curvature="identity"))


def test_inputs_by_keyword_and_teachers():
    model, (x, y), val = make("mlp")
    teacher = torch.randn(len(x), CLASSES, dtype=torch.float64)
    expected = influence_scores(model, (x, y, teacher), val, **EXACT)
    loader = [{"inputs": {"input": a}, "targets": b, "teacher_logits": c} for a, b, c in pieces((x, y, teacher), 5)]
    torch.testing.assert_close(influence_scores(model, loader, val, **EXACT), expected)


@pytest.mark.parametrize("solver", ["minres", "exact", "lanczos", "nystrom"])
@pytest.mark.parametrize("queries", ["mean", "per_class"])
def test_other_solvers(solver, queries):
    """Of full rank, the low-rank ones are exact."""
    model, batch, val = make("mlp")
    expected = influence_scores(model, batch, val, queries=queries, **EXACT)
    options = {"rank": 43} if solver in ("lanczos", "nystrom") else {}
    phi = influence_scores(
        model, pieces(batch, 5), val, solver=solver, queries=queries, solver_options=options, damping=0.1, tol=1e-6
    )
    torch.testing.assert_close(phi, expected, rtol=1e-3, atol=1e-5)


def test_float32_models_give_float32():
    model, batch, val = make("mlp")
    model, loader = model.float(), [(x.float(), y) for x, y in pieces(batch, 5)]
    assert influence_scores(model, loader, (val[0].float(), val[1]), damping=0.1).dtype == torch.float32


def test_queries_in_groups_by_memory():
    model, batch, val = make("mlp")
    expected, whole = influence_scores(model, batch, val, queries="per_sample", return_solution=True, **EXACT)
    P = sum(p.numel() for p in model.parameters())
    memory = 3 * 8 * 8 * P  # room for three right-hand sides in float64
    calls = []

    def counted(operator, b, *arguments, **options):
        calls.append(len(b))
        return solve(operator, b, *arguments, **options)

    solving = scores_module.solve_queries.__globals__
    solve, solving["solve"] = solving["solve"], counted
    try:
        phi, solution = influence_scores(
            model, batch, val, queries="per_sample", memory=memory, return_solution=True, **EXACT
        )
    finally:
        solving["solve"] = solve
    assert calls == [3, 3, 1]
    torch.testing.assert_close(phi, expected)
    torch.testing.assert_close(solution.x, whole.x)
    assert solution.residual.shape == whole.residual.shape == (7,)
    assert solution.reason == whole.reason == ("tolerance",) * 7
    assert (solution.iterations, solution.converged) == (whole.iterations, True)


def test_auto_damping_is_the_same_for_all_queries_and_forms():
    model, batch, val = make("mlp")
    options = {"return_solution": True, "tol": 1e-6}
    dampings = [
        influence_scores(model, train, val, queries=queries, **options)[1].damping
        for train in (batch, pieces(batch, 5))
        for queries in ("mean", "per_sample")
    ]
    assert dampings == pytest.approx(dampings[:1] * 4)


def test_curvature_of_other_data():
    model, batch, val = make("mlp")
    part = tuple(x[:4] for x in batch)
    whole = influence_scores(model, batch, val, **EXACT)
    phi = influence_scores(model, part, val, curvature_data=pieces(batch, 5), **EXACT)
    torch.testing.assert_close(phi, whole[:4])
    assert not torch.allclose(influence_scores(model, part, val, **EXACT), whole[:4])


def test_model_is_left_alone():
    model, batch, val = make("batch norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        influence_scores(model, pieces(batch, 5), pieces(val, 5), queries="per_class", damping=0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_progress_bars_only_when_asked_for(capsys):
    model, batch, val = make("mlp")
    influence_scores(model, pieces(batch, 5), val, damping=0.1)
    assert capsys.readouterr().err == ""
    influence_scores(model, pieces(batch, 5), val, damping=0.1, progress=True)
    bars = capsys.readouterr().err
    assert all(what in bars for what in ("solve", "scores of batch", "3/3"))


class TestStrict:
    def test_raises_where_else_there_is_a_warning(self):
        model, batch, val = make("mlp")
        options = {"damping": 1e-6, "max_iter": 2}
        for train, queries in ((batch, "mean"), (pieces(batch, 5), "per_sample")):
            with pytest.raises(ConvergenceError, match="residual"):
                influence_scores(model, train, val, strict=True, queries=queries, **options)
            with pytest.warns(ConvergenceWarning, match="residual"):
                influence_scores(model, train, val, queries=queries, **options)

    def test_is_silent_otherwise(self):
        model, batch, val = make("mlp")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            influence_scores(model, pieces(batch, 5), val, strict=True, damping=0.1)
            influence_scores(model, batch, val, strict=True, damping=1e-6, max_iter=2, tol=None)


def dataset(batch):
    return TensorDataset(*batch)


class TestLoadersThatWillNotDo:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"shuffle": True}, r"batch is a DataLoader with a RandomSampler.*shuffle=False"),
            (
                {"sampler": torch.utils.data.WeightedRandomSampler([1.0] * 12, 12)},
                "batch is a DataLoader with a WeightedRandomSampler",
            ),
            ({"drop_last": True}, "drop_last=True, which leaves the last 2 samples out: use drop_last=False"),
        ],
    )
    def test_train(self, arguments, message):
        model, batch, val = make("mlp")
        loader = DataLoader(dataset(batch), 5, **arguments)
        for given in ({"batch": loader}, {"curvature_data": loader}):
            expected = message.replace("batch is", f"{next(iter(given))} is")
            with pytest.raises(ValueError, match=expected):
                influence_scores(model, **{"batch": batch, "val": val, **given})

    def test_drop_last_that_drops_nothing(self):
        model, batch, val = make("mlp")
        loader = DataLoader(dataset(batch), 4, drop_last=True)
        torch.testing.assert_close(
            influence_scores(model, loader, val, **EXACT), influence_scores(model, batch, val, **EXACT)
        )

    def test_an_order_that_only_shows(self):
        """Samplers and data sets of a user's own may shuffle without saying so."""

        class Shuffled(torch.utils.data.Sampler):
            def __iter__(self):
                return iter(torch.randperm(12).tolist())

        model, batch, val = make("mlp")
        torch.manual_seed(0)
        loader = DataLoader(dataset(batch), 5, sampler=Shuffled())
        with pytest.raises(ValueError, match="batch gave other samples, or the same in another order"):
            influence_scores(model, loader, val, damping=0.1)
        with pytest.raises(ValueError, match="curvature_data gave other samples"):
            influence_scores(model, batch, val, damping=0.1, curvature_data=loader)
        with pytest.raises(ValueError, match="train gave other samples"):
            datainf_scores(model, loader, val)

    def test_shuffled_validation_data(self):
        model, batch, val = make("mlp")
        loader = DataLoader(dataset(val), 3, shuffle=True)
        torch.testing.assert_close(
            influence_scores(model, batch, loader, **EXACT), influence_scores(model, batch, val, **EXACT)
        )
        with pytest.raises(ValueError, match="val is a DataLoader with a RandomSampler"):
            influence_scores(model, batch, loader, queries="per_sample", **EXACT)

    def test_distributed_samplers(self):
        model, batch, val = make("mlp")

        def loader(ranks, **arguments):
            return DataLoader(dataset(batch), 2, sampler=DistributedSampler(dataset(batch), ranks, 0, **arguments))

        with pytest.raises(ValueError, match="DistributedSampler that shuffles"):
            influence_scores(model, loader(3), val)
        with pytest.raises(ValueError, match="repeats 3 of its 12 samples so that 5 ranks"):
            influence_scores(model, loader(5, shuffle=False), val)
        assert len(influence_scores(model, loader(3, shuffle=False), val, damping=0.1)) == 4

    def test_an_iterable_that_may_drop(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(range(3))

        with pytest.raises(ValueError, match="a last batch that is not full"):
            require_every_sample(DataLoader(Stream(), 2, drop_last=True), "batch")

    def test_a_length_that_changes(self):
        model, batch, val = make("mlp")

        class Changing:
            passes = 0

            def __iter__(self):
                self.passes += 1
                yield from pieces(batch, 5)[: 3 if self.passes < 4 else 2]

        with pytest.raises(ValueError, match="batch gave 2 batches with 10 samples, but 3 with 12"):
            influence_scores(model, Changing(), val, damping=0.1)

    @pytest.mark.parametrize("name", ["batch", "val"])
    def test_empty(self, name):
        model, batch, val = make("mlp")
        with pytest.raises(ValueError, match=f"{name} is empty"):
            influence_scores(model, **{"batch": batch, "val": val, name: []})

    @pytest.mark.parametrize("name", ["batch", "val"])
    def test_what_is_not_finite_names_the_batch(self, name):
        model, batch, val = make("mlp")
        data = {"batch": batch, "val": val}
        data[name][0][6, 1] = float("nan")
        data[name] = pieces(data[name], 5)
        for curvature in ("ggn", "identity"):
            with pytest.raises(ValueError, match=f"batch 1 of {name}: sample 1"):
                influence_scores(model, **data, curvature=curvature)

    def test_a_gradient_that_is_not_finite_while_the_loss_is(self):
        class Root(nn.Linear):
            def forward(self, x):
                return super().forward(x.abs().sqrt()) + (self.weight.sum() * x.sum(1, keepdim=True)).abs().sqrt()

        torch.manual_seed(0)
        model = Root(4, 3).double()
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
        x[4] = 0
        with pytest.raises(ValueError, match="batch 1 of batch"):
            influence_scores(model, pieces((x, y), 3), (x[:2], y[:2]), curvature="identity")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"queries": "all"}, ValueError, "queries is 'all', expected one of 'mean'"),
            (
                {"tol": "rank", "solver": "minres"},
                ValueError,
                "tol is 'rank', which needs solver='cg', but solver is 'minres'",
            ),
            ({"memory": 0}, ValueError, "memory is 0"),
            ({"group": "everyone"}, RuntimeError, "not initialised"),
            ({"out": "scores.txt"}, ValueError, r"out is 'scores.txt', expected .*\.npy or \.safetensors"),
        ],
    )
    def test_arguments(self, change, error, message):
        model, batch, val = make("mlp")
        with pytest.raises(error, match=message):
            influence_scores(model, pieces(batch, 5), val, **change)

    def test_classes_need_integer_targets(self):
        model, batch, val = make("mlp")
        val = (val[0], F.one_hot(val[1], CLASSES).double())

        def loss(outputs, targets):
            return F.cross_entropy(outputs, targets, reduction="none")

        with pytest.raises(ValueError, match="queries is 'per_class'"):
            influence_scores(model, batch, val, loss=loss, queries="per_class")
