import functools
import math

import pytest
import torch

from kdaif_fast import influence_scores, sigmoid_weights
from kdaif_fast.distill.rules import (
    RULES,
    Drop,
    ExpMinMax,
    HalfSigmoid,
    KeepProbability,
    Linear,
    OwnLoss,
    SelectFraction,
    Shuffled,
    Sigmoid,
    checked_weights,
    make_rule,
    require_usable,
)
from kdaif_fast.distill.statistics import SampleStatistics
from tests.influence.cases import Regression
from tests.properties import given, settings, st

E = math.e
NEUTRAL = {"sigmoid": (0, 2), "half_sigmoid": (0.5, 1.5), "linear": (0, 2), "drop": (0, 1)}  # w(0) = 1; their range
BIASED = {"exp_min_max": (1 / E, E), "select": (0, 1)}
CERTAIN = {**NEUTRAL, **BIASED}  # those that do not draw
gammas = st.floats(0, 1e300)
scales = st.sampled_from(["range", "robust", 1e-300, 1.0, 1e300])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def scores(draw, least=1, dtype=None):
    """Finite ones of any size, often equal to each other or to 0."""
    dtype = dtype or draw(dtypes)
    limit = torch.finfo(dtype).max
    number = st.one_of(st.floats(-limit, limit), st.sampled_from([0.0, -0.0, 1.0, -2.0, limit, -limit]))
    values = draw(st.lists(number, min_size=least, max_size=20))
    return torch.tensor(values, dtype=torch.float64).clamp(-limit, limit).to(dtype)


@st.composite
def rules(draw, names=tuple(CERTAIN)):
    name = draw(st.sampled_from(names))
    if name == "select":
        return name, make_rule(name, share=draw(st.floats(0.01, 1)))
    has_scale = name in ("sigmoid", "half_sigmoid", "linear", "keep_probability")
    return name, make_rule(name, **({"gamma": draw(gammas), "scale": draw(scales)} if has_scale else {}))


def statistics(phi, reference=None, seed=0, **others):
    reference = phi if reference is None else reference
    return SampleStatistics(torch.arange(len(phi)), None, reference, torch.Generator().manual_seed(seed), **others)


def weigh(rule, phi, reference=None, seed=0):
    return rule(statistics(phi, reference, seed), phi, 0)


@settings(deadline=None)
@given(rule=rules(), phi=scores(), data=st.data())
def test_weights_decrease_in_phi_and_keep_to_their_range(rule, phi, data):
    name, rule = rule
    reference = data.draw(st.one_of(st.none(), scores(len(phi), phi.dtype)))
    w = weigh(rule, phi, reference)
    assert w.dtype == torch.promote_types(phi.dtype, torch.float32)
    assert not w.isnan().any()
    assert (w[phi.double().argsort(stable=True)].diff() <= 0).all()
    low, high = CERTAIN[name]
    slack = 1e-6  # of float32's exp
    assert ((w >= low - slack) & (w <= high + slack)).all()


@settings(deadline=None)
@given(rule=rules(tuple(NEUTRAL)), phi=scores(), data=st.data())
def test_no_influence_no_change(rule, phi, data):
    """Theorem 1's first condition, and the sign: harmful samples never gain, helpful ones never lose."""
    reference = data.draw(st.one_of(st.none(), scores(len(phi), phi.dtype)))
    w = weigh(rule[1], phi, reference)
    assert (w[phi == 0] == 1).all()
    assert (w[phi > 0] <= 1).all()
    assert (w[phi < 0] >= 1).all()


def test_rules_that_break_the_first_condition():
    """As their docstrings say: a sample without influence has another weight than 1 if the range is not symmetric."""
    phi = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    assert weigh(ExpMinMax(), phi)[1].item() == pytest.approx(math.exp(3 / 5))
    assert weigh(ExpMinMax(), -phi)[1].item() == pytest.approx(math.exp(-3 / 5))
    assert weigh(SelectFraction(1 / 3), phi)[1] == 0
    assert weigh(KeepProbability(), phi.new_zeros(1000)).mean().item() == pytest.approx(0.5, abs=0.05)


