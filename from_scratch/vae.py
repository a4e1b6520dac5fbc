"""The autoencoder (Kingma & Welling 2013, Rombach et al. 2022): pictures to latents, an eighth of their size, and back.

Shapes: B pictures, C channels, H x W pixels. An nn.Sequential runs its parts in the order in which they are set.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from from_scratch.attention import Attention
from from_scratch.layers import Downsample, ResidualBlock, Upsample

EPS = 1e-6  # of every group norm in here; the UNet's is 1e-5


class PixelAttention(Attention):
    """Self-attention with one head over all pixels of the smallest feature map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H·W, C)
        return x + super().forward(h, h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Residual block, attention, residual block: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Sequential):
    """Residual blocks at one size, then perhaps a change of size: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, resize: str | None):
        super().__init__()
        widths = [channels] + [out_channels] * layers
        self.resnets = nn.Sequential(*(ResidualBlock(a, b, groups, EPS) for a, b in pairwise(widths)))
        if resize == "down":
            self.downsample = Downsample(out_channels, padding=0)
        elif resize == "up":
            self.upsample = Upsample(out_channels)


class Encoder(nn.Sequential):
    """Pictures (B, 3, H, W) in [-1, 1] -> mean and log variance of the latents, (B, 2 · latent channels, H/8, W/8)."""

    def __init__(self, widths: list[int], layers: int, latent_channels: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        sizes = zip([widths[0], *widths], widths, ["down"] * (len(widths) - 1) + [None], strict=False)
        self.down_blocks = nn.Sequential(*(Level(a, b, layers, groups, resize) for a, b, resize in sizes))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.silu = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)


class Decoder(nn.Sequential):
    """Latents (B, latent channels, H/8, W/8) -> pictures (B, 3, H, W), about in [-1, 1]; `widths` as the encoder's."""

    def __init__(self, widths: list[int], layers: int, latent_channels: int, groups: int):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        sizes = zip([widths[0], *widths], widths, ["up"] * (len(widths) - 1) + [None], strict=False)
        self.up_blocks = nn.Sequential(*(Level(a, b, layers + 1, groups, resize) for a, b, resize in sizes))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.silu = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)


class VAE(nn.Module):
    """`encode` and `decode`. Of latents z the models see (z - shift) · scaling, with a variance of about 1.

    `widths` are the channels from the picture's size down to the latents'; `layers` the residual blocks per level.
    Stable Diffusion 1.5 has a 1x1 convolution on either side of the latents (`quant`) and no shift, 3 the opposite.
    """

    def __init__(self, widths, layers, latent_channels, groups, scaling_factor, shift_factor=0.0, quant=True):
        super().__init__()
        self.scaling_factor, self.shift_factor, self.latent_channels = scaling_factor, shift_factor, latent_channels
        self.factor = 2 ** (len(widths) - 1)  # pixels a latent, in each direction
        self.encoder = Encoder(widths, layers, latent_channels, groups)
        self.decoder = Decoder(widths, layers, latent_channels, groups)
        both = 2 * latent_channels
        self.quant_conv = nn.Conv2d(both, both, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant else nn.Identity()

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents of pictures (B, 3, H, W) in [-1, 1]."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents z = μ + σ noise, shifted and scaled; no noise: z = μ."""
        mean, deviation = self.distribution(images)
        z = mean if noise is None else mean + deviation * noise
        return self.scaling_factor * (z - self.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, latent channels, h, w) -> pictures (B, 3, h · factor, w · factor), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor + self.shift_factor))
