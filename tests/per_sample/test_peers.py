"""The same numbers as opacus, BackPACK and torch.func, on models that each of them can do.

Losses are summed, so that every library's gradient of a sample is that of its own loss: of a mean, opacus multiplies
by N what BackPACK leaves divided.
"""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kdaif_fast.per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
)

needs_opacus = pytest.mark.skipif(not importlib.util.find_spec("opacus"), reason="opacus is not installed")
needs_backpack = pytest.mark.skipif(not importlib.util.find_spec("backpack"), reason="BackPACK is not installed")

N, CLASSES = 6, 3
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Rows(nn.Module):
    """Positions of a sequence, averaged."""

    def forward(self, x):
        return x.mean(1)


class Last(nn.Module):
    """A recurrent layer's output at the last position."""

    def forward(self, x):
        return x[0][:, -1]


class Bags(nn.Module):
    """A bag a row, in the form (indices, offsets): the one that opacus has a rule for."""

    def __init__(self):
        super().__init__()
        self.bags = nn.EmbeddingBag(7, 4, mode="sum")

    def forward(self, tokens):
        return self.bags(tokens.flatten(), torch.arange(0, tokens.numel(), tokens.shape[1]))


class SelfAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.inner(x)


def images(*shape):
    return lambda: torch.randn(N, *shape)


def tokens(length):
    return lambda: torch.randint(7, (N, length))


def conv(layer, *options, size, channels=4, **keywords):
    """A convolution of 2 channels into 4, and a linear layer on its `size` outputs a channel."""
    return lambda: nn.Sequential(
        layer(2, channels, *options, **keywords), nn.Tanh(), nn.Flatten(), nn.Linear(channels * size, CLASSES)
    )


def normalised(*norms):
    """2 channels of 5 x 5 through convolutions, each followed by a layer that normalises 4 channels."""

    def build():
        layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False)]  # a bias before InstanceNorm has no gradient but rounding
        for norm in norms:
            layers += [randomised(norm()), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, bias=False)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, CLASSES))

    return build


def randomised(layer):
    """With parameters other than ones and zeros."""
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def sequence(*layers):
    return lambda: nn.Sequential(nn.Embedding(7, 4), *(make() for make in layers), nn.Linear(4, CLASSES))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES))


# name -> (model, inputs); what all three do with a plain call
CONVOLUTIONS = {
    "conv1d": (conv(nn.Conv1d, 3, 2, 1, size=4), images(2, 8)),
    "conv1d, dilated": (conv(nn.Conv1d, 3, dilation=2, size=4), images(2, 8)),
    "conv2d": (conv(nn.Conv2d, 3, 2, 1, size=9), images(2, 5, 5)),
    "conv2d, uneven": (conv(nn.Conv2d, (3, 2), (1, 2), (0, 1), size=9), images(2, 5, 5)),
    "conv2d, groups": (conv(nn.Conv2d, 3, groups=2, size=9), images(2, 5, 5)),
    "conv3d": (conv(nn.Conv3d, 2, 2, 1, size=27), images(2, 4, 4, 4)),
}
SIMPLE = {"mlp": (mlp, images(5)), **CONVOLUTIONS, "embedding": (sequence(Rows), tokens(5))}
NORMALISED = {
    "group and instance norm": (
        normalised(lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True)),
        images(2, 5, 5),
    ),
    "layer norm": (normalised(lambda: nn.LayerNorm((4, 5, 5))), images(2, 5, 5)),
    "layer norm of positions": (sequence(lambda: randomised(nn.LayerNorm(4)), Rows), tokens(5)),
    "rms norm": (sequence(lambda: randomised(nn.RMSNorm(4)), Rows), tokens(5)),
}
RECURRENT = {
    "lstm": (sequence(lambda: nn.LSTM(4, 4, batch_first=True), Last), tokens(5)),
    "rnn": (sequence(lambda: nn.RNN(4, 4, batch_first=True), Last), tokens(5)),
}
ATTENTION = {
    "attention": (sequence(lambda: SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True)), Rows), tokens(5))
}
BAGS = {
    "embedding bag": (
        lambda: nn.Sequential(Bags(), nn.Linear(4, CLASSES)),
        lambda: torch.stack([torch.randperm(7)[:5] for _ in range(N)]),  # opacus 1.6 counts a repeated token once
    )
}
RESIDUAL = {
    "residual": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), Residual(nn.GroupNorm(2, 4), nn.ReLU()), nn.Flatten(), nn.Linear(36, CLASSES)
        ),
        images(2, 5, 5),
    )
}
TRANSPOSED = {"transposed conv2d": (conv(nn.ConvTranspose2d, 3, 2, size=49), images(2, 3, 3))}


def cases(*groups, without=lambda name, dtype: False):
    """Parametrise over all models of these groups and both dtypes, but for what a peer cannot do."""
    named = {name: case for group in groups for name, case in group.items()}
    rows = [(name, dtype) for name in named for dtype in RELATIVE if not without(name, dtype)]
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(named[name], dtype, id=f"{name}-{dtype}") for name, dtype in rows]
    )


def make(case, dtype):
    """A model in training mode and a batch, from one seed."""
    build, inputs = case
    model, x = build().to(dtype), inputs()
    return model, (x.to(dtype) if x.is_floating_point() else x, torch.randint(CLASSES, (N,)))


def losses(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def assert_close(ours, theirs, dtype):
    """Relative to the largest element."""
    assert ours.dtype == theirs.dtype == dtype
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=RELATIVE[dtype] * float(theirs.abs().max()))


