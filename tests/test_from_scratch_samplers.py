"""The samplers against diffusers' schedulers with Stable Diffusion 1.5's settings, step by step."""

import pytest
import torch
from random_sd import SCHEDULERS

from benchmarks.parity_full import difference
from from_scratch import samplers

NAMES = list(SCHEDULERS)
TOLERANCE = 1e-5


def predict(x: torch.Tensor, t: float) -> torch.Tensor:
    """Stands in for a UNet: of about unit variance, and different at every latent and time."""
    return torch.tanh(x * (1 + t / 1000)) + 0.1 * torch.cos(5 * x)


def theirs(name: str, steps: int):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 300, 998])
@pytest.mark.parametrize("name", NAMES)
def test_timesteps(name, steps):
    assert samplers.make(name, steps).timesteps == theirs(name, steps).timesteps.tolist()


@pytest.mark.parametrize("steps, start", [(1, 0), (2, 0), (7, 0), (20, 0), (50, 0), (50, 20), (20, 19)])
@pytest.mark.parametrize("name", NAMES)
def test_every_step(name, steps, start):
    """From the same start, each on its own latents to the end; `start` > 0: as image-to-image enters."""
    scheduler, sampler = theirs(name, steps), samplers.make(name, steps)
    generator = torch.Generator().manual_seed(5)
    noise, clean = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    times = scheduler.timesteps[start:]
    if start:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        a, b = sampler.add_noise(clean, noise, start), scheduler.add_noise(clean, noise, times[:1])
    else:
        a, b = sampler.first(noise), noise * scheduler.init_noise_sigma
    assert difference(a, b) < TOLERANCE
    same = [torch.Generator().manual_seed(6) for _ in range(2)]
    for index, t in enumerate(times, start):
        seen, expected = sampler.model_input(a, index), scheduler.scale_model_input(b, t)
        assert difference(seen, expected) < TOLERANCE
        more = {} if name in ("ddim", "dpm++2m", "euler") else {"generator": same[1]}
        b = scheduler.step(predict(expected, float(t)), t, b, **more).prev_sample
        draw = lambda: torch.randn(clean.shape, generator=same[0])  # noqa: E731
        a = sampler.step(a, predict(seen, sampler.timesteps[index]), index, draw)
        assert difference(a, b) < TOLERANCE, f"step {index}"


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_noise_leads_back_to_the_picture(name):
    """If the noise is predicted exactly, every sampler ends where it began, but for what is left at time 0."""
    sampler = samplers.make(name, 20)
    clean, noise = torch.randn(4, 8, 8), torch.randn(4, 8, 8)
    latents = sampler.add_noise(clean, noise, 5)
    for index in range(5, 20):
        x = sampler.model_input(latents, index)
        a = sampler.alpha(index)
        latents = sampler.step(latents, (x - a**0.5 * clean) / (1 - a) ** 0.5, index, lambda: torch.zeros(4, 8, 8))
    assert (latents - clean).abs().max() < 0.15
    assert torch.equal(sampler.add_noise(clean, noise, 20), clean)


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_used_twice_gives_the_same_twice(name):
    """Also after a run that was cut off, and for a picture that enters in the middle."""
    sampler, noise = samplers.make(name, 6), torch.randn(4, 8, 8)

    def run(first: int, last: int) -> torch.Tensor:
        latents = sampler.add_noise(torch.zeros_like(noise), noise, first)
        for index in range(first, last):
            eps = predict(sampler.model_input(latents, index), sampler.timesteps[index])
            latents = sampler.step(latents, eps, index, lambda: noise.flip(0))
        return latents

    whole, entered = run(0, 6), run(2, 6)
    run(0, 4)
    assert torch.equal(run(0, 6), whole) and torch.equal(run(2, 6), entered)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, -1, 1000, 2.5, "20", None])
def test_a_number_of_steps_that_there_is_not(name, steps):
    with pytest.raises(ValueError, match="steps is .*: give a whole number from 1 to 99"):
        samplers.make(name, steps)


def test_a_sampler_that_there_is_not():
    with pytest.raises(ValueError, match="no sampler 'plms': choose one of ddpm, ddim, euler, dpm\\+\\+2m"):
        samplers.make("plms", 20)
