"""Numbers that notebook 04 prints, computed again in another way than the page does; its table, and its loop."""

import csv
import math
import re
from contextlib import nullcontext
from functools import partial

import checks
import nbformat
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from diffusers.guiders import ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from PIL import Image

from helpers.guidance import Step, cfg, denoise, noised_copy, start_noise, without_attention, without_layers
from helpers.mixture import Mixture, example, sliced_wasserstein
from helpers.pipelines import Model, load
from helpers.schedulers import make
from tools import guidance_curves
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "04_guidance.ipynb", as_version=4)
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)
PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 3, 4.0, (PROMPT,), folder=str(folder)))


# Rung 0


def walked(cond: Mixture, scale: float, count: int = 1500) -> torch.Tensor:
    """By the library: its guider, its DDIM in 200 steps, its noise schedule; other noise than the page's."""
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(200)
    guider = ClassifierFreeGuidance(scale)
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(8)).double()
    for k, t in enumerate(scheduler.timesteps):
        a, b = scheduler.alphas_cumprod[t].sqrt().item(), (1 - scheduler.alphas_cumprod[t]).sqrt().item()
        guider.set_state(k, 200, t)
        x = scheduler.step(guider.forward(cond.noise(x, a, b), example().noise(x, a, b)).pred, t, x).prev_sample
    return x


@pytest.mark.parametrize("scale", ["1.0", "2.0", "7.5"])
def test_what_guidance_does_to_a_perfect_denoiser(scale):
    distance, right, *parts, size = printed(
        rf"{re.escape(scale)}\s+([\d.]+)\s+([\d.]+)%\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)"
    )
    wanted = example().given(1)
    points = walked(wanted, float(scale))
    truth = wanted.sample(1500, torch.Generator().manual_seed(4), exact=True)[0].double()
    shares = wanted.shares(points).argmax(-1).bincount(minlength=3) / len(points)
    assert sliced_wasserstein(points, truth).item() == pytest.approx(distance, abs=0.04)
    assert shares.tolist() == pytest.approx(parts, abs=0.05)
    assert points.norm(dim=1).mean().item() == pytest.approx(size, abs=0.04) and right > 99


def test_the_sharpened_density_by_weighing_the_data():
    """Points of p(x | c), each counted (p(x | c) / p(x))^(w - 1) times."""
    *parts, size = printed(r"sharpened density, w = 7.5 +clusters ([\d.]+)  ([\d.]+)  ([\d.]+)   size ([\d.]+)")
    wanted = example().given(1)
    points, which = wanted.sample(20_000, torch.Generator().manual_seed(6))
    weights = (6.5 * (wanted.log_density(points) - example().log_density(points))).softmax(0)
    shares = torch.zeros(3).index_add(0, which, weights)
    assert shares.tolist() == pytest.approx(parts, abs=0.04)
    assert (weights * points.norm(dim=1)).sum().item() == pytest.approx(size, abs=0.03)


def test_guidance_mends_a_leak():
    before, after = printed(r"leaky denoiser, share right at scale 1 and 2 \(exact\) +([\d.]+) ([\d.]+)")
    every = example()
    is_right = torch.tensor(every.labels) == 1
    share = every.weights[is_right].sum()
    leaky = Mixture(
        torch.where(is_right, 0.8 * every.weights / share, 0.2 * every.weights / (1 - share)),
        every.means, every.stds, every.labels,
    )  # fmt: skip
    for scale, on_the_page in ((1.0, before), (2.0, after)):
        right = every.shares(walked(leaky, scale))[:, is_right].sum(-1) > 0.5
        assert right.double().mean().item() == pytest.approx(on_the_page, abs=0.03)


# The table


def rows(**wanted) -> list[dict]:
    with guidance_curves.TABLE.open() as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


@pytest.mark.parametrize("model", guidance_curves.JOBS)
def test_the_table_belongs_to_the_weights(model):
    found = guidance_curves.check_rows(load(model), 12)
    for (*_, metric, mean, _low, _high, n), row in zip(found, rows(model=model, part="check"), strict=True):
        assert metric == row["metric"] and n == int(row["n"])
        assert mean == pytest.approx(float(row["mean"]), rel=0.02, abs=0.01), (
            f"other weights than the table's: python -m tools.guidance_curves --model {model}, then notebook 04"
        )


