"""Redraw a part of a picture with a model that was never trained for it: by replacement, and by resampling."""

import torch

from helpers.editing import Walk, noise_like


@torch.no_grad()
def inpaint(
    denoiser: Walk,
    x: torch.Tensor,
    known: torch.Tensor,
    mask: torch.Tensor,
    noise: torch.Tensor,
    first: int = 0,
    rounds: int = 1,
    jump: int = 1,
    generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """From latents x (B, C, h, w) at level `first`: drawn anew where `mask` is 1, like `known` where it is 0.

    After each step what is known is put back, with `noise` (B, C, h, w) at the level of the step: replacement, as
    blended latent diffusion (2206.02779) and the library's classes do it. With `rounds` of 2 or more every `jump` steps
    are taken that often: between two rounds both parts are noised together again, with noise of `generators`, one a
    picture, so that the new part can come to terms with the known one. That is the resampling of RePaint (2201.09865),
    whose steps between are DDPM's; ours are DDIM's or Euler's. Each round asks the denoiser as often as a whole run.
    Raises ValueError for rounds or a jump below 1, and for several rounds without generators.
    """
    if rounds < 1 or jump < 1 or (rounds > 1 and generators is None):
        raise ValueError("Give 1 round or more, jumps of 1 step or more, and generators for the noise between rounds.")
    for high in range(first, denoiser.steps, jump):
        low = min(high + jump, denoiser.steps)
        for left in reversed(range(rounds)):
            for k in range(high, low):
                behind = known if k + 1 == denoiser.steps else denoiser.mix(known, noise, k + 1)
                x = mask * denoiser.mix(*denoiser(x, k), k + 1) + (1 - mask) * behind
            if left:
                x, noise = noised(denoiser, x, low, high, generators), noise_like(known, generators)
    return x


def noised(walk: Walk, x: torch.Tensor, low: int, high: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Latents of level `low` brought up to level `high`, which has more noise, by noise of these generators."""
    share = walk.a[high] / walk.a[low]
    fresh = (walk.b[high] ** 2 - (share * walk.b[low]) ** 2) ** 0.5
    return share * x + fresh * noise_like(x, generators)