def assert_same_quantities(model, batch, theirs, dtype):
    """Gradients, and everything that is a product of them."""
    ours = per_sample_grads(model, batch, losses)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert_close(ours[name], expected, dtype)
    flat = torch.cat([theirs[name].flatten(1) for name, p in model.named_parameters() if p.requires_grad], 1)
    direction = torch.randn(flat.shape[1], dtype=dtype)
    assert_close(per_sample_grad_dots(model, batch, direction, loss=losses), flat @ direction, dtype)
    assert_close(per_sample_grad_norms(model, batch, losses), flat.norm(dim=1), dtype)
    assert_close(pairwise_grad_dots(model, batch, batch, loss=losses), flat @ flat.T, dtype)


# vmap takes the fused attention sample by sample, and says that it is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@cases(SIMPLE, NORMALISED, ATTENTION, RESIDUAL, TRANSPOSED)
def test_same_as_torch_func(case, dtype):
    model, batch = make(case, dtype)

    def loss(parameters, x, y):
        return losses(functional_call(model, parameters, (x[None],)), y[None]).sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    theirs = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, *batch)
    assert_same_quantities(model, batch, theirs, dtype)


def backward_of_sum(model, batch):
    """By opacus or BackPACK, both of which hook layers whose inputs need no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        losses(model(batch[0]), batch[1]).sum().backward()


def by_opacus(model, batch):
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(model, loss_reduction="sum")
    backward_of_sum(model, batch)
    return {name.removeprefix("_module."): p.grad_sample for name, p in model.named_parameters()}


@needs_opacus
@cases(SIMPLE, NORMALISED, RESIDUAL, TRANSPOSED, BAGS)
def test_same_as_opacus(case, dtype):
    model, batch = make(case, dtype)
    assert_same_quantities(model, batch, by_opacus(copy.deepcopy(model), batch), dtype)


@needs_opacus
@cases(RECURRENT)
def test_same_as_opacus_own_recurrent_layers(case, dtype):
    """nn.LSTM is opaque to opacus; its DPLSTM has the same parameters and the same outputs."""
    from opacus.layers import DPLSTM, DPRNN

    model, batch = make(case, dtype)
    private = copy.deepcopy(model)
    layer = DPLSTM if isinstance(model[1], nn.LSTM) else DPRNN
    private[1] = layer(4, 4, batch_first=True).to(dtype)
    private[1].load_state_dict(model[1].state_dict())
    torch.testing.assert_close(private(batch[0]), model(batch[0]))
    assert_same_quantities(model, batch, by_opacus(private, batch), dtype)


@needs_opacus
@pytest.mark.parametrize("dtype", [*RELATIVE], ids=str)
def test_same_as_opacus_own_attention(dtype):
    from opacus.layers import DPMultiheadAttention

    case = sequence(lambda: SelfAttention(DPMultiheadAttention(4, 2, batch_first=True)), Rows), tokens(5)
    model, batch = make(case, dtype)
    theirs = by_opacus(copy.deepcopy(model), batch)
    # Keys shifted alike for all queries change nothing: rounding is all there is to compare.
    name = "1.attention.klinear.bias"
    ours = per_sample_grads(model, batch, losses)
    assert ours[name].abs().max() < RELATIVE[dtype] * ours["1.attention.vlinear.bias"].abs().max()
    model.get_parameter(name).requires_grad_(False)
    del theirs[name]
    assert_same_quantities(model, batch, theirs, dtype)


@needs_opacus
@cases(SIMPLE, NORMALISED, BAGS)
def test_norms_same_as_opacus_ghost_clipping(case, dtype):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, batch = make(case, dtype)
    private = GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum")
    backward_of_sum(private, batch)
    assert_close(per_sample_grad_norms(model, batch, losses), private.get_norm_sample(), dtype)


def by_backpack(model, batch, extension, field):
    from backpack import backpack, extend

    model, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        with backpack(extension):
            loss(model(batch[0]), batch[1]).backward()
    return {name: getattr(p, field) for name, p in model.named_parameters()}


def backpack_cannot(name, dtype):
    """BackPACK 1.7 makes embeddings' gradients in float32 only."""
    return name == "embedding" and dtype == torch.float64


def backpack_norms_cannot(name, dtype):
    """Its BatchL2Grad of a grouped convolution is not the square of its own BatchGrad: about twice that."""
    return name == "conv2d, groups" or backpack_cannot(name, dtype)


@needs_backpack
@cases(SIMPLE, TRANSPOSED, without=backpack_cannot)
def test_same_as_backpack_batch_grad(case, dtype):
    """Pairwise dots too: BackPACK's BatchDotGrad, in none of its releases up to 1.7.1, multiplies these gradients."""
    from backpack.extensions import BatchGrad

    model, batch = make(case, dtype)
    theirs = by_backpack(copy.deepcopy(model), batch, BatchGrad(), "grad_batch")
    assert_same_quantities(model, batch, theirs, dtype)


@needs_backpack
@cases(SIMPLE, TRANSPOSED, without=backpack_norms_cannot)
def test_same_as_backpack_batch_l2_grad(case, dtype):
    from backpack.extensions import BatchL2Grad

    model, batch = make(case, dtype)
    theirs = by_backpack(copy.deepcopy(model), batch, BatchL2Grad(), "batch_l2")
    ours = per_sample_grad_norms(model, batch, losses, per_parameter=True)
    assert set(ours) == set(theirs)
    for name, squares in theirs.items():
        assert_close(ours[name].square(), squares, dtype)
