"""Numbers that notebook 06 prints, computed again in another way than the page does."""

import re
from functools import partial

import checks
import nbformat
import pytest
import torch
from diffusers import DDIMScheduler

from helpers.mixture import Mixture, example, sliced_wasserstein
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "06_noise_and_training.ipynb", as_version=4)
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)


def stable_diffusion(**settings) -> DDIMScheduler:
    return DDIMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **settings
    )


@pytest.mark.parametrize("side", [16, 64, 128])
def test_the_share_of_brightness_that_is_kept(side):
    """By the library's DDIM in 1,000 steps, with the exact noise of a single Gaussian."""
    mean_kept, spread_kept = printed(rf"{side} x {side}\s+(\d+)%\s+(\d+)%")
    scheduler = stable_diffusion(set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    gaussian = Mixture(torch.ones(1), torch.tensor([[-0.6 * side]]), torch.tensor([0.3 * side]))
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(7)).double()
    for t in scheduler.timesteps:
        a, b = scheduler.alphas_cumprod[t].sqrt().item(), (1 - scheduler.alphas_cumprod[t]).sqrt().item()
        x = scheduler.step(gaussian.noise(x, a, b), t, x).prev_sample
    brightness = x / side
    assert 100 * brightness.mean().item() / -0.6 == pytest.approx(mean_kept, abs=3)
    assert 100 * brightness.std().item() / 0.3 == pytest.approx(spread_kept, abs=4)


def test_the_last_timestep_still_holds_some_of_the_picture():
    before, after = printed(r"share of the picture at the end: ([\d.]+) before, ([\d.]+) after")
    assert stable_diffusion().alphas_cumprod[-1].sqrt().item() == pytest.approx(before, abs=1e-4)
    repaired = stable_diffusion(rescale_betas_zero_snr=True)
    assert repaired.alphas_cumprod[-1].sqrt().item() == pytest.approx(after, abs=1e-3)


def test_the_likelihoods_of_the_three_variances():
    """From one step's errors, weighed by hand: half the log of the variance, plus the error over twice the variance."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    times = torch.linspace(999, 0, 11).long().tolist()
    mixture, generator = example(), torch.Generator().manual_seed(11)
    totals = {"lower bound": 0.0, "learned": 0.0, "upper bound": 0.0}
    for t, s in zip(times, times[1:], strict=False):
        now, low = alpha_bar[t], alpha_bar[s]
        beta = 1 - now / low
        tilde = beta * (1 - low) / (1 - now)
        x0, _ = mixture.sample(50_000, generator)
        x = now.sqrt() * x0 + (1 - now).sqrt() * torch.randn(x0.shape, generator=generator)
        doubt = mixture.doubt(x, now.sqrt(), (1 - now).sqrt()).mean()
        best = tilde + (low.sqrt() * beta / (1 - now)) ** 2 * doubt
        for name, variance in {"lower bound": tilde, "learned": best, "upper bound": beta}.items():
            totals[name] += ((variance.log() + best / variance) / 2).item()
    for name, total in totals.items():
        (on_the_page,) = printed(rf"{name}\s+negative log-likelihood\s+(-?[\d.]+)")
        assert total == pytest.approx(on_the_page, rel=0.15), name


def test_coupled_noise_is_what_the_page_says():
    """Pairs found in another way, in smaller batches: label 0 gets noise from the left."""
    (left,) = printed(r"coupled\s+mean \[(-?[\d.]+)")
    mixture, generator = example(), torch.Generator().manual_seed(5)
    labels = torch.tensor(mixture.labels)
    taken = []
    for _ in range(30):
        points, which = mixture.sample(128, generator)
        noise = torch.randn(128, 2, generator=generator)
        order = greedy_then_exchanged(points, noise)
        taken.append(noise[order][labels[which] == 0, 0])
    assert torch.cat(taken).mean().item() == pytest.approx(left, abs=0.1)


def greedy_then_exchanged(points, noise):
    """An order of the noises: the shortest pairs first, then exchanges until none helps."""
    cost = torch.cdist(points, noise).square()
    order, free = torch.full((len(points),), -1), torch.ones(len(noise), dtype=bool)
    for flat in cost.flatten().argsort().tolist():
        i, j = divmod(flat, len(noise))
        if order[i] < 0 and free[j]:
            order[i], free[j] = j, False
    while True:
        own = cost[torch.arange(len(points)), order]
        gain = own[:, None] + own[None] - cost[:, order] - cost[:, order].T
        best = gain.argmax().item()
        if gain.flatten()[best] < 1e-5:
            return order
        i, j = divmod(best, len(points))
        order[i], order[j] = order[j].clone(), order[i].clone()


def test_findings_are_as_the_page_judges_them():
    """The signs and intervals that the prose relies on."""
    interval = r"\s+(-?[\d.]+) ± ([\d.]+)"
    for finding, sign in {
        "averaged minus raw weights, 50 steps": -1,
        "flow minus v, 4 steps": -1,
        "coupled minus independent, no label, 1 step": -1,
        "coupled minus independent, label, 32 steps": 1,
    }.items():
        mean, half = printed(re.escape(finding) + interval)
        assert sign * mean > half, finding
    at_same_levels, _ = printed("flow minus v, 4 steps at the same noise levels" + interval)
    as_spaced, _ = printed("flow minus v, 4 steps" + interval)
    assert abs(at_same_levels) < abs(as_spaced) / 3
    mean, half = printed("min-SNR minus plain eps, 50 steps" + interval)
    assert mean > -half


def test_the_walk_back_without_noise_ends_in_one_place():
    (distance,) = printed(r"back, without noise\s+distance to the data ([\d.]+)")
    data, _ = example().sample(4000, torch.Generator().manual_seed(0))
    one_place = data.new_tensor([0.35, -1.2]).expand(4000, 2)
    assert sliced_wasserstein(one_place, data).item() == pytest.approx(distance, rel=0.15)
