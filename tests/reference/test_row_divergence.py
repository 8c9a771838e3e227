"""The definition of row_divergence: against formulas written out, and its closed forms against autograd."""

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference import row_terms as terms
from tests.ops.row_cases import ALL, EVERY, KIND_NAMES, arguments

T, SKEW = 1.7, 0.3


def value(kind, s, t, y, kd=1.0, other=0.0):
    """The divergence alone."""
    numbers = [T, 0.0, kd, other, 0.0, 1.0, 0.0, 0.0, SKEW]
    choices = [kind, terms.LOGITS, 0, 0, 0, -1, -100]
    return reference.row_divergence(s, t, None, None, y, None, None, None, None, None, numbers, choices)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def without(p, y):
    """p conditional on not being y."""
    rest = p.masked_fill(F.one_hot(y, p.shape[-1]).bool(), 0)
    return rest / rest.sum(-1, keepdim=True)


def rest_kl(p, q, y):
    p, q = without(p, y), without(q, y)
    return torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).nan_to_num().sum(-1)


def label_kl(p, q, y):
    p, q = p.gather(-1, y[:, None]), q.gather(-1, y[:, None])
    return kl(torch.cat([p, 1 - p], -1), torch.cat([q, 1 - q], -1))


# Each kind's two parts, from probabilities at T (or logits) and labels.
TEXTBOOK = {
    "KL": (lambda s, t, p, q, y: kl(p, q), lambda s, t, p, q, y: kl(q, p)),
    "CROSS_ENTROPY": (lambda s, t, p, q, y: -(p * q.log()).sum(-1), None),
    "SWAPPED_CROSS_ENTROPY": (lambda s, t, p, q, y: -(q * p.log()).sum(-1), None),
    "JENSEN_SHANNON": (
        lambda s, t, p, q, y: SKEW * kl(p, SKEW * p + (1 - SKEW) * q) + (1 - SKEW) * kl(q, SKEW * p + (1 - SKEW) * q),
        None,
    ),
    "SKEW_FORWARD": (lambda s, t, p, q, y: kl(p, SKEW * p + (1 - SKEW) * q), None),
    "SKEW_REVERSE": (lambda s, t, p, q, y: kl(q, SKEW * q + (1 - SKEW) * p), None),
    "TOTAL_VARIATION": (lambda s, t, p, q, y: (p - q).abs().sum(-1) / 2, None),
    "PROBABILITY_MSE": (lambda s, t, p, q, y: ((p - q) ** 2).mean(-1), None),
    "LOGIT_MSE": (lambda s, t, p, q, y: ((s - t) ** 2).mean(-1), None),
    "LOG_COSH": (lambda s, t, p, q, y: ((s - t) / (2 * T)).cosh().log().sum(-1), None),
    "DECOUPLED": (lambda s, t, p, q, y: label_kl(p, q, y), lambda s, t, p, q, y: rest_kl(p, q, y)),
}


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_kind_is_its_formula(kind):
    s, t = torch.randn(2, 6, 7, dtype=torch.float64)
    y = torch.randint(7, (6,))
    p, q = (t / T).softmax(-1), (s / T).softmax(-1)
    first, second = TEXTBOOK[kind]
    ours = value(getattr(terms, kind), s, t, y)
    torch.testing.assert_close(ours, first(s, t, p, q, y), rtol=1e-11, atol=1e-12)
    if second is not None:
        ours = value(getattr(terms, kind), s, t, y, kd=0.0, other=1.0)
        torch.testing.assert_close(ours, second(s, t, p, q, y), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_closed_forms_are_autograds(kind, name):
    """Gradient and Hessian of every kind with every option."""
    args = arguments(kind, ALL[name], N=4, V=7)
    student = args[0].requires_grad_()
    (grad,) = torch.autograd.grad(reference.row_divergence(*args).sum(), student, create_graph=True)
    close = dict(rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(reference.row_divergence_grad(*args), grad, **close)
    if kind == "LOG_COSH" and name == "the student as its own target":
        return  # |s - t| has a kink for autograd where the function has none
    tangents = torch.randn(2, 4, 7, dtype=torch.float64)
    products = reference.row_divergence_hvp(tangents, False, *args)
    for u, product in zip(tangents, products, strict=True):
        expected = torch.zeros_like(u)
        if grad.requires_grad:
            expected = torch.autograd.grad(grad, student, u, retain_graph=True, allow_unused=True)[0]
        torch.testing.assert_close(product, torch.zeros_like(u) if expected is None else expected, **close)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("name", ["all parts", "class weights", "without the label", "class slice"])
def test_gauss_newton_products_have_no_negative_curvature(kind, name):
    args = arguments(kind, ALL[name], N=4, V=7)
    args[8] = args[8].abs()
    basis = torch.eye(7, dtype=torch.float64)[:, None].expand(7, 4, 7)
    matrices = reference.row_divergence_hvp(basis, True, *args).transpose(0, 1)
    torch.testing.assert_close(matrices, matrices.mT)
    assert torch.linalg.eigvalsh(matrices).min() > -1e-12
    if kind in ("CROSS_ENTROPY", "DECOUPLED", "LOGIT_MSE", "LOG_COSH"):
        torch.testing.assert_close(reference.row_divergence_hvp(basis, False, *args).transpose(0, 1), matrices)


def test_gauss_newton_of_reverse_kl_is_the_fisher_matrix():
    s, t = torch.randn(2, 3, 5, dtype=torch.float64)
    numbers, choices = [T, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.5], [terms.KL, terms.LOGITS, 0, 0, 0, -1, -100]
    u = torch.randn(1, 3, 5, dtype=torch.float64)
    ours = reference.row_divergence_hvp(u, True, s, t, *[None] * 8, numbers, choices)[0]
    q = (s / T).softmax(-1)
    torch.testing.assert_close(ours, (q * u[0] - q * (q * u[0]).sum(-1, keepdim=True)) / T**2)


def test_targets_are_what_they_say():
    """Mixtures of distributions, mixed logits, and top-k with an evenly spread rest."""
    s, t, t2 = torch.randn(3, 4, 6, dtype=torch.float64)
    y = torch.tensor([0, 3, 5, 2])
    p, p2, q = (t / T).softmax(-1), (t2 / T).softmax(-1), (s / T).softmax(-1)

    def forward_kl(teacher, form=terms.LOGITS, indices=None, second=None, mixes=0, mix=0.0, share=1.0, gate=0.0):
        numbers, choices = [T, 0.0, 1.0, 0.0, mix, share, gate, 0.0, 0.5], [terms.KL, form, mixes, 0, 0, 6, -100]
        return reference.row_divergence(s, teacher, indices, second, y, *[None] * 5, numbers, choices)

    target = 0.75 * (0.6 * p + 0.4 * p2) + 0.25 * F.one_hot(y, 6)
    torch.testing.assert_close(forward_kl(t, second=t2, mixes=1, mix=0.25, gate=0.4), kl(target, q))
    torch.testing.assert_close(forward_kl(t, share=0.3), kl(((0.3 * t + 0.7 * s) / T).softmax(-1), q))
    values, indices = p.topk(2)
    rest = (1 - values.sum(-1, keepdim=True)) / 4
    target = rest.expand(4, 6).scatter(-1, indices, values)
    torch.testing.assert_close(forward_kl(values, terms.TOP_K, indices), kl(target, q))
    mass = torch.rand(4, 6, dtype=torch.float64) + 0.1
    torch.testing.assert_close(forward_kl(mass, terms.PROBABILITIES), kl(mass, q))


def test_gradient_survives_the_lift_of_tiny_divergences():
    """Rounding makes some terms of nearly equal rows negative; their gradient is still there."""
    student = torch.randn(300, 50)
    teacher = student + 1e-3 * torch.randn_like(student)
    student.requires_grad_()
    numbers, choices = [T, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5], [terms.KL, terms.LOGITS, 0, 0, 0, -1, -100]
    rest = [teacher, *[None] * 8, numbers, choices]
    loss = reference.row_divergence(student, *rest)
    assert (loss >= 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    wide = [student.detach().double(), teacher.double(), *rest[1:]]
    expected = reference.row_divergence_grad(*wide)
    assert (grad - expected).norm() < 0.02 * expected.norm()  # cancellation of nearly equal softmaxes