@settings(deadline=None)
@given(rule=rules(), phi=scores(2), data=st.data())
def test_weights_go_with_their_samples(rule, phi, data):
    """The samples' order says nothing: not even about ties, which the samples' places in the data decide."""
    order = torch.tensor(data.draw(st.permutations(range(len(phi)))))
    w = weigh(rule[1], phi)
    stats = SampleStatistics(order, None, phi)
    assert torch.equal(rule[1](stats, phi[order], 0), w[order])
    some = order[: len(order) // 2]  # a batch, whose weights are those among all samples
    assert torch.equal(rule[1](SampleStatistics(some, None, phi), phi[some], 0), w[some])


def test_formulas():
    phi = torch.linspace(-2, 3, 101, dtype=torch.float64)
    fifth, one = phi / 5, torch.ones((), dtype=torch.float64)
    expected = {
        Sigmoid(): 2 / (1 + torch.exp(10 * fifth)),
        Sigmoid(gamma=3, scale=2): 2 / (1 + torch.exp(1.5 * phi)),
        Sigmoid(gamma=3, scale="robust"): 2 / (1 + torch.exp(3 * phi / (phi[99] - phi[1]))),
        HalfSigmoid(gamma=4): 0.5 + 1 / (1 + torch.exp(4 * fifth)),
        Linear(): torch.maximum(torch.minimum(1 - 5 * fifth, 2 * one), 0 * one),
        Linear(gamma=1): 1 - fifth,
        Drop(): (phi <= 0).double(),
        ExpMinMax(): torch.exp(1 - 2 * (phi + 2) / 5),
        SelectFraction(0.25): (phi <= phi.kthvalue(25).values).double(),
    }
    for rule, w in expected.items():
        torch.testing.assert_close(weigh(rule, phi), w, rtol=1e-13, atol=1e-15, msg=lambda m, rule=rule: f"{rule}: {m}")
    probabilities = KeepProbability(gamma=2).probabilities(statistics(phi), phi)
    torch.testing.assert_close(probabilities, 1 / (1 + torch.exp(2 * fifth)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", [Sigmoid, HalfSigmoid, Linear])
@pytest.mark.parametrize("phi", [torch.tensor([-3e38, 0, 3e38]), torch.tensor([-1e300, 0, 1e300]).double()])
def test_steepness_without_an_end(kind, phi):
    """Neither 0 times what overflows is NaN, nor what overflows times 0."""
    assert weigh(kind(gamma=0.0, scale=1e-30), phi).tolist() == [1, 1, 1]
    low, neutral, high = weigh(kind(gamma=1e300, scale=1e-30), phi)
    assert low == {HalfSigmoid: 1.5}.get(kind, 2)
    assert neutral == 1
    assert high == {HalfSigmoid: 0.5}.get(kind, 0)


def test_the_range_is_that_of_all_samples():
    everything = torch.tensor([-4.0, 0.0, 1.0, 4.0])
    batch = torch.tensor([1.0, 2.0])
    for rule in (Sigmoid(), HalfSigmoid(), Linear(), ExpMinMax()):
        reordered = everything[[3, 2, 1, 0]]
        assert torch.equal(weigh(rule, batch, everything), weigh(rule, batch, reordered))
    assert torch.equal(weigh(Sigmoid(), batch, everything), sigmoid_weights(batch, scale=8.0))
    assert weigh(ExpMinMax(), torch.tensor([-9.0, 9.0]), everything).tolist() == pytest.approx([E, 1 / E])


@pytest.mark.parametrize("rule", [Sigmoid(), HalfSigmoid(), Linear(), Drop(), ExpMinMax()])
def test_scores_that_are_all_zero_change_nothing(rule):
    assert weigh(rule, torch.zeros(4)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", RULES)
def test_no_samples(name):
    rule = make_rule(name, **({"share": 0.5} if name == "select" else {}))
    assert weigh(rule, torch.zeros(0)).shape == (0,)
    assert weigh(rule, torch.zeros(0), torch.ones(3)).shape == (0,)


@pytest.mark.parametrize("name", RULES)
def test_nan_stays_nan(name):
    rule = make_rule(name, **({"share": 1.0} if name == "select" else {}))
    phi = torch.tensor([math.nan, -1.0, 1.0])
    w = weigh(rule, phi, torch.tensor([0.0, -1.0, 1.0]))
    assert w.isnan().tolist() == [True, False, False]
    w = weigh(rule, phi)
    assert w[0].isnan()
    flat = weigh(rule, phi, torch.ones(3))  # nothing to tell apart
    assert flat.isnan().tolist() == [True, False, False]
    if name in ("drop", "select"):  # no range that NaN would be part of
        assert not w[1:].isnan().any()


@pytest.mark.parametrize("name", RULES)
def test_nothing_looks_at_values(name):
    """Tensors without values cannot be looked at, so no GPU would be waited for either."""
    rule = make_rule(name, **({"share": 0.5} if name == "select" else {}))
    phi = torch.zeros(6, device="meta")
    stats = SampleStatistics(torch.arange(6, device="meta"), None, phi, torch.Generator())
    w = rule(stats, phi, 0)
    assert w.device.type == "meta"
    assert w.shape == (6,)
    assert checked_weights(w, phi).shape == (6,)
    assert Shuffled(rule)(stats, phi, 0).device.type == "meta"


@pytest.mark.parametrize("name", RULES)
def test_made_in_inference_mode_they_still_weight_a_loss(name):
    rule = make_rule(name, **({"share": 0.5} if name == "select" else {}))
    with torch.inference_mode():
        phi = torch.tensor([0.5, -1.0, 0.25])
        w = checked_weights(weigh(rule, phi), phi)
    losses = torch.randn(3, requires_grad=True)
    (w * losses).sum().backward()
    assert torch.equal(losses.grad, w)
    assert not weigh(rule, phi.clone().requires_grad_()).requires_grad


class TestKeepProbability:
    def test_how_many_are_kept(self):
        phi = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0]).repeat_interleave(4000)
        w = weigh(KeepProbability(gamma=4.0), phi)
        assert set(w.tolist()) == {0.0, 1.0}
        expected = 1 / (1 + torch.exp(4.0 * phi[::4000] / 2))
        torch.testing.assert_close(w.view(5, 4000).mean(1), expected, rtol=0, atol=0.03)  # 3.8 standard deviations

    @settings(deadline=None)
    @given(phi=scores(dtype=torch.float64), raised=st.floats(0, 1e6), seed=st.integers(0, 99))
    def test_a_higher_phi_adds_no_sample(self, phi, raised, seed):
        rule = KeepProbability(scale=3.0)
        assert (weigh(rule, phi + raised, seed=seed) <= weigh(rule, phi, seed=seed)).all()

    def test_draws_are_the_generators(self):
        phi = torch.zeros(50)
        before = torch.get_rng_state()
        stats = statistics(phi)
        first, second = KeepProbability()(stats, phi, 0), KeepProbability()(stats, phi, 1)
        assert not torch.equal(first, second)
        assert torch.equal(first, weigh(KeepProbability(), phi))
        assert torch.equal(before, torch.get_rng_state())
        with pytest.raises(ValueError, match="given no generator"):
            KeepProbability()(SampleStatistics(torch.arange(50), None, phi), phi, 0)


class TestSelectFraction:
    @settings(deadline=None)
    @given(phi=scores(), share=st.floats(0.001, 1))
    def test_as_many_as_said(self, phi, share):
        for reference in (phi, phi.clone()):
            w = weigh(SelectFraction(share), phi, reference)
            assert w.sum() == round(share * len(phi))
        # numpy sorts for itself
        chosen = phi.double().numpy().argsort(kind="stable")[: int(w.sum())]
        assert (w[torch.from_numpy(chosen)] == 1).all()

    def test_ties_are_cut_by_place(self):
        phi = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0])
        assert weigh(SelectFraction(0.4), phi).tolist() == [0, 1, 1, 0, 0]
        same = torch.zeros(5)
        assert weigh(SelectFraction(0.6), same).tolist() == [1, 1, 1, 0, 0]
        stats = SampleStatistics(torch.tensor([30, 20, 10]), None, phi := torch.zeros(3))
        assert SelectFraction(0.67)(stats, phi, 0).sum() == 2  # phi is the reference, whatever the places are called

    def test_a_batch_is_selected_by_the_quantile_of_all(self):
        reference = torch.arange(10.0)
        batch = torch.tensor([8.0, 3.9, 4.0, 4.1, -5.0])
        assert SelectFraction(0.5)(
            SampleStatistics(torch.tensor([0, 9, 2, 3, 5]), None, reference), batch, 0
        ).tolist() == [0, 1, 1, 0, 1]

    def test_scores_that_are_not_known_come_last(self):
        phi = torch.tensor([math.nan, 2.0, math.nan, 1.0])
        assert weigh(SelectFraction(0.25), phi)[[1, 3]].tolist() == [0, 1]
        assert weigh(SelectFraction(0.75), phi)[[1, 3]].tolist() == [1, 1]


