"""linear_kd_loss under every transform, eager and compiled, against the same transform of its definition in float64.

The silent failure here is a derivative that comes out as zero, so every comparison is of values.
"""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.ops.linear_kd_loss_cases import DIFFERENTIABLE, expected, leaves, ours, problem

X = problem(N=4, D=3, V=5, E=2, ignored=(1,))
SHARED = problem(N=4, D=3, V=4, E=3, ignored=(2,))

# Functions of one argument of the loss, or of something that several of them depend on.
CASES = {
    "hidden": (lambda f: lambda h: f(**(X | {"hidden": h})), X["hidden"]),
    "head_weight": (lambda f: lambda w: f(**(X | {"head_weight": w})), X["head_weight"]),
    "head_bias": (lambda f: lambda b: f(**(X | {"head_bias": b * b})), X["head_bias"]),
    "weight": (lambda f: lambda w: f(**(X | {"weight": w.sin()})), X["weight"]),
    "teacher": (lambda f: lambda t: f(**(X | {"teacher": t})), X["teacher"]),
    "all of the student": (
        lambda f: lambda x: f(
            **(SHARED | {"hidden": x, "head_weight": x.sin(), "head_bias": x[0].cos()[[0, 1, 2, 0]]})
        ),
        SHARED["hidden"],
    ),
    "everything": (
        lambda f: lambda x: f(
            **(
                SHARED
                | {"hidden": x, "head_weight": x.sin(), "teacher": x.cos(), "teacher_head": x * x, "weight": x[:, 0]}
            )
        ),
        SHARED["hidden"],
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
    "vjp": lambda f: lambda x: vjp(f, x)[1](direction(f(x)).cos())[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (direction(x),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(total(f)),
    "hessian forward over forward": lambda f: jacfwd(jacfwd(total(f))),
    "hvp forward over reverse": lambda f: lambda x: jvp(grad(total(f)), (x,), (direction(x),))[1],
    "hvp reverse over forward": lambda f: grad(lambda x: jvp(total(f), (x,), (direction(x.detach()),))[1]),
    "hvp reverse over reverse": lambda f: grad(lambda x: (grad(total(f))(x) * direction(x.detach())).sum()),
    "vmap": lambda f: lambda x: vmap(f)(several(x)),
    "vmap last axis": lambda f: lambda x: vmap(f, in_dims=-1, out_dims=-1)(several(x).movedim(0, -1)),
    "vmap of grad": lambda f: lambda x: vmap(grad(total(f)))(several(x)),
    "vmap of hvp": lambda f: lambda x: vmap(lambda d: jvp(grad(total(f)), (x,), (d,))[1])(several(x)),
    "grad of vmap": lambda f: grad(lambda x: vmap(total(f))(several(x)).sum()),
}
CLOSE = dict(rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_eager(case, transform, reduction):
    function, x = CASES[case]
    result = TRANSFORMS[transform](function(lambda **a: ours(reduction, **a)))(x)
    right = TRANSFORMS[transform](function(lambda **a: expected(reduction, **a)))(x)
    torch.testing.assert_close(result, right, **CLOSE)
    assert transform == "value" or right.abs().max() > 1e-6  # else the test could not see a zero


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["all of the student", "everything"])
def test_compiled(case, transform):
    torch.compiler.reset()
    function, x = CASES[case]
    compiled = torch.compile(TRANSFORMS[transform](function(ours)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](function(expected))(x), **CLOSE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_backward(backend, reduction):
    torch.compiler.reset()
    arguments, wanted = leaves(problem())
    compiled = torch.compile(lambda **a: ours(reduction, **a).sum(), fullgraph=True, backend=backend)
    loss, right = compiled(**arguments), expected(reduction, **arguments).sum()
    torch.testing.assert_close(loss, right)
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(right, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, classes in ((4, 6), (9, 3), (17, 30)):
        arguments, wanted = leaves(problem(N=rows, V=classes))
        results = [torch.autograd.grad(f(**arguments), wanted) for f in (compiled, expected)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_per_sample_gradients(reduction):
    def loss(formula, head, hidden, teacher, label):
        rows = {"hidden": hidden[None], "teacher": teacher[None], "labels": label[None]}
        shared = {k: X[k] for k in ("head_bias", "teacher_head", "teacher_bias")}
        return formula(reduction, head_weight=head, **rows, **shared).sum()

    per_sample = [
        vmap(grad(lambda *a, f=f: loss(f, *a)), in_dims=(None, 0, 0, 0))(
            X["head_weight"], X["hidden"], X["teacher"], X["labels"]
        )
        for f in (ours, expected)
    ]
    torch.testing.assert_close(*per_sample, **CLOSE)
    assert (per_sample[0].flatten(1).norm(dim=1) > 0).tolist() == (X["labels"] != -100).tolist()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autograd_around_and_inside_a_transform(reduction):
    """Leaves of plain autograd, used inside a transform that does not look at them."""
    results = []
    for formula in (ours, expected):
        arguments, wanted = leaves(X)

        def function(scale, formula=formula, arguments=arguments):
            return (scale * formula(reduction, **arguments)).sum()

        slope = grad(function)(torch.tensor(2.0, dtype=torch.float64))
        results.append((slope, *torch.autograd.grad(slope, wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_third_derivatives_of_plain_autograd(reduction):
    results = []
    for formula in (ours, expected):
        arguments, wanted = leaves(X, "hidden", "head_weight")
        value = formula(reduction, **arguments).sin().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, wanted, create_graph=True)
            value = sum(g.cos().sum() for g in gradients)
        results.append((value, *torch.autograd.grad(value, wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_batches_without_rows():
    nobody = problem(N=0, D=3)
    jacobian = jacrev(lambda h: ours("none", **(nobody | {"hidden": h})))(nobody["hidden"])
    assert jacobian.shape == (0, 0, 3)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, **arguments):
            return ours(**arguments)

    program = torch.export.export(Loss(), (), X)
    torch.testing.assert_close(program.module()(**X), expected(**X))


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_tensors_without_values(where):
    mode = torch._subclasses.FakeTensorMode() if where == "fake" else torch.device("meta")
    with mode:
        arguments = {k: torch.empty(v.shape, dtype=v.dtype, requires_grad=k in DIFFERENTIABLE) for k, v in X.items()}
        loss = ours(**arguments)
        loss.backward()
    assert loss.shape == ()
    assert all(arguments[name].grad.shape == X[name].shape for name in DIFFERENTIABLE)
