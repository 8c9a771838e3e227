"""Influence scores: against brute force, and against what they predict, retraining."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast import ConvergenceWarning, backend, influence_scores
from kdaif_fast.ops import kd_loss
from tests.cases import CLASSES, MODELS, Dense, N, make


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
