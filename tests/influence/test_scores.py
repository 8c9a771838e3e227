"""Influence scores: against brute force, and against what they predict, retraining."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdaif_fast
from kdaif_fast import ConvergenceWarning, backend, influence_scores
from kdaif_fast.ops import kd_loss
from tests.cases import CLASSES, MODELS, Dense, M, N, make


def brute_force(model, batch, val, damping, curvature):
    dense = Dense(model)
    matrix = {"ggn": dense.gauss_newton, "hessian": dense.hessian}[curvature](batch)
    matrix = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return -dense.grads(batch) @ torch.linalg.solve(matrix, dense.grads(val).mean(0))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", MODELS)
def test_against_brute_force(name, curvature):
    model, batch, val = make(name)
    damping = 0.01
    if curvature == "hessian":
        damping += max(0.0, -torch.linalg.eigvalsh(Dense(model).hessian(batch))[0].item())
    phi = influence_scores(model, batch, val, curvature=curvature, damping=damping, tol=1e-10, max_iter=2000)
    expected = brute_force(model, batch, val, damping, curvature)
    torch.testing.assert_close(phi, expected, rtol=1e-5, atol=1e-7 * expected.abs().max().item())
    with backend("reference"):
        again = influence_scores(model, batch, val, curvature=curvature, damping=damping, tol=1e-10, max_iter=2000)
    torch.testing.assert_close(again, phi, rtol=1e-6, atol=1e-9)


def test_identity_is_gradient_dots():
    model, batch, val = make("mlp")
    dense = Dense(model)
    expected = -dense.grads(batch) @ dense.grads(val).mean(0)
    torch.testing.assert_close(influence_scores(model, batch, val, curvature="identity"), expected)
    damped = influence_scores(model, batch, val, curvature="identity", damping=1.0)
    torch.testing.assert_close(damped, expected / 2)


class Regression:
    """l2-regularised logistic regression, solved by Newton's method: retraining is exact and cheap."""

    def __init__(self, decay, N=300, features=5, seed=0):
        random = torch.Generator().manual_seed(seed)
        truth = torch.randn(features, CLASSES, generator=random, dtype=torch.float64)

        def draw(n):
            x = torch.randn(n, features, generator=random, dtype=torch.float64)
            noise = torch.rand(n, CLASSES, generator=random, dtype=torch.float64)
            return x, (x @ truth - (-noise.log()).log()).argmax(1)

        self.batch, self.val = draw(N), draw(100)
        flips = torch.randperm(N, generator=random)[: N // 10]
        self.flipped = torch.zeros(N, dtype=torch.bool).index_fill(0, flips, True)
        self.batch[1][flips] = (self.batch[1][flips] + 1) % CLASSES
        self.decay, self.shape = decay, (CLASSES, features)

    def losses(self, theta, batch):
        return F.cross_entropy(batch[0] @ theta.view(self.shape).T, batch[1], reduction="none")

    def fit(self, weight):
        """Parameters at which the gradient of the weighted, regularised mean loss is below 1e-10."""
        N = len(weight)

        def objective(theta):
            return (weight * self.losses(theta, self.batch)).sum() / N + self.decay / 2 * theta @ theta

        theta = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float64)
        for _ in range(50):
            gradient = torch.func.grad(objective)(theta)
            if gradient.norm() < 1e-10:
                return theta
            H = torch.func.jacfwd(torch.func.grad(objective))(theta)
            # Without decay the softmax leaves directions of no curvature; least squares steps across them.
            theta = theta - torch.linalg.lstsq(H, gradient, driver="gelsd").solution
        raise AssertionError("Newton's method did not converge")

    def validation_loss(self, weight):
        return self.losses(self.fit(weight), self.val).mean()

    def model(self):
        model = nn.Linear(self.shape[1], self.shape[0], bias=False, dtype=torch.float64)
        theta = self.fit(torch.ones(len(self.batch[1]), dtype=torch.float64))
        model.weight.data = theta.view(self.shape).clone()
        return model