def near_best(sort: str) -> set[float]:
    names = ("strength", "mean", "low", "high")
    found = [{name: float(row[name]) for name in names} for row in rows(part="scale", prompts=sort, metric="right")]
    best = max(found, key=lambda row: row["mean"])
    error = {row["strength"]: math.hypot(best["mean"] - best["low"], row["high"] - row["mean"]) for row in found}
    return {row["strength"] for row in found if best["mean"] - row["mean"] <= error[row["strength"]]}


def test_the_recommendation_is_the_smallest_scale_among_the_best():
    (recommended,) = printed(r"plain guidance at scale ([\d.]+), the smallest")
    assert recommended == min(near_best("easy") & near_best("hard"))


def test_what_the_table_has_is_what_the_page_says():
    for sort in ("easy", "hard"):
        (row,) = rows(part="scale", prompts=sort, metric="right", strength="14")
        assert printed(rf"right, {sort}, scale 14 +([\d.]+) \(([\d.]+) to ([\d.]+)\)") == pytest.approx(
            [float(row[name]) for name in ("mean", "low", "high")], abs=0.006
        )


METHODS = [(model, name) for model, all_of in guidance_curves.METHODS.items() for name in all_of if name != "cfg"]


@pytest.mark.parametrize(("model", "method"), METHODS)
def test_methods_are_compared_at_the_same_effective_scale_on_the_same_pictures(model, method):
    found = {
        (row["part"], row["metric"]): [float(row[name]) for name in ("mean", "low", "high", "n")]
        for row in rows(model=model, method=method)
        if row["part"] in ("method", "plain", "gain")
    }
    assert found["plain", "effective"] == pytest.approx(found["method", "effective"], rel=2e-3)
    for metric in ("right", "clip", "saturation", "contrast"):
        mean, low, high, count = found["gain", metric]
        assert mean == pytest.approx(found["method", metric][0] - found["plain", metric][0], abs=2e-3)
        assert low <= mean <= high and count == found["method", metric][3] == found["plain", metric][3] >= 40
    assert {("method", "diversity"), ("plain", "diversity"), ("method", "kid"), ("plain", "kid")} <= set(found)


@pytest.mark.parametrize(("model", "method"), METHODS)
def test_the_pages_verdicts_are_the_tables(model, method):
    (row,) = rows(model=model, part="gain", method=method, metric="right")
    ends = [float(row[name]) for name in ("mean", "low", "high")]
    name = re.escape(method)
    line = printed(rf"{name} minus plain at its effective scale, right +(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)")
    assert line == pytest.approx(ends, abs=0.006)
    number = list(guidance_curves.METHODS).index(model)  # one list after the other
    better = re.findall(r"clearly more right than plain guidance.*?: +(.*)", PRINTED)[number]
    worse = re.findall(r"clearly less right: +(.*)", PRINTED)[number]
    assert (method in better.split(", ")) == (ends[1] > 0) and (method in worse.split(", ")) == (ends[2] < 0)


# The loop


def test_the_loop_is_the_pipelines(pipe):
    """Also with a negative prompt and for a batch; the noise is that of the pipeline's own generators."""
    prompts = [PROMPT, "a blue star"]
    mine = denoise(pipe, prompts, start_noise(pipe, [3, 4]), cfg(5.0), 4, negative="house")
    own, pipe.scheduler = pipe.scheduler, make("DDIMScheduler", pipe.scheduler.config)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)]
    theirs = pipe(prompts, negative_prompt=["house"] * 2, num_inference_steps=4, guidance_scale=5.0,
                  generator=generators, output_type="latent").images  # fmt: skip
    pipe.scheduler = own
    assert torch.allclose(mine.latents, theirs, atol=1e-4)
    assert mine.effective.tolist() == pytest.approx([5.0, 5.0], abs=1e-3)


def test_the_effective_scale_counts_what_goes_along_the_difference(pipe):
    noise = start_noise(pipe, [0])
    half = denoise(pipe, [PROMPT], noise, lambda s: cfg(6.0 if s.share < 0.5 else 2.0)(s), 4).effective.item()
    across = denoise(pipe, [PROMPT], noise, lambda s: cfg(3.0)(s) + sideways(s), 4).effective.item()
    assert 2 < half < 6 and across == pytest.approx(3.0, abs=1e-3)


def sideways(step):
    """Noise without any part along the difference of the two predictions."""
    difference = (step.cond - step.empty).flatten()
    other = torch.randn(difference.shape, generator=torch.Generator().manual_seed(1))
    other -= (other @ difference) / (difference @ difference) * difference
    return other.view_as(step.cond)


