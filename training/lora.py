"""What LoRA, DreamBooth and textual inversion minimise: the denoising error on a few pictures, through the one loop.

For any stock pipeline of Stable Diffusion 1.x, whose UNet predicts the noise (Ho et al., 2020), or of Stable Diffusion
3, whose transformer predicts the velocity (Esser et al., 2024). Latents and texts are computed once, before training.
"""

import csv
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.loop import Schedule, train

T5_TOKENS = 64  # of a caption; the pipeline pads to 256, which would cost three times as much
ENCODED = 16  # pictures at once


class Examples(NamedTuple):
    """Pictures and captions as the network takes them. One entry of each tensor belongs to one picture."""

    latents: torch.Tensor  # (N, C, h, w), of unit variance
    texts: tuple[torch.Tensor, ...]  # (N, T, D); of Stable Diffusion 3 also pooled ones, (N, P)


@torch.no_grad()
def encode(pipe: diffusers.DiffusionPipeline, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Examples:
    """Latents of the pictures, cut at their centre to the model's own size, and what the text encoders say.

    Raises ValueError, one sentence, if there are no pictures, or not as many captions.
    """
    latents = encode_pictures(pipe, pictures, captions)
    texts = [_texts(pipe, list(captions[k : k + ENCODED])) for k in range(0, len(captions), ENCODED)]
    return Examples(latents, tuple(torch.cat(parts).cpu() for parts in zip(*texts, strict=True)))


@torch.no_grad()
def encode_pictures(
    pipe: diffusers.DiffusionPipeline, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> torch.Tensor:
    """The latents alone, (N, C, h, w). Raises ValueError as `encode` does."""
    if not pictures:
        raise ValueError("There are no pictures to learn from: give at least one, with a caption for each.")
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures came with {len(captions)} captions: give one for each picture.")
    size, vae, found = network_of(pipe).config.sample_size * pipe.vae_scale_factor, pipe.vae, []
    for k in range(0, len(pictures), ENCODED):
        fitted = [ImageOps.fit(picture.convert("RGB"), (size, size)) for picture in pictures[k : k + ENCODED]]
        pixels = pipe.image_processor.preprocess(fitted).to(pipe._execution_device, vae.dtype)
        found.append(vae.encode(pixels).latent_dist.mean.float().cpu())
    return (torch.cat(found) - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _texts(pipe, captions: list[str]) -> tuple[torch.Tensor, ...]:
    if hasattr(pipe, "unet"):
        return (pipe.encode_prompt(captions, pipe._execution_device, 1, False)[0],)
    tokens, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    return tokens, pooled


def network_of(pipe: diffusers.DiffusionPipeline) -> nn.Module:
    """The part that denoises: the UNet, or the transformer of Stable Diffusion 3."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def draw_levels(pipe: diffusers.DiffusionPipeline, count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count,), one from each of `count` equally likely slices, so that batches resemble each other.

    Timesteps, all equally likely; for Stable Diffusion 3 sigmas in 0..1, logit-normal as in its paper.
    """
    slices = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    if hasattr(pipe, "unet"):
        return (slices * pipe.scheduler.config.num_train_timesteps).long()
    return torch.sigmoid(torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4)))


class Denoising(nn.Module):
    """Mean squared error of the predicted noise or velocity.

    `learned` is all that training changes and checkpoints hold; the pipeline is referred to, and no part of this.
    Raises ValueError for a UNet that predicts something else than the noise.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, learned: Sequence[nn.Parameter]):
        super().__init__()
        self.learned = nn.ParameterList(learned)
        self._pipe = (pipe,)  # a tuple: torch would make a pipeline's networks parts of this
        if hasattr(pipe, "unet"):
            kind = pipe.scheduler.config.prediction_type
            if kind != "epsilon":
                raise ValueError(
                    f"This model predicts {kind!r}: only those that predict the noise can be trained here."
                )
            self._noise = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)

    def forward(self, latents, noise, levels, *texts):
        """latents and noise (B, C, h, w); levels (B,) as of `draw_levels`; texts as in `Examples`."""
        (pipe,) = self._pipe
        network = network_of(pipe)
        texts = [text.to(network.dtype) for text in texts]
        # bfloat16 on a CPU would cast all frozen weights anew at every step, which costs more than it saves.
        with torch.autocast("cpu", enabled=False):
            if hasattr(pipe, "unet"):
                noisy, target = self._noise.add_noise(latents, noise, levels), noise
                found = network(noisy.to(network.dtype), levels, *texts).sample
            else:
                line = levels.view(-1, 1, 1, 1)
                noisy, target = (1 - line) * latents + line * noise, noise - latents
                found = network(noisy.to(network.dtype), *texts, levels * 1000).sample
        return {"loss": (found.float() - target).square().mean()}


def fit(
    pipe: diffusers.DiffusionPipeline,
    examples: Examples,
    steps: int,
    prior: Examples | None = None,
    batch_size: int = 4,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """Train what requires a gradient in the pipeline's network, an adapter for one, on `examples`; the losses.

    With `prior` as many examples of the class join each batch, so that the class stays what it was (prior preservation,
    Ruiz et al., 2022, with weight 1). Raises ValueError, one sentence, if nothing there can learn, and
    FloatingPointError if the loss is no longer finite; the adapter is then as it was before.
    """
    learned = [parameter for parameter in network_of(pipe).parameters() if parameter.requires_grad]
    if not learned or len(learned) == len(list(network_of(pipe).parameters())):
        raise ValueError("There is no adapter to train: attach one first, helpers.lora.attach(pipe, name).")

    def make_batch(indices, generator):
        parts = [(examples, indices)]
        if prior is not None:
            parts.append((prior, torch.randint(len(prior.latents), (len(indices),), generator=generator)))
        latents = torch.cat([one.latents[chosen] for one, chosen in parts])
        texts = [torch.cat([one.texts[k][chosen] for one, chosen in parts]) for k in range(len(examples.texts))]
        noise = torch.randn(latents.shape, generator=generator)
        # levels of their own for both halves
        levels = torch.cat([draw_levels(pipe, len(indices), generator) for _ in parts])
        return latents, noise, levels, *texts

    return run(Denoising(pipe, learned), make_batch, len(examples.latents), steps, batch_size, learning_rate, seed)


def run(objective, make_batch, count: int, steps: int, batch_size: int, learning_rate: float, seed: int) -> list[float]:
    """The one loop over `objective.learned`, nothing kept on disk; the losses.

    Raises ValueError for less than a step or a picture, and FloatingPointError if the loss is no longer finite: what
    learned is then as it was before. After an interrupt it is as far as it came.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"{steps} steps of {batch_size} pictures teach nothing: give 1 or more of each.")
    warmup = min(10, steps // 4)
    schedule = Schedule(steps, batch_size, learning_rate, warmup, weight_decay=0.0, save_every=steps, seed=seed)
    before = [parameter.detach().clone() for parameter in objective.learned]
    for parameter in objective.learned:
        parameter.grad = None  # of a run that was left early
    # On a CPU, attention as plain matrix products: the fused kernel's backward pass takes three times as long.
    kernel = nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)
    with tempfile.TemporaryDirectory() as folder, kernel:
        try:
            done = train("lora", objective, objective.learned, make_batch, count, schedule, runs=Path(folder))
        except FloatingPointError as error:
            with torch.no_grad():
                for parameter, old in zip(objective.learned, before, strict=True):
                    parameter.copy_(old)
            raise FloatingPointError(
                "The loss is no longer finite, and everything is as it was before: lower the learning rate."
            ) from error
        with (done / "log.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]
