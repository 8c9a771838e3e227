"""Which network sees weights under each mechanism: every step is compared with one written out by hand."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdaif_fast import DistillationLoss, influence_scores, sigmoid_weights
from kdaif_fast.distill import MECHANISMS, Mechanism
from kdaif_fast.distill.weight_book import COMBINATIONS

from .cases import loaders, make, network, sgd

LR = 0.1  # of cases.sgd


def expected_step(distiller, batch, weights):
    """The parameters of both networks after one step, from plain autograd."""
    teacher, student = copy.deepcopy(distiller.teacher), copy.deepcopy(distiller.student)
    x, y = batch
    mechanism = distiller.mechanism
    guide = teacher(x)
    losses = DistillationLoss(2.0, 0.5)(student(x), y, guide.detach())
    ones = torch.ones(len(y))
    (losses * (weights if mechanism.weighs_student else ones)).mean().backward()
    if mechanism.trains_teacher:
        (cross_entropy(guide, y, reduction="none") * (weights if mechanism.weighs_teacher else ones)).mean().backward()
    found = []
    for model in (teacher, student):
        found.append([p.detach() - LR * p.grad if p.grad is not None else p.detach() for p in model.parameters()])
    return found


@pytest.mark.parametrize("refresh", ["epoch", "step", 1])
@pytest.mark.parametrize("name", MECHANISMS)
def test_who_sees_weights(name, refresh):
    distiller = make(mechanism=name, optimizer=sgd, refresh=refresh)
    train = distiller.prepare(*loaders(shuffle=False, flip=0.3))
    distiller.start_epoch(0)
    for at, indexed in enumerate(train):
        before = copy.deepcopy(distiller)
        result = distiller.step(indexed)
        weights = result.weights
        assert (weights is not None) == distiller.mechanism.weighs
        if weights is not None:
            assert (weights != 1).all()
            torch.testing.assert_close(weights, distiller.weighting(indexed.indices))
        for model, wanted in zip(
            (distiller.teacher, distiller.student), expected_step(before, indexed.batch, weights), strict=True
        ):
            for p, expected in zip(model.parameters(), wanted, strict=True):
                torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)
        assert (result.phi is not None) == (refresh == "step" and distiller.mechanism.weighs)
        if at == 1:
            break


def test_weights_are_those_of_the_influence_calls():
    solve = {"damping": 0.1, "tol": 1e-6}
    distiller = make(mechanism="M1", influence=solve)
    train = distiller.prepare(*loaders(shuffle=False))
    distiller.start_epoch(0)
    x, y = train.dataset.dataset.tensors
    with torch.no_grad():
        guide = distiller.teacher(x)
    val = next(iter(loaders()[1]))
    phi = influence_scores(distiller.student, (x, y, guide), tuple(val), loss=DistillationLoss(2.0, 0.5), **solve)
    torch.testing.assert_close(distiller.weighting.phi, phi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distiller.weighting.weights, sigmoid_weights(phi), rtol=1e-4, atol=1e-4)


def test_one_pass_measures_what_a_full_refresh_does():
    """Along the same direction, at the same parameters; only the range is of the last solve."""
    distiller = make(mechanism="M3", refresh="step", influence={"damping": 0.1, "tol": 1e-6})
    train = distiller.prepare(*loaders(shuffle=False))
    distiller.start_epoch(0)
    reference = make(mechanism="M3", influence={"damping": 0.1, "tol": 1e-6})
    reference.prepare(*loaders(shuffle=False))
    reference.start_epoch(0)
    indexed = next(iter(train))
    result = distiller.step(indexed)
    torch.testing.assert_close(result.phi, reference.weighting.phi[indexed.indices], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.weights, reference.weighting.weights[indexed.indices], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_m4_combines_with_the_previous_student(combine):
    distiller = make(mechanism="M4", combine=combine, ema=0.0)
    train = distiller.prepare(*loaders(shuffle=False))
    measured = []
    for epoch in range(3):
        distiller.start_epoch(epoch)
        measured.append(sigmoid_weights(distiller.weighting.phi))
        for indexed in train:
            distiller.step(indexed)
    first, second, third = measured
    wanted = {
        "mean": (second + third) / 2,
        "product": second * third,
        "ema": ((first + second) / 2 + third) / 2,
    }
    torch.testing.assert_close(distiller.weighting.weights, wanted[combine])


def test_m3_forgets_the_previous_student():
    distiller = make(mechanism="M3", ema=0.0)
    train = distiller.prepare(*loaders(shuffle=False))
    for epoch in range(2):
        distiller.start_epoch(epoch)
        for indexed in train:
            distiller.step(indexed)
    torch.testing.assert_close(distiller.weighting.weights, sigmoid_weights(distiller.weighting.phi))


def test_vanilla_leaves_the_teacher_as_it_is():
    distiller = make(mechanism="vanilla")
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.fit(*loaders(), 1)
    assert all(torch.equal(before[name], value) for name, value in distiller.teacher.state_dict().items())
    assert not distiller.teacher.training


def test_the_student_hears_the_teacher_without_dropout():
    """And dropout of its own; the teacher learns with its dropout."""
    torch.manual_seed(0)
    distiller = make(mechanism="online", optimizer=sgd)
    distiller.teacher = network(16, dropout=0.5)
    distiller.teacher_optimizer = sgd(distiller.teacher.parameters())
    train = distiller.prepare(*loaders(shuffle=False))
    indexed = next(iter(train))
    x, y = indexed.batch
    distiller.teacher.eval()
    with torch.no_grad():
        wanted = DistillationLoss(2.0, 0.5)(distiller.student(x), y, distiller.teacher(x))
    distiller.teacher.train()
    result = distiller.step(indexed)
    torch.testing.assert_close(result.student_losses, wanted)
    assert distiller.teacher.training
    assert not torch.allclose(result.teacher_losses, cross_entropy(distiller.teacher.eval()(x), y, reduction="none"))


def test_a_mechanism_of_ones_own():
    own = Mechanism("teacher only, twice", weighs_teacher=True, combines=True)
    distiller = make(mechanism=own)
    assert len(distiller.fit(*loaders(), 2)) == 2


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'M5', expected one of vanilla, online, M1, M2, M3, M4"):
        make(mechanism="M5")
