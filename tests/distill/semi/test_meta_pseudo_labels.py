"""The feedback of Meta Pseudo Labels' manner, against gradients written out in plain torch."""

import copy

import pytest
import torch

from kdaif_fast import DistillationLoss, influence_scores
from kdaif_fast.distill import IndexedBatch, SemiSupervisedDistiller
from kdaif_fast.distill.clock import Clock
from kdaif_fast.distill.finite import FiniteWatch
from kdaif_fast.distill.semi.meta_pseudo_labels import MetaFeedback, MetaStep
from kdaif_fast.distill.semi.pseudo_labels import joined

from ..cases import CLASSES, network, samples, sgd

LABELLED, UNLABELLED, RATE, LEARNING_RATE = 5, 7, 0.3, 0.2
LOSS = DistillationLoss(2.0, 0.4)


def made():
    torch.manual_seed(0)
    x, y, _ = samples(LABELLED + UNLABELLED)
    data = torch.utils.data.TensorDataset(x[:LABELLED], y[:LABELLED]), torch.utils.data.TensorDataset(x[LABELLED:])
    loader, pseudo = joined(*data, "hard", 0.0)
    teacher, student = network(16).double(), network(8).double()
    logits = torch.randn(UNLABELLED, CLASSES)
    pseudo.renew([logits])
    x = x.double()
    targets = torch.cat([y[:LABELLED], logits.argmax(1)])
    return loader, teacher, student, x, targets


class Doubled(MetaFeedback):
    """Draws in float64."""

    def draw(self):
        batch = super().draw()
        return batch._replace(inputs=batch.inputs.double())


def step_of(loader, teacher, student, optimizer):
    feedback = Doubled(loader, LABELLED, seed=3)
    step = MetaStep(
        teacher,
        student,
        feedback=feedback,
        optimizer=optimizer,
        clip_norm=None,
        rate=lambda: RATE,
        loss=LOSS,
        teacher_loss=None,
        device=torch.device("cpu"),
        autocast=None,
        clock=Clock(),
        watch=FiniteWatch(),
    )
    return step, feedback


@pytest.mark.parametrize("places", [[9, 0, 4, 6, 11, 2], [7, 8], [1, 3]], ids=["mixed", "unlabelled", "labelled"])
def test_feedback_and_gradients(places):
    loader, teacher, student, x, targets = made()
    mine = copy.deepcopy(teacher), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE)
    step, feedback = step_of(loader, teacher, student, optimizer)
    indices = torch.tensor(places)
    result = step(IndexedBatch(indices, (x[indices], targets[indices])), len(indices))

    is_pseudo = indices >= LABELLED
    teacher_losses = torch.nn.functional.cross_entropy(mine[0](x[indices]), targets[indices], reduction="none")
    losses = LOSS(mine[1](x[indices]), targets[indices], mine[0](x[indices]).detach())
    parameters = list(mine[1].parameters())
    count = max(int(is_pseudo.sum()), 1)
    before = torch.autograd.grad(losses[is_pseudo].sum() / count, parameters, retain_graph=True)
    whole = torch.autograd.grad(losses.mean(), parameters)
    with torch.no_grad():
        for p, grad in zip(parameters, whole, strict=True):
            p -= LEARNING_RATE * grad
    # All labelled samples are drawn, as there are fewer than a batch has.
    labelled = torch.nn.functional.cross_entropy(mine[1](x[:LABELLED]), targets[:LABELLED])
    after = torch.autograd.grad(labelled, parameters)
    h = RATE * sum((a * b).sum() for a, b in zip(before, after, strict=True))
    factors = torch.where(is_pseudo, h, torch.ones_like(h))
    expected = torch.autograd.grad((factors * teacher_losses).mean(), list(mine[0].parameters()))

    torch.testing.assert_close(result.weights, factors)
    torch.testing.assert_close(result.student_losses, losses.detach())
    for p, q in zip(student.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q)
    for p, grad in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert feedback.take_mean() == pytest.approx(float(h))
    assert feedback.take_mean() is None


def test_it_is_the_mean_influence_without_curvature():
    loader, teacher, student, x, targets = made()
    optimizer = torch.optim.SGD(student.parameters(), 0.0)  # so that before and after are the same
    step, _ = step_of(loader, teacher, student, optimizer)
    indices = torch.arange(LABELLED, LABELLED + UNLABELLED)
    result = step(IndexedBatch(indices, (x[indices], targets[indices])), len(indices))
    batch = x[indices], targets[indices], teacher(x[indices]).detach()
    phi = influence_scores(student, batch, (x[:LABELLED], targets[:LABELLED]), loss=LOSS, curvature="identity")
    torch.testing.assert_close(result.weights, (-RATE * phi.mean()).expand(UNLABELLED))


def test_draws_go_on():
    loader = made()[0]
    first, second = MetaFeedback(loader, LABELLED, 1), MetaFeedback(loader, LABELLED, 2)
    first.draw()
    first.add(torch.tensor(2.0))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.draw().inputs, second.draw().inputs)
    assert second.take_mean() == 2.0


def test_mixed_precision_measures_after_the_step():
    """Autocast keeps copies of parameters, which are old ones then."""
    found = []
    x, y, _ = samples(60, 1)
    for autocast in (None, torch.bfloat16):
        torch.manual_seed(0)
        distiller = SemiSupervisedDistiller(
            *(network(16), network(8), sgd, lambda parameters: torch.optim.SGD(parameters, 5.0)),
            **{"feedback": "meta", "pseudo_labels": "hard", "autocast": autocast, "progress": False},
        )
        labelled = torch.utils.data.TensorDataset(x[:20], y[:20])
        unlabelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[20:]), batch_size=60)
        settings = {"rounds": 1, "epochs": 1, "teacher_epochs": 1}
        records = distiller.fit(labelled, unlabelled, [samples(20, 2)[:2]], **settings)
        found.append(records[-1]["mean_feedback"])
    assert found[1] == pytest.approx(found[0], rel=0.05)
