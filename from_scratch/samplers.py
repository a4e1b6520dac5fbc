"""Four ways from noise to latents, each equal to its namesake in diffusers under Stable Diffusion 1.5's settings.

With ε the predicted noise, noised latents at time t are  x_t = √ᾱ_t x₀ + √(1 - ᾱ_t) ε  (Ho et al. 2020, eq. 4); divided
by √ᾱ_t they are  x₀ + σ_t ε  with  σ_t = √((1 - ᾱ_t) / ᾱ_t)  (Karras et al. 2022). Latents have any shape.
"""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """ᾱ_t = Π (1 - β_s) for s = 0..t, (1000,), of the schedule that Stable Diffusion was trained with: √β is linear."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


class Sampler:
    """What the samplers share. `timesteps` lists the times at which the model is called, from noisy to clean.

    Every sampler also has `step(latents, eps, index, draw)`, which gives the latents after step `index`, whose
    predicted noise is `eps`; `draw()` makes fresh noise of their shape. Steps are taken in order, as often as you like.
    Raises ValueError for a number of steps that the 1000 trained times do not allow.
    """

    extra = 0  # how many steps more the times are spaced for

    def __init__(self, steps: int):
        if not (isinstance(steps, Integral) and 1 <= steps < TRAIN_STEPS - self.extra):
            raise ValueError(f"steps is {steps!r}: give a whole number from 1 to {TRAIN_STEPS - 1 - self.extra}.")
        # "Leading" spacing with an offset of 1: 50 steps are at 981, 961, ..., 1. The noisiest times are never visited.
        spacing = TRAIN_STEPS // (int(steps) + self.extra)
        self.timesteps = [spacing * n + 1 for n in reversed(range(self.extra, steps + self.extra))]
        self.alphas_cumprod = alphas_cumprod()

    def alpha(self, index: int) -> Tensor:
        """ᾱ at step `index`; past the last one 1, which is clean."""
        return self.alphas_cumprod[self.timesteps[index]] if index < len(self.timesteps) else torch.tensor(1.0)

    def sigma(self, index: int) -> Tensor:
        """σ at step `index`; past the last one 0."""
        return ((1 - self.alpha(index)) / self.alpha(index)) ** 0.5

    def entry(self, strength: float) -> int:
        """The step at which a picture enters of which the share `strength`, 0 to 1, may change."""
        return len(self.timesteps) - int(len(self.timesteps) * strength)

    def first(self, noise: Tensor) -> Tensor:
        """Standard normal noise -> the latents to start from."""
        return noise

    def add_noise(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents, noised as far as step `index` expects."""
        return self.alpha(index) ** 0.5 * latents + (1 - self.alpha(index)) ** 0.5 * noise

    def model_input(self, latents: Tensor, index: int) -> Tensor:
        """The latents as the model expects them, with a variance of about 1."""
        return latents

    def predict_clean(self, latents: Tensor, eps: Tensor, index: int) -> Tensor:
        """x₀ = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t, the clean latents that the predicted noise implies."""
        return (latents - (1 - self.alpha(index)) ** 0.5 * eps) / self.alpha(index) ** 0.5


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020): a draw from the posterior q(x_s | x_t, x₀), s being the next time."""

    def step(self, latents: Tensor, eps: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        a, a_next = self.alpha(index), self.alpha(index + 1)
        alpha, beta = a / a_next, 1 - a / a_next  # of the whole jump from s to t
        clean = self.predict_clean(latents, eps, index)
        # μ = √ᾱ_s β / (1 - ᾱ_t) x₀ + √α (1 - ᾱ_s) / (1 - ᾱ_t) x_t   (eq. 7)
        mean = a_next**0.5 * beta / (1 - a) * clean + alpha**0.5 * (1 - a_next) / (1 - a) * latents
        # variance = (1 - ᾱ_s) / (1 - ᾱ_t) β, which is 0 at the last step
        return mean + ((1 - a_next) / (1 - a) * beta) ** 0.5 * draw()


class DDIM(Sampler):
    """The deterministic sampler, η = 0 (Song et al. 2020)."""

    def step(self, latents: Tensor, eps: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        # The last step ends at time 0, not at a clean picture: ᾱ_0 = 0.99915.
        last = index == len(self.timesteps) - 1
        a_next = self.alphas_cumprod[0] if last else self.alpha(index + 1)
        # x_s = √ᾱ_s x₀ + √(1 - ᾱ_s) ε   (eq. 12)
        return a_next**0.5 * self.predict_clean(latents, eps, index) + (1 - a_next) ** 0.5 * eps


class Euler(Sampler):
    """Euler's method on dx/dσ = ε (Karras et al. 2022). Its latents are x₀ + σ ε, which grow with σ."""

    def first(self, noise: Tensor) -> Tensor:
        return noise * (self.sigma(0) ** 2 + 1) ** 0.5

    def add_noise(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        return latents + self.sigma(index) * noise

    def model_input(self, latents: Tensor, index: int) -> Tensor:
        return latents / (self.sigma(index) ** 2 + 1) ** 0.5

    def step(self, latents: Tensor, eps: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        return latents + (self.sigma(index + 1) - self.sigma(index)) * eps


class DPMpp2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022): x₀ is extrapolated from this step and the one before, in λ = -log σ."""

    extra = 1  # diffusers spaces its times for one step more and leaves out the last
    before = (None, None)  # the last step's index and the clean latents that it predicted

    def step(self, latents: Tensor, eps: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        clean, (index_before, clean_before) = self.predict_clean(latents, eps, index), self.before
        self.before = (index, clean)
        if index == len(self.timesteps) - 1:
            return clean  # the last step goes all the way, to σ = 0
        a, a_next = self.alpha(index), self.alpha(index + 1)
        h = torch.log(self.sigma(index)) - torch.log(self.sigma(index + 1))
        if index_before == index - 1:  # not at the first step, with which another picture may begin
            # D = x₀ + (h / 2h_before) (x₀ - x₀_before)   (algorithm 2)
            h_before = torch.log(self.sigma(index - 1)) - torch.log(self.sigma(index))
            clean = clean + h / (2 * h_before) * (clean - clean_before)
        # x_s = √((1 - ᾱ_s) / (1 - ᾱ_t)) x_t - √ᾱ_s (e^-h - 1) D
        return ((1 - a_next) / (1 - a)) ** 0.5 * latents - a_next**0.5 * torch.expm1(-h) * clean


SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "euler": Euler, "dpm++2m": DPMpp2M}


def make(name: str, steps: int) -> Sampler:
    """A sampler for so many steps. Raises ValueError for a name or number of steps that there is not."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"There is no sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](steps)
