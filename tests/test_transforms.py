"""Every op under every transform, eager and compiled, against the same transform of the reference in float64.

The silent failure here is a derivative that comes out as zero, so every comparison is of values.
"""

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from kdaif_fast import _derive
from kdaif_fast.reference import kd_loss as reference

ops = importlib.import_module("kdaif_fast.ops.kd_loss")

N, V, T, ALPHA = 3, 5, 2.0, 0.3


def tensors():
    generator = torch.Generator().manual_seed(7)
    student, teacher, u, v = torch.randn(4, N, V, dtype=torch.float64, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    weight, g = torch.randn(2, N, dtype=torch.float64, generator=generator)
    return student, teacher, labels, weight, g, u, v


STUDENT, TEACHER, LABELS, WEIGHT, G, U, W = tensors()

# Each op as a function of one differentiable argument, with the reference's version of the same.
CASES = {
    "kd_loss in student": (
        lambda s: ops._kd_loss(s, TEACHER, LABELS, WEIGHT, T, ALPHA),
        lambda s: reference.kd_loss(s, TEACHER, LABELS, WEIGHT, T, ALPHA),
        STUDENT,
    ),
    "kd_loss in teacher": (
        lambda t: ops._kd_loss(STUDENT, t, LABELS, WEIGHT, T, ALPHA),
        lambda t: reference.kd_loss(STUDENT, t, LABELS, WEIGHT, T, ALPHA),
        TEACHER,
    ),
    "kd_loss in weight": (
        lambda w: ops._kd_loss(STUDENT, TEACHER, LABELS, w * w, T, ALPHA),
        lambda w: reference.kd_loss(STUDENT, TEACHER, LABELS, w * w, T, ALPHA),
        WEIGHT,
    ),
    "kd_loss in both logits": (
        lambda x: ops._kd_loss(x.sin(), x.cos(), LABELS, WEIGHT, T, ALPHA),
        lambda x: reference.kd_loss(x.sin(), x.cos(), LABELS, WEIGHT, T, ALPHA),
        STUDENT,
    ),
    "kd_loss_grad in student": (
        lambda s: ops._kd_loss_grad(G, s, TEACHER, LABELS, T, ALPHA).sin(),
        lambda s: reference.kd_loss_grad(G, s, TEACHER, LABELS, T, ALPHA).sin(),
        STUDENT,
    ),
    "kd_loss_grad in all": (
        lambda x: ops._kd_loss_grad(x.sum(-1), x.sin(), x.cos(), LABELS, T, ALPHA).sin(),
        lambda x: reference.kd_loss_grad(x.sum(-1), x.sin(), x.cos(), LABELS, T, ALPHA).sin(),
        STUDENT,
    ),
    "kd_loss_hvp in all": (
        lambda x: ops._kd_loss_hvp(x.sum(-1), x.sin(), x.cos(), T, ALPHA),
        lambda x: reference.kd_loss_hvp(x.sum(-1), x.sin(), x.cos(), T, ALPHA),
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


# What torch itself cannot compile, for the reference either, is not asked of the op.
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["kd_loss in both logits", "kd_loss_grad in all"])
def test_compiled(case, transform):
    torch.compiler.reset()
    ours, expected, x = CASES[case]
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](expected)(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward(backend):
    torch.compiler.reset()

    def training_loss(s, t, y, w):
        return ops.kd_loss(s * 2, t, y, weight=w, temperature=T, alpha=ALPHA, reduction="mean")

    leaves = [x.clone().requires_grad_() for x in (STUDENT, TEACHER, WEIGHT)]
    compiled = torch.compile(training_loss, fullgraph=True, backend=backend)
    loss = compiled(leaves[0], leaves[1], LABELS, leaves[2])
    expected = reference.kd_loss(leaves[0] * 2, leaves[1], LABELS, leaves[2], T, ALPHA).mean()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, leaves)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t, y: ops.kd_loss(s, t, y, temperature=T).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, classes in ((4, 6), (9, 3), (17, 30)):
        s, t = torch.randn(2, rows, classes, dtype=torch.float64)
        y = torch.randint(classes, (rows,))
        s.requires_grad_()
        (ours,) = torch.autograd.grad(compiled(s, t, y), s)
        (expected,) = torch.autograd.grad(reference.kd_loss(s, t, y, torch.ones(rows, dtype=s.dtype), T, 0.5).sum(), s)
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
            lambda s, t, y: ops.kd_loss(s, t, y, temperature=T),
            lambda s, t, y: reference.kd_loss(s, t, y, torch.ones(1, dtype=s.dtype), T, 0.5),
        )
    ]
    for name in parameters:
        torch.testing.assert_close(per_sample[0][name], per_sample[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_transforms(dtype):
    s, t = STUDENT.to(dtype), TEACHER.to(dtype)

    def loss(s):
        return ops.kd_loss(s, t, LABELS, temperature=T).sum()

    expected = grad(lambda s: reference.kd_loss(s, t.double(), LABELS, torch.ones(N).double(), T, 0.5).sum())(
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
    assert jacrev(lambda s: ops.kd_loss(s, s.detach(), labels))(empty).shape == (0, 0, V)
    assert vmap(lambda s: ops.kd_loss(s, TEACHER, LABELS))(torch.zeros(2, N, V, dtype=torch.float64)).shape == (2, N)
    assert vmap(lambda s: ops.kd_loss(s, empty, labels))(torch.zeros(2, 0, V, dtype=torch.float64)).shape == (2, 0)


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
    code = "import torch, kdaif_fast, importlib\n" + textwrap.dedent(COLD_STARTS[case])
    code += "\nassert importlib.import_module('kdaif_fast.ops.kd_loss').rules_work()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class TestWithoutRules:
    """A torch that ignores the rules must lead to the reference, not to zeros."""

    @pytest.fixture(params=["moved names", "ignored rules"])
    def broken(self, request, monkeypatch):
        if request.param == "moved names":
            monkeypatch.setattr(_derive, "AVAILABLE", False)
        else:
            monkeypatch.setattr(ops, "_try_rules", lambda: False)
        monkeypatch.setattr(ops, "_kd_loss", lambda *args: pytest.fail("the op was used"))

    @pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap of grad"])
    def test_falls_back(self, broken, transform):
        def f(s):
            return ops.kd_loss(s, TEACHER, LABELS, weight=WEIGHT, temperature=T, alpha=ALPHA)

        expected = TRANSFORMS[transform](CASES["kd_loss in student"][1])(STUDENT)
        torch.testing.assert_close(TRANSFORMS[transform](f)(STUDENT), expected)

    def test_the_trial_sees_zeros(self, monkeypatch):
        """An op that has no rules gives zero derivatives, silently: the trial must say so."""
        library = torch.library.Library("kdaif_fast_test_no_rules", "DEF")
        library.define("loss(Tensor s, Tensor t, Tensor y, Tensor w, float T, float alpha) -> Tensor")
        library.impl("loss", reference.kd_loss, "CompositeExplicitAutograd")
        monkeypatch.setattr(ops, "_kd_loss", torch.ops.kdaif_fast_test_no_rules.loss.default)
        assert ops._try_rules.__wrapped__() is False

    def test_the_trial_passes_here(self):
        assert ops._try_rules.__wrapped__() is True