def test_a_weakened_network_is_whole_again_afterwards(pipe):
    noise, seen = start_noise(pipe, [0]), []

    def guide(step):
        seen.append(step)
        return step.cond

    denoise(pipe, [PROMPT], noise, guide, 1, weaken=without_attention)
    denoise(pipe, [PROMPT], noise, guide, 1)
    assert torch.equal(seen[0].cond, seen[1].cond) and seen[1].weak is None
    assert (seen[0].weak - seen[0].cond).abs().max() > 1e-4


def test_a_noised_copy_is_worse_by_the_share_and_leaves_the_network_alone(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    first, again, other = (noised_copy(pipe.unet, 0.2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    largest = max(before, key=lambda name: before[name].numel())
    error = (first[largest] - before[largest]).std() / before[largest].std()
    assert error.item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(first[largest], again[largest]) and not torch.equal(first[largest], other[largest])


def test_the_weakened_network_is_the_one_that_is_asked(pipe):
    copy, seen = noised_copy(pipe.unet, 0.5), []
    denoise(pipe, [PROMPT], start_noise(pipe, [0]), lambda step: seen.append(step) or step.cond, 1,
            weaken=lambda unet: nullcontext(copy))  # fmt: skip
    own, pipe.unet = pipe.unet, copy
    denoise(pipe, [PROMPT], start_noise(pipe, [0]), lambda step: seen.append(step) or step.cond, 1)
    pipe.unet = own
    assert torch.allclose(seen[0].weak, seen[1].cond, atol=1e-5) and not torch.equal(seen[0].weak, seen[0].cond)


def test_levels_of_a_step(pipe):
    """x = a * clean + b * noise, sigma = b / a, and the next step begins at the level where this one ends."""
    seen = []
    denoise(pipe, [PROMPT], start_noise(pipe, [0]), lambda step: seen.append(step) or step.cond, 4)
    for step, after in zip(seen, seen[1:], strict=False):
        assert step.a**2 + step.b**2 == pytest.approx(1, abs=1e-5) and step.sigma == pytest.approx(
            step.b / step.a, rel=1e-4
        )
        assert step.low == pytest.approx(after.sigma, rel=1e-4)
        clean = (step.x - step.b * step.cond) / step.a
        assert torch.allclose(after.x, after.a * clean + after.b * step.cond, atol=1e-4)


@pytest.fixture(scope="module")
def flow_pipe(tmp_path_factory):
    folder = tiny.sd3_folder(tmp_path_factory.mktemp("sd3"))
    return load(Model("tiny", "StableDiffusion3Pipeline", None, 3, 4.0, (PROMPT,), folder=str(folder)))


def test_the_loop_of_a_flow_is_the_pipelines(flow_pipe):
    """Also with a negative prompt, for a batch, and with a block left out on the way."""
    prompts, noise = [PROMPT, "a blue star"], start_noise(flow_pipe, [3, 4])

    def guide(step):
        return cfg(5.0)(step) + (2.8 * (step.cond - step.weak) if 0.01 < step.share < 0.5 else 0)

    mine = denoise(flow_pipe, prompts, noise, guide, 6, negative="house", weaken=without_layers([0]))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)]
    asked = {"num_inference_steps": 6, "guidance_scale": 5.0, "generator": generators, "output_type": "latent"}
    theirs = flow_pipe(prompts, negative_prompt=["house"] * 2, skip_guidance_layers=[0],
                       skip_layer_guidance_stop=0.5, **asked).images  # fmt: skip
    assert torch.allclose(mine.latents, theirs, atol=1e-4)
    plain = denoise(flow_pipe, prompts, noise, cfg(5.0), 6, negative="house")
    assert plain.effective.tolist() == pytest.approx([5.0, 5.0], abs=1e-3) and not torch.allclose(
        plain.latents, theirs, atol=1e-3
    )


def test_a_step_that_stands_still_moves_nothing_and_does_not_count(flow_pipe):
    seen = []

    def guide(step):
        seen.append(step)
        return torch.zeros_like(step.cond) if step.share == 0 else cfg(3.0)(step)

    found = denoise(flow_pipe, [PROMPT], start_noise(flow_pipe, [0]), guide, 4)
    assert torch.allclose(seen[0].x, seen[1].x, atol=1e-5) and not torch.allclose(seen[1].x, seen[2].x, atol=1e-5)
    assert found.effective.item() == pytest.approx(3.0, abs=1e-3)
    assert seen[0].sigma == math.inf and (seen[0].a, seen[0].b) == (0, 1)
    assert seen[1].low == pytest.approx(seen[2].sigma, rel=1e-4) and seen[-1].low == 0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_zero_star_is_the_librarys(share):
    cond, empty = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    guider = ClassifierFreeZeroStarGuidance(6.0)
    guider.set_state(round(10 * share), 10, torch.tensor(500))
    mine = guidance_curves.zero_star(Step(cond, empty, None, cond, 0.5, 0.5, 1.0, 0.9, share), 6.0)
    assert torch.allclose(mine, guider.forward(cond, empty).pred, atol=1e-4)


def test_too_few_prompts_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["guidance_curves", "--count", "3"])
    with pytest.raises(SystemExit):
        guidance_curves.main()
    assert "--count 3 is too few: KID takes 10 or more." in capsys.readouterr().err


