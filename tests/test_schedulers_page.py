"""Numbers that notebook 05 prints and the table that it plots, computed again in another way."""

import csv
import math
import re
from functools import partial

import checks
import nbformat
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from helpers.metrics import interval
from helpers.mixture import example
from helpers.pipelines import load
from helpers.schedulers import draw_latents, make
from tools import scheduler_curves
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "05_schedulers.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)
with scheduler_curves.PATH.open(newline="") as file:
    ROWS = list(csv.DictReader(file))


def test_the_order_of_dpm_solver_by_the_librarys_class():
    """With exponential levels down to sigma_min and no first-order step at the end, the error falls as printed."""
    (order,) = printed(r"Karras, stopped at 0\.1.*DPM\+\+ 2M\s+([\d.]+)")
    assert order == pytest.approx(2, abs=0.4)
    mixture, noise = example(), torch.randn(100, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def end(steps):
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_exponential_sigmas=True,
            final_sigmas_type="sigma_min", lower_order_final=False,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # many steps share a rounded timestep
        x = noise
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
            share = (sigma**2 + 1) ** -0.5
            x = scheduler.step(mixture.noise(x, share, sigma * share), t, x).prev_sample
        return x

    reference = end(900)
    coarse, fine = ((end(steps) - reference).norm(dim=1).mean().item() for steps in (30, 90))
    assert math.log(coarse / fine) / math.log(3) == pytest.approx(2, abs=0.5)


def test_the_limits_of_stability_by_running_the_recursion():
    """On the slope -z x, just inside the limit that the page prints a walk stays small, just outside it explodes."""
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}

    def far(own, z):
        x, seen = 1.0, [0.0] * len(own)
        for _ in range(3000):
            seen = [-z * x, *seen][: len(own)]
            x += sum(w * s for w, s in zip(own, seen, strict=True))
            if abs(x) > 1e6:
                return math.inf
        return abs(x)

    for count, own in weights.items():
        (limit,) = printed(rf"{count} answers: stable up to z = ([\d.]+)")
        assert far(own, limit - 0.02) < 1 < far(own, limit + 0.03), count


def test_the_timesteps_of_the_three_spacings():
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(10)
        assert f"{spacing:9} {scheduler.timesteps.tolist()}" in PRINTED


def test_the_shift_in_closed_form():
    (last,) = printed(r"the last level above zero: ([\d.]+)")
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert last == pytest.approx(3 * once / (1 + 2 * once), abs=1e-4)


def test_a_path_in_the_plane_is_no_matter_of_chance():
    """A random walk as long has the share that the page prints, by the eigenvalues of its covariance."""
    of_path, of_chance = printed(r"two widest directions hold ([\d.]+)% of the path, ([\d.]+)%")
    steps = 30
    gram = np.minimum.outer(np.arange(1, steps + 1), np.arange(1, steps + 1)).astype(float)  # of a walk, expected
    centre = np.eye(steps) - 1 / steps
    values = np.sort(np.linalg.eigvalsh(centre @ gram @ centre))[::-1]
    assert 100 * values[:2].sum() / values.sum() == pytest.approx(of_chance, abs=3)
    assert of_path > of_chance + 5


# The table that `python -m tools.scheduler_curves` made


def test_the_table_is_whole():
    expected = [
        (name, sampler.label, count)
        for name, samplers in scheduler_curves.SAMPLERS.items()
        for sampler in samplers
        for count in scheduler_curves.EVALUATIONS + ((scheduler_curves.MORE,) if sampler is samplers[0] else ())
    ]
    assert [(row["model"], row["sampler"], int(row["evaluations"])) for row in ROWS] == expected
    assert all(0 <= float(row["right"]) <= 1 and int(row["prompts"]) == scheduler_curves.PROMPTS for row in ROWS)


def test_one_model_is_computed_again_and_the_other_stays(tmp_path, monkeypatch):
    path = tmp_path / "curves.csv"
    monkeypatch.setattr(scheduler_curves, "PATH", path)
    monkeypatch.setattr(scheduler_curves, "measure", lambda name: [dict.fromkeys(scheduler_curves.COLUMNS, name)])
    monkeypatch.setattr("sys.argv", ["scheduler_curves"])
    scheduler_curves.main()
    assert [row["model"] for row in scheduler_curves.read(path)] == list(scheduler_curves.SAMPLERS)
    again = {"model": "storybook-sd", "sampler": "again"}
    monkeypatch.setattr(scheduler_curves, "measure", lambda name: [dict.fromkeys(scheduler_curves.COLUMNS, "") | again])
    monkeypatch.setattr("sys.argv", ["scheduler_curves", "--only", "storybook-sd"])
    scheduler_curves.main()
    assert [row["sampler"] for row in scheduler_curves.read(path)] == ["again", "storybook-sd3"]


@torch.no_grad()
@pytest.mark.parametrize("name", scheduler_curves.SAMPLERS)
def test_a_row_of_the_table_is_found_again(name):
    """The share that is right with the first sampler at 5 evaluations; one picture may fall on the other side."""
    sampler = scheduler_curves.SAMPLERS[name][0]
    pipe, prompts = load(name), scheduler_curves.seen_prompts(scheduler_curves.PROMPTS)
    scheduler = make(sampler.name, pipe.scheduler.config, **sampler.arguments)
    latents = draw_latents(pipe, scheduler, prompts, 5, pipe.model.guidance)
    (row,) = (row for row in ROWS if (row["model"], row["sampler"], row["evaluations"]) == (name, sampler.label, "5"))
    right = scheduler_curves.judged(pipe, latents, prompts)
    assert right == pytest.approx(float(row["right"]), abs=1.5 / len(prompts)), (
        "other weights than the table's: run python -m tools.scheduler_curves, then notebook 05"
    )


def test_the_recommendations_follow_from_the_table():
    for name in scheduler_curves.SAMPLERS:
        for count in ("5", "10", "20", "50"):
            (line,) = re.findall(rf"^{name} +{count}: (.*)$", PRINTED, re.MULTILINE)
            here = {row["sampler"]: row for row in ROWS if row["model"] == name and row["evaluations"] == count}
            best = max(float(row["right"]) for row in here.values())
            for sampler, row in here.items():
                tied = interval(float(row["right"]), int(row["prompts"]))[1] >= best
                assert bool(re.search(rf"(^|, ){re.escape(sampler)} \d+%-", line)) == tied, (name, count, sampler)


# The exercises


def test_the_solutions_of_the_exercises_are_right():
    before = next(k for k, source in enumerate(CODE) if source.startswith("def mean_slope"))
    shown = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    solution = re.search(r"```python\n(def mean_slope.*?)```", shown, re.DOTALL).group(1)
    space = {"math": math}
    exec(solution + "\n" + CODE[before + 1], space)  # its own check
    assert space["mean_slope"](2.0, 0.0) == 3.0
    with pytest.raises(AssertionError, match="half a step"):
        exec("def mean_slope(now, before):\n    return now\n" + CODE[before + 1], dict(space))
