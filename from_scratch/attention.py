"""Attention, and the transformer blocks that bring the prompt into the UNet.

Shapes: B pictures, N tokens (pixels of a feature map, or words), C channels, M words of the prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from from_scratch.layers import GroupNorm, Linear, linear


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √d) V for each head of width d = C / heads (Vaswani et al. 2017, eq. 1).

    query (B, N, C), key and value (B, M, C) -> (B, N, C). `causal`: token n sees tokens 0..n only.
    The fused kernel never holds the whole (N, M) table, which at 512x512 would be 4096 x 4096 numbers for every head.
    """
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The table that `attention` does not keep: softmax(Q Kᵀ / √d), (B, N, C) and (B, M, C) -> (B, heads, N, M)."""
    q, k = split_heads(query, heads), split_heads(key, heads)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel: (B, N, C) -> (B, N, C). Queries, keys and values have no bias."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class CrossAttention(nn.Module):
    """Every pixel looks at every word. Keys and values come from the prompt, which stays the same from step to step:
    `keys_values` is computed once a picture and handed to every call.
    """

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = Linear(channels, channels)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt (B, M, context channels) -> keys and values, (B, M, C) each."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return self.to_out(attention(self.to_q(x), *keys_values, self.heads))


class FeedForward(nn.Module):
    """GEGLU(x) = (x W + b) ⊙ GELU(x V + c), then a linear layer (Shazeer 2020): (B, N, C) -> (B, N, C).

    GELU is the exact x Φ(x); its tanh approximation is what many copies get wrong.
    """

    def __init__(self, channels: int, factor: int = 4):
        super().__init__()
        self.proj_in = Linear(channels, 2 * factor * channels)
        self.proj_out = Linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # W and V lie one above the other in one matrix. Taken apart, each product is a tensor of its own, which GELU
        # and ⊙ may overwrite; at 512x512 each of them is 42 MB a picture, and fresh memory costs more than the sums.
        weight, gate_weight = self.proj_in.weight.chunk(2)
        bias, gate_bias = self.proj_in.bias.chunk(2)
        gate = linear(x, gate_weight, gate_bias)
        gate = F.gelu(gate) if torch.is_grad_enabled() else torch.ops.aten.gelu_(gate)
        return self.proj_out(gate.mul_(linear(x, weight, bias)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on normalised input and added to it: (B, N, C) both."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = SelfAttention(channels, heads)
        self.attn2 = CrossAttention(channels, context_channels, heads)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        # `a.add_(b)` writes into a layer's fresh output, which no gradient needs: one tensor less each time.
        x = self.attn1(self.norm1(x)).add_(x)
        x = self.attn2(self.norm2(x), keys_values).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, context_channels: int, heads: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the UNet's residual blocks
        self.proj_in = Linear(channels, channels)  # in the files a 1x1 convolution, which is the same thing
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads)])
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        height = x.shape[2]
        # (B, C, H, W) -> (B, H·W, C); in channels-last memory, a pixel's channels side by side, nothing is moved.
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            h = block(h, keys_values)
        return self.proj_out(h).unflatten(1, (height, -1)).permute(0, 3, 1, 2).add_(x)
