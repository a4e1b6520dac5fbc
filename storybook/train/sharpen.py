"""Sharpen a trained autoencoder's decoder: squared error alone leaves edges soft and flat areas wavy.

A small patch discriminator learns to tell renders from round trips, and the decoder to pass as a render
(Isola et al., 2017; Esser et al., 2021, for autoencoders). The encoder stays as it is, and with it every latent
and every denoiser that was trained on them. Some latents carry a little noise, since those that a denoiser draws
are never exact either.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from storybook.train import data, vae
from training.loop import RUNS, Schedule, keep_log, train

ADVERSARIAL_SHARE = 0.4  # of the discriminator's gradient on the pixels, beside that of the squared error
MOST_NOISE = 0.15  # in latents of unit variance


def new_discriminator(width: int = 32) -> nn.Sequential:
    """(B, 3, H, W) to one score for each patch of 26 pixels, high for renders; spectral norms keep it steady."""

    def convolution(inputs, outputs, side, stride):
        return spectral_norm(nn.Conv2d(inputs, outputs, side, stride, padding=1))

    return nn.Sequential(
        convolution(3, width, 4, 2),
        nn.LeakyReLU(0.2),
        convolution(width, 2 * width, 4, 2),
        nn.LeakyReLU(0.2),
        convolution(2 * width, 4 * width, 3, 1),
        nn.LeakyReLU(0.2),
        convolution(4 * width, 1, 3, 1),
    )


class SharpDecoding(nn.Module):
    """Squared and absolute error as in `vae.VaeObjective`, and the hinge losses of decoder and discriminator."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.vae = autoencoder
        self.vae.encoder.requires_grad_(False)
        if self.vae.quant_conv is not None:
            self.vae.quant_conv.requires_grad_(False)
        self.discriminator = new_discriminator()

    def forward(self, images, weights, noise):
        """images (B, 3, H, W) in [-1, 1]; weights (B, 1, H, W); noise (B, C, H/8, W/8) for posterior and decoder."""
        with torch.no_grad():
            posterior = self.vae.encode(images).latent_dist
            # from clean latents to the noisiest ones, evenly over the batch
            added = torch.linspace(0, MOST_NOISE, len(images), device=images.device).view(-1, 1, 1, 1)
            spread = (posterior.var + (added / self.vae.config.scaling_factor) ** 2).sqrt()
            latents = posterior.mean + spread * noise
        decoded = self.vae.decode(latents).sample.float()
        error = decoded - images
        pixels = (weights * (error.square() + 0.1 * error.abs())).mean()
        told_apart = (
            F.relu(1 - self.discriminator(images).float()).mean()
            + F.relu(1 + self.discriminator(decoded.detach()).float()).mean()
        )
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        passing = -functional_call(self.discriminator, frozen, (decoded,)).float().mean()
        # the two gradients on the pixels in a fixed proportion, whatever the losses' sizes
        # (Esser et al., eq. 7, who take those on the last layer)
        by_error, by_passing = (
            torch.autograd.grad(part, decoded, retain_graph=True)[0].norm() for part in (pixels, passing)
        )
        balance = ADVERSARIAL_SHARE * by_error / (by_passing + 1e-8)
        loss = pixels + balance * passing + told_apart
        return {"loss": loss, "squared": error.square().mean(), "told_apart": told_apart}


def main(argv=None) -> None:
    """Train the decoder of a `vae` folder on, and write it back."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--vae", type=Path, default=Path("models/storybook-sd/vae"))
    parser.add_argument("--name", default="sharpen")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=16, help="crops of 64 pixels, or as many pixels in pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    autoencoder = AutoencoderKL.from_pretrained(args.vae).to(memory_format=torch.channels_last)
    size, channels = autoencoder.config.sample_size, autoencoder.config.latent_channels
    images = data.pictures("train", args.pictures, size)
    fresh = data.to_tensor(data.pictures("fresh", 256, size))
    decoder = nn.ModuleList(part for part in (autoencoder.post_quant_conv, autoencoder.decoder) if part is not None)

    def sample(step):
        vae.glance(autoencoder, fresh, RUNS / args.name / f"samples-{step:06d}.png")

    schedule = Schedule(args.steps, args.batch_size, args.learning_rate, ema_decay=0.998)
    make_batch = vae.batches(images, channels)
    run = train(args.name, SharpDecoding(autoencoder), decoder, make_batch, len(images), schedule, sample)
    autoencoder.half().save_pretrained(args.vae)
    keep_log(run, args.vae, "sharpening_log.csv")


if __name__ == "__main__":
    main()