def slope_and_correlation(predicted, actual):
    p, a = predicted - predicted.mean(), actual - actual.mean()
    return (p @ a / (p @ p)).item(), (p @ a / (p.norm() * a.norm())).item()


@pytest.fixture(scope="module")
def problem():
    return Regression(decay=0.02)


@pytest.fixture(scope="module")
def phi(problem):
    return influence_scores(problem.model(), problem.batch, problem.val, damping=problem.decay, tol=1e-10)


class TestRetraining:
    """The sign and the scale of phi are what retraining does to the validation loss."""

    def effects(self, problem, change):
        N = len(problem.batch[1])
        ones = torch.ones(N, dtype=torch.float64)
        base = problem.validation_loss(ones)
        rows = ones + change * torch.eye(N, dtype=torch.float64)
        return torch.stack([problem.validation_loss(row) for row in rows]) - base

    def test_more_weight(self, problem, phi):
        """Weight 1 + eps on sample i changes the validation loss by eps phi_i / N."""
        eps = 1e-3
        slope, correlation = slope_and_correlation(phi * eps / len(phi), self.effects(problem, eps))
        assert correlation >= 0.99999
        assert abs(slope - 1) < 0.002

    def test_leaving_one_out(self, problem, phi):
        """Sample i gone changes the validation loss by -phi_i / N."""
        slope, correlation = slope_and_correlation(-phi / len(phi), self.effects(problem, -1.0))
        assert correlation >= 0.999
        assert abs(slope - 1) < 0.02

    def test_weights_find_the_flips_and_help(self, problem, phi):
        order = phi.argsort(descending=True)
        found = problem.flipped[order[: int(problem.flipped.sum())]].double().mean()
        assert found > 3 * problem.flipped.double().mean()  # the top of the list is rich in wrong labels
        w = kdaif_fast.sigmoid_weights(phi)
        reweighted, ones = problem.validation_loss(w), torch.ones_like(w)
        assert reweighted < problem.validation_loss(ones)
        assert problem.validation_loss(2 - w) > problem.validation_loss(ones)  # the other sign would harm
        assert w[order[0]] < 1 < w[order[-1]]

    def test_scores_sum_to_zero_at_the_unregularised_optimum(self):
        problem = Regression(decay=0.0)
        phi = influence_scores(problem.model(), problem.batch, problem.val, damping=1e-9, tol=1e-9)
        assert phi.sum().abs() < 1e-4 * phi.abs().sum()

    def test_hessian_and_gauss_newton_agree_on_a_linear_model(self, problem, phi):
        hessian = influence_scores(
            problem.model(), problem.batch, problem.val, curvature="hessian", damping=problem.decay, tol=1e-10
        )
        torch.testing.assert_close(hessian, phi, rtol=1e-5, atol=1e-8)  # linear model: the same matrix