class TestControls:
    def test_own_loss(self):
        losses = torch.tensor([0.1, 5.0, 0.2, 0.3])
        w = OwnLoss(gamma=2.0)(statistics(torch.zeros(4), losses=lambda: losses), torch.zeros(4), 0)
        torch.testing.assert_close(w, 2 / (1 + torch.exp(2.0 * (losses - 1.4) / 4.9)))
        with pytest.raises(ValueError, match=r"asks for the training losses \(stats.losses\)"):
            weigh(OwnLoss(), torch.zeros(4))

    def test_shuffled(self):
        phi = torch.randn(200)
        w, shuffled = weigh(Sigmoid(), phi), weigh(Shuffled("sigmoid"), phi)
        assert torch.equal(w.sort().values, shuffled.sort().values)
        assert torch.corrcoef(torch.stack([w, shuffled]))[0, 1].abs() < 0.25
        assert torch.equal(shuffled, weigh(Shuffled(Sigmoid()), phi))
        assert not torch.equal(shuffled, weigh(Shuffled(Sigmoid()), phi, seed=1))

    def test_shuffled_in_one_order(self):
        rule, first, second = Shuffled(Sigmoid(), seed=3), torch.randn(200), torch.randn(200)
        order = rule(statistics(torch.arange(200.0)), torch.arange(200.0), 0).argsort(descending=True).argsort()
        for phi in (first, second):  # the order is that of the seed, whatever stats.generator gives
            assert torch.equal(weigh(rule, phi), weigh(Sigmoid(), phi)[order])
        assert not torch.equal(weigh(rule, first), weigh(Shuffled(Sigmoid(), seed=4), first))


