"""The encoder of T5 (Raffel et al. 2019), in its version 1.1: token ids in, one vector a token out.

Shapes: B prompts, M tokens, C channels. No layer has a bias, no norm a mean.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from from_scratch.attention import split_heads

EPS = 1e-6


def distance_buckets(length: int, buckets: int, furthest: int = 128) -> Tensor:
    """Which bucket the way from token n to token m falls into: (length, length), 0 to buckets - 1.

    Half of the buckets are for tokens that come later. Of each half, the first half holds one distance each, and the
    others grow by a constant factor up to `furthest`; what is further away shares the last one.
    """
    way = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    half, exact, distance = buckets // 2, buckets // 4, way.abs()
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return (way > 0) * half + torch.where(distance < exact, distance, far)


class Norm(nn.RMSNorm):
    """x / √(mean x² + eps), scaled (Zhang & Sennrich 2019): float32 in, the precision of the weights out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


class Block(nn.Module):
    """Attention and a gated feed-forward network, each on normalised input and added to it: (B, M, C) -> (B, M, C).

    Both sums stay in float32, as the largest T5 grows beyond the 65504 of float16.
    """

    def __init__(self, channels: int, inner_channels: int, hidden_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(channels, EPS), Norm(channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner_channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner_channels, channels, bias=False)
        self.gate = nn.Linear(channels, hidden_channels, bias=False)
        self.proj_in = nn.Linear(channels, hidden_channels, bias=False)
        self.proj_out = nn.Linear(hidden_channels, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`bias` (1, heads, M, M) is added to Q Kᵀ, which is not divided by √d."""
        h = self.norm1(x)
        q, k, v = (split_heads(to(h), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = x + self.to_out(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        h = F.gelu(self.gate(h), approximate="tanh") * self.proj_in(h)  # GEGLU (Shazeer 2020)
        return x + F.linear(h.float(), self.proj_out.weight.float())


class T5Encoder(nn.Module):
    """Token ids (B, M) -> embeddings (B, M, C). There is no limit to M, and no padding mask.

    It knows no places, only distances: a number for each bucket of them and each head, the same in all blocks.
    """

    def __init__(self, vocabulary, channels, inner_channels, hidden_channels, layers, heads, buckets):
        super().__init__()
        # Without the random numbers that nn.Embedding draws; see CLIPTextEncoder.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(vocabulary, channels), freeze=False)
        self.position_bias = nn.Embedding.from_pretrained(torch.zeros(buckets, heads), freeze=False)
        blocks = (Block(channels, inner_channels, hidden_channels, heads) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.final_layer_norm = Norm(channels, EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        buckets = distance_buckets(tokens.shape[1], self.position_bias.num_embeddings).to(tokens.device)
        bias = self.position_bias(buckets).permute(2, 0, 1)[None]
        x = self.token_embedding(tokens).float()
        for block in self.blocks:
            x = block(x, bias)
        return self.final_layer_norm(x)
