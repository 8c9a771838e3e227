"""SciPy's solvers on the operators."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator, cg, eigsh, minres, svds

from kdaif_fast.curvature import GaussNewton, Hessian, Identity
from tests.curvature.truth import problem

DAMPING = 0.2


@pytest.mark.parametrize(("operator", "solve"), [(GaussNewton, cg), (Hessian, minres)])
def test_solves(operator, solve):
    this = problem("mlp")
    view = operator(this.model, this.batch).to_scipy(damping=DAMPING)
    assert view.shape == (this.P, this.P)
    assert view.dtype == np.float64
    matrix = this.gauss_newton if operator is GaussNewton else this.hessian
    b = torch.randn(this.P, dtype=torch.float64)
    x, failed = solve(view, b.numpy(), rtol=1e-9)
    assert not failed
    expected = torch.linalg.solve(matrix + DAMPING * torch.eye(this.P), b)
    assert (torch.as_tensor(x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_eigenvalues(which):
    this = problem("cnn")
    values = eigsh(Hessian(this.model, this.batch).to_scipy(), k=3, which=which, return_eigenvectors=False, tol=1e-8)
    exact = torch.linalg.eigvalsh(this.hessian)
    expected = exact[-3:] if which == "LA" else exact[:3]
    torch.testing.assert_close(torch.as_tensor(np.sort(values)), expected, rtol=1e-6, atol=1e-9)


def test_every_shape_of_vectors():
    this = problem("mlp")
    view = aslinearoperator(GaussNewton(this.model, this.batch).to_scipy())
    columns = np.random.default_rng(0).standard_normal((this.P, 3))
    expected = this.gauss_newton.numpy() @ columns
    for found in (view @ columns, view.T @ columns, (view + view) @ columns / 2, view @ np.asfortranarray(columns)):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(view @ columns[:, 0], expected[:, 0], atol=1e-9)
    np.testing.assert_allclose(view.matmat(columns[:, :1]), expected[:, :1], atol=1e-9)
    np.testing.assert_allclose(view.rmatvec(columns[:, 1]), expected[:, 1], atol=1e-9)
    largest = svds(view, k=1, return_singular_vectors=False)
    assert largest[0] == pytest.approx(torch.linalg.eigvalsh(this.gauss_newton)[-1].item(), rel=1e-6)


def test_models_in_float32_and_arrays_of_integers():
    model = torch.nn.Linear(3, 2)
    view = Identity(model).to_scipy(damping=1.0)
    assert (view @ np.arange(8)).tolist() == (2.0 * np.arange(8)).tolist()
    read_only = np.arange(8.0)
    read_only.flags.writeable = False
    assert (view @ read_only).dtype == np.float64