@functools.cache
def problem(flips):
    regression = Regression(decay=0.02, flips=flips)
    options = {"damping": regression.decay, "tol": 1e-10}
    phi = influence_scores(regression.model(), regression.batch, regression.val, **options)
    return regression, phi, regression.validation_loss(torch.ones_like(phi))


class TestRetraining:
    """On a convex problem with wrong labels, by retraining to the minimum. Only the weights' ratios matter there."""

    def change(self, flips, rule, sign=1):
        regression, phi, base = problem(flips)
        w = checked_weights(weigh(rule, sign * phi), phi)
        return float(regression.validation_loss(w / w.mean()) - base)

    @pytest.mark.parametrize("flips", [0.1, 0.2, 0.4])
    @pytest.mark.parametrize("name", RULES)
    def test_weights_lower_the_validation_loss_and_the_other_sign_raises_it(self, name, flips):
        rule = make_rule(name, **({"share": 0.7} if name == "select" else {}))
        assert self.change(flips, rule) < -0.05
        assert self.change(flips, rule, sign=-1) > 0.05

    def test_the_sign_of_the_public_code(self):
        """exp(2 minmax(phi) - 1), as published, for phi that are positive for harmful samples. Ours is its inverse."""
        regression, phi, base = problem(0.1)
        share = (phi - phi.min()) / (phi.max() - phi.min())
        published = torch.exp(2 * share - 1)
        assert regression.validation_loss(published / published.mean()) > base
        torch.testing.assert_close(weigh(ExpMinMax(), phi), 1 / published)

    def test_shuffled_weights_do_not_help(self):
        changes = [self.change(0.2, rule) for rule in (Shuffled("sigmoid"), Sigmoid())]
        assert changes[0] > changes[1] + 0.1


