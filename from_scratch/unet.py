"""The UNet that predicts the noise in latents (Rombach et al. 2022).

Down through the levels, each half the size of the one before, then up again; every layer on the way up also sees what
the layer across the U saw on the way down. Shapes: B pictures, C channels, H x W latents; the context, which is the
embedded prompt, has M tokens of D channels.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from from_scratch.attention import SpatialTransformer
from from_scratch.layers import Downsample, ResidualBlock, Upsample

EPS = 1e-5  # of the group norms of residual blocks and output; a spatial transformer's is 1e-6


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
    """One level on the way down: (B, C, H, W) -> (B, C', H/2, W/2), and what each layer saw, for the way up."""

    def __init__(self, channels, out_channels, layers, time_channels, context_channels, heads, groups, last):
        super().__init__()
        widths = [channels] + [out_channels] * layers
        attentions = (SpatialTransformer(out_channels, context_channels, heads, groups) for _ in range(layers))
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups, EPS, time_channels) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(attentions if heads else [])
        self.downsample = None if last else Downsample(out_channels, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for n, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[n](x, context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom of the U: residual block, attention, residual block, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, time_channels, context_channels, heads, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups, EPS, time_channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, context_channels, heads, groups)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpBlock(nn.Module):
    """One level on the way up: (B, C, H, W) and one skip a layer -> (B, C', 2H, 2W).

    `widths` are the channels that each layer reads, its skip included.
    """

    def __init__(self, widths, out_channels, time_channels, context_channels, heads, groups, last):
        super().__init__()
        attentions = (SpatialTransformer(out_channels, context_channels, heads, groups) for _ in widths)
        self.resnets = nn.ModuleList(ResidualBlock(w, out_channels, groups, EPS, time_channels) for w in widths)
        self.attentions = nn.ModuleList(attentions if heads else [])
        self.upsample = None if last else Upsample(out_channels)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes its skips from the end of the list. The next one gives the size to grow to, in case it was odd."""
        for n, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[n](x, context)
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[2:])


class UNet(nn.Module):
    """ε(x, t, prompt): latents (B, in_channels, H, W) -> the noise in them (B, out_channels, H, W).

    `widths` are the channels of each level, from the latents' size down; `layers` the layers per level on the way down
    (one more on the way up); `heads[n]` the attention heads at level n, None where it has no attention.
    """

    def __init__(self, in_channels, out_channels, widths, layers, context_channels, heads, mid_heads, groups):
        super().__init__()
        self.context_channels, time_channels = context_channels, 4 * widths[0]
        shared = {"time_channels": time_channels, "context_channels": context_channels, "groups": groups}
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleList(nn.Linear(c, time_channels) for c in (widths[0], time_channels))
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        channels, last = widths[0], len(widths) - 1
        skips = [channels]  # the channels of what the skips will hold: conv_in, then the layers and downsamplings
        for n, width in enumerate(widths):
            self.down_blocks.append(DownBlock(channels, width, layers, heads=heads[n], last=n == last, **shared))
            skips += [width] * (layers + (n < last))
            channels = width
        self.mid_block = MidBlock(channels, heads=mid_heads, **shared)
        for n, width in reversed(list(enumerate(widths))):
            reads = [skips.pop() + (width if layer else channels) for layer in range(layers + 1)]
            self.up_blocks.append(UpBlock(reads, width, heads=heads[n], last=n == 0, **shared))
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, EPS)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def embed(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) or (1,) -> SiLU of their embedding, (B, 4 · widths[0]), as every residual block reads it."""
        first, second = self.time_embedding
        time = timestep_embedding(timesteps, first.in_features).to(first.weight.dtype)
        return F.silu(second(F.silu(first(time))))

    def forward(self, x: Tensor, timesteps: Tensor | float, context: Tensor) -> Tensor:
        """x (B, in_channels, H, W) of any size, context (B, M, D), `timesteps` in 0..999, one for all or (B,)."""
        time = self.embed(torch.as_tensor(timesteps, device=x.device).reshape(-1))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, seen = block(x, time, context)
            skips += seen
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
