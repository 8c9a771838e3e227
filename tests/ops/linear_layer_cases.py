"""Linear layers for the tests of persample_dot, persample_norm, persample_grad and weighted_grad."""

import torch
from torch.func import functional_call, grad, vmap

import kdaif_fast

HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# N, T, I, O: below, at and above the panels of 16 that the kernels work in, and the blocks of 256.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 5, 7),
    (5, 1, 300, 40),
    (300, 1, 17, 10),
    (4, 3, 16, 32),
    (2, 17, 33, 15),
    (3, 70, 20, 530),
    (2, 64, 64, 48),
    (2, 300, 9, 21),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (3, 2, 0, 5),
    (3, 2, 4, 0),
]

STRIDES = {
    "positions first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one position for all": lambda x: x[:, :1].expand(x.shape),
    "one sample for all": lambda x: x[:1].expand(x.shape),
    "one feature for all": lambda x: x[..., :1].expand(x.shape),
    "every other feature": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "part of wider rows": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "features first": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
}


def layer(N, T, I, O, dtype=torch.float64):  # noqa: E741
    return torch.randn(N, T, I).to(dtype), torch.randn(N, T, O).to(dtype)


def strided(layout, N, T, I, O, dtype=torch.float64):  # noqa: E741
    return tuple(STRIDES[layout](x) for x in layer(N, T, I, O, dtype))


def gradients(inputs, output_grads):
    """G in float64, sample by sample."""
    a, b = inputs.double(), output_grads.double()
    shape = (0, output_grads.shape[2], inputs.shape[2])
    return torch.stack([b[n].T @ a[n] for n in range(len(a))]) if len(a) else a.new_zeros(shape)


def gradients_by_autograd(inputs, output_grads):
    """The same from torch.func, for a linear module whose outputs' gradients are the given ones."""
    module = torch.nn.Linear(inputs.shape[2], output_grads.shape[2], bias=False, dtype=inputs.dtype)

    def loss(parameters, a, b):
        return (functional_call(module, parameters, (a,)) * b).sum()

    return vmap(grad(loss), (None, 0, 0))(dict(module.named_parameters()), inputs, output_grads)["weight"].detach()


def assert_near(ours, expected, scale, dtype):
    """To a small multiple of the rounding of `dtype`, relative to the sum of magnitudes `scale`, elementwise."""
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert ours.shape == expected.shape
    error = (ours.double() - expected.double()).abs()
    smallest = 2**-24 if dtype == torch.float16 else 1e-37  # below the normal numbers, steps are this wide
    assert ours.numel() == 0 or (error <= tolerance * scale.double() + smallest).all(), (error / scale).max()


BAD_LAYERS = [
    ({"inputs": [1.0]}, TypeError, r"inputs is \[1.0\] \(list\), expected a torch.Tensor"),
    ({"inputs": torch.zeros(2, 3, 4).long()}, TypeError, "inputs has dtype torch.int64, expected one of float32"),
    ({"inputs": torch.zeros(6, 4)}, ValueError, r"inputs has shape \(6, 4\), expected \[N, T, I\]"),
    ({"output_grads": None}, TypeError, r"output_grads is None \(NoneType\)"),
    ({"output_grads": torch.zeros(2, 3)}, ValueError, r"output_grads has shape \(2, 3\), expected \[N, T, O\]"),
    (
        {"output_grads": torch.zeros(5, 3, 6)},
        ValueError,
        r"output_grads has shape \(5, 3, 6\), expected \[2, 3, O\] as inputs of shape \(2, 3, 4\)",
    ),
    ({"output_grads": torch.zeros(2, 4, 6)}, ValueError, r"output_grads has shape \(2, 4, 6\), expected \[2, 3, O\]"),
    (
        {"output_grads": torch.zeros(2, 3, 6).double()},
        TypeError,
        "output_grads has dtype torch.float64, expected torch.float32 as inputs",
    ),
    (
        {"output_grads": torch.zeros(2, 3, 6, device="meta")},
        ValueError,
        "output_grads is on device meta, expected cpu as inputs",
    ),
]
BAD_DIRECTIONS = [
    ({"directions": 3}, TypeError, r"directions is 3 \(int\)"),
    ({"directions": torch.zeros(6, 4)}, ValueError, r"directions has shape \(6, 4\), expected \[K, O, I\]"),
    ({"directions": torch.zeros(1, 4, 6)}, ValueError, r"directions has shape \(1, 4, 6\), expected \[K, 6, 4\]"),
    ({"directions": torch.zeros(1, 6, 4).int()}, TypeError, "directions has dtype torch.int32"),
    (
        {"directions": torch.zeros(1, 6, 4, device="meta")},
        ValueError,
        "directions is on device meta, expected cpu as inputs",
    ),
]


def arguments(**change):
    return {"inputs": torch.zeros(2, 3, 4), "output_grads": torch.zeros(2, 3, 6), **change}
