"""The layers that UNet and VAE share.

Shapes: B pictures, C channels, H x W pixels, T channels of the time embedding. `linear`, `upsample_conv` and GroupNorm
compute what PyTorch's own do, on a CPU faster or more precisely.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On x86, PyTorch multiplies float32 matrices with MKL, which on AMD's processors does half of what they can.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def silu(x: Tensor) -> Tensor:
    """SiLU(x) = x σ(x). Overwrites x where no gradients are kept: call it on fresh tensors only."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (..., C) and (C', C) -> (..., C'). On x86 as a convolution, two and a half times as fast on AMD.

    A linear layer is a 1x1 convolution over a picture whose pixels are the rows of x, and convolutions go to oneDNN.
    PyTorch does so from a batch of 16 on, hence 16 pictures of one column each.
    """
    rows = x.shape[:-1].numel()
    if not (ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and rows >= 128 and rows % 16 == 0):
        return F.linear(x, weight, bias)
    pictures = x.reshape(16, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (16, C, rows / 16, 1) in channels-last memory
    return F.conv2d(pictures, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What Upsample computes, with 4/9 of its multiplications: (B, C, H, W) -> (B, C', 2H, 2W).

    In a picture of repeated pixels, two of the three taps in each direction always see the same pixel, so they may be
    added up beforehand. What is left are four 2x2 convolutions over x, one for each pixel of a 2x2 square:
    on its first row (or column) the taps are w₀ and w₁ + w₂, on its second w₀ + w₁ and w₂.
    """
    height, width = x.shape[2:]
    w0, w1, w2 = weight.unbind(2)
    rows = (torch.stack([w0, w1 + w2], dim=2), torch.stack([w0 + w1, w2], dim=2))  # (C', C, 2, 3) each
    out = None
    for i, row in enumerate(rows):
        w0, w1, w2 = row.unbind(3)
        for j, taps in enumerate(([w0, w1 + w2], [w0 + w1, w2])):
            kernel = torch.stack(taps, dim=3).contiguous(memory_format=torch.channels_last)
            # With a border of 1 the result has one row and one column too many, at the other end for each phase.
            y = F.conv2d(x, kernel, bias, padding=1)[:, :, i : i + height, j : j + width]
            if out is None:
                out = y.new_empty(len(x), 2 * height, 2 * width, len(weight)).permute(0, 3, 1, 2)  # channels last
            out[:, :, i::2, j::2] = y
    return out


def group_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels: (B, C, H, W) -> (B, groups) twice, in float64.

    For channels-last memory PyTorch's group norm adds up x and x² of a whole picture in float32 and loses half of the
    digits on the way. Here strips of 512 pixels are taken by themselves and put together in float64: E[x²] - E[x]².
    """
    rows = max(512 // x.shape[3], 1)
    means, squares = [], []
    for picture in x.split(1):
        strips = picture.split(rows, dim=2)
        found = [torch.batch_norm_update_stats(strip, None, None, 0) for strip in strips]  # mean and variance, (C,)
        mean, variance = (torch.stack(one).double() for one in zip(*found, strict=True))  # (strips, C)
        share = torch.tensor([s.shape[2] / x.shape[2] for s in strips], dtype=torch.float64)
        means.append((share @ mean).unflatten(0, (groups, -1)).mean(1))
        squares.append((share @ (variance + mean**2)).unflatten(0, (groups, -1)).mean(1))
    mean = torch.stack(means)
    return mean, torch.stack(squares) - mean**2


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """(x - mean) / √(variance + eps) per group of channels, scaled and shifted: (B, C, H, W) both (Wu & He 2018)."""

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """`overwrite`: nobody else needs x, so the result may take its place where no gradients are kept."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        mean, variance = group_statistics(x, self.num_groups)
        # All in one multiplication and addition: x scale + (bias - mean scale), scale being weight / √(variance + eps).
        scale = (variance + self.eps).rsqrt().repeat_interleave(x.shape[1] // self.num_groups, dim=1) * self.weight
        shift = self.bias - mean.repeat_interleave(x.shape[1] // self.num_groups, dim=1) * scale
        scale, shift = (s.float()[:, :, None, None] for s in (scale, shift))  # (B, C, 1, 1)
        return torch.addcmul(shift, x, scale, out=x if overwrite else None)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))): (B, C, H, W) -> (B, C', H, W), as in Ho et al. 2020.

    `time_channels` None: a block without time, as in the VAE.
    """

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time`: SiLU of the time embedding, (B, T) or (1, T)."""
        h = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h += self.time_emb_proj(time)[:, :, None, None]
        h = silu(self.norm2(h, overwrite=True))
        h = self.conv2(h)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A convolution of stride 2: (B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉).

    The UNet pads every side by 1; the VAE's encoder, `padding=0`, pads right and bottom only.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W), or `size` of 2H - 1, 2W - 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        double = (2 * x.shape[2], 2 * x.shape[3])
        pixels = len(x) * x.shape[2] * x.shape[3]  # below about a thousand, adding up the taps costs more than it saves
        if size in (None, double) and x.device.type == "cpu" and x.dtype == torch.float32 and pixels > 1024:
            return upsample_conv(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, size=size or double, mode="nearest"))