def test_a_scale_for_each_picture_is_plain_guidance_of_each(pipe, monkeypatch):
    """Also over the end of a batch; pictures of another scale are other pictures."""
    monkeypatch.setattr(guidance_curves, "BATCH", 2)
    monkeypatch.setattr(guidance_curves, "STEPS", 2)
    prompts, seeds, scales = [PROMPT] * 3, [0, 1, 2], [1.5, 6.0, 3.0]
    images, effective = guidance_curves.draw(pipe, prompts, seeds, scales)
    assert effective == pytest.approx(scales, abs=1e-3)
    for k in range(3):
        (alone,), _ = guidance_curves.draw(pipe, [PROMPT], [seeds[k]], cfg(scales[k]))
        (other,), _ = guidance_curves.draw(pipe, [PROMPT], [seeds[k]], cfg(scales[k - 1]))
        drawn, same, different = (np.asarray(image, int) for image in (images[k], alone, other))
        # a batch of another size is summed in another order, so a pixel may round the other way
        assert np.abs(drawn - same).max() <= 1 < np.abs(drawn - different).max()


def test_gains_are_taken_picture_by_picture():
    red, half, grey = (Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (255, 128, 128), "gray"))
    found = {row[0]: row[1:] for row in guidance_curves.gains([red, half], [half, grey], [PROMPT] * 2)}
    mean, low, high, count = found["saturation"]
    assert mean == pytest.approx(0.5, abs=0.01) and count == 2
    assert high - low < 0.02, "both differences are one half: how the pictures differ among themselves is out of it"


def test_a_job_replaces_its_own_rows_and_no_others():
    sd, sd3 = "storybook-sd", "storybook-sd3"
    old = [
        [sd, "check", "rescale", "6"],
        [sd, "scale", "cfg", "1"],
        [sd, "method", "cfg", "7"],
        [sd, "plain", "apg", "7"],
    ]
    flow = [[sd3, "method", "cfg", "7"], [sd3, "gain", "slg", "2.8"]]
    new = [[sd, "method", "apg", "9"], [sd, "gain", "apg", "9"]]
    assert guidance_curves.merged(old + flow, new, sd, "apg") == old[:3] + new + flow
    scale = [[sd, "scale", "cfg", "2"]]
    assert guidance_curves.merged(flow + old, scale, sd, "scale") == [old[0], *scale, *old[2:], *flow]
    assert guidance_curves.merged(old + flow, [], sd3, "cfg") == old + flow[1:]


def test_only_what_is_asked_for_is_computed_again(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(guidance_curves, "load", lambda name: name)
    jobs = {model: {name: lambda pipe, count, name=name: asked.append((pipe, name)) or [("check", "cfg", 1.0)]
                    for name in names} for model, names in guidance_curves.JOBS.items()}  # fmt: skip
    monkeypatch.setattr(guidance_curves, "JOBS", jobs)
    for more in (["--model", "storybook-sd3"], ["--only", "cfg"]):
        monkeypatch.setattr("sys.argv", ["guidance_curves", "--out", str(tmp_path / "table.csv"), *more])
        guidance_curves.main()
    flow = [("storybook-sd3", name) for name in ("check", "cfg", "slg", "zero*")]
    assert asked == [*flow, ("storybook-sd", "cfg"), ("storybook-sd3", "cfg")]
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "storybook-sd,check,cfg,1"
