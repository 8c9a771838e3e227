import math
import sys

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast import DistillationLoss, influence_scores, weighted_step
from kdaif_fast.distill.label_revision import LabelRevisionLoss, label_revision
from kdaif_fast.distill.rules import SelectFraction
from tests.cases import CLASSES, Dense, make
from tests.properties import given, settings, st

LOSS = LabelRevisionLoss(eta=0.7, temperature=2.5, ce_weight=0.6, kd_weight=1.7)


def plain(outputs, targets, teacher_logits=None, weights=1.0, loss=LOSS):
    """The definition, in plain torch."""
    ce = F.cross_entropy(outputs, targets, reduction="none")
    if teacher_logits is None:
        return ce
    T = loss.temperature
    p = (teacher_logits / T).softmax(-1)
    label = (targets[:, None] == torch.arange(p.shape[-1])).to(p.dtype)
    beta = loss.eta / (p.amax(-1, keepdim=True) - (p * label).sum(-1, keepdim=True) + 1)
    r = (beta * p + (1 - beta) * label).detach()
    kl = (torch.special.xlogy(r, r) - r * (outputs / T).log_softmax(-1)).sum(-1)
    return (weights * loss.ce_weight + 1 - weights) * ce + weights * loss.kd_weight * T**2 * kl


def rows(N=6, V=5):
    outputs = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    return outputs, torch.randint(V, (N,)), 3 * torch.randn(N, V, dtype=torch.float64)


logits = st.lists(st.floats(-50, 50), min_size=2, max_size=6).map(lambda x: torch.tensor([x], dtype=torch.float64))


@settings(deadline=None)
@given(teacher=logits, eta=st.floats(0, 0.999), temperature=st.floats(0.1, 10), data=st.data())
def test_the_label_is_on_top_of_the_revised_target(teacher, eta, temperature, data):
    loss = LabelRevisionLoss(eta, temperature)
    label = data.draw(st.integers(0, teacher.shape[1] - 1))
    targets = torch.tensor([label])
    (r,) = loss.revised(targets, teacher)
    others = torch.cat([r[:label], r[label + 1 :]])
    assert r[label] - others.max() >= 1 - eta - 1e-9
    assert r.sum().item() == pytest.approx(1)
    (beta,) = loss.teacher_share(targets, teacher)
    p = (teacher[0] / temperature).softmax(0)
    assert beta.item() == pytest.approx(eta / float(p.max() - p[label] + 1))
    if teacher[0, label] == teacher.max():  # the teacher is right
        assert beta.item() == pytest.approx(eta)
    elif eta > 0:
        assert beta.item() <= eta


def test_the_bound_of_the_paper_is_tight():
    """With eta = 1 a wrong teacher's class would be as likely as the label."""
    loss = LabelRevisionLoss(eta=1 - 1e-12, temperature=1.0)
    (r,) = loss.revised(torch.tensor([1]), torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64))
    assert r[1] - r[0] == pytest.approx(1e-12, abs=1e-15)


