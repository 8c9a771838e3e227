"""Bare parameters of user modules, in every operation in which people let them meet the samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo import CLASSES, add

T, D = 5, 4


class Bare(nn.Module):
    """A function of named parameters and of x [N, T, D], followed by a head."""

    def __init__(self, function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], features: int):
        super().__init__()
        self.function = function
        self.before = nn.Linear(D, D)
        self.bare = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.before(x), **dict(self.bare.items()))
        return self.head(torch.tanh(y).flatten(1))


def bare(name: str, function: Callable[..., Tensor], features: int = T * D, **shapes: tuple[int, ...]) -> None:
    add(name, lambda: Bare(function, shapes, features), lambda n: torch.randn(n, T, D))


# Elementwise, broadcast in every way
bare("scale and shift", lambda x, scale, shift: x * scale + shift, scale=(D,), shift=(D,))
bare("scale of every position", lambda x, scale: scale * x, scale=(T, 1))
bare("scalar", lambda x, s: x * s - s, s=())
bare("scalar of one element", lambda x, s: x - s * x.exp(), s=(1,))
bare("scalar of shape 1, 1, 1", lambda x, s: x * s, s=(1, 1, 1))
bare("temperature", lambda x, t: F.softmax(x / t, -1), t=(1,))
bare("reciprocal of a parameter", lambda x, t: x / (1 + t * t), t=(D,))
bare("parameter divided by samples", lambda x, t: t / (2 + x.tanh()), t=(D,))
bare("parameter minus samples", lambda x, t: torch.rsub(x, t, alpha=2), t=(D,))
bare("sum with alpha", lambda x, t: torch.add(x, t, alpha=-3), t=(T, D))
bare("power with a learned exponent", lambda x, p: x.sigmoid() ** p, p=(D,))
bare("power of a learned base", lambda x, p: p.sigmoid() ** x, p=(D,))
bare("where", lambda x, t: torch.where(x > 0, x, t), t=(D,))
bare("where, both learned", lambda x, s, t: torch.where(x > 0, s, t), s=(T, D), t=())
bare("maximum", lambda x, t: torch.maximum(x, t), t=(D,))
bare("clamp", lambda x, low, high: torch.clamp(x, low, low + high.exp()), low=(D,), high=(D,))
bare("interpolation by a learned gate", lambda x, g: torch.lerp(x, x.sin(), g.sigmoid()), g=(D,))
bare("addcmul", lambda x, s, t: torch.addcmul(t, x, s, value=0.5), s=(D,), t=(D,))
bare("addcdiv", lambda x, s, t: torch.addcdiv(t, x, s.exp(), value=2.0), s=(D,), t=(D,))
bare("learned leaky slope", lambda x, s: torch.where(x > 0, x, s * x), s=(T, 1))
bare("swish with a learned slope", lambda x, s: x * torch.sigmoid(s * x), s=())
bare("periodic activation", lambda x, a: x + torch.sin(a * x) ** 2 / (a.abs() + 0.1), a=(D,))
bare("atan2", lambda x, t: torch.atan2(x, t), t=(D,))
bare("layer scale and residual", lambda x, g: x + g * torch.tanh(x), g=(D,))
bare("x + its own bias in place", lambda x, t: x.clone().add_(t), t=(D,))
bare("scaled in place", lambda x, s: x.clone().mul_(s), s=(D,))

# Tokens and positions
bare(
    "class token in front", lambda x, c: torch.cat([c.expand(len(x), -1, -1), x], 1), features=(T + 1) * D, c=(1, 1, D)
)
bare("class token, repeated", lambda x, c: torch.cat([x, c.repeat(len(x), 1, 1)], 1), features=(T + 2) * D, c=(1, 2, D))
bare("token stacked", lambda x, c: torch.stack([x[:, 0], c.expand(len(x), D)], 1), features=2 * D, c=(D,))
bare("positions added", lambda x, p: x + p, p=(1, T, D))
bare("positions looked up", lambda x, p: x + F.embedding(torch.arange(T), p), p=(T + 2, D))
bare(
    "positions of every sample looked up", lambda x, p: x + F.embedding(torch.arange(T).expand(len(x), T), p), p=(T, D)
)
bare("positions cut out", lambda x, p: x + p[1 : T + 1], p=(T + 2, D))
bare("positions broadcast, looked up once", lambda x, p: x + F.embedding(torch.arange(T)[None], p), p=(T, D))
bare("rows by the sample's own index", lambda x, p: x + p[x.argmax(-1)], p=(D, D))
bare("index_select", lambda x, p: x + p.index_select(0, x.argmax(-1).flatten()).view_as(x), p=(D, D))
bare("gathered columns", lambda x, p: p.expand(len(x), T, D).gather(2, x.argsort(-1)), p=(T, D))
bare("relative position bias", lambda x, b: _attend(x, b[:, _distances()]), b=(2, 2 * T - 1))


def _distances() -> Tensor:
    at = torch.arange(T)
    return at[:, None] - at + T - 1


def _attend(x: Tensor, bias: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, D // 2)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) + bias
    return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


def _first_position_replaced(x: Tensor, token: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = token
    return y


def _masked_positions_replaced(x: Tensor, token: Tensor) -> Tensor:
    y = x.clone()
    y[x[..., 0] > 0] = token
    return y


bare("token assigned in place", _first_position_replaced, token=(D,))
bare("token assigned in place under a mask", _masked_positions_replaced, token=(D,))
bare("token filled in", lambda x, t: x.masked_fill(x > 0.5, t), t=())
bare("padded with nothing but the parameter", lambda x, t: F.pad(x, (0, 1)) + t, features=T * (D + 1), t=(D + 1,))

# Products
bare("x @ w", lambda x, w: x @ w, features=T * 3, w=(D, 3))
bare("w @ x", lambda x, w: w @ x, features=3 * D, w=(3, T))
bare("x @ vector", lambda x, w: x @ w, features=T, w=(D,))
bare("x @ w transposed, by hand", lambda x, w: x @ w.t().contiguous(), features=T * 3, w=(3, D))
bare("row vectors @ w", lambda x, w: x[:, 0] @ w, features=3, w=(D, 3))
bare("samples as columns", lambda x, w: (w @ x[:, 0].t()).t(), features=3, w=(3, D))
bare("addmm with scales", lambda x, w, b: torch.addmm(b, x[:, 0], w, beta=2, alpha=0.5), features=3, w=(D, 3), b=(3,))
bare(
    "addmm with a bias of every row",
    lambda x, w, b: torch.addmm(b.expand(len(x), 3), x[:, 0], w),
    features=3,
    w=(D, 3),
    b=(1, 3),
)
bare("one matrix a position", lambda x, w: torch.einsum("ntd,tde->nte", x, w), features=T * 3, w=(T, D, 3))
bare(
    "one matrix a head",
    lambda x, w: torch.einsum("nthd,hde->nthe", x.unflatten(-1, (2, 2)), w),
    features=T * 6,
    w=(2, 2, 3),
)
bare("quadratic form", lambda x, w: torch.einsum("ntd,de,nse->nts", x, w, x), features=T * T, w=(D, D))
bare(
    "batched product with an expanded matrix",
    lambda x, w: torch.bmm(x, w.expand(len(x), D, 3)),
    features=T * 3,
    w=(D, 3),
)
bare("baddbmm", lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), D, 3)), features=T * 3, b=(1, 1, 3), w=(D, 3))
bare("tensordot", lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), features=3, w=(T, D, 3))
bare("outer product", lambda x, w: x[:, 0, :, None] * w, features=D * 3, w=(3,))
bare("low-rank update", lambda x, w, a, b: F.linear(x, w + a @ b), features=T * 3, w=(3, D), a=(3, 1), b=(1, D))
bare("weight under a mask", lambda x, w: F.linear(x, w * torch.ones(3, D).tril()), features=T * 3, w=(3, D))
bare(
    "weights of unit length",
    lambda x, w: F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)),
    features=T * 3,
    w=(3, D),
)
bare(
    "weight rounded, gradient passed straight through",
    lambda x, w: F.linear(x, w + (w.round() - w).detach()),
    features=T * 3,
    w=(3, D),
)
bare("weight of two parts", lambda x, v, w: F.linear(x, torch.cat([v, w])), features=T * 3, v=(1, D), w=(2, D))
bare("fused weight, split", lambda x, w: (x @ w[:, :D]) * (x @ w[:, D:]).sigmoid(), w=(D, 2 * D))
bare(
    "convolution with a computed kernel",
    lambda x, k: F.conv1d(x.transpose(1, 2), (k - k.mean((1, 2), True)) / k.std((1, 2), keepdim=True)),
    features=3 * 3,
    k=(3, D, 3),
)
bare("distances from centres", lambda x, c: torch.cdist(x, c.expand(len(x), -1, -1)), features=T * 3, c=(3, D))
bare("distances from centres, written out", lambda x, c: (x[:, :, None] - c).pow(2).sum(-1), features=T * 3, c=(3, D))
bare("cosines with prototypes", lambda x, c: F.cosine_similarity(x[:, :, None], c, dim=-1), features=T * 3, c=(3, D))

# Attention to learned things
bare(
    "learned queries",
    lambda x, q: F.scaled_dot_product_attention(q.expand(len(x), -1, -1), x, x),
    features=2 * D,
    q=(2, D),
)
bare(
    "learned keys and values",
    lambda x, k, v: F.scaled_dot_product_attention(x, k.expand(len(x), -1, -1), v.expand(len(x), -1, -1)),
    k=(3, D), v=(3, D),
)  # fmt: skip
bare("learned attention mask", lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), m=(T, T))
bare(
    "learned prefix",
    lambda x, p: _attend(torch.cat([p.expand(len(x), -1, -1), x], 1), torch.zeros(())),
    features=(T + 2) * D,
    p=(2, D),
)
bare("pooling by a learned query", lambda x, q: torch.einsum("nt,ntd->nd", (x @ q).softmax(1), x), features=D, q=(D,))

# Spectra, scans, images
bare(
    "filter of a spectrum",
    lambda x, f: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(f), n=T, dim=1),
    f=(T // 2 + 1, D, 2),
)
bare("causal decay", lambda x, a: torch.einsum("ts,nsd->ntd", _decay(a), x), a=())
bare("recurrence written out", lambda x, u, w: _recurrence(x, u, w), features=D, u=(D, D), w=(D, D))
bare(
    "learned image, sampled by the samples",
    lambda x, g: F.grid_sample(g.expand(len(x), -1, -1, -1), x[:, :, None, :2].tanh(), align_corners=False),
    features=2 * T,
    g=(1, 2, 3, 3),
)
bare("sorted parameter", lambda x, t: x * t.sort().values.cumsum(0), t=(D,))
bare("penalty that every sample pays", lambda x, t: x * (1 + t.pow(2).sum()), t=(3,))
bare("one linear map and elementwise", lambda x, w: (x @ w) * w.sum(0) + w[0], w=(D, D))
bare("parameter times itself by way of samples", lambda x, w: (x * w) @ torch.diag(w), w=(D,))
bare("layer norm with a shared scale", lambda x, g: F.layer_norm(x, (D,), g, g), g=(D,))
bare("layer norm with a computed scale", lambda x, g: F.layer_norm(x, (D,), 1 + g), g=(D,))
bare("group norm and bias of one parameter", lambda x, g: F.group_norm(x, 1, g, g.flip(0)), g=(T,))


def _decay(a: Tensor) -> Tensor:
    at = torch.arange(T)
    return (a.sigmoid() ** (at[:, None] - at).clamp(min=0)).tril()


def _recurrence(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
    state = x.new_zeros(len(x), D)
    for t in range(T):
        state = torch.tanh(x[:, t] @ u + state @ w)
    return state
