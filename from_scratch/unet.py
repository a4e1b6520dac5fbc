"""The UNet that predicts the noise in latents (Rombach et al. 2022).

Down through the levels, each half the size of the one before, then up again; every layer on the way up also sees what
the layer across the U saw on the way down. Shapes: B pictures, C channels, H x W latents, M words of D channels.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from from_scratch.attention import CrossAttention, SpatialTransformer
from from_scratch.layers import Downsample, GroupNorm, ResidualBlock, Upsample, silu

EPS = 1e-5  # of the group norms of residual blocks and output; a spatial transformer's is 1e-6

KeysValues = tuple[Tensor, Tensor]


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """[cos(t ω₀), ..., cos(t ωₙ), sin(t ω₀), ..., sin(t ωₙ)] with ωᵢ = 10000^(-i/n): (B,) -> (B, channels), n = half.

    The wavelengths of Vaswani et al. 2017, with cosine first, as Stable Diffusion was trained.
    """
    half = channels // 2
    # In this order of operations, in float32: at t = 981, the last bit of ω moves the angle by 0.0001.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class DownBlock(nn.Module):
    """One level on the way down: (B, C, H, W) -> (B, C', H/2, W/2), and what each layer saw, for the way up.

    `heads` None: no attention at this level; `last`: no change of size.
    """

    def __init__(self, channels, out_channels, layers, time_channels, context_channels, heads, groups, last):
        super().__init__()
        widths = [channels] + [out_channels] * layers
        self.resnets = nn.ModuleList([ResidualBlock(a, b, groups, EPS, time_channels) for a, b in pairwise(widths)])
        self.attentions = nn.ModuleList(
            [SpatialTransformer(out_channels, context_channels, heads, groups) for _ in range(layers if heads else 0)]
        )
        self.downsample = None if last else Downsample(out_channels, padding=1)

    def forward(self, x: Tensor, time: Tensor, words: Iterator[KeysValues]) -> tuple[Tensor, list[Tensor]]:
        """`words` gives every attention layer its keys and values, in order."""
        skips = []
        for n, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[n](x, next(words))
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom of the U: residual block, attention, residual block, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, time_channels, context_channels, heads, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups, EPS, time_channels) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialTransformer(channels, context_channels, heads, groups)])

    def forward(self, x: Tensor, time: Tensor, words: Iterator[KeysValues]) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), next(words))
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: (B, C, H, W) and one skip a layer -> (B, C', 2H, 2W).

    `widths` are the channels that each layer reads, its skip included.
    """

    def __init__(self, widths, out_channels, time_channels, context_channels, heads, groups, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(w, out_channels, groups, EPS, time_channels) for w in widths])
        self.attentions = nn.ModuleList(
            [SpatialTransformer(out_channels, context_channels, heads, groups) for _ in (widths if heads else [])]
        )
        self.upsample = None if last else Upsample(out_channels)

    def forward(self, x: Tensor, time: Tensor, words: Iterator[KeysValues], skips: list[Tensor]) -> Tensor:
        """Takes its skips from the end of the list. The next one gives the size to grow to, in case it was odd."""
        for n, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[n](x, next(words))
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[2:])


class UNet(nn.Module):
    """ε(x, t, prompt): latents (B, in_channels, H, W) -> the noise in them (B, out_channels, H, W).

    `widths` are the channels of each level, from the latents' size down; `layers` the layers per level on the way down
    (one more on the way up); `heads[n]` the attention heads at level n, None where it has no attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        layers: int,
        context_channels: int,
        heads: list[int | None],
        mid_heads: int,
        groups: int,
    ):
        super().__init__()
        self.in_channels = in_channels
        last = len(widths) - 1
        time_channels = 4 * widths[0]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleList(
            [nn.Linear(widths[0], time_channels), nn.Linear(time_channels, time_channels)]
        )
        shared = {"time_channels": time_channels, "context_channels": context_channels, "groups": groups}
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(widths[max(n - 1, 0)], w, layers, heads=heads[n], last=n == last, **shared)
                for n, w in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], heads=mid_heads, **shared)
        # What the skips will hold, in the order in which they are made: conv_in, then the layers and downsamplings.
        skips = [widths[0]]
        for n, w in enumerate(widths):
            skips += [w] * (layers + (n < last))
        self.up_blocks = nn.ModuleList()
        x = widths[-1]
        for n in reversed(range(len(widths))):
            reads = [skips.pop() + (widths[n] if layer else x) for layer in range(layers + 1)]
            self.up_blocks.append(UpBlock(reads, widths[n], heads=heads[n], last=n == 0, **shared))
            x = widths[n]
        self.conv_norm_out = GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """The prompt's embeddings (B, M, D) -> keys and values for every cross-attention layer, from first to last."""
        return [m.keys_values(context) for m in self.modules() if isinstance(m, CrossAttention)]

    def embed(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) or (1,) -> SiLU of their embedding, (B, 4 · widths[0]), as every residual block reads it."""
        first, second = self.time_embedding
        time = timestep_embedding(timesteps, first.in_features).to(first.weight.dtype)
        return silu(second(silu(first(time))))

    def forward(self, x: Tensor, timesteps: Tensor | float, context: Tensor | list[KeysValues]) -> Tensor:
        """`timesteps` in 0..999, one for all or (B,); `context` (B, M, D), or what `keys_values` made of it.

        H and W may be any size that the levels can halve or round up; the output is as large as the input.
        """
        words = iter(context if isinstance(context, list) else self.keys_values(context))
        time = self.embed(torch.as_tensor(timesteps, device=x.device).reshape(-1))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, words)
            skips += more
        x = self.mid_block(x, time, words)
        for block in self.up_blocks:
            x = block(x, time, words, skips)
        return self.conv_out(silu(self.conv_norm_out(x, overwrite=True)))
