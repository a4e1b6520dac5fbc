"""Numbers that notebook 08 prints, and the table that it plots, computed again in another way."""

import csv
import re
from functools import partial

import checks
import nbformat
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from helpers.editing import away
from helpers.metrics import interval
from helpers.mixture import example
from helpers.pipelines import load
from storybook.world import HELD_OUT, parse
from tools import editing_curves
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "08_image_to_image.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)
with editing_curves.TABLE.open(newline="") as file:
    ROWS = list(csv.DictReader(file))


def stable_diffusion(cls=DDIMScheduler, steps: int = 20):
    scheduler = cls(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


# Levels


def test_noise_for_one_part_of_picture():
    numbers = r"\s+([\d.]+)" * 4
    old, flow = stable_diffusion(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(20)
    left = [old.alphas_cumprod[old.timesteps[k]].item() for k in (16, 12, 8, 4)]
    assert printed("Stable Diffusion 1.5" + numbers) == pytest.approx([(1 / one - 1) ** 0.5 for one in left], abs=0.006)
    sigmas = [flow.sigmas[k].item() for k in (16, 12, 8, 4)]
    ratios = [sigma / (1 - sigma) for sigma in sigmas]
    assert printed(r"shift 3 \(Stable Diffusion 3\)" + numbers) == pytest.approx(ratios, abs=0.006)


# Rung 0


def denoise(x: torch.Tensor, keep: float | None = None) -> torch.Tensor:
    """By the library's DDIM and the exact noise; with `keep` the first coordinate is put back after each step."""
    scheduler, mixture = stable_diffusion(), example()
    noise = x.clone()
    for k, t in enumerate(scheduler.timesteps):
        left = scheduler.alphas_cumprod[t]
        x = scheduler.step(mixture.noise(x, left.sqrt().item(), (1 - left).sqrt().item()), t, x).prev_sample
        if keep is not None:
            known = torch.full_like(x, keep)
            x[:, 0] = (scheduler.add_noise(known, noise, scheduler.timesteps[k + 1]) if k < 19 else known)[:, 0]
    return x


def test_what_replacement_gets_wrong():
    (of_truth,), (replaced,) = (printed(rf"{name} .*upper cluster: (\d+)%") for name in ("the truth", "1 round"))
    (impossible,) = printed(r"1 round .*hardly any data are: +([\d.]+)%")
    mixture = example()
    points, which = mixture.sample(400_000, torch.Generator().manual_seed(3))
    near = (points[:, 0] - 0.75).abs() < 0.02
    assert 100 * (which[near] == 2).double().mean().item() == pytest.approx(of_truth, abs=3)
    found = denoise(torch.randn(1000, 2, generator=torch.Generator().manual_seed(12)), keep=0.75)
    low = mixture.log_density(mixture.sample(5000, torch.Generator().manual_seed(2))[0]).quantile(0.01)
    assert 100 * (mixture.log_density(found) < low).double().mean().item() == pytest.approx(impossible, abs=4)
    assert 100 * mixture.shares(found)[:, 2].mean().item() == pytest.approx(replaced, abs=4)


def test_the_error_of_the_round_trip():
    (error,) = printed(r"rounds 1: .*20 steps ([\d.]+)")
    mixture, up = example(), stable_diffusion(DDIMInverseScheduler)
    x = data = mixture.sample(500, torch.Generator().manual_seed(9))[0].double()
    for t in up.timesteps:
        left = up.alphas_cumprod[t].double()
        x = up.step(mixture.noise(x, left.sqrt(), (1 - left).sqrt()), t, x).prev_sample
    back = denoise(x)
    found = ((back - data).square().mean() / data.square().mean()).sqrt().item()
    assert found == pytest.approx(error, rel=0.25)


# The table that `python -m tools.editing_curves` made


def rows(**wanted) -> list[dict]:
    return [row for row in ROWS if wanted.items() <= row.items()]


@pytest.mark.parametrize("name", ["storybook-sd", "storybook-sd3"])
def test_the_table_belongs_to_the_weights(name):
    found = editing_curves.check_rows(name, load(name))
    for (*_, metric, mean, _low, _high, n), row in zip(found, rows(part="check", model=name), strict=True):
        assert metric == row["metric"] and n == int(row["n"])
        assert mean == pytest.approx(float(row["mean"]), rel=0.03, abs=0.003), (
            "other weights than the table's: run python -m tools.editing_curves, then notebook 08"
        )


def test_the_table_is_whole():
    for name, methods in (("storybook-sd", ("img2img", "inversion")), ("storybook-sd3", ("img2img",))):
        for method in methods:
            found = [float(row["x"]) for row in rows(part="strength", model=name, method=method, metric="right")]
            assert found == list(editing_curves.STRENGTHS)
    assert [row["method"] for row in rows(part="inpaint", metric="right")] == list(editing_curves.REDRAWN)
    assert len(rows(part="inversion")) == 4 * len(editing_curves.INVERTED)
    for row in rows(metric="right"):
        low, high = interval(float(row["mean"]), int(row["n"]))
        assert float(row["low"]) == pytest.approx(low, abs=2e-3) and float(row["high"]) == pytest.approx(high, abs=2e-3)


def test_what_the_table_has_is_what_the_page_says():
    for name in ("storybook-sd", "storybook-sd3"):
        (right,) = rows(part="strength", model=name, method="img2img", metric="right", x="0.6")
        (far,) = rows(part="strength", model=name, method="img2img", metric="outside", x="0.6")
        shown, outside = printed(rf"{name} +strength 0\.6: right +(\d+)% .*outside ([\d.]+)")
        assert shown == pytest.approx(100 * float(right["mean"]), abs=0.6)
        assert outside == pytest.approx(float(far["mean"]), abs=6e-4)


def test_what_is_edited():
    for one in editing_curves.sources(12, 64):
        (own,), (new,), (other,) = (parse(text).things for text in (one.prompt, one.recoloured, one.replaced))
        assert not {(thing.colour, thing.kind) for thing in (own, new, other)} & HELD_OUT
        assert own.kind == new.kind != other.kind and own.colour != new.colour == other.colour
        assert len({parse(text).setting for text in (one.prompt, one.recoloured, one.replaced)}) == 1
        white = np.asarray(one.mask) > 0
        assert white[one.thing].all() and white.mean() < 0.8 and one.thing.any()


def test_a_seam_is_the_jump_across_the_border():
    picture, mask = Image.new("RGB", (20, 20)), Image.new("L", (20, 20))
    picture.paste((51, 51, 51), (10, 0, 20, 20))
    mask.paste(255, (10, 0, 20, 20))
    assert editing_curves.seam(picture, mask) == pytest.approx(0.2)
    mask.paste(255, (5, 0, 20, 20))
    assert editing_curves.seam(picture, mask) == 0


def test_away_is_a_root_mean_square():
    white, grey = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), (204, 204, 204))
    grey.paste((255, 255, 255), (0, 0, 4, 2))
    assert away(white, grey) == pytest.approx(0.2 / 2**0.5)
    assert away(white, grey, np.arange(16).reshape(4, 4) >= 8) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="bring them to one size first"):
        away(white, Image.new("RGB", (5, 4)))


