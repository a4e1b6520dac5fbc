"""Train the autoencoder: 64 times fewer positions, four numbers at each (Rombach et al., 2022)."""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from storybook.train import data
from training.loop import RUNS, Schedule, keep_log, train

# Nats are cheap: this weight keeps the noise that the posterior adds to a picture near
# KL_WEIGHT / 2 of squared error, far below the reconstruction error itself.
KL_WEIGHT = 4e-4
# Most steps see crops of this many pixels: the layers are convolutions, so more pictures teach them more.
# One step in four sees a few whole pictures, for the attention in the middle.
CROP = 64
# Things cover an eighth of a picture. Without more weight the backdrop is learned to the last shade
# while the things stay blurred.
THING_WEIGHT = 5.0


def new_vae(size: int, latent_channels: int = 4, widths=(32, 64, 96, 128)) -> AutoencoderKL:
    """A small AutoencoderKL with Stable Diffusion's factor of 8; `size` in pixels.

    Since its third version Stable Diffusion has 16 latent channels and no convolution around them.
    """
    quant = latent_channels == 4
    return AutoencoderKL(
        sample_size=size,
        latent_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


class VaeObjective(nn.Module):
    """Squared and absolute error of the round trip, weighted, and the KL divergence to a unit Gaussian."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images, weights, noise):
        """images (B, 3, H, W) in [-1, 1]; weights (B, 1, H, W); noise (B, C, H/8, W/8) draws from the posterior."""
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = (weights * (error.square() + 0.1 * error.abs())).mean() + KL_WEIGHT * kl
        return {"loss": loss, "squared": error.square().mean(), "kl": kl}


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of pictures (B, 3, H, W) in [-1, 1] (peak 2)."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))


def fine_detail(images: torch.Tensor) -> torch.Tensor:
    """Root of the share of each picture's power above half of Nyquist, (B,) in 0..1: small where it is blurred.

    images (B, 3, H, W); the mean is left out of the power.
    """
    spectrum = torch.fft.fft2(images.mean(1)).abs().square()
    spectrum[:, 0, 0] = 0
    y, x = (torch.fft.fftfreq(side).abs() for side in images.shape[-2:])
    fine = torch.maximum(y[:, None], x[None]) > 0.25  # cycles a pixel; Nyquist is 0.5
    return (spectrum[:, fine].sum(1) / spectrum.sum((1, 2))).sqrt()


def batches(images: np.ndarray, latent_channels: int):
    """make_batch for `loop.train`: crops or whole pictures, the weights of their pixels, noise for the posterior.

    images (N, size, size, 4) uint8, alpha 255 where the things are.
    """
    size = images.shape[1]

    def make_batch(indices, generator):
        whole = torch.rand((), generator=generator) < 0.25
        crop = size if whole else min(CROP, size)
        indices = indices[: max(1, len(indices) * CROP**2 // size**2)] if whole else indices
        corners = torch.randint(size - crop + 1, (len(indices), 2), generator=generator).tolist()
        chosen = np.stack([images[i, y : y + crop, x : x + crop] for i, (y, x) in zip(indices, corners, strict=True)])
        noise = torch.randn(len(indices), latent_channels, crop // 8, crop // 8, generator=generator)
        things = torch.from_numpy(chosen[..., 3]).unsqueeze(1) > 0
        pixels = data.to_tensor(chosen).contiguous(memory_format=torch.channels_last)
        return pixels, torch.where(things, THING_WEIGHT, 1.0), noise

    return make_batch


@torch.no_grad()
def glance(vae: AutoencoderKL, fresh: torch.Tensor, path: Path) -> None:
    """While it trains: prints PSNR and fine detail on fresh renders (N, 3, H, W); eight round trips go to `path`."""
    parts = [vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.cpu() for part in fresh.split(32)]
    decoded = torch.cat(parts).clamp(-1, 1)
    detail = (fine_detail(decoded) / fine_detail(fresh)).mean()
    print(f"\n{path.stem}: {psnr(decoded, fresh).mean():.2f} dB, {detail:.2f} of fine detail", flush=True)
    _, _, height, width = fresh.shape
    rows = torch.stack([fresh[:8], decoded[:8]]).permute(0, 3, 1, 4, 2).reshape(2 * height, 8 * width, 3)
    Image.fromarray(((rows + 1) * 127.5).round().byte().numpy()).save(path)


def main(argv=None) -> None:
    """Train and write a `vae` folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/storybook-sd/vae"))
    parser.add_argument("--name", default="vae")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--latent-channels", type=int, default=4, help="4, or 16 as in Stable Diffusion 3")
    parser.add_argument("--widths", type=int, nargs=4, default=(32, 64, 96, 128))
    parser.add_argument("--go-on-from", type=Path, help="a vae folder to start with, instead of random weights")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch-size", type=int, default=16, help="crops of 64 pixels, or as many pixels in pictures")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images = data.pictures("train", args.pictures, args.size)
    fresh = data.to_tensor(data.pictures("fresh", 256, args.size))
    if args.go_on_from:
        vae = AutoencoderKL.from_pretrained(args.go_on_from)
        vae.register_to_config(sample_size=args.size)
    else:
        vae = new_vae(args.size, args.latent_channels, args.widths)
    vae.to(memory_format=torch.channels_last)
    objective = VaeObjective(vae)
    schedule = Schedule(args.steps, args.batch_size, args.learning_rate, ema_decay=0.998)

    def sample(step):
        glance(vae, fresh, RUNS / args.name / f"samples-{step:06d}.png")

    make_batch = batches(images, args.latent_channels)
    run = train(args.name, objective, vae, make_batch, len(images), schedule, sample)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in fresh.split(32)])
    # the denoiser wants latents of unit variance; SD1.5 ships its own 1 / std here, 0.18215, SD3 its mean too
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if args.latent_channels != 4:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    vae.half().save_pretrained(args.out)
    keep_log(run, args.out)


if __name__ == "__main__":
    main()
