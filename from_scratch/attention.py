"""Attention, and the transformer blocks that bring the prompt into the UNet.

Shapes: B pictures, N pixels of a feature map, C channels; the context, the embedded prompt, has M tokens of D channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √d) V for each head of width d = C / heads (Vaswani et al. 2017, eq. 1):
    (B, N, C), (B, M, C) and (B, M, C) -> (B, N, C). `causal`: token n sees tokens 0..n only.

    PyTorch's function never holds the whole (N, M) table, which at 512x512 would be 4096 x 4096 numbers for every head.
    """
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The table that `attention` does not keep: softmax(Q Kᵀ / √d), (B, N, C) and (B, M, C) -> (B, heads, N, M)."""
    q, k = split_heads(query, heads), split_heads(key, heads)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Attention(nn.Module):
    """Every pixel of x looks at every token of the context: x (B, N, C) and context (B, M, D) -> (B, N, C).

    With x itself as the context it is self-attention. `bias`: whether queries, keys and values have one.
    """

    def __init__(self, channels: int, context_channels: int, heads: int, bias: bool = False, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(query, key, value, self.heads, self.causal))


class FeedForward(nn.Module):
    """GEGLU(x) = (x W + b) ⊙ GELU(x V + c), then a linear layer (Shazeer 2020): (B, N, C) -> (B, N, C).

    GELU is the exact x Φ(x); its tanh approximation is what many copies get wrong.
    """

    def __init__(self, channels: int, factor: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(channels, 2 * factor * channels)  # W and V, one above the other
        self.proj_out = nn.Linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(h * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on normalised input and added to it: (B, N, C) both."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context_channels, heads)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: x (B, C, H, W), context (B, M, D) -> (B, C, H, W)."""

    def __init__(self, channels: int, context_channels: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the UNet's residual blocks
        self.proj_in = nn.Linear(channels, channels)  # in the files a 1x1 convolution, which is the same thing
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, C, H, W) -> (B, H·W, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
