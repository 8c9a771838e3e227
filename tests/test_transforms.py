"""Every op under every transform, eager and compiled, against the same transform of the reference in float64.

The silent failure here is a derivative that comes out as zero, so every comparison is of values.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from kdaif_fast import _derive
from kdaif_fast import ops as public
from kdaif_fast.ops import kd_loss, row_rules
from kdaif_fast.ops import row_ops as ops
from kdaif_fast.reference import row_divergence as reference
from tests.ops.row_cases import ALL, arguments, plain_arguments
from tests.ops.row_cases import CASES as ROW_CASES

N, V, T, ALPHA = 3, 5, 2.0, 0.3


def tensors():
    generator = torch.Generator().manual_seed(7)
    student, teacher, u, v = torch.randn(4, N, V, dtype=torch.float64, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    weight, g = torch.randn(2, N, dtype=torch.float64, generator=generator)
    return student, teacher, labels, weight, g, u, v


STUDENT, TEACHER, LABELS, WEIGHT, G, U, W = tensors()


def plain(function):
    """A function of the family on plain distillation: (student, teacher, weight) -> result."""
    return lambda s, t, w: function(*plain_arguments(s, t, LABELS, w, T, ALPHA))


def plain_hvp(function):
    return lambda u, s, t, w: function(u[None], False, *plain_arguments(s, t, LABELS, w, T, ALPHA))[0]


def both(make):
    """The same expression of the op and of the reference."""
    return make(ops), make(reference)


# Each op as a function of one differentiable argument, with the reference's version of the same.
CASES = {
    "loss in student": (*both(lambda m: lambda s: plain(m.row_divergence)(s, TEACHER, WEIGHT)), STUDENT),
    "loss in teacher": (*both(lambda m: lambda t: plain(m.row_divergence)(STUDENT, t, WEIGHT)), TEACHER),
    "loss in weight": (*both(lambda m: lambda w: plain(m.row_divergence)(STUDENT, TEACHER, w * w)), WEIGHT),
    "loss in both logits": (*both(lambda m: lambda x: plain(m.row_divergence)(x.sin(), x.cos(), WEIGHT)), STUDENT),
    "grad in student": (*both(lambda m: lambda s: plain(m.row_divergence_grad)(s, TEACHER, G).sin()), STUDENT),
    "grad in all": (
        *both(lambda m: lambda x: plain(m.row_divergence_grad)(x.sin(), x.cos(), x.sum(-1)).sin()),
        STUDENT,
    ),
    "hvp in all": (
        *both(lambda m: lambda x: plain_hvp(m.row_divergence_hvp)(x.sin(), x.cos(), TEACHER, x.sum(-1))),
        STUDENT,
    ),
}


def total(f):
    return lambda x: f(x).sin().sum()


def direction(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)


def several(x):
    return torch.stack([direction(x), direction(x).cos(), x.sin()])


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: grad(total(f)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](direction(f(x)))[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (direction(x),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(total(f)),
    "hvp forward over reverse": lambda f: lambda x: jvp(grad(total(f)), (x,), (direction(x),))[1],
    "hvp reverse over forward": lambda f: grad(lambda x: jvp(total(f), (x,), (direction(x.detach()),))[1]),
    "hvp reverse over reverse": lambda f: grad(lambda x: (grad(total(f))(x) * direction(x.detach())).sum()),
    "hessian forward over forward": lambda f: jacfwd(jacfwd(total(f))),
    "vmap": lambda f: lambda x: vmap(f)(several(x)),
    "vmap last axis": lambda f: lambda x: vmap(f, in_dims=-1, out_dims=-1)(several(x).movedim(0, -1)),
    "vmap of grad": lambda f: lambda x: vmap(grad(total(f)))(several(x)),
    "vmap of hvp": lambda f: lambda x: vmap(lambda d: jvp(grad(total(f)), (x,), (d,))[1])(several(x)),
    "grad of vmap": lambda f: grad(lambda x: vmap(total(f))(several(x)).sum()),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(f))(torch.stack([several(x), several(x).cos()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_eager(case, transform):
    ours, expected, x = CASES[case]
    result = TRANSFORMS[transform](ours)(x)
    right = TRANSFORMS[transform](expected)(x)
    torch.testing.assert_close(result, right, rtol=1e-9, atol=1e-11)
    assert transform == "value" or right.abs().max() > 1e-6  # else the test could not see a zero


# Arguments beside the student's logits that may be differentiated, and kinds that take other ways through the rules.
GENERAL = {
    "reverse KL in both logits": ("KL", ROW_CASES["all parts"], (0, 1)),
    "Jensen-Shannon in both logits": ("JENSEN_SHANNON", ROW_CASES["divergence alone"], (0, 1)),
    "skewed KL in teacher": ("SKEW_FORWARD", ROW_CASES["divergence alone"], (1,)),
    "decoupled in both logits": ("DECOUPLED", ROW_CASES["all parts"], (0, 1)),
    "two teachers, mixed": ("KL", ALL["two teachers"], (0, 1, 3, 8)),
    "probabilities": ("CROSS_ENTROPY", ALL["probabilities"], (0, 1)),
    "soft labels and class weights": ("KL", ALL["soft, smoothed and weighted"], (0, 5, 6)),
    "settings by row": ("KL", ROW_CASES["settings by row"], (0, 9)),
}


@pytest.mark.parametrize(
    "transform", ["value", "grad", "vjp", "jvp", "jacfwd", "hessian", "vmap", "vmap of grad", "vmap of hvp"]
)
@pytest.mark.parametrize("case", GENERAL)
def test_general_arguments(case, transform):
    """Moves several arguments at once, each along a function of x."""
    torch.manual_seed(0)
    kind, options, moving = GENERAL[case]
    args = arguments(kind, options, 3, 5)

    def along(function):
        def f(x):
            changed = list(args)
            for at in moving:
                changed[at] = args[at] + 0.1 * torch.cos((x[0] + x.square().sum()) * args[at])
            return function(*changed)

        return f

    x = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    result = TRANSFORMS[transform](along(ops.row_divergence))(x)
    expected = TRANSFORMS[transform](along(reference.row_divergence))(x)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)
    assert transform == "value" or expected.abs().max() > 1e-7


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", sorted(ALL))
def test_vmap_over_every_argument(name, axis):
    """One argument batched at a time, then all of them: batches are rows, and nothing else changes."""
    args = arguments("JENSEN_SHANNON", ALL[name], 3, 8)
    tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
    several = {i: torch.stack([args[i], args[i].flip(0)], axis) for i in tensors}
    if args[2] is not None:
        several[2] = torch.stack([args[2], args[2]], axis)
    for batched in ([i] for i in tensors), [tensors]:
        for chosen in batched:
            changed = [several[i] if i in chosen else x for i, x in enumerate(args)]
            dims = tuple(axis if i in chosen else None for i in range(len(args)))
            one_by_one = [[x.select(axis, b) if i in chosen else x for i, x in enumerate(changed)] for b in range(2)]
            for function in (ops.row_divergence, ops.row_divergence_grad):
                expected = torch.stack([function(*a) for a in one_by_one])
                torch.testing.assert_close(vmap(function, in_dims=dims)(*changed), expected)
            u = torch.randn(2, 3, 8, dtype=torch.float64)
            expected = torch.stack([ops.row_divergence_hvp(u, False, *a) for a in one_by_one])
            ours = vmap(ops.row_divergence_hvp, in_dims=(None, None, *dims))(u, False, *changed)
            torch.testing.assert_close(ours, expected)


# What torch itself cannot compile, for the reference either, is not asked of the op.
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["loss in both logits", "grad in all"])
def test_compiled(case, transform):
    torch.compiler.reset()
    ours, expected, x = CASES[case]
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](expected)(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward(backend):
    torch.compiler.reset()

    def training_loss(s, t, y, w):
        return kd_loss(s * 2, t, y, weight=w, temperature=T, alpha=ALPHA, reduction="mean")

    leaves = [x.clone().requires_grad_() for x in (STUDENT, TEACHER, WEIGHT)]
    compiled = torch.compile(training_loss, fullgraph=True, backend=backend)
    loss = compiled(leaves[0], leaves[1], LABELS, leaves[2])
    expected = plain(reference.row_divergence)(leaves[0] * 2, leaves[1], leaves[2]).mean()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, leaves)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


WHOLE = {
    "dkd": lambda s, t, y, w: public.dkd_loss(s, t, y, weight=w, reduction="mean"),
    "js": lambda s, t, y, w: public.js_loss(s, t, y, temperature=w + 1, reduction="mean", normalizer="elements"),
    "nkd": lambda s, t, y, w: public.nkd_loss(s, t, y, reduction="mean"),
    "taid": lambda s, t, y, w: public.taid_loss(s, t, y, share=0.3, reduction="mean"),
    "top-k": lambda s, t, y, w: public.row_divergence(
        s, t[:, :2].sigmoid() / 4, y, teacher_indices=torch.tensor([[0, 3]] * N), reduction="mean"
    ),
    "smoothed, weighted": lambda s, t, y, w: public.row_divergence(
        s, t, y, weight=w, class_weight=t[0].exp(), label_smoothing=0.1, reduction="mean", normalizer="weights"
    ),
    "mixed": lambda s, t, y, w: public.row_divergence(
        s, t, y, second_teacher=s.detach() + 1, gate=0.3, label_mix=0.2, soft_labels=t.softmax(-1), reduction="sum"
    ),
    "weights by row": lambda s, t, y, w: public.row_divergence(s, t, y, ce_weight=w, kd_weight=w * w, reduction="sum"),
    "slice, standardized": lambda s, t, y, w: public.row_divergence(
        s, t, y, classes=(1, 4), standardize=True, reduction="mean"
    ),
    "hvp": lambda s, t, y, w: public.row_hvp(torch.stack([t, s.detach()]), s, t, y, weight=w).sum(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_public_losses(name):
    """Arguments and reduction included, without a graph break."""
    torch.compiler.reset()
    labels, weight = LABELS.clone(), WEIGHT.abs()
    labels[1] = -100
    leaves = [x.clone().requires_grad_() for x in (STUDENT, TEACHER)]
    expected = WHOLE[name](*leaves, labels, weight)
    ours = torch.compile(WHOLE[name], fullgraph=True, backend="aot_eager")(*leaves, labels, weight)
    torch.testing.assert_close(ours, expected)
    grads = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours, expected))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t, y: kd_loss(s, t, y, temperature=T).sum(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows, classes in ((4, 6), (9, 3), (17, 30)):
        s, t = torch.randn(2, rows, classes, dtype=torch.float64)
        y = torch.randint(classes, (rows,))
        s.requires_grad_()
        (ours,) = torch.autograd.grad(compiled(s, t, y), s)
        (expected,) = torch.autograd.grad(reference.row_divergence(*plain_arguments(s, t, y, None, T)).sum(), s)
        torch.testing.assert_close(ours, expected)


def test_per_sample_gradients_of_a_model():
    model = torch.nn.Linear(4, V, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    x = torch.randn(N, 4, dtype=torch.float64)

    def sample_loss(formula, parameters, x, t, y):
        logits = functional_call(model, parameters, (x[None],))
        return formula(logits, t[None], y[None])[0]

    per_sample = [
        vmap(grad(lambda *a, f=f: sample_loss(f, *a)), in_dims=(None, 0, 0, 0))(parameters, x, TEACHER, LABELS)
        for f in (
            lambda s, t, y: kd_loss(s, t, y, temperature=T),
            lambda s, t, y: reference.row_divergence(*plain_arguments(s, t, y, None, T)),
        )
    ]
    for name in parameters:
        torch.testing.assert_close(per_sample[0][name], per_sample[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_transforms(dtype):
    s, t = STUDENT.to(dtype), TEACHER.to(dtype)

    def loss(s):
        return kd_loss(s, t, LABELS, temperature=T).sum()

    expected = grad(lambda s: reference.row_divergence(*plain_arguments(s, t.double(), LABELS, None, T)).sum())(
        s.double()
    )
    gradient = grad(loss)(s)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-2, atol=2e-3)
    tangent = jvp(loss, (s,), (torch.ones_like(s) * STUDENT.to(dtype),))[1]
    assert tangent.dtype == torch.float32


def test_no_rows_and_empty_batches():
    empty = torch.zeros(0, V, dtype=torch.float64)
    labels = torch.zeros(0, dtype=torch.int64)
    assert jacrev(lambda s: kd_loss(s, s.detach(), labels))(empty).shape == (0, 0, V)
    assert vmap(lambda s: kd_loss(s, TEACHER, LABELS))(torch.zeros(2, N, V, dtype=torch.float64)).shape == (2, N)
    assert vmap(lambda s: kd_loss(s, empty, labels))(torch.zeros(2, 0, V, dtype=torch.float64)).shape == (2, 0)


COLD_STARTS = {
    "export": """
        class M(torch.nn.Module):
            def forward(self, s, t, y):
                return kdaif_fast.ops.kd_loss(s, t, y, temperature=2.0).sum()
        torch.export.export(M(), (torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])))
    """,
    "fake tensors": """
        with torch._subclasses.FakeTensorMode():
            s = torch.randn(3, 4)
            torch.func.jvp(lambda s: kdaif_fast.ops.kd_loss(s, s, torch.tensor([0, 1, 2])).sum(), (s,), (s,))
    """,
    "default device": """
        with torch.device("meta"):
            s = torch.randn(3, 4)
            torch.func.grad(lambda s: kdaif_fast.ops.kd_loss(s, s, torch.zeros(3, dtype=torch.int64)).sum())(s)
    """,
    "default dtype": """
        torch.set_default_dtype(torch.bfloat16)
        s = torch.randn(3, 4)
        torch.func.grad(lambda s: kdaif_fast.ops.kd_loss(s, s, torch.tensor([0, 1, 2])).sum())(s)
    """,
    "compile": """
        s = torch.randn(3, 4, requires_grad=True)
        f = torch.compile(lambda s: kdaif_fast.ops.kd_loss(s, s.detach(), torch.tensor([0, 1, 2])).sum(),
                          fullgraph=True, backend="aot_eager")
        f(s).backward()
    """,
}


@pytest.mark.parametrize("case", COLD_STARTS)
def test_first_call_of_a_process(case):
    """The trial of the rules happens in whatever state the first caller is in; it must not be misled by that."""
    code = "import torch, kdaif_fast\n" + textwrap.dedent(COLD_STARTS[case])
    code += "\nfrom kdaif_fast.ops.row_rules import rules_work\nassert rules_work()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class TestWithoutRules:
    """A torch that ignores the rules must lead to the reference, not to zeros."""

    @pytest.fixture(params=["moved names", "ignored rules"])
    def broken(self, request, monkeypatch):
        if request.param == "moved names":
            monkeypatch.setattr(_derive, "AVAILABLE", False)
        else:
            monkeypatch.setattr(row_rules, "_try_rules", lambda: False)
        monkeypatch.setattr(ops, "row_divergence", lambda *args: pytest.fail("the op was used"))

    @pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap of grad"])
    def test_falls_back(self, broken, transform):
        def f(s):
            return kd_loss(s, TEACHER, LABELS, weight=WEIGHT, temperature=T, alpha=ALPHA)

        expected = TRANSFORMS[transform](CASES["loss in student"][1])(STUDENT)
        torch.testing.assert_close(TRANSFORMS[transform](f)(STUDENT), expected)

    def test_the_trial_sees_zeros(self, monkeypatch):
        """An op that has no rules gives zero derivatives, silently: the trial must say so."""
        library = torch.library.Library("kdaif_fast_test_no_rules", "DEF")
        library.define(f"loss{str(ops.row_divergence._schema).removeprefix('kdaif_fast::row_divergence')}")
        library.impl("loss", reference.row_divergence, "CompositeExplicitAutograd")
        monkeypatch.setattr(row_rules, "row_divergence", torch.ops.kdaif_fast_test_no_rules.loss.default)
        assert row_rules._try_rules.__wrapped__() is False

    def test_the_trial_passes_here(self):
        assert row_rules._try_rules.__wrapped__() is True
