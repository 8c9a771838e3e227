"""The named losses against their published formulas, written out in plain torch."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast import ops

N, V = 6, 7


@pytest.fixture
def data():
    student, teacher = torch.randn(2, N, V, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(V, (N,))


def kl(p, q):
    safe = p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()
    return (p * safe).sum(-1)


def same(ours, expected, student):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def conditional(logits, labels):
    return logits.masked_fill(F.one_hot(labels, V).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_nkd_loss(data, T):
    student, teacher, labels = data
    label_logit = student.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    p_label = teacher.softmax(-1).gather(-1, labels[:, None])[:, 0]
    p, q = conditional(teacher / T, labels), conditional(student / T, labels)
    rest = -torch.where(p > 0, p * q.clamp(min=1e-300).log(), 0).sum(-1)
    expected = F.cross_entropy(student, labels, reduction="none") - p_label * label_logit + 2.5 * T**2 * rest
    same(ops.nkd_loss(student, teacher, labels, temperature=T, gamma=2.5), expected, student)
    without_ce = expected - F.cross_entropy(student, labels, reduction="none")
    same(ops.nkd_loss(student, teacher, labels, temperature=T, gamma=2.5, ce_weight=0.0), without_ce, student)


def test_dkd_loss(data):
    student, teacher, labels = data
    T, alpha, beta = 4.0, 1.5, 8.0
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    p_y, q_y = p.gather(-1, labels[:, None]), q.gather(-1, labels[:, None])
    target = kl(torch.cat([p_y, 1 - p_y], -1), torch.cat([q_y, 1 - q_y], -1))
    rest = kl(conditional(teacher / T, labels), conditional(student / T, labels).clamp(min=1e-300))
    expected = F.cross_entropy(student, labels, reduction="none") + T**2 * (alpha * target + beta * rest)
    same(ops.dkd_loss(student, teacher, labels, alpha=alpha, beta=beta), expected, student)
    # Its own identity: with beta = 1 - p_y it is classical distillation.
    classical = ops.row_divergence(student, teacher, labels, temperature=T)
    ours = ops.dkd_loss(student, teacher, labels, temperature=T, alpha=1.0, beta=1 - p_y[:, 0])
    same(ours, classical, student)


def test_divergences(data):
    student, teacher, labels = data
    T = 2.0
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    m = 0.3 * p + 0.7 * q
    ce = F.cross_entropy(student, labels, reduction="none")
    same(ops.reverse_kl_loss(student, teacher, temperature=T), T**2 * kl(q, p), student)
    expected = T**2 * (0.3 * kl(p, m) + 0.7 * kl(q, m))
    same(ops.js_loss(student, teacher, skew=0.3, temperature=T), expected, student)
    same(ops.js_loss(student, teacher, labels, skew=0.3, temperature=T, ce_weight=0.5), expected + 0.5 * ce, student)
    same(ops.skew_kl_loss(student, teacher, skew=0.3, temperature=T), T**2 * kl(p, m), student)
    other = 0.3 * q + 0.7 * p
    same(ops.skew_kl_loss(student, teacher, skew=0.3, reverse=True, temperature=T), T**2 * kl(q, other), student)
    same(
        ops.total_variation_loss(student, teacher),
        (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2,
        student,
    )
    same(ops.logit_mse_loss(student, teacher), ((student - teacher) ** 2).mean(-1), student)
    cosh = T**2 * ((student - teacher) / (2 * T)).cosh().log().sum(-1)
    same(ops.log_cosh_loss(student, teacher, temperature=T), cosh, student)
    target = (0.4 * teacher + 0.6 * student.detach()).softmax(-1)
    same(ops.taid_loss(student, teacher, share=0.4), -(target * student.log_softmax(-1)).sum(-1), student)


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name.endswith("_loss") and "linear" not in name])
def test_options_reach_the_row(data, name):
    """Row weights, ignored rows and reductions mean the same for all of them."""
    student, teacher, labels = data
    loss = getattr(ops, name)
    given = {"share": 0.5} if name == "taid_loss" else {}
    rows = loss(student, teacher, labels, **given)
    assert rows.shape == (N,)
    weight = torch.rand(N, dtype=torch.float64)
    ignored = labels.clone()
    ignored[1] = -100
    ours = loss(student, teacher, ignored, weight=weight, reduction="mean", **given)
    kept = torch.tensor([i != 1 for i in range(N)])
    torch.testing.assert_close(ours, (weight * rows)[kept].sum() / (N - 1))
    assert "Source:" in inspect.getdoc(loss)


def test_what_named_losses_do_not_take(data):
    student, teacher, labels = data
    for name, value in (("teacher_form", "probabilities"), ("soft_labels", teacher), ("classes", (0, 3))):
        with pytest.raises(ValueError, match=f"nkd_loss: {name} is given"):
            ops.nkd_loss(student, teacher, labels, **{name: value})
    with pytest.raises(TypeError, match="kd_loss: ce_weight is given, but alpha"):
        ops.kd_loss(student, teacher, labels, ce_weight=1.0)
