"""What is here only for speed, on a CPU in float32: `speed_up` puts it in the place of the plain layers.

A CPU's convolutions are fastest where a pixel's channels lie side by side in memory ("channels last"), in which layout
PyTorch's group norm loses half of its digits. Each class computes what the plain one does, with the same weights, and
leaves other devices, other precisions and training to it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from from_scratch import layers


def speed_up(module: nn.Module) -> nn.Module:
    """Give the layers inside `module` their fast forms, and its weights their layout; returns the module."""
    fast = {nn.GroupNorm: GroupNorm, layers.Upsample: Upsample}
    for layer in module.modules():
        layer.__class__ = fast.get(type(layer), type(layer))  # another forward for the same weights
    return module.to(memory_format=torch.channels_last)


def suits(x: Tensor) -> bool:
    """Whether the fast form may be taken for this input."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def group_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels: (B, C, H, W) -> (B, groups) twice, in float64.

    PyTorch adds up x and x² of a whole channels-last picture in float32. Here strips of at most 512 pixels (or a row)
    are taken by themselves and put together in float64: E[x²] - E[x]².
    """
    strips = x.split(math.gcd(x.shape[2], max(512 // x.shape[3], 1)), dim=2)
    found = [torch.batch_norm_update_stats(one, None, None, 0) for strip in strips for one in strip.split(1)]
    found = torch.stack([torch.stack(pair) for pair in found]).double()  # (strips B, 2, C)
    mean, variance = found.view(len(strips), len(x), 2, groups, -1).unbind(2)
    return mean.mean((0, 3)), (variance + mean**2).mean((0, 3)) - mean.mean((0, 3)) ** 2


class GroupNorm(nn.GroupNorm):
    """(x - mean) / √(variance + eps) per group of channels, scaled and shifted: (B, C, H, W) both (Wu & He 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x) or x.numel() < 2**17:  # where the rearranging costs less than the many small steps below
            return super().forward(x.contiguous())
        mean, variance = group_statistics(x, self.num_groups)
        mean, variance = (s.repeat_interleave(x.shape[1] // self.num_groups, dim=1) for s in (mean, variance))  # (B, C)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return torch.addcmul(shift.float()[:, :, None, None], x, scale.float()[:, :, None, None])  # shift + x scale


class Upsample(layers.Upsample):
    """The same with 4/9 of the multiplications: among repeated pixels, two of the three taps in each direction always
    see the same pixel and may be added up beforehand; four 2x2 convolutions are left, one for each pixel of a square.
    """

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        few = len(x) * height * width < 512  # adding up the taps would cost more than it saves
        if few or size not in (None, (2 * height, 2 * width)) or not suits(x):
            return super().forward(x, size)
        # On the first row (or column) of a square the taps are w₀ and w₁ + w₂, on the second w₀ + w₁ and w₂.
        fold = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        kernels = torch.einsum("iau,jbv,ocuv->ijocab", fold, fold, self.conv.weight)
        out = x.new_empty(len(x), 2 * height, 2 * width, x.shape[1]).permute(0, 3, 1, 2)  # channels last
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            kernel = kernels[i, j].contiguous(memory_format=torch.channels_last)
            # With a border of 1 the result has a row and a column too many, at the other end for each phase.
            y = F.conv2d(x, kernel, self.conv.bias, padding=1)
            out[:, :, i::2, j::2] = y[:, :, i : i + height, j : j + width]
        return out
