"""The denoising loop with the guidance left open: what is done with the two predictions is a function of your own."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import diffusers
import torch

from helpers.schedulers import make


class Step(NamedTuple):
    """What a guide gets to see at one step. Predictions of noise and latents are (B, C, h, w)."""

    cond: torch.Tensor  # the prediction with the prompt
    empty: torch.Tensor  # with the negative prompt, which is empty unless said otherwise
    weak: torch.Tensor | None  # with the prompt, by the weakened network, where there is one
    x: torch.Tensor  # the noisy latents, a * clean + b * noise
    a: float
    b: float
    sigma: float  # b / a, the noise level now
    low: float  # and after this step
    share: float  # of the steps that are done, 0 up to 1


Guide = Callable[[Step], torch.Tensor]


def cfg(scale: float) -> Guide:
    """Classifier-free guidance (Ho and Salimans, 2022; their w is this scale minus 1)."""
    return lambda step: step.empty + scale * (step.cond - step.empty)


class Drawn(NamedTuple):
    """What `denoise` found."""

    latents: torch.Tensor  # (B, C, h, w)
    effective: torch.Tensor  # (B), the effective scale of each picture


@torch.no_grad()
def denoise(
    pipe: diffusers.StableDiffusionPipeline,
    prompts: list[str],
    noise: torch.Tensor,
    guide: Guide,
    steps: int,
    negative: str = "",
    weaken: Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]] | None = None,
) -> Drawn:
    """DDIM from `noise` (B, C, h, w), one prompt each, for a model that predicts noise.

    `guide` makes of each `Step` the noise that is followed. `weaken(unet)` is a context manager that gives the weakened
    network, which is asked too, with the prompt.

    The *effective scale* says how far the guide went along the difference of the two predictions, whatever else it did:
    the sum of <guided - empty, cond - empty> over all steps, divided by that of |cond - empty|^2. Of `cfg(w)` it is w.
    """
    cond, empty = pipe.encode_prompt(prompts, pipe.device, 1, True, negative_prompt=[negative] * len(prompts))
    scheduler = make("DDIMScheduler", pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    along, length = torch.zeros(2, len(prompts))
    x = noise.to(pipe.device, pipe.unet.dtype)
    for k, t in enumerate(scheduler.timesteps):
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, cond])).sample
        weak = None
        if weaken is not None:
            with weaken(pipe.unet) as network:
                weak = network(x, t, encoder_hidden_states=cond).sample
        before = t - scheduler.config.num_train_timesteps // steps
        left, later = scheduler.alphas_cumprod[t], scheduler.final_alpha_cumprod
        later = scheduler.alphas_cumprod[before] if before >= 0 else later
        sigma, low = ((1 - left) / left).sqrt().item(), ((1 - later) / later).sqrt().item()
        asked_empty, asked_cond = both.chunk(2)
        step = Step(
            asked_cond, asked_empty, weak, x, left.sqrt().item(), (1 - left).sqrt().item(), sigma, low, k / steps
        )
        guided = guide(step)
        difference = (step.cond - step.empty).float().flatten(1)
        along += ((guided - step.empty).float().flatten(1) * difference).sum(1).cpu()
        length += difference.square().sum(1).cpu()
        x = scheduler.step(guided, t, x).prev_sample
    return Drawn(x, along / length)


class _Identity:
    """Self-attention in which every place attends to itself alone."""

    def __call__(self, attention, hidden_states, *args, **kwargs):
        return attention.to_out[0](attention.to_v(hidden_states))


@contextmanager
def without_attention(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The UNet with the self-attention of its middle block switched off (Perturbed Attention Guidance; Ahn, 2024)."""
    layers = [block.attn1 for part in unet.mid_block.attentions for block in part.transformer_blocks]
    own = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = _Identity()
        yield unet
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.processor = processor


def noised_copy(network: torch.nn.Module, share: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """A copy with Gaussian noise in every weight, `share` times as strong as the tensor's own spread.

    A worse version of a network of which no earlier checkpoint is at hand. Autoguidance (Karras and others, 2024) wants
    the same mistakes, only larger; noise makes mistakes of its own kind, so it is a stand-in and no equal.
    """
    worse, generator = copy.deepcopy(network), torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for tensor in worse.parameters():
            spread = tensor.float().std(correction=0).item()
            tensor += share * spread * torch.randn(tensor.shape, generator=generator).to(tensor)
    return worse


def start_noise(pipe: diffusers.StableDiffusionPipeline, seeds: list[int]) -> torch.Tensor:
    """The noise that the pipeline draws for these seeds, (len(seeds), C, h, w): a CPU generator for each."""
    size = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, size, size)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