def test_losses_and_gradients():
    outputs, targets, teacher = rows()
    weights = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.0, 0.9], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(LOSS(outputs, targets, teacher), plain(outputs, targets, teacher))
    torch.testing.assert_close(LOSS(outputs, targets), plain(outputs, targets))
    ours = LOSS.weighted(outputs, targets, teacher, weights)
    theirs = plain(outputs, targets, teacher, weights)
    torch.testing.assert_close(ours, theirs)
    factors = torch.randn(6, dtype=torch.float64)
    inner = (0.1 + 0.8 * weights.detach()).requires_grad_()
    for a, b in zip(
        *(torch.autograd.grad(x @ factors, [outputs, weights], create_graph=True) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b)
    mixed = [
        torch.autograd.functional.hessian(lambda z, f=f: f(z, targets, teacher).sum(), outputs) for f in (LOSS, plain)
    ]
    torch.testing.assert_close(*mixed)
    assert torch.autograd.gradcheck(lambda z: LOSS(z, targets, teacher), [outputs])
    assert torch.autograd.gradcheck(lambda z, w: LOSS.weighted(z, targets, teacher, w), [outputs, inner])
    assert torch.autograd.gradgradcheck(lambda z: LOSS(z, targets, teacher), [outputs])


def test_weights_1_and_0_are_the_loss_and_the_cross_entropy():
    outputs, targets, teacher = rows()
    assert torch.equal(LOSS.weighted(outputs, targets, teacher, torch.ones(6)), LOSS(outputs, targets, teacher))
    rounded = torch.full((6,), 1 + 1e-7, dtype=torch.float64)
    assert torch.equal(LOSS.weighted(outputs, targets, teacher, rounded), LOSS(outputs, targets, teacher))
    teacher[0] = math.nan
    w = torch.tensor([0.0, 0, 0, 0, 0, 1])
    mixed = LOSS.weighted(outputs, targets, teacher, w)
    torch.testing.assert_close(mixed[:5], LOSS(outputs, targets)[:5])  # the teacher's NaN is not looked at
    torch.testing.assert_close(mixed[5], LOSS(outputs, targets, teacher)[5])
    (grad,) = torch.autograd.grad(mixed.sum(), outputs)
    assert grad.isfinite().all()


def test_no_gradient_reaches_the_teacher():
    outputs, targets, teacher = rows()
    loss = LOSS(outputs, targets, teacher.requires_grad_())
    assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True) == (None,)


def test_without_revision_and_with_a_teacher_that_is_right_it_is_the_usual_loss():
    """eta just below 1 leaves a teacher that is right as it is."""
    outputs, _, teacher = rows()
    loss = LabelRevisionLoss(1 - 1e-13, 3.0, ce_weight=0.5, kd_weight=0.5)
    targets = teacher.argmax(1)
    torch.testing.assert_close(
        loss(outputs, targets, teacher), DistillationLoss(temperature=3.0, alpha=0.5)(outputs, targets, teacher)
    )


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_dtypes(dtype, teacher_dtype):
    outputs, targets, teacher = rows()
    outputs, teacher = outputs.detach().to(dtype), teacher.to(teacher_dtype)
    losses = LOSS.weighted(outputs, targets, teacher, torch.full((6,), 0.5, dtype=torch.float64))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), plain(outputs.double(), targets, teacher.double(), 0.5), rtol=1e-5, atol=1e-5
    )


def test_samples_without_a_label_are_ignored():
    outputs, targets, teacher = rows()
    targets[2] = -100
    losses = LOSS(outputs, targets, teacher)
    (grad,) = torch.autograd.grad(losses.sum(), outputs)
    assert losses[2] == 0
    assert grad.isfinite().all()
    assert (grad[2] == 0).all()
    torch.testing.assert_close(losses[3:], plain(outputs[3:], targets[3:], teacher[3:]))


def test_under_transforms():
    outputs, targets, teacher = rows()
    outputs = outputs.detach()
    each = torch.func.vmap(torch.func.grad(lambda z, y, t: LOSS(z[None], y[None], t[None])[0]))(
        outputs, targets, teacher
    )
    whole = torch.func.grad(lambda z: plain(z, targets, teacher).sum())(outputs)
    torch.testing.assert_close(each, whole)


def test_nothing_looks_at_values_on_other_devices():
    """Tensors without values cannot be looked at, so no GPU would be waited for either."""
    outputs, targets, teacher, weights = (x.to("meta") for x in (*rows(), torch.ones(6)))
    assert LOSS.weighted(outputs, targets, teacher, weights).shape == (6,)
    assert LOSS.revised(targets, teacher).shape == (6, 5)


def test_a_share_out_of_range_that_nobody_looked_at_is_nan(monkeypatch):
    """What a GPU gives, where the check would wait."""
    module = sys.modules["kdaif_fast.distill.label_revision"]  # the package has a function of that name
    monkeypatch.setattr(module, "_require_shares", lambda *args: None)
    outputs, targets, teacher = rows(3)
    losses = LOSS.weighted(outputs, targets, teacher, torch.tensor([1.5, 1.0, -0.5]))
    assert losses.isnan().tolist() == [True, False, True]


