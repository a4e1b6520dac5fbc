"""Both kinds of model in one notation, so that an edit is written once: `x = a * clean + b * noise` at every level.

DDIM's step (2010.02502, with eta 0) and Euler's step on a flow (2403.03206) are then the same line: guess the clean
latents and the noise, and mix the two again with the `a` and `b` of the next level.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image

from helpers.generate import decode
from helpers.mixture import Mixture
from helpers.schedulers import is_flow, make, set_steps


class Guess(NamedTuple):
    """What a denoiser takes noisy latents for, (B, C, h, w) each."""

    clean: torch.Tensor
    noise: torch.Tensor


class Walk:
    """The levels of one run from noise to data: `a[k]`, `b[k]` for k = 0 (noise) to `steps` (data), and `times[k]`.

    `times` is what a network is told at level k; it has `steps` entries, since nothing is asked at the end.
    """

    def __init__(self, scheduler: diffusers.SchedulerMixin, steps: int):
        """Raises ValueError, one sentence, for a number of steps that the scheduler does not allow."""
        self.flow, self.steps = is_flow(scheduler.config), steps
        if self.flow:
            scheduler = make("FlowMatchEulerDiscreteScheduler", scheduler.config)
            self.times = set_steps(scheduler, steps).tolist()
            self.b = scheduler.sigmas.tolist()
            self.a = [1 - sigma for sigma in self.b]
        else:
            # Only here does each step of DDIM end where the next one begins, whatever their number.
            scheduler = make("DDIMScheduler", scheduler.config, timestep_spacing="leading")
            self.times = set_steps(scheduler, steps).tolist()
            left = [scheduler.alphas_cumprod[t].item() for t in self.times] + [scheduler.final_alpha_cumprod.item()]
            self.a, self.b = [one**0.5 for one in left], [(1 - one) ** 0.5 for one in left]

    def mix(self, clean: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
        """Latents at level k."""
        return self.a[k] * clean + self.b[k] * noise

    def split(self, x: torch.Tensor, output: torch.Tensor, k: int) -> Guess:
        """What a prediction of noise, or of a flow's velocity `noise - clean`, says of latents x at level k."""
        if self.flow:
            return Guess(x - self.b[k] * output, x + self.a[k] * output)
        return Guess((x - self.b[k] * output) / self.a[k], output)

    def __call__(self, x: torch.Tensor, k: int) -> Guess:
        """The guess for latents x (B, C, h, w) at level k."""
        return self.split(x, self.output(x, k), k)

    def output(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """The prediction for x, which is told to be at level k: noise, or a flow's velocity."""
        raise NotImplementedError


class Denoiser(Walk):
    """A pipeline with one prompt a picture, as a function of latents and level: `clean, noise = denoiser(x, k)`."""

    def __init__(
        self,
        pipe: diffusers.DiffusionPipeline,
        prompts: list[str],
        steps: int,
        guidance: float | None = None,
        negative: str = "",
    ):
        """`guidance` None is the model's own; 1 or less is no guidance, and asks the network once a step, not twice."""
        super().__init__(pipe.scheduler, steps)
        self.guidance = pipe.model.guidance if guidance is None else guidance
        self.text = texts(pipe, prompts, negative)
        self._network = getattr(pipe, "unet", None) or pipe.transformer

    def output(self, x: torch.Tensor, k: int) -> torch.Tensor:
        if self.guidance <= 1:
            return self._ask(x, k, {name: both.chunk(2)[1] for name, both in self.text.items()})
        empty, asked = self._ask(torch.cat([x, x]), k, self.text).chunk(2)
        return empty + self.guidance * (asked - empty)

    def _ask(self, x: torch.Tensor, k: int, text: dict[str, torch.Tensor]) -> torch.Tensor:
        times = torch.full((len(x),), self.times[k], device=x.device)
        return self._network(x, timestep=times, **text).sample  # both kinds of network have these names


class Exact(Walk):
    """Rung 0: the same function for a mixture of Gaussians, whose noise is known; x is (..., dimensions)."""

    def __init__(self, mixture: Mixture, scheduler: diffusers.SchedulerMixin, steps: int):
        super().__init__(scheduler, steps)
        self._mixture = mixture

    def output(self, x: torch.Tensor, k: int) -> torch.Tensor:
        noise = self._mixture.noise(x, self.a[k], self.b[k])
        return noise - self._mixture.clean(x, self.a[k], self.b[k]) if self.flow else noise


@torch.no_grad()
def texts(pipe: diffusers.DiffusionPipeline, prompts: list[str], negative: str = "") -> dict[str, torch.Tensor]:
    """What the network reads of B prompts, by its argument's name: (2B, ...) each, the negative prompt's part first."""
    avoided = [negative] * len(prompts)
    if not is_flow(pipe.scheduler.config):
        asked, empty = pipe.encode_prompt(prompts, pipe.device, 1, True, negative_prompt=avoided)
        return {"encoder_hidden_states": torch.cat([empty, asked])}
    if hasattr(pipe, "stage"):
        pipe.stage.prepare()
    asked, empty, pooled, pooled_empty = pipe.encode_prompt(prompts, None, None, negative_prompt=avoided)
    return {"encoder_hidden_states": torch.cat([empty, asked]), "pooled_projections": torch.cat([pooled_empty, pooled])}


def first_level(pipe: diffusers.DiffusionPipeline, steps: int, strength: float) -> int:
    """The level k at which the library starts from a picture. Raises ValueError where no step would be left.

    With 25 steps and a strength of 0.5 Stable Diffusion 1.5's class takes 12 steps and Stable Diffusion 3's takes 13.
    """
    first = steps
    if 0 < strength <= 1:
        # One class rounds down the steps that are taken, the other those that are left out.
        flow = is_flow(pipe.scheduler.config)
        first = int(steps - steps * strength) if flow else steps - int(steps * strength)
    if first == steps:
        raise ValueError(f"A strength of {strength:g} leaves none of {steps} steps: 0.3 keeps most of the picture.")
    return first


@torch.no_grad()
def encode(
    pipe: diffusers.DiffusionPipeline, images: list[Image.Image], generators: list[torch.Generator] | None = None
) -> torch.Tensor:
    """Latents (B, C, h, w) of pictures whose sides the VAE can halve as often as it does, scaled as the network wants.

    The VAE's encoder gives a mean and a spread. With `generators`, on the CPU and one a picture, a sample is drawn, as
    the library does it; without them it is the mean. Raises ValueError for no pictures, or a number of generators that
    is not the number of pictures.
    """
    if not images or (generators is not None and len(generators) != len(images)):
        raise ValueError(f"There are {len(images)} pictures: give at least one, and a generator for each or none.")
    vae, shift = pipe.vae, getattr(pipe.vae.config, "shift_factor", None) or 0.0
    found = []
    for index, image in enumerate(images):
        pixels = pipe.image_processor.preprocess(image.convert("RGB")).to(pipe._execution_device, vae.dtype)
        spread = vae.encode(pixels).latent_dist
        found.append(spread.mode() if generators is None else spread.sample(generators[index]))
    return (torch.cat(found) - shift) * vae.config.scaling_factor


def noise_like(x: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Noise of the shape of x (B, C, h, w), drawn on the CPU, with a generator for each of the B."""
    shape = (1, *x.shape[1:])
    return torch.cat([torch.randn(shape, generator=one, dtype=x.dtype) for one in generators]).to(x.device)


def seeded(seeds: list[int]) -> list[torch.Generator]:
    """A generator on the CPU for each seed, so that a picture is the same alone and in a batch, on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def pictures(pipe: diffusers.DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, h, w) as RGB pictures."""
    return pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(decode(pipe, latents)))


@torch.no_grad()
def run(denoiser: Walk, x: torch.Tensor, first: int = 0, after: Callable | None = None) -> torch.Tensor:
    """From latents x at level `first` to data. `after(x, k)` may change what each step leads to, at level k."""
    for k in range(first, denoiser.steps):
        x = denoiser.mix(*denoiser(x, k), k + 1)
        x = x if after is None else after(x, k + 1)
    return x


def away(image: Image.Image, other: Image.Image, where: np.ndarray | None = None) -> float:
    """Root mean square of the difference over pixels in 0..1; of those alone where `where` (H, W) is true.

    Raises ValueError for pictures of two sizes.
    """
    if image.size != other.size:
        raise ValueError(f"One picture has {image.size} pixels, the other {other.size}: bring them to one size first.")
    square = np.square(np.asarray(image.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)) / 255**2
    return float((square if where is None else square[where]).mean() ** 0.5)