def test_a_second_judge_grades_the_same_pictures(monkeypatch):
    def judge(images, prompts, network=None):
        return [{"object": True, "colour": network is None or k == 0, "setting": True} for k in range(len(images))]

    monkeypatch.setattr(editing_curves, "judge", judge)
    asked = (["a picture"] * 2, ["a prompt"] * 2, "object", "colour")
    assert editing_curves.right(*asked) == {"right": [True, True]}
    assert editing_curves.right(*asked, second="network") == {"right": [True, True], "second": [True, False]}


def test_what_the_second_judge_says_stands_beside_every_right():
    """Where the table was made with one: beside all but the two pictures that a test draws again."""
    judged = [row for row in ROWS if row["part"] != "check"]
    places = [{tuple(row[name] for name in ("part", "model", "method", "x", "n")) for row in judged
               if row["metric"] == metric} for metric in ("right", "second")]  # fmt: skip
    assert places[1] in (places[0], set())


def test_too_few_pictures_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["editing_curves", "--count", "1"])
    with pytest.raises(SystemExit):
        editing_curves.main()
    assert "--count 1 is too few: an interval takes 2 pictures or more." in capsys.readouterr().err


# The exercises

SPACE = {
    "torch": torch,
    "ends": [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)],
}


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("same_strength", "def same_strength(r):\n    return r / (1 + r)", "came out as"),
        ("mended", "def mended(x, y, share):\n    return torch.lerp(x, y, share)", "the norm is"),
    ],
)
def test_the_solutions_of_the_exercises_are_right(name, wrong, message):
    from helpers.editing_between import slerp
    from helpers.editing_inversion import distance

    space = SPACE | {"slerp": slerp, "distance": distance}
    before = next(k for k, source in enumerate(CODE) if source.startswith(f"def {name}"))
    text = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    solution = re.search(rf"```python\n(def {name}.*?)```", text, re.DOTALL).group(1)
    exec(solution + "\n" + CODE[before + 1], dict(space))
    with pytest.raises(AssertionError, match=message):
        exec(wrong + "\n" + CODE[before + 1], dict(space))
