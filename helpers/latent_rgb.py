"""From latents to a small picture without decoding, by a linear map that is fitted to the VAE in use.

Each channel of a latent is close to a mixture of colours, so that the preview costs one matrix product.
"""

from dataclasses import dataclass

import diffusers
import torch

PICTURES, HELD_OUT = 48, 16  # made for the fit, the latter only for its R2
SIDE = 128  # pixels of each at most


@dataclass(frozen=True)
class LatentToRgb:
    """A linear map from latents, as the denoiser has them, to colours averaged over the VAE's factor."""

    weight: torch.Tensor  # (C, 3), float32 on the CPU
    bias: torch.Tensor  # (3,)
    r2: float  # of the colours' variance, the share that it explains in pictures that it was not fitted to

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., C, h, w) of any dtype and device to colours (..., 3, h, w), about -1 to 1, on the CPU."""
        return torch.einsum("...chw,cr->...rhw", latents.float().cpu(), self.weight) + self.bias[:, None, None]


@torch.no_grad()
def fit_rgb(vae: diffusers.AutoencoderKL, device: torch.device | None = None) -> LatentToRgb:
    """Fit the map by least squares to 32 pictures that this VAE encodes, and measure R2 on 16 others.

    The pictures are made on the spot and are the same for every call: what the VAE decodes from smooth random latents.
    A small VAE cannot encode just any picture, but these it can. Takes a second or two. `device` is where it computes,
    which for one that is offloaded is not where its weights are now.
    """
    config = vae.config
    shift = getattr(config, "shift_factor", None) or 0
    factor = 2 ** (len(config.block_out_channels) - 1)
    side = min(SIDE, config.sample_size) // factor
    coarse = torch.randn(PICTURES, config.latent_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(1.2 * coarse, (side, side), mode="bicubic")  # that lowers the variance
    latents, colours = [], []
    for few in (smooth / config.scaling_factor + shift).to(device or vae.device, vae.dtype).split(4):
        pictures = vae.decode(few).sample.clamp(-1, 1)
        latents.append((vae.encode(pictures).latent_dist.mode().double().cpu() - shift) * config.scaling_factor)
        colours.append(torch.nn.functional.avg_pool2d(pictures.double().cpu(), factor))
    # One row for each place of each picture.
    x, y = (torch.cat(maps).permute(0, 2, 3, 1).reshape(PICTURES, side**2, -1) for maps in (latents, colours))
    (x_test, x), (y_test, y) = ((z[:HELD_OUT].flatten(0, 1), z[HELD_OUT:].flatten(0, 1)) for z in (x, y))
    weight = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    bias = y.mean(0) - x.mean(0) @ weight
    unexplained = (x_test @ weight + bias - y_test).square().sum() / (y_test - y_test.mean(0)).square().sum()
    return LatentToRgb(weight.float(), bias.float(), 1 - unexplained.item())
