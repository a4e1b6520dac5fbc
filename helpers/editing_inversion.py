"""The way back: which noise would have become this picture?"""

import torch

from helpers.editing import Walk


@torch.no_grad()
def invert(denoiser: Walk, x: torch.Tensor, first: int = 0, rounds: int = 1) -> torch.Tensor:
    """From clean latents x (B, C, h, w) up to level `first`, from where `run` should come back to them.

    A step down asks the denoiser at its upper end. On the way up that end is what is looked for, so DDIM inversion
    (2010.02502, section 4.3) asks at the lower end and takes the answer for the same, which is wrong by as much as the
    answer changes within a step. With `rounds` of 2 or more it asks again at the upper end that it found, a fixed-point
    iteration, which need not converge. Raises ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError("Give 1 round or more: the denoiser is asked so often a step.")
    for k in reversed(range(first, denoiser.steps)):
        upper = x
        for _ in range(rounds):
            upper = denoiser.mix(*denoiser.split(x, denoiser.output(upper, k), k + 1), k)
        x = upper
    return x


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The root mean square of the difference, beside that of y."""
    return ((x - y).float().square().mean() / y.float().square().mean()).sqrt().item()
