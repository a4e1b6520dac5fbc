"""Numbers that notebook 09 prints, computed again in another way than the page does; its table, and the command."""

import csv
import random
import re
from functools import partial
from types import SimpleNamespace

import checks
import nbformat
import numpy as np
import pytest
import torch
from test_pages import unanswered

from helpers import lora
from helpers.loading.download import LoadError
from helpers.pipelines import load
from storybook import probe
from storybook.world import KINDS, SETTINGS, Scene, Thing, render
from storybook.world.novel import INK, PAPER, ink_drawings, newcomers
from tools import lora_curves
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "09_finetune_lora.ipynb", as_version=4)
PRINTED = checks.printed(NOTEBOOK)
printed = partial(checks.numbers, PRINTED)


def rows(**wanted) -> list[dict]:
    with lora_curves.TABLE.open() as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def percents(row: dict) -> list[float]:
    return [100 * max(float(row[name]), 0) for name in ("mean", "low", "high")]


@pytest.fixture(scope="module")
def pipe():
    return load("storybook-sd")


def weights(unet, rank: int, ends: tuple[str, ...] | None) -> int:
    """r (in + out) for a linear layer; for a convolution A is one too, with the kernel of the layer."""
    total = 0
    for name, layer in unet.named_modules():
        if ends is not None and not name.endswith(ends):
            continue
        if isinstance(layer, torch.nn.Linear):
            total += rank * (layer.in_features + layer.out_features)
        elif isinstance(layer, torch.nn.Conv2d):
            total += rank * (layer.in_channels * layer.weight[0, 0].numel() + layer.out_channels)
    return total


def test_needs_are_those_of_the_table_and_questions_have_answers():
    (told,) = re.findall(r"\| VRAM \| about ([\d.]+) GiB", NOTEBOOK.cells[0].source)
    (asked,) = re.findall(r"choose\(MODEL, vram_gib=([\d.]+)\)", "\n".join(cell.source for cell in NOTEBOOK.cells))
    assert float(told) == float(asked)
    assert unanswered([cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]) == []


def test_how_many_weights_an_adapter_has(pipe):
    count, total, percent = printed(r"the adapter has ([\d,]+) weights, the UNet ([\d,]+): ([\d.]+)%")
    assert count == weights(pipe.unet, 16, None) == int(rows(method="all", rank="16", metric="right")[0]["weights"])
    assert total == sum(p.numel() for p in pipe.unet.parameters())
    assert percent == pytest.approx(100 * count / total, abs=0.1)
    for layers, ends in (("attention", lora.ATTENTION), ("all", None)):
        for rank in lora_curves.RANKS:
            (row,) = rows(part="rank", method=layers, rank=str(rank), metric="right")
            assert int(row["weights"]) == weights(pipe.unet, rank, ends)


def test_the_probe_on_other_fresh_renders():
    """A probe fitted on other renders is as often right on others again."""
    rng, kinds = random.Random(11), tuple(KINDS)
    known = [render(Scene((Thing(kinds[k % 12]),), SETTINGS[k % 7]), rng, 64) for k in range(300)]
    judged_by = probe.fit({"zorp": newcomers("creature", 120, seed=12, size=64)[0], "known": known[:200]})
    for name, pictures in (("zorp", newcomers("creature", 70, seed=13)[0]), ("known", known[200:])):
        (percent,) = printed(rf"probe right on {name} +(\d+)% of 70")
        hits = [seen == name for seen in probe.read(judged_by, pictures)]
        assert 100 * np.mean(hits) == pytest.approx(percent, abs=6)