class TestForms:
    def test_batches_as_mappings_tuples_and_lists(self):
        model, batch, val = make("mlp")
        expected = influence_scores(model, batch, val, damping=0.1)
        mapping = {"inputs": val[0], "targets": val[1]}
        assert torch.equal(influence_scores(model, list(batch), mapping, damping=0.1), expected)
        wrapped = ((batch[0],), batch[1]), ({"input": val[0]}, val[1])
        assert torch.equal(influence_scores(model, *wrapped, damping=0.1), expected)

    def test_teacher_logits_choose_the_distillation_loss(self):
        model, batch, val = make("mlp")
        teacher = torch.randn(N, CLASSES, dtype=torch.float64)
        phi = influence_scores(model, (*batch, teacher), val, damping=0.1)

        def loss(outputs, targets, *teacher):
            if teacher:
                return kd_loss(outputs, *teacher, targets)
            return F.cross_entropy(outputs, targets, reduction="none")

        assert torch.allclose(phi, influence_scores(model, (*batch, teacher), val, loss=loss, damping=0.1))
        mapping = {"inputs": batch[0], "targets": batch[1], "teacher_logits": teacher}
        assert torch.equal(phi, influence_scores(model, mapping, val, damping=0.1))

    def test_outputs_with_logits(self):
        model, batch, val = make("mlp")

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return type("Output", (), {"logits": self.inner(x)})()

        expected = influence_scores(model, batch, val, damping=0.1)
        assert torch.equal(influence_scores(Wrapper(), batch, val, damping=0.1), expected)

    def test_parameters_can_be_restricted(self):
        model, batch, val = make("mlp")
        head = influence_scores(model, batch, val, params=["2"], damping=0.1, tol=1e-10)
        for p in model[0].parameters():
            p.requires_grad_(False)
        frozen = influence_scores(model, batch, val, damping=0.1, tol=1e-10)
        torch.testing.assert_close(head, frozen)

    def test_model_is_left_alone(self):
        model, batch, val = make("conv")
        model[-1].train(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        with torch.no_grad():
            influence_scores(model, batch, val, damping=0.1)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert modes == [module.training for module in model.modules()]

    def test_parameters_in_every_form(self):
        model, batch, val = make("mlp")
        expected = influence_scores(model, batch, val, params=["2"], damping=0.1)
        forms = ["2", model[2], [model[2]], model[2].parameters(), (p for p in model[2].parameters())]
        for params in forms:
            assert torch.equal(influence_scores(model, batch, val, params=params, damping=0.1), expected)

    def test_every_name_of_a_tied_parameter(self):
        model, batch, val = make("attention")
        model.register_parameter("head", model.embedding.weight)
        options = {"damping": 0.1, "tol": 1e-8}
        torch.testing.assert_close(
            influence_scores(model, batch, val, params=["head"], **options),
            influence_scores(model, batch, val, params=["embedding"], **options),
        )

    @pytest.mark.parametrize("shape", ["vector", "sequence"])
    def test_outputs_of_other_shapes(self, shape):
        """Regression to one number a sample, and sequences of outputs."""
        model = nn.Linear(4, 1 if shape == "vector" else 6).double()

        class Shaped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return self.inner(x).squeeze(-1) if shape == "vector" else self.inner(x).view(-1, 2, 3)

        def loss(outputs, targets):
            return (
                ((outputs - targets.view(-1, *(1,) * (outputs.dim() - 1))) ** 2)
                .flatten(1 if outputs.dim() > 1 else 0)
                .view(len(outputs), -1)
                .sum(1)
            )

        _, batch, val = make("linear")
        batch, val = ((x, y.double()) for x, y in (batch, val))
        shaped = Shaped()
        phi = influence_scores(shaped, batch, val, loss=loss, damping=0.1, tol=1e-10)
        dense = Dense(shaped)
        matrix = dense.hessian(batch, loss) + 0.1 * torch.eye(sum(p.numel() for p in model.parameters())).double()
        expected = -dense.grads(batch, loss) @ torch.linalg.solve(matrix, dense.grads(val, loss).mean(0))
        torch.testing.assert_close(phi, expected, rtol=1e-5, atol=1e-7)

    def test_mappings_with_logits(self):
        model, batch, val = make("mlp")

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return {"logits": self.inner(x)}

        expected = influence_scores(model, batch, val, damping=0.1)
        assert torch.equal(influence_scores(Wrapper(), batch, val, damping=0.1), expected)

    @pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
    def test_compiled_models(self, how):
        model, batch, val = make("mlp")
        expected = influence_scores(model, batch, val, damping=0.1)
        compiled = model
        if how == "wrapped":
            compiled = torch.compile(model, backend="aot_eager")
        elif how == "in place":
            compiled.compile(backend="aot_eager")
        else:
            compiled[0] = torch.compile(model[0], backend="aot_eager")
        compiled(batch[0])
        assert torch.equal(influence_scores(compiled, batch, val, damping=0.1), expected)
        names = [name for name, _ in compiled.named_parameters()]
        assert torch.equal(influence_scores(compiled, batch, val, damping=0.1, params=names), expected)

    def test_inside_inference_mode_and_with_tensors_from_there(self):
        model, batch, val = make("mlp")
        teacher = torch.randn(N, CLASSES, dtype=torch.float64)
        expected = influence_scores(model, (*batch, teacher), val, damping=0.1)
        with torch.inference_mode():
            made_inside = (batch[0] * 1, batch[1] * 1, teacher * 1)
            assert torch.equal(influence_scores(model, made_inside, val, damping=0.1), expected)
        assert torch.equal(influence_scores(model, made_inside, val, damping=0.1), expected)

    def test_buffers_are_left_alone_in_training_mode(self):
        model = nn.Sequential(
            torch.nn.utils.parametrizations.spectral_norm(nn.Conv1d(1, 3, 2)),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(9, CLASSES),
        ).double()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        _, batch, val = make("linear")
        batch, val = ((x[:, None], y) for x, y in (batch, val))
        influence_scores(model, batch, val, damping=0.1)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_sparse_embeddings(self):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(20, CLASSES)).double()
        _, batch, val = make("attention")
        expected = influence_scores(dense, batch, val, damping=0.1)
        dense[0].sparse = True
        torch.testing.assert_close(influence_scores(dense, batch, val, damping=0.1), expected)

    def test_numbers_of_numpy(self):
        import numpy as np

        model, batch, val = make("mlp")
        expected = influence_scores(model, batch, val, damping=0.5)
        assert torch.equal(influence_scores(model, batch, val, damping=np.float32(0.5)), expected)