class TestInfluence:
    @pytest.mark.parametrize("name", ["linear", "mlp"])
    def test_scores_are_those_of_the_plain_loss(self, name):
        model, batch, val = make(name)
        batch = (*batch, 2 * torch.randn(len(batch[1]), CLASSES, dtype=torch.float64))
        options = {"damping": 0.1, "tol": 1e-11}
        phi = influence_scores(model, batch, val, loss=LOSS, **options)
        torch.testing.assert_close(
            phi, influence_scores(model, batch, val, loss=plain, **options), rtol=1e-7, atol=1e-9
        )
        dense = Dense(model)
        P = sum(p.numel() for p in model.parameters())
        C = dense.gauss_newton(batch, plain) + 0.1 * torch.eye(P, dtype=torch.float64)
        query = dense.grads(val, plain).mean(0)
        truth = -dense.grads(batch, plain) @ torch.linalg.solve(C, query)
        torch.testing.assert_close(phi, truth, rtol=1e-7, atol=1e-9)

    def test_the_weighted_step_takes_it(self):
        model, batch, _ = make("mlp")
        batch = (*batch, torch.randn(len(batch[1]), CLASSES, dtype=torch.float64))
        weights = torch.rand(len(batch[1]), dtype=torch.float64)
        step = weighted_step(model, batch, weights, loss=LOSS, divisor=1.0)
        expected = plain(model(batch[0]), *batch[1:])
        torch.testing.assert_close(step.losses, expected.detach())
        grads = torch.autograd.grad(expected @ weights, list(model.parameters()))
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)


def test_preset():
    settings = label_revision(share=0.6, eta=0.5, temperature=2.0, ce_weight=0.1, kd_weight=0.9, mechanism="M3", seed=3)
    assert settings == {
        "rule": SelectFraction(0.6),
        "loss": LabelRevisionLoss(0.5, 2.0, 0.1, 0.9),
        "mechanism": "M3",
        "refresh": "epoch",
        "ema": 0.0,
        "seed": 3,
    }
    assert label_revision()["mechanism"] == "M1"
    assert label_revision()["loss"] == LabelRevisionLoss()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "drop"}, TypeError, "rule is given, expected share"),
        ({"loss": None}, TypeError, "loss is given, expected eta"),
        ({"normalize": True}, ValueError, "normalize is True"),
        ({"share": 2.0}, ValueError, "share is 2.0"),
        ({"eta": 1.0}, ValueError, "eta is 1.0, expected a number >= 0 and < 1"),
        ({"eta": -0.1}, ValueError, "eta is -0.1"),
        ({"eta": "high"}, TypeError, "eta is 'high', expected a number"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight is -1.0"),
        ({"kd_weight": math.nan}, ValueError, "kd_weight is nan"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        label_revision(**settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_logits": torch.ones(2, 4)}, ValueError, r"teacher_logits has shape \(2, 4\), expected \(2, 3\)"),
        ({"targets": torch.tensor([0, -1])}, ValueError, r"labels\[1\] is -1"),
        ({"targets": None}, TypeError, "targets is None"),
        ({"weights": torch.tensor([0.5, 1.5])}, ValueError, r"weights\[1\] is 1.5, expected a share from 0 to 1"),
        ({"weights": torch.tensor([-0.5, 1])}, ValueError, r"weights\[0\] is -0.5"),
        ({"weights": torch.ones(3)}, ValueError, r"weights is torch.float32 \(3,\), expected floating-point \(2,\)"),
        ({"weights": torch.ones(2).long()}, ValueError, "weights is torch.int64"),
        ({"weights": None}, ValueError, "weights is None"),
    ],
)
def test_bad_input(change, error, message):
    given = {
        "outputs": torch.ones(2, 3),
        "targets": torch.tensor([0, 1]),
        "teacher_logits": torch.ones(2, 3),
        "weights": torch.ones(2),
    }
    with pytest.raises(error, match=message):
        LOSS.weighted(**{**given, **change})