def test_how_far_ink_is_from_ink():
    """By trying many points on the line between the two ends."""
    (told,) = printed(r"renders in ink +mean distance .*: ([\d.]+)")
    line = INK + np.linspace(0, 1, 500)[:, None] * (PAPER - INK)
    pixels = np.concatenate([np.asarray(p.resize((32, 32), 0), float).reshape(-1, 3) for p in ink_drawings(8)[0]])
    nearest = np.linalg.norm(pixels[:, None] - line, axis=-1).min(1)
    assert nearest.mean() == pytest.approx(told, abs=0.15)
    with_it, without = (
        printed(rf"{name} +mean distance .*: ([\d.]+)")[0] for name in ("with it", "without the adapter")
    )
    assert told < with_it < without / 2


def test_the_table_belongs_to_the_weights(pipe):
    (row,) = rows(part="check")
    (again,) = lora_curves.check_rows(pipe)
    assert again[5] == pytest.approx(float(row["mean"]), abs=0.5), "run python -m tools.lora_curves again"


def test_what_the_model_draws_for_a_house_that_it_never_saw(pipe):
    """The table's castles before anything was learned, by a probe that was fitted on other renders."""
    (row,) = rows(part="prior", method="none", metric="castle")
    images = lora_curves.draw(pipe, newcomers("castle", 14, size=8)[1])
    rng = random.Random(21)
    plain = [render(Scene((Thing("house"),), SETTINGS[k % 7]), rng, 64) for k in range(120)]
    judged_by = probe.fit({"castle": newcomers("castle", 120, seed=22, size=64)[0], "house": plain})
    seen = probe.read(judged_by, images)
    assert seen.count("castle") / 14 == pytest.approx(float(row["mean"]), abs=2.5 / 14) and float(row["mean"]) < 0.3


def test_the_table_is_whole_and_the_page_shows_it():
    shares = [row for part in ("none", "rank") for row in rows(part=part)]
    assert len(shares) == 2 * (1 + len(lora.LAYERS) * len(lora_curves.RANKS))
    assert {row["n"] for row in shares} == {"28", "14"} and len(rows(part="prior")) == 12
    for row in shares + rows(part="prior"):
        mean, low, high, n = (float(row[name]) for name in ("mean", "low", "high", "n"))
        assert -1e-6 <= low <= mean <= high <= 1
        assert row["metric"] == "drift" or mean * n == pytest.approx(round(mean * n), abs=0.05)
    for row in rows(part="rank", metric="right"):
        found = printed(rf"{row['method']} +{row['rank']} +{int(row['weights']):,} +(\d+)% \((\d+)% to (\d+)%\)")
        assert found == pytest.approx(percents(row), abs=0.51)
    for metric, label in (("castle", "zik house when asked for it"), ("spoiled", "ordinary houses that look zik")):
        found = printed(label + 3 * r" +(\d+)% \((\d+)% to (\d+)%\)")
        wanted = [
            value for method in ("none", "alone", "prior") for value in percents(*rows(method=method, metric=metric))
        ]
        assert found == pytest.approx(wanted, abs=0.51)


def test_what_was_taught_is_there_and_what_was_not_is_not():
    (never,) = rows(part="none", metric="right")
    (after,) = printed(r"zorps right, after +(\d+)% of 28")
    assert float(never["mean"]) < 0.15 and after > 100 * float(never["high"])
    assert printed(r"drawn by stock diffusers from the file: zorps (\d+) of 4")[0] >= 2
    alone, prior = (rows(part="prior", method=method, metric="drift")[0] for method in ("alone", "prior"))
    assert float(prior["mean"]) < float(alone["mean"])
    table, page = printed(r"rank 16 beside all layers: ([\d.]+)% in the table, ([\d.]+)% on this page")
    assert page == pytest.approx(table, abs=8)


