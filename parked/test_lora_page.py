"""Numbers that notebook 09 prints, computed again in another way than the page does; its table, and the command."""

import csv
import re

import checks
import nbformat
import pytest
import torch

from helpers import lora
from helpers.pipelines import load
from tools import lora_curves
from tools.badges import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "09_finetune_lora.ipynb", as_version=4)
PRINTED = checks.printed(NOTEBOOK)


def printed(pattern: str) -> list[float]:
    """The numbers that the groups of the pattern find in what the page printed."""
    found = re.search(pattern, PRINTED)
    assert found, f"the page no longer prints {pattern!r}"
    return [float(number.replace(",", "")) for number in found.groups()]


def rows(**wanted) -> list[dict]:
    with lora_curves.TABLE.open() as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


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


def test_how_many_weights_an_adapter_has(pipe):
    count, total, percent = printed(r"the adapter has ([\d,]+) weights, the UNet ([\d,]+): ([\d.]+)%")
    assert count == weights(pipe.unet, 8, None)
    assert total == sum(p.numel() for p in pipe.unet.parameters()) and percent == pytest.approx(
        100 * count / total, abs=0.1
    )
    for layers, ends in (("attention", lora.ATTENTION), ("all", None)):
        for rank in lora_curves.RANKS:
            (row,) = rows(part="rank", method=layers, rank=str(rank), metric="right")
            assert int(row["weights"]) == weights(pipe.unet, rank, ends)


def test_the_table_belongs_to_the_weights(pipe):
    (row,) = rows(part="check")
    (again,) = lora_curves.check_rows(pipe)
    assert again[5] == pytest.approx(float(row["mean"]), abs=0.5), "run python -m tools.lora_curves again"


def test_the_table_is_whole_and_the_page_shows_it():
    shares = rows(metric="right") + rows(metric="kept")
    assert len(shares) == 2 * (1 + len(lora.LAYERS) * len(lora_curves.RANKS))
    for row in shares:
        mean, low, high, n = (float(row[name]) for name in ("mean", "low", "high", "n"))
        assert 0 <= low <= mean <= high <= 1 and mean * n == pytest.approx(round(mean * n), abs=0.05)
    for row in rows(part="rank", metric="right"):
        found = printed(rf"{row['method']} +{row['rank']} +{int(row['weights']):,} +(\d+)% \((\d+)% to (\d+)%\)")
        assert found == pytest.approx([100 * float(row[name]) for name in ("mean", "low", "high")], abs=0.51)


def test_what_was_taught_is_there_and_what_was_not_is_not():
    (never,) = rows(part="none", metric="right")
    (after,) = printed(r"zorps right, after +(\d+)% of 14")
    assert float(never["mean"]) < 0.15 and after > 100 * float(never["high"])
    with_prior, alone = (printed(rf"still plain, .*{how} +(\d+)%")[0] for how in ("with prior preservation", "alone"))
    assert with_prior > alone


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
