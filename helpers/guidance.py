"""The denoising loop with the guidance left open: what is done with the two predictions is a function of your own."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import diffusers
import torch

from helpers.editing import Walk, texts


class Step(NamedTuple):
    """What a guide gets to see at one step. Predictions (noise, or a flow's velocity) and latents are (B, C, h, w)."""

    cond: torch.Tensor  # the prediction with the prompt
    empty: torch.Tensor  # with the negative prompt, which is empty unless said otherwise
    weak: torch.Tensor | None  # with the prompt, by the weakened network, where there is one
    x: torch.Tensor  # the noisy latents, a * clean + b * noise
    a: float
    b: float
    sigma: float  # b / a, the noise level now; infinite where a flow begins, for nothing of the picture is there
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
    pipe: diffusers.DiffusionPipeline,
    prompts: list[str],
    noise: torch.Tensor,
    guide: Guide,
    steps: int,
    negative: str = "",
    weaken: Callable[[torch.nn.Module], AbstractContextManager[Callable]] | None = None,
) -> Drawn:
    """From `noise` (B, C, h, w), one prompt each: DDIM for a model that predicts noise, Euler along a flow's velocity.

    `guide` makes of each `Step` the prediction that is followed. `weaken(network)` is a context manager that gives the
    weakened network, which is asked too, with the prompt.

    The *effective scale* says how far the guide went along the difference of the two predictions, whatever else it did:
    the sum of <guided - empty, cond - empty> over all steps, divided by that of |cond - empty|^2. Of `cfg(w)` it is w.
    A step in which the guide answers nothing but zeros, and a flow stands still, does not count.
    """
    network, walk = _network(pipe), Walk(pipe.scheduler, steps)
    text = texts(pipe, prompts, negative)
    asked_text = {name: both.chunk(2)[1] for name, both in text.items()}
    along, length = torch.zeros(2, len(prompts))
    x = noise.to(next(iter(text.values())).device, network.dtype)  # where the network is asked, under every plan
    for k, t in enumerate(walk.times):
        times = torch.full((2 * len(x),), t, device=x.device)
        empty, cond = network(torch.cat([x, x]), timestep=times, **text).sample.chunk(2)
        weak = None
        if weaken is not None:
            with weaken(network) as weakened:
                weak = weakened(x, timestep=times[: len(x)], **asked_text).sample
        sigma, low = (walk.b[j] / walk.a[j] if walk.a[j] else math.inf for j in (k, k + 1))
        guided = guide(Step(cond, empty, weak, x, walk.a[k], walk.b[k], sigma, low, k / steps))
        difference = (cond - empty).float().flatten(1)
        moves = guided.flatten(1).any(1)
        along += (moves * ((guided - empty).float().flatten(1) * difference).sum(1)).cpu()
        length += (moves * difference.square().sum(1)).cpu()
        x = walk.mix(*walk.split(x, guided, k), k + 1)
    return Drawn(x, along / length)


def _network(pipe: diffusers.DiffusionPipeline) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


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


def without_layers(layers: list[int]) -> Callable[[torch.nn.Module], AbstractContextManager[Callable]]:
    """For `weaken`: Stable Diffusion 3's transformer with these blocks left out, as skip-layer guidance asks it."""
    return lambda transformer: nullcontext(partial(transformer, skip_layers=layers))


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


def start_noise(pipe: diffusers.DiffusionPipeline, seeds: list[int]) -> torch.Tensor:
    """The noise that the pipeline draws for these seeds, (len(seeds), C, h, w): a CPU generator for each."""
    config = _network(pipe).config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
