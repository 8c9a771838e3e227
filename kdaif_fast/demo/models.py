"""Small networks for the examples: for 8 x 8 digits, and for sentences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cnn(width: int = 16, classes: int = 10) -> nn.Module:
    """A convolutional network for small grey images [N, 1, H, W], H and W at least 4: [N, classes].

    Two convolutions with a pooling after each, and a linear layer; GroupNorm, so that every sample has a gradient of
    its own.

    Example:
        >>> cnn(width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(1, 2 * width),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


def mlp(inputs: int = 64, hidden: Sequence[int] = (32,), classes: int = 10) -> nn.Module:
    """A multi-layer perceptron on samples of `inputs` numbers in any shape: [N, classes].

    Example:
        >>> mlp(hidden=[16, 16])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class Transformer(nn.Module):
    """A small transformer that classifies sequences of tokens: `transformer`."""

    def __init__(self, vocabulary: int, classes: int, width: int, layers: int, heads: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)  # torch's own 1.0 drowns what few sentences can teach
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, classes], of token ids [N, L] and a mask [N, L] that is 1 at tokens and 0 at padding."""
        if input_ids.shape[1] > self.longest:
            raise ValueError(f"input_ids has {input_ids.shape[1]} tokens a sample, expected at most {self.longest}")
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        is_token = attention_mask.bool()
        for block in self.blocks:
            x = block(x, is_token)
        weight = attention_mask.to(x.dtype)[..., None]
        pooled = (self.norm(x) * weight).sum(1) / weight.sum(1)
        return self.head(pooled)


class _Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        """[N, L, width]; tokens look at tokens only, not at padding."""
        N, L, width = x.shape
        parts = self.mix(self.first_norm(x)).view(N, L, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=is_token[:, None, None, :])
        x = x + self.out(seen.transpose(1, 2).reshape(N, L, width))
        return x + self.down(nn.functional.gelu(self.up(self.second_norm(x))))


def transformer(
    vocabulary: int, classes: int = 2, width: int = 32, layers: int = 2, heads: int = 4, longest: int = 64
) -> nn.Module:
    """A transformer for ({"input_ids", "attention_mask"}, label) batches: [N, classes]; padding changes nothing.

    Args:
        vocabulary: number of token ids.
        classes: number of classes.
        width: of the embeddings; a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of each.
        longest: number of positions.

    Example:
        >>> model = transformer(vocabulary=10, width=8, heads=2)
        >>> ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
        >>> model(input_ids=ids, attention_mask=mask).shape
        torch.Size([2, 2])
    """
    if width % heads:
        raise ValueError(f"width is {width}, expected a multiple of heads, {heads}")
    return Transformer(vocabulary, classes, width, layers, heads, longest)
