"""Train storybook-sd: a UNet that predicts the noise in latents, given a caption (Ho et al., 2020).

Latents are cached (the VAE is fixed), one caption in ten is empty (Ho & Salimans, 2022, guidance),
the weights are averaged over time, and timesteps come as often as min-SNR weighting (Hang et al.,
2023, gamma 5) would weigh them: drawn evenly, the nearly clean ones crowd out those that decide what
the picture shows, and weighted they would cost as much and teach as little.
"""

import argparse
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from storybook.sample import glance
from storybook.train import clip, data
from training.loop import RUNS, Schedule, choose_attention_kernel, keep_log, make_accelerator, train

OUT = Path("models/storybook-sd")
MIN_SNR_GAMMA = 5.0
LEAST_SHARE = 0.15  # relative to the timesteps that come most often
# Stable Diffusion 1.5's own numbers, for training and for sampling
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SAMPLING = {**NOISE, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def new_unet(latent_side: int, text_width: int) -> UNet2DConditionModel:
    """A UNet of three levels; cross-attention in the two lower ones, where it costs little."""
    return UNet2DConditionModel(
        sample_size=latent_side,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads: diffusers kept the name for old configurations
    )


class NoisePrediction(nn.Module):
    """Mean squared error of the predicted noise."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(False)
        self.scheduler = DDPMScheduler(**NOISE)

    def forward(self, latents, noise, timesteps, token_ids):
        """latents and noise (B, 4, h, w), latents of unit variance; timesteps (B,) in 0..999; token_ids (B, T)."""
        with torch.no_grad():
            context = self.text_encoder(token_ids)[0]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, context).sample.float()
        return {"loss": (predicted - noise).square().mean()}


@cache
def shares_of_timesteps() -> torch.Tensor:
    """How often each of the 1000 timesteps is trained: as min(SNR, gamma) / SNR, but no less than `LEAST_SHARE`."""
    scheduler = DDPMScheduler(**NOISE)
    snr = compute_snr(scheduler, torch.arange(len(scheduler)))
    weights = (snr.clamp(max=MIN_SNR_GAMMA) / snr).clamp(min=LEAST_SHARE)
    return weights / weights.sum()


def draw_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` timesteps in 0..999, one from each of `count` equally likely slices: batches resemble each other."""
    slices = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.searchsorted(shares_of_timesteps().cumsum(0), slices).clamp(max=999)


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, images: np.ndarray, accelerator) -> torch.Tensor:
    """Posterior means and standard deviations, float16 (N, 2, C, h, w), kept on disk until the VAE changes."""
    weights = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in vae.encoder.parameters()))
    path = data.CACHE / f"latents-{len(images)}-{weights.hexdigest()[:16]}.npy"
    if accelerator.is_main_process and not path.exists():
        encoder = vae.to(accelerator.device, memory_format=torch.channels_last)
        parts = []
        for start in tqdm(range(0, len(images), 64), "encoding", unit="batch"):
            with accelerator.autocast():
                posterior = encoder.encode(
                    data.to_tensor(images[start : start + 64]).to(accelerator.device)
                ).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], 1).half().cpu())
        np.save(path.with_suffix(".partial.npy"), torch.cat(parts).numpy())
        path.with_suffix(".partial.npy").rename(path)
    accelerator.wait_for_everyone()
    return torch.from_numpy(np.load(path))


def assemble(unet, text_encoder, vae, tokenizer) -> StableDiffusionPipeline:
    """The stock pipeline, with SD1.5's scheduler settings and no safety checker.

    DDIM in place of SD1.5's PNDM: with 25 steps and guidance 7.5 PNDM's extrapolation feeds the small errors of a
    small network back until the picture breaks; single-step samplers forgive them.
    """
    scheduler = DDIMScheduler(**SAMPLING)
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def export(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the folder in half precision."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder)
    clip.save_half(pipeline.text_encoder, folder / "text_encoder")
    clip.save_tokenizer(pipeline.tokenizer, folder / "tokenizer")


def main(argv=None) -> None:
    """Train and write models/storybook-sd (needs its vae folder and models/storybook-clip)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=9_500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    choose_attention_kernel()
    vae = AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip.OUT)
    text_encoder = CLIPTextModel.from_pretrained(clip.OUT, dtype=torch.float32).eval()
    size = vae.config.sample_size
    scenes = data.scenes("train", args.pictures)
    by_things = data.by_things(scenes)
    latents = cached_latents(vae, data.pictures("train", args.pictures, size), make_accelerator())
    unet = new_unet(size // 8, text_encoder.config.hidden_size).to(memory_format=torch.channels_last)

    def make_batch(indices, generator):
        indices = [by_things[i] for i in indices]
        mean, std = latents[indices].float().unbind(1)
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        texts = data.captions_for_guidance([scenes[i] for i in indices], generator)
        noise = torch.randn(clean.shape, generator=generator)
        return clean, noise, draw_timesteps(len(indices), generator), clip.tokenize(tokenizer, texts)

    def sample(step):
        glance(assemble(unet, text_encoder, vae, tokenizer), RUNS / "sd" / f"samples-{step:06d}.png")

    schedule = Schedule(args.steps, args.batch_size, args.learning_rate, warmup=200, ema_decay=0.9995, save_every=1000)
    run = train("sd", NoisePrediction(unet, text_encoder), unet, make_batch, len(by_things), schedule, sample)
    if make_accelerator().is_main_process:
        export(assemble(unet, text_encoder, vae, tokenizer), args.out)
        keep_log(run, args.out)


if __name__ == "__main__":
    main()
