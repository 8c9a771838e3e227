"""The ops of a linear layer under autograd, torch.func and torch.compile, against their definitions in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from kdaif_fast import ops, reference
from tests.ops.linear_layer_cases import HAS_KERNELS, layer

N, T, I, O, K = 3, 4, 5, 6, 2  # noqa: E741


def arguments(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (N, T, I), "b": (N, T, O), "v": (K, O, I), "w": (N,)}
    return {x: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for x, shape in shapes.items()}


OPS = {
    "persample_dot": (ops.persample_dot, reference.persample_dot.persample_dot, "abv"),
    "persample_norm": (ops.persample_norm, reference.persample_norm.persample_norm, "ab"),
    "persample_grad": (ops.persample_grad, reference.persample_grad.persample_grad, "ab"),
    "weighted_grad": (ops.weighted_grad, reference.weighted_grad.weighted_grad, "abw"),
    "persample_grad_dots": (
        lambda a, b, v: torch.cat([x.flatten() for x in ops.persample_grad(a, b, directions=v)]),
        lambda a, b, v: torch.cat(
            [
                reference.persample_grad.persample_grad(a, b).flatten(),
                reference.persample_dot.persample_dot(a, b, v).flatten(),
            ]
        ),
        "abv",
    ),
}


def moved(function, letters):
    """A function of one argument by which all arguments move."""
    tensors = [arguments()[x] for x in letters]
    return lambda x: function(*[t + 0.1 * torch.cos((x.sum() + x.square().sum()) * t) for t in tensors])


X = torch.linspace(-1, 1, 3, dtype=torch.float64)
TRANSFORMS = {
    "value": lambda f: f(X),
    "grad": lambda f: grad(lambda x: f(x).sin().sum())(X),
    "jvp": lambda f: jvp(f, (X,), (X.cos(),))[1],
    "jacrev": lambda f: jacrev(f)(X),
    "hessian": lambda f: jacfwd(grad(lambda x: f(x).sin().sum()))(X),
    "vmap": lambda f: vmap(f)(torch.stack([X, X.cos()])),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sin().sum()))(torch.stack([X, X.cos()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transforms(op, transform):
    ours, definition, letters = OPS[op]
    result = TRANSFORMS[transform](moved(ours, letters))
    expected = TRANSFORMS[transform](moved(definition, letters))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
    assert expected.abs().max() > 1e-6  # else the test could not see a zero


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    ours, definition, letters = OPS[op]
    tensors = [arguments()[x].requires_grad_() for x in letters]
    assert torch.autograd.gradcheck(ours, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, tensors)
    torch.testing.assert_close(ours(*tensors), definition(*tensors))  # gradcheck passes on no gradient at all


@pytest.mark.parametrize("op", OPS)
def test_one_argument_at_a_time_requires_grad(op):
    ours, definition, letters = OPS[op]
    for at in range(len(letters)):
        tensors = [arguments()[x] for x in letters]
        tensors[at].requires_grad_()
        derivatives = [torch.autograd.grad(f(*tensors).sin().sum(), tensors[at])[0] for f in (ours, definition)]
        torch.testing.assert_close(*derivatives, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_no_grad_mode_asks_the_kernel(op):
    ours, definition, letters = OPS[op]
    tensors = [arguments()[x].requires_grad_() for x in letters]
    with torch.no_grad():
        result = ours(*tensors)
    assert not result.requires_grad
    torch.testing.assert_close(result, definition(*tensors).detach())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backward", [False, True])
def test_compile(op, backward):
    ours, definition, letters = OPS[op]
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = [arguments()[x].requires_grad_(backward) for x in letters]
    torch.testing.assert_close(compiled(*tensors), definition(*tensors))
    if backward:
        derivatives = [torch.autograd.grad(f(*tensors).sin().sum(), tensors) for f in (compiled, definition)]
        torch.testing.assert_close(*derivatives)


def test_compile_with_out():
    a, b = layer(N, T, I, O)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b, out: ops.persample_grad(a, b, out), fullgraph=True, backend="aot_eager")
    out = torch.empty(N, O, I, dtype=torch.float64)
    compiled(a, b, out)
    torch.testing.assert_close(out, reference.persample_grad.persample_grad(a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_have_the_right_shape_and_dtype(op, dtype):
    ours, definition, letters = OPS[op]
    tensors = [arguments(dtype)[x] for x in letters]
    expected = definition(*tensors)
    with FakeTensorMode() as mode:
        fake = ours(*[mode.from_tensor(x) for x in tensors])
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", ["persample_dot", "persample_norm", "persample_grad", "weighted_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(name, dtype):
    tensors = [arguments(dtype)[x] for x in OPS[name][2]]
    wide = torch.promote_types(dtype, torch.float32)
    if name in ("persample_dot", "weighted_grad"):
        tensors[2] = tensors[2].to(wide)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.kdaif_fast, name).default, tuple(tensors), test_utils=checks)


@pytest.mark.parametrize("directions", [False, True])
def test_opcheck_with_out_and_dots(directions):
    x = arguments()
    v = x["v"] if directions else None
    checks = ("test_schema", "test_faketensor")
    into = torch.ops.kdaif_fast.persample_grad_into.default
    torch.library.opcheck(into, (x["a"], x["b"], v, torch.empty(N, O, I, dtype=torch.float64)), test_utils=checks)
    torch.library.opcheck(torch.ops.kdaif_fast.persample_grad_dots.default, (x["a"], x["b"], x["v"]), test_utils=checks)


@pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")
class TestKernelsRefuse:
    """What would read or write outside a tensor, also from callers who go around the Python checks."""

    @pytest.mark.parametrize("name", ["persample_dot", "persample_norm", "persample_grad", "weighted_grad"])
    @pytest.mark.parametrize("shape", [(N + 1, T, O), (N, T + 1, O), (N, O)])
    def test_shapes(self, name, shape):
        x = arguments() | {"b": torch.zeros(shape, dtype=torch.float64)}
        with pytest.raises(RuntimeError, match=name):
            getattr(torch.ops.kdaif_fast, name)(*[x[letter] for letter in OPS[name][2]])

    def test_dtypes_directions_weights_and_out(self):
        x, kernels = arguments(), torch.ops.kdaif_fast
        with pytest.raises(RuntimeError, match="persample_norm: inputs and output_grads differ in dtype"):
            kernels.persample_norm(x["a"], x["b"].float())
        with pytest.raises(RuntimeError, match=r"persample_dot: directions must be \[K, O, I\]"):
            kernels.persample_dot(x["a"], x["b"], x["v"].mT)
        with pytest.raises(RuntimeError, match=r"weighted_grad: weights must be \[N\]"):
            kernels.weighted_grad(x["a"], x["b"], x["w"][:-1])
        for out in (torch.empty(N, O, I), torch.empty(N, I, O).double(), torch.empty(N, I, O).double().mT):
            with pytest.raises(RuntimeError, match=r"persample_grad: .*out"):
                kernels.persample_grad_into(x["a"], x["b"], None, out)