class TestMakeRule:
    def test_names(self):
        assert make_rule("sigmoid", gamma=3.0, scale="robust") == Sigmoid(3.0, "robust")
        assert make_rule("select", share=0.3) == SelectFraction(0.3)
        assert repr(make_rule("linear")) == "Linear(gamma=5.0, scale='range')"
        assert len({make_rule(name, **({"share": 0.5} if name == "select" else {})) for name in RULES}) == len(RULES)

    def test_functions_stay_as_they_are(self):
        def own(stats, phi, epoch):
            return torch.ones_like(phi)

        assert make_rule(own) is own

    @pytest.mark.parametrize(
        ("rule", "settings", "error", "message"),
        [
            ("sigmod", {}, ValueError, "rule is 'sigmod', expected one of 'sigmoid', 'half_sigmoid', .*'select'"),
            ("sigmoid", {"gama": 1.0}, TypeError, "gama is given, but rule 'sigmoid' has the settings gamma, scale"),
            ("drop", {"gamma": 1.0}, TypeError, "gamma is given, but rule 'drop' has no settings"),
            (Sigmoid, {}, TypeError, "rule is the class Sigmoid"),
            (Sigmoid(), {"gamma": 1.0}, TypeError, "gamma given with a rule that is a function"),
            (None, {}, TypeError, "rule is None"),
            ("sigmoid", {"gamma": -1.0}, ValueError, "gamma is -1.0"),
            ("linear", {"gamma": math.inf}, ValueError, "gamma is inf"),
            ("half_sigmoid", {"gamma": True}, TypeError, "gamma is True"),
            ("keep_probability", {"scale": "std"}, ValueError, "scale is 'std'"),
            ("linear", {"scale": 0}, ValueError, "scale is 0"),
            ("select", {"share": 0.0}, ValueError, "share is 0.0"),
            ("select", {"share": 1.1}, ValueError, "share is 1.1"),
            ("select", {"share": math.nan}, ValueError, "share is nan"),
            ("select", {"share": "most"}, TypeError, "share is 'most'"),
        ],
    )
    def test_bad_input(self, rule, settings, error, message):
        with pytest.raises(error, match=message):
            make_rule(rule, **settings)

    def test_bad_controls(self):
        with pytest.raises(ValueError, match="gamma is -1"):
            OwnLoss(-1)
        with pytest.raises(ValueError, match="rule is 'sigmod'"):
            Shuffled("sigmod")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("phi", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "phi is list"),
        (torch.ones(2).long(), TypeError, "phi is torch.int64"),
        (torch.ones(3), ValueError, r"phi has shape \(3,\), expected \(2,\)"),
    ],
)
def test_bad_scores(name, phi, error, message):
    rule = make_rule(name, **({"share": 0.5} if name == "select" else {}))
    with pytest.raises(error, match=message):
        rule(statistics(torch.ones(2)), phi, 0)


class TestCheckedWeights:
    def test_what_passes(self):
        phi = torch.zeros(3, dtype=torch.float64)
        w = checked_weights(torch.ones(3, requires_grad=True, dtype=torch.bfloat16), phi)
        assert w.dtype == torch.float32
        assert not w.requires_grad
        values = torch.tensor([0.0, -1.0, math.nan])
        assert checked_weights(values, phi).equal(values) is False  # NaN: not looked at
        assert checked_weights(values, phi)[:2].tolist() == [0.0, -1.0]

    @pytest.mark.parametrize(
        ("weights", "error", "message"),
        [
            ([1.0, 1.0, 1.0], TypeError, "returned a list, expected a tensor of 3 weights"),
            (None, TypeError, "returned a NoneType"),
            (torch.ones(3).long(), TypeError, r"returned torch.int64, expected real floating-point weights"),
            (torch.ones(3) > 0, TypeError, "returned torch.bool"),
            (torch.ones(3, dtype=torch.complex64), TypeError, "returned torch.complex64"),
            (torch.ones(3, 1), ValueError, r"the shape \(3, 1\), expected \(3,\), one a sample"),
            (torch.ones(()), ValueError, r"the shape \(\), expected \(3,\)"),
        ],
    )
    def test_bad_weights(self, weights, error, message):
        with pytest.raises(error, match=message):
            checked_weights(weights, torch.zeros(3))

    def test_unusable_values(self):
        indices = torch.tensor([7, 5, 3, 9])
        require_usable(torch.tensor([0.0, 1.0, 2.0, 1e9]), indices)
        require_usable(torch.zeros(0), indices[:0])
        with pytest.raises(ValueError, match=r"3 of 4 weights .* \{5: -0.5, 3: nan, 9: inf\}; expected"):
            require_usable(torch.tensor([1.0, -0.5, math.nan, math.inf]), indices)
        with pytest.raises(ValueError, match=r"10 of 10 weights .* \{0: -1, .* 4: -1, ...\}"):
            require_usable(-torch.ones(10), torch.arange(10))
