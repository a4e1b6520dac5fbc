"""Euler's method for flow matching (Lipman et al. 2022; Liu et al. 2022), as Stable Diffusion 3 samples.

Noised latents lie on the straight line from picture to noise,  x_σ = (1 - σ) x₀ + σ ε,  and the model predicts the
velocity along it,  v = dx/dσ = ε - x₀.  Latents have any shape.
"""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

TRAIN_STEPS = 1000


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ' = s σ / (1 + (s - 1) σ): with s above 1, more of the steps are spent where there is much noise, as larger
    pictures need (Esser et al. 2024, eq. 23).
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


class FlowMatching:
    """A schedule of so many steps. `timesteps` lists the times for the model, 1000 σ, from noisy to clean.

    Raises ValueError for a number of steps that is none.
    """

    def __init__(self, steps: int, shift: float):
        if not (isinstance(steps, Integral) and 1 <= steps <= TRAIN_STEPS):
            raise ValueError(f"steps is {steps!r}: give a whole number from 1 to {TRAIN_STEPS}.")
        # The schedule of training is shifted, and the steps between its two ends once more: with a shift of 3 the last
        # σ before 0 is 0.0089, not 0.0030. The reference does so as well as diffusers.
        least = shifted(torch.tensor(1 / TRAIN_STEPS), shift).double()
        sigmas = shifted(torch.linspace(1, least, int(steps), dtype=torch.float64), shift).float()
        self.timesteps = sigmas * TRAIN_STEPS
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])

    def entry(self, strength: float) -> int:
        """The step at which a picture enters of which the share `strength`, 0 to 1, may change."""
        return int(len(self.timesteps) - len(self.timesteps) * strength)  # rounded as diffusers rounds

    def first(self, noise: Tensor) -> Tensor:
        """Standard normal noise -> the latents to start from."""
        return noise

    def add_noise(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents, noised as far as step `index` expects."""
        return (1 - self.sigmas[index]) * latents + self.sigmas[index] * noise

    def step(self, latents: Tensor, velocity: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The latents after step `index`. No fresh noise is drawn."""
        return latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
