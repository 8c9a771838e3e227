"""Losses whose targets are probabilities, for some samples or all, against plain torch."""

import pytest
import torch

from kdaif_fast import DistillationLoss, influence_scores
from kdaif_fast.distill.semi.soft_targets import SoftTargetLoss, most_likely

N, V = 9, 5


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    outputs, teacher = torch.randn(2, N, V, dtype=dtype)
    labels = torch.randint(0, V, (N,))
    targets = torch.randn(N, V, dtype=dtype).softmax(1)
    targets[:4] = torch.nn.functional.one_hot(labels[:4], V).to(dtype)  # labelled and pseudo-labelled in one batch
    return outputs.requires_grad_(), targets, teacher, labels


def plainly(outputs, targets, teacher=None, temperature=1.0, alpha=1.0):
    losses = -(targets * outputs.log_softmax(1)).sum(1)
    if teacher is None:
        return losses
    q = (outputs / temperature).log_softmax(1)
    p = (teacher / temperature).softmax(1)
    return alpha * losses + (1 - alpha) * temperature**2 * (p * (p.log() - q)).sum(1)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_losses_and_gradients(with_teacher):
    outputs, targets, teacher, _ = problem()
    teacher = teacher if with_teacher else None
    losses = SoftTargetLoss(3.0, 0.3)(outputs, targets, teacher)
    expected = plainly(outputs, targets, teacher, 3.0, 0.3)
    torch.testing.assert_close(losses, expected)
    weights = torch.rand(N, dtype=torch.float64)
    for a, b in ((losses, expected), (losses.square(), expected.square())):
        found, right = (torch.autograd.grad((weights * x).sum(), outputs, retain_graph=True)[0] for x in (a, b))
        torch.testing.assert_close(found, right)


def test_labels_as_distributions_are_labels():
    outputs, _, teacher, labels = problem()
    one_hot = torch.nn.functional.one_hot(labels, V).double()
    for given in ((), (teacher,)):
        soft = SoftTargetLoss(2.0, 0.7)(outputs, one_hot, *given)
        torch.testing.assert_close(soft, SoftTargetLoss(2.0, 0.7)(outputs, labels, *given))
        torch.testing.assert_close(soft, DistillationLoss(2.0, 0.7)(outputs, labels, *given))


def test_nothing_is_derived_by_the_targets():
    outputs, targets, teacher, _ = problem()
    targets.requires_grad_()
    SoftTargetLoss()(outputs, targets, teacher).sum().backward()
    assert targets.grad is None
    assert outputs.grad is not None


def test_targets_of_another_shape():
    outputs, targets, _, _ = problem()
    with pytest.raises(ValueError, match=r"targets has shape \(9, 4\), expected \(9, 5\)"):
        SoftTargetLoss()(outputs, targets[:, :4])


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "identity"])
def test_influence_of_soft_targets_against_the_dense_matrix(curvature):
    _, targets, teacher, labels = problem()
    torch.manual_seed(1)
    model = torch.nn.Linear(3, V, dtype=torch.float64)
    x, val_x = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    damping = 0.1
    loss = SoftTargetLoss(2.0, 0.4)
    phi = influence_scores(
        model,
        (x, targets, teacher),
        (val_x, labels),
        loss=loss,
        curvature=curvature,
        damping=damping,
        tol=1e-10,
    )

    names = [name for name, _ in model.named_parameters()]

    def losses(flat):
        weight, bias = flat[: 3 * V].reshape(V, 3), flat[3 * V :]
        return plainly(x @ weight.T + bias, targets, teacher, 2.0, 0.4)

    assert names == ["weight", "bias"]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    grads = torch.autograd.functional.jacobian(losses, flat)
    val = torch.autograd.grad(torch.nn.functional.cross_entropy(model(val_x), labels), list(model.parameters()))
    val = torch.cat([g.reshape(-1) for g in val])
    # The model is linear in its parameters: Gauss-Newton is the Hessian.
    matrix = torch.autograd.functional.hessian(lambda p: losses(p).mean(), flat)
    if curvature == "identity":
        matrix = torch.eye(len(flat), dtype=torch.float64)
    expected = -grads @ torch.linalg.solve(matrix + damping * torch.eye(len(flat)), val)
    torch.testing.assert_close(phi, expected, rtol=1e-6, atol=1e-9)


def test_most_likely_classes():
    assert most_likely(torch.tensor([[0.2, 0.8], [0.6, 0.4]])).tolist() == [1, 0]
    labels = torch.tensor([2, 0])
    assert most_likely(labels) is labels
