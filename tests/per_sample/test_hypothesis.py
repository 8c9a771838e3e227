"""Random stacks of layers, in either order of axes, with weights shared at random."""

import torch
from torch import nn

from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grad_norms, per_sample_grads, weighted_step
from tests.properties import given, settings, st

from .zoo import Case, assert_close, assert_same, flat, trainable

D, CLASSES = 4, 3


class OnChannels(nn.Module):
    """A layer of channels [N, D, T] for sequences [N, T, D]."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class PositionsFirst(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=True):
        super().__init__()
        self.network = kind(D, D, batch_first=batch_first)

    def forward(self, x):
        return self.network(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x * self.scale + self.shift


class Flattened(nn.Module):
    """All positions of all samples as rows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, D)).view_as(x)


class Residual(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


LAYERS = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "layer norm": lambda: nn.LayerNorm(D),
    "RMS norm": lambda: nn.RMSNorm(D),
    "group norm": lambda: OnChannels(nn.GroupNorm(2, D)),
    "batch norm": lambda: OnChannels(nn.BatchNorm1d(D)),
    "convolution": lambda: OnChannels(nn.Conv1d(D, D, 3, padding=1)),
    "depthwise": lambda: OnChannels(nn.Conv1d(D, D, 3, padding=1, groups=D)),
    "circular": lambda: OnChannels(nn.Conv1d(D, D, 2, padding="same", padding_mode="circular", dilation=2)),
    "transposed": lambda: OnChannels(nn.ConvTranspose1d(D, D, 3, padding=1)),
    "PReLU": lambda: OnChannels(nn.PReLU(D)),
    "scale": lambda: Scale(D),
    "scalar": lambda: Scale(),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM, positions first": lambda: PositionsFirst(Recurrent(nn.LSTM, batch_first=False)),
    "attention": Attention,
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 5, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "dropout": nn.Dropout,
}
OF_VECTORS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, Scale)  # whatever axes there are before the last
AROUND = {
    "": lambda layer: layer,
    "residual": Residual,
    "positions first": lambda layer: PositionsFirst(layer if isinstance(layer, OF_VECTORS) else PositionsFirst(layer)),
    "flattened": lambda layer: Flattened(layer) if isinstance(layer, OF_VECTORS) else layer,
}


class Stack(nn.Module):
    """The layers one after another; one that is named twice is called twice."""

    def __init__(self, names, arounds):
        super().__init__()
        shared = {}
        self.layers = nn.ModuleList()
        for name, around in zip(names, arounds, strict=True):
            if name not in shared:
                shared[name] = LAYERS[name]()
            self.layers.append(AROUND[around](shared[name]))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_stacks(data):
    names = data.draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5))
    arounds = [data.draw(st.sampled_from(sorted(AROUND))) for _ in names]
    sizes = [(data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))) for _ in range(2)]
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model = Stack(names, arounds).double().eval()
    case = Case(lambda: model, lambda n: None)
    for n, length in sizes:
        batch = (torch.randn(n, length, D).double(), torch.randint(CLASSES, (n,)))
        truth = case.truth(model, batch)
        assert_same(per_sample_grads(model, batch), truth, 1e-9)
        matrix = flat(truth)
        assert_close(per_sample_grad_norms(model, batch), matrix.norm(dim=1), 1e-9)
        v = torch.randn(matrix.shape[1]).double()
        assert_close(per_sample_grad_dots(model, batch, v), matrix @ v, 1e-9)
        weights = torch.rand(n).double()
        step = weighted_step(model, batch, weights, direction=v)
        assert_close(step.phi, -matrix @ v, 1e-9)
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()}
        assert_same(grads, {name: torch.einsum("n,n...->...", weights, g) / n for name, g in truth.items()}, 1e-9)
        model.zero_grad()