def test_a_torchao_in_the_way_is_told_and_on_colab_taken_away(monkeypatch, capsys):
    (cell,) = [cell.source for cell in NOTEBOOK.cells if "lora.require_peft()" in cell.source]
    there, ran = [True], []

    def available():
        if there[0]:
            raise ImportError("too old")

    def uninstall(command, check):
        ran.append(command)
        there[0] = False

    monkeypatch.setattr(lora, "is_torchao_available", available)
    for modules, taken in (({}, []), ({"google.colab": None}, [["python", "-m", "pip", "uninstall"]])):
        exec(
            cell,
            {
                "sys": SimpleNamespace(modules=modules, executable="python"),
                "subprocess": SimpleNamespace(run=uninstall),
            },
        )
        assert "torchao of this machine is too old for peft" in capsys.readouterr().out
        assert [command[:4] for command in ran] == taken and all(command[-1] == "torchao" for command in ran)
    there[0] = True
    with pytest.raises(LoadError):  # the second look is a real one
        stuck = SimpleNamespace(run=lambda command, check: None)
        exec(cell, {"sys": SimpleNamespace(modules={"google.colab": None}, executable="python"), "subprocess": stuck})


def test_a_curve_is_one_adapter_after_another_on_the_same_model(pipe, monkeypatch):
    """Each adapter is trained for the steps asked for and gone before the next; the untrained model comes first."""
    seen = []
    monkeypatch.setattr(lora_curves, "fit", lambda pipe, examples, steps, **how: seen.append((lora.names(pipe), steps)))
    monkeypatch.setattr(lora_curves, "measured", lambda pipe, *given: {"right": [bool(lora.names(pipe))] * 4})
    monkeypatch.setattr(lora_curves, "examiner", lambda: None)
    monkeypatch.setattr(lora_curves, "encode", lambda pipe, pictures, captions: captions)
    found = lora_curves.curves(pipe, [("none", 0), ("attention", 2), ("all", 1)], steps=7, count=3)
    assert seen == [(["zorp"], 7)] * 2 and lora.names(pipe) == []
    assert [row[:3] for row in found] == [("none", "none", 0), ("rank", "attention", 2), ("rank", "all", 1)]
    assert [row[5] for row in found] == [0.0, 1.0, 1.0] and found[0][3] == 0


def test_the_prior_is_of_other_houses_and_joins_one_method_alone(pipe, monkeypatch):
    fitted, drawn = [], []

    def fit(pipe, examples, steps, prior, **how):
        fitted.append((len(examples), prior and tuple(prior), lora.names(pipe)))

    def draw(pipe, prompts, first_seed=0):
        drawn.append((tuple(prompts), first_seed))
        return newcomers("castle", len(prompts), size=32)[0]

    monkeypatch.setattr(lora_curves, "fit", fit)
    monkeypatch.setattr(lora_curves, "draw", draw)
    monkeypatch.setattr(lora_curves, "encode", lambda pipe, pictures, captions: captions)
    found, picture = lora_curves.prior_rows(pipe, steps=7)
    (own, seed), asked = drawn[0], {prompts for prompts, first_seed in drawn if not first_seed}
    assert fitted == [(6, None, ["castle"]), (6, own, ["castle"])] and seed and len(own) == 8
    assert not set(own) & {prompt for prompts in asked for prompt in prompts} and lora.names(pipe) == []
    assert {row[4]: row[5] for row in found[:4]}.items() >= {"castle": 1.0, "drift": 0.0}.items()
    assert [row[1] for row in found] == [method for method in ("none", "alone", "prior") for _ in range(4)]


def test_the_distance_of_two_pictures():
    black, grey = (np.full((4, 4, 3), value, np.uint8) for value in (0, 51))
    assert lora_curves.rms(black, grey) == pytest.approx(0.2) and lora_curves.rms(grey, grey) == 0


def test_too_few_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora_curves", "--steps", "0"])
    with pytest.raises(SystemExit):
        lora_curves.main()
    assert "--steps takes 1 or more" in capsys.readouterr().err


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "table.csv"
    lora_curves.write([("rank", "all", 1, 10, "right", 0.5, 0.25, 0.75, 4)], path)
    with pytest.raises(TypeError):
        lora_curves.write([None], path)
    assert path.read_text().splitlines() == [",".join(lora_curves.FIELDS), "rank,all,1,10,right,0.5,0.25,0.75,4"]
