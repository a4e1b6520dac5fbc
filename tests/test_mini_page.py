"""Numbers that notebook 07 prints, computed again in another way; its table belongs to the weights it brings."""

import csv
import hashlib
import re
from functools import partial

import checks
import nbformat
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from helpers.metrics import interval
from storybook.judge import judge, share
from storybook.sample import close_up_prompts
from storybook.world import COLOURS, HELD_OUT, KINDS
from storybook.write_dataset import close_ups, in_brief, write
from tools import mini_curves
from tools.badges import ROOT
from training import mini
from training.dataset import encode

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "07_train_mini_diffusion.ipynb", as_version=4)
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)


def table(name: str) -> list[dict]:
    with (ROOT / "notebooks/data" / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def last() -> dict:
    """The row of the table that the committed weights made."""
    row = table("mini_training.csv")[-1]
    assert int(row["step"]) == mini_curves.TRAINING.steps
    return row


def test_the_table_was_made_with_the_committed_weights(last):
    assert hashlib.sha256(mini_curves.WEIGHTS.read_bytes()).hexdigest()[:16] == last["weights"]
    prompts = close_up_prompts(mini_curves.PROMPTS)
    found = share(judge(mini_curves.draw(mini_curves.WEIGHTS, prompts), prompts), *mini_curves.RIGHT)
    assert int(last["n"]) == len(prompts) and found == pytest.approx(float(last["seen"]), abs=1.5 / len(prompts))


def test_the_table_is_whole_and_the_page_prints_it():
    rows = table("mini_training.csv")
    assert [int(row["step"]) for row in rows] == [*mini_curves.JUDGED]
    assert mini_curves.JUDGED[-1] == mini_curves.TRAINING.steps
    for row in rows:
        for name in ("seen", "held_out"):
            low, high = interval(float(row[name]), int(row["n"]))
            assert (low, high) == pytest.approx((float(row[f"{name}_low"]), float(row[f"{name}_high"])), abs=2e-3)
        minutes, loss, *shares = printed(
            rf"step +{row['step']}, +([\d.]+) minutes, loss ([\d.]+): seen +(\d+)%, held-out +(\d+)% of {row['n']}"
        )
        assert 60 * minutes == pytest.approx(float(row["seconds"]), abs=4) and abs(loss - float(row["loss"])) < 6e-4
        assert [100 * float(row["seen"]), 100 * float(row["held_out"])] == pytest.approx(shares, abs=0.6)


def test_withheld_pairs_leave_every_colour_and_every_kind():
    for portion in mini_curves.SHARES:
        gone = mini_curves.withheld(round(portion * len(COLOURS) * len(KINDS)))
        left = {(colour, kind) for colour in COLOURS for kind in KINDS} - gone
        assert (
            gone >= HELD_OUT and {colour for colour, _ in left} == {*COLOURS} and {kind for _, kind in left} == {*KINDS}
        )


def test_how_much_of_the_picture_each_schedule_leaves():
    right, told = printed(r"left at t = 500: ([\d.]+), told by linear betas: ([\d.]+)")
    true = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[500] ** 0.5
    assert true == pytest.approx(right, abs=0.006)
    assert DDPMScheduler(1000).alphas_cumprod[500] ** 0.5 == pytest.approx(told, abs=0.006)


def test_how_many_latents_clipping_cuts(tmp_path):
    """In 32 pictures that the page does not have."""
    (outside,) = printed(r"latents outside -1 to 1: (\d+)%")
    write(tmp_path / "set", 32, close_ups(split="test"), say=in_brief)
    latents = encode(tmp_path / "set", *mini.bundled("cpu"))["latents"][:, 0].float()
    assert 100 * (latents.abs() > 1).float().mean() == pytest.approx(outside, abs=4)


def test_what_the_page_counts_are_its_networks_weights():
    (count,) = re.findall(r"([\d,]+) weights, \(2, 4, 16, 16\)", PRINTED)
    unet, objective = mini.load(mini_curves.WEIGHTS)
    assert sum(weight.numel() for weight in unet.state_dict().values()) == int(count.replace(",", ""))
    assert objective == "noise" and all(torch.isfinite(weight).all() for weight in unet.parameters())


def test_fewer_pairs_shown_are_fewer_held_out_ones_right():
    """What section 10 says of its table, whose intervals are computed again; what is asked for is always withheld."""
    rows = table("mini_composition.csv")
    assert [int(row["withheld"]) for row in rows] == [
        round(part * len(COLOURS) * len(KINDS)) for part in mini_curves.SHARES
    ]
    for row in rows:
        for sort in ("seen", "held_out"):
            low, high = interval(float(row[sort]), int(row["n"]))
            assert float(row[f"{sort}_low"]) == pytest.approx(low, abs=2e-3)
            assert float(row[f"{sort}_high"]) == pytest.approx(high, abs=2e-3)
        gone = mini_curves.withheld(int(row["withheld"]))
        assert len(gone) == int(row["withheld"]) and gone >= set(HELD_OUT)
    few = rows[-1]
    assert float(few["held_out_high"]) < float(few["seen_low"])
    assert all(float(row["held_out_high"]) > float(row["seen_low"]) for row in rows[:-1])