class TestSolve:
    def test_a_model_without_curvature_left_can_still_be_solved(self):
        model, batch, val = make("linear")
        model.weight.data.mul_(1e4)  # every softmax is 0 or 1
        batch = (batch[0], model(batch[0]).argmax(1))
        phi = influence_scores(model, batch, val)
        assert phi.isfinite().all()

    def test_defaults_on_a_well_trained_model(self):
        """Little curvature in few directions: float32 must still be able to solve it."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        x = torch.randn(100, 20)
        y = model(x).argmax(1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # slow is allowed, wrong is not
            phi, solution = influence_scores(model, (x, y), (x[:30], y[:30].roll(1)), return_solution=True)
        assert phi.isfinite().all()
        assert solution.reason in ("tolerance", "max_iter")
        assert solution.residual < 0.5

    def test_warns_of_a_singular_matrix(self):
        model, batch, val = make("mlp")  # more parameters than the batch determines
        with pytest.warns(ConvergenceWarning, match="too near to singular") as caught:
            phi = influence_scores(model, batch, val, damping=0.0, tol=1e-12, max_iter=3000)
        assert caught[0].filename == __file__
        assert phi.isfinite().all()

    def test_auto_damping_is_reported(self):
        model, batch, val = make("mlp")
        phi, solution = influence_scores(model, batch, val, return_solution=True)
        again = influence_scores(model, batch, val, damping=solution.damping)
        assert solution.converged
        assert solution.damping > 0
        assert torch.equal(phi, again)

    def test_warns_when_not_converged(self):
        model, batch, val = make("mlp")
        with pytest.warns(ConvergenceWarning, match="after 2 products .* above tol=0.001"):
            influence_scores(model, batch, val, damping=1e-6, max_iter=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            influence_scores(model, batch, val, damping=1e-6, max_iter=2, tol=None)

    def test_warns_of_an_indefinite_hessian(self):
        model, batch, val = make("attention")
        assert torch.linalg.eigvalsh(Dense(model).hessian(batch))[0] < -1e-3
        with pytest.warns(ConvergenceWarning, match="indefinite"):
            phi = influence_scores(model, batch, val, curvature="hessian", damping=0.0)
        assert phi.isfinite().all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"curvature": "fisher"}, ValueError, "curvature is 'fisher', expected one of 'ggn'"),
            ({"solver": "magic"}, ValueError, "solver is 'magic', expected one of 'cg'"),
            ({"damping": -1}, ValueError, "damping is -1"),
            ({"damping": "much"}, TypeError, "damping is 'much'"),
            ({"damping": True}, TypeError, "damping is True"),
            ({"tol": 7.0}, ValueError, "tol is 7.0"),
            ({"tol": "low"}, TypeError, "tol is 'low'"),
            ({"tol": 7.0, "curvature": "identity"}, ValueError, "tol is 7.0"),
            ({"max_iter": 2.5}, TypeError, "max_iter is 2.5"),
            ({"max_iter": 0}, ValueError, "max_iter is 0"),
            ({"batch": torch.ones(3)}, TypeError, "batch is a Tensor"),
            ({"batch": (torch.ones(3),)}, ValueError, "batch has 1 parts"),
            ({"batch": [1, 2, 3, 4]}, ValueError, "batch has 4 parts"),
            ({"batch": iter([])}, TypeError, "of a DataLoader give one batch"),
            (
                {"val": (torch.ones(M, 4).numpy(), torch.ones(M).long())},
                TypeError,
                "val: inputs has a ndarray of NumPy",
            ),
            ({"val": (torch.ones(M, 9).double(), torch.ones(M).long())}, RuntimeError, "failed on the inputs of val"),
            ({"val": (torch.ones(M, 4).double(), torch.ones(3).long())}, ValueError, "val: 3 targets for 7 samples"),
            ({"val": (torch.ones(M, 4).double(), torch.ones(M).int())}, ValueError, r"val: .*targets\.long\(\)"),
            ({"loss": "ce"}, TypeError, "loss is a str"),
            ({"loss": lambda z, y: z.detach().sum(1)}, ValueError, "batch|val.* do not depend on the outputs"),
            ({"val": {"x": 1, "targets": 2}}, ValueError, r"val has the keys \['targets', 'x'\]"),
            ({"params": []}, ValueError, "params is empty"),
            ({"params": ["3.weight"]}, ValueError, "params contains '3.weight'"),
            ({"params": [3]}, TypeError, "params contains a int"),
            ({"params": nn.Linear(1, 1)}, ValueError, "params contains a module Linear"),
            ({"params": [torch.ones(2)]}, ValueError, r"params contains a tensor of shape \(2,\)"),
            (
                {"loss": lambda z, y: F.cross_entropy(z, y)},
                ValueError,
                r"loss returned \(\) for batch, expected \(12,\)",
            ),
            ({"loss": lambda z, y: 3.0}, ValueError, "loss returned float for batch"),
            (
                {"val": (torch.ones(M, 4, dtype=torch.float64), torch.ones(M))},
                ValueError,
                r"val: the default loss needs .* the targets torch.float32 \(7,\)",
            ),
            ({"batch": (torch.ones(0, 4).double(), torch.ones(0).long())}, ValueError, "batch has no samples"),
        ],
    )
    def test_message(self, change, error, message):
        model, batch, val = make("mlp")
        arguments = {"batch": batch, "val": val, **change}
        with pytest.raises(error, match=message):
            influence_scores(model, **arguments)

    def test_label_out_of_range(self):
        model, batch, val = make("mlp")
        batch[1][3] = CLASSES
        with pytest.raises(ValueError, match=rf"the loss failed on batch: .*labels\[3\] is {CLASSES}"):
            influence_scores(model, batch, val)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["batch", "val"])
    def test_a_sample_that_is_not_finite(self, name, value):
        model, batch, val = make("mlp")
        {"batch": batch, "val": val}[name][0][2, 1] = value
        model[0].weight.data[:, 1] = 0.5
        if value == float("inf"):
            model[1] = nn.ReLU()  # tanh would make it finite
        with pytest.raises(ValueError, match=f"{name}: sample 2 has the loss"):
            kdaif_fast.influence_weights(model, batch, val, tol=None)

    def test_model_that_is_no_module(self):
        _, batch, val = make("mlp")
        with pytest.raises(TypeError, match="model is a function"):
            influence_scores(lambda x: x, batch, val)

    def test_batch_norm_without_statistics(self):
        _, batch, val = make("mlp")
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
        with pytest.raises(ValueError, match="no running statistics"):
            influence_scores(model, batch, val)

    def test_functional_dropout(self):
        _, batch, val = make("mlp")

        class Dropping(nn.Linear):
            def forward(self, x):
                return F.dropout(super().forward(x), 0.5, self.training)

        model = Dropping(4, 3).double()
        with pytest.raises(ValueError, match="outputs on batch are random"):
            influence_scores(model, batch, val)
        influence_scores(model.eval(), batch, val, damping=0.1)

    def test_drawing_without_using_is_allowed(self):
        _, batch, val = make("mlp")

        class LayerDrop(nn.Linear):
            def forward(self, x):
                skip = torch.rand([]) < 0.5 and self.training
                return x[:, :3] if skip else super().forward(x)

        influence_scores(LayerDrop(4, 3).double().eval(), batch, val, damping=0.1)

    def test_loss_without_second_derivatives(self):
        """Fused losses that store their gradient in the forward pass: no curvature, silently."""

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z, y):
                ctx.save_for_backward(z.softmax(1) - F.one_hot(y, CLASSES))
                return F.cross_entropy(z, y, reduction="none")

            @staticmethod
            def backward(ctx, grad):
                return grad[:, None] * ctx.saved_tensors[0], None

        model, batch, val = make("mlp")
        with pytest.raises(RuntimeError, match="gradient that is not differentiable itself"):
            influence_scores(model, batch, val, loss=Fused.apply, damping=0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_no_false_alarm_of_the_derivative_check(self, dtype):
        large = nn.Linear(64, 10).to(dtype)
        batch = (torch.randn(1000, 64) + 3).to(dtype), torch.randint(10, (1000,))
        influence_scores(large, batch, batch, curvature="identity")
        # The key's bias in attention has no effect, but for rounding.
        attention = nn.MultiheadAttention(8, 2, batch_first=True).to(dtype).eval()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.key_bias = attention, nn.Parameter(torch.zeros(8, dtype=dtype))

            def forward(self, x):
                return self.attention(x, x + self.key_bias - self.key_bias.detach() * 0, x)[0].mean(1)

        x = torch.randn(20, 5, 8).to(dtype), torch.randint(8, (20,))
        influence_scores(Model(), x, x, curvature="identity", params=["key_bias"])

    def test_layer_without_second_derivatives(self):
        """Its part of the products would be missing, silently."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                with torch.no_grad():
                    return 2 * ctx.saved_tensors[0] * grad

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

            def forward(self, x):
                return self.second(Square.apply(self.first(x)))

        _, batch, val = make("mlp")
        with pytest.raises(RuntimeError, match=r"custom autograd\.Functions"):
            influence_scores(Model().double(), batch, val, damping=0.1)

    def test_arguments_of_the_wrong_kind(self):
        model, batch, val = make("mlp")
        with pytest.raises(ValueError, match=r"curvature is \['ggn'\]"):
            influence_scores(model, batch, val, curvature=["ggn"])
        with pytest.raises(TypeError, match="params is a int"):
            influence_scores(model, batch, val, params=5)

    def test_parameters_that_are_not_used(self):
        model, batch, val = make("mlp")
        model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        with pytest.raises(ValueError, match="do not depend on the chosen parameters"):
            influence_scores(model, batch, val, params=["idle"])

    @pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.Dropout(0.1)])
    def test_layers_that_mix_samples_or_draw(self, layer):
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double()
        _, batch, val = make("mlp")
        with pytest.raises(ValueError, match=r"module '1' .*model\.eval\(\)"):
            influence_scores(model, batch, val)
        if not isinstance(layer, nn.SyncBatchNorm):  # which runs on GPUs only
            influence_scores(model.eval(), batch, val, damping=0.1)

    def test_frozen_model(self):
        model, batch, val = make("mlp")
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter that requires grad"):
            influence_scores(model, batch, val)
