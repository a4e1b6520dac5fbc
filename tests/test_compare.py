"""Metrics on cases with a known answer, and grids that keep their promises."""

import csv
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import helpers.compare
from helpers.compare import (
    Settings,
    clip_features,
    clip_score,
    contrast,
    difference_with_interval,
    diversity,
    interval,
    kid,
    mean_with_interval,
    pixels,
    saturation,
    sweep,
)
from helpers.generate import generate
from helpers.images import record
from helpers.images import settings as settings_in
from helpers.pipelines import Model, load

PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 3, 4.0, (PROMPT,), folder=str(folder)))


@pytest.fixture
def drawn(monkeypatch):
    """How many pictures each batch held."""
    sizes, latents = [], helpers.compare._latents

    def counting(pipe, batch, watch):
        if batch[0].steps != helpers.compare.TIMED:
            sizes.append(len(batch))
        return latents(pipe, batch, watch)

    monkeypatch.setattr(helpers.compare, "_latents", counting)
    return sizes


def plain(*colours, size=8):
    return [Image.new("RGB", (size, size), colour) for colour in colours]


# Metrics


def test_wilson_intervals_are_those_of_the_textbook():
    assert interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError, match="count"):
        interval(0.5, 0)


def test_a_mean_comes_with_the_interval_of_its_kind():
    assert mean_with_interval([True] * 8 + [False] * 2) == pytest.approx((0.8, 0.4902, 0.9433, 10), abs=1e-4)
    assert mean_with_interval([1.0, 3.0]) == pytest.approx((2, 2 - 1.96, 2 + 1.96, 2))
    assert mean_with_interval([1.0])[1:3] == (-math.inf, math.inf)


def test_differences_are_taken_pair_by_pair():
    assert difference_with_interval([1.0, 5.0], [0.5, 4.5]) == pytest.approx((0.5, 0.5, 0.5, 2))
    # Bonett and Price by hand: 6 gained and 1 lost of 20, so 7 / 22 and 2 / 22
    ours, theirs = [True] * 6 + [False] + [True] * 13, [False] * 6 + [True] * 14
    half = 1.96 * math.sqrt((9 / 22 - (5 / 22) ** 2) / 22)
    assert difference_with_interval(ours, theirs) == pytest.approx((5 / 20, 5 / 22 - half, 5 / 22 + half, 20))
    mean, low, high, _ = difference_with_interval([True] * 48, [True] * 48)
    assert mean == 0 and high == -low == pytest.approx(0.0554, abs=1e-4)
    for wrong in ([True], []):
        with pytest.raises(ValueError, match="give pairs"):
            difference_with_interval(wrong, [True, False] if wrong else [])


def test_colours_and_greys():
    assert saturation(plain("red", "gray", "white", (255, 128, 0))) == pytest.approx([1, 0, 0, 1])
    halves = Image.new("L", (8, 8))
    halves.paste(255, (0, 0, 8, 4))
    assert contrast([halves]) == pytest.approx([0.5])
    assert contrast(plain("red")) == pytest.approx([0], abs=1e-6)
    assert pixels(plain("red")).shape == (1, 3, 8, 8) and pixels(plain("red"))[0, 0].min() == 1


def test_the_distance_between_two_seeds():
    assert diversity(pixels(plain("black", "white"))) == pytest.approx(1)
    assert diversity(pixels(plain("black", "black", "white"))) == pytest.approx(2 / 3)
    assert diversity(torch.tensor([[1.0, 0], [0, 1.0]])) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="two pictures"):
        diversity(torch.zeros(1, 4))


def test_kid_of_two_points_is_a_formula():
    """(a . b / d + 1)^3 between the only two values that there are."""
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]])
    expected = (5 / 2 + 1) ** 3 + (9 / 2 + 1) ** 3 - 2 * (6 / 2 + 1) ** 3
    found, error = kid(a.expand(20, 2), b.expand(30, 2))
    assert found == pytest.approx(expected) and error == pytest.approx(0)


def test_kid_is_unbiased_and_its_error_honest():
    generator = torch.Generator().manual_seed(0)
    found = [kid(*torch.randn(2, 20, 4, generator=generator)) for _ in range(400)]
    values, errors = torch.tensor(found).T
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(400)  # the biased estimate is 0.6 off here
    assert values.min() < 0 < values.max()
    assert values.std() / 3 < errors.mean() < 6 * values.std()
    with pytest.raises(ValueError, match="10 or more"):
        kid(torch.zeros(9, 4), torch.zeros(20, 4))


def test_clip_prefers_the_prompt_that_a_render_was_made_for():
    import random

    from storybook.world import parse, render

    prompts = ["a red boat by the sea", "a yellow house in the snow", "a blue rocket under a starry night sky"]
    renders = [render(parse(prompt), random.Random(1)) for prompt in prompts]
    scores = np.array([clip_score(renders, [prompt] * 3) for prompt in prompts])
    assert (scores.argmax(1) == [0, 1, 2]).all() and abs(scores).max() <= 1
    assert torch.allclose(clip_features(renders).norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        clip_score(renders, ["a red boat"])


# The grid


def test_a_sweep_draws_what_generate_draws(pipe, tmp_path, drawn):
    """The same noise everywhere: a picture of a batch is the one that is drawn alone from its seed."""
    said = []
    found = sweep(pipe, ("guidance", [1, 4]), ("steps", [2, 4]), [PROMPT, "a blue star"], [3, 7],
                  Settings(PROMPT, "house"), folder=tmp_path, say=said.append)  # fmt: skip
    assert drawn == [4, 4, 4, 4]
    assert len(found.rows) == len(found.images) == 16
    for row, image in zip(found.rows, found.images, strict=True):
        (alone,) = generate(
            pipe, Settings(row["prompt"], "house", row["steps"], row["guidance"], row["seed"]), say=lambda _: None
        )
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1, row
        assert row["saturation"] == pytest.approx(saturation([image])[0])
    # PNDM asks once more than it has steps, and twice with guidance: 4 pictures each of 3 + 5 and 6 + 10
    assert said[0] == "16 pictures, 96 evaluations of the network for one picture each." and "pace" in said[1]
    with found.csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guidance"] for row in rows[:8:4]] == ["1", "4"] and len(rows) == 16
    assert Image.open(found.png).size == found.picture.size
    inside = record(found.png)
    assert list(inside["axes"].items()) == [
        ("steps", [2, 4]),
        ("guidance", [1, 4]),
        ("prompt", [PROMPT, "a blue star"]),
        ("seed", [3, 7]),
    ]
    assert settings_in(found.png) == replace(found.images[0].info["settings"], count=1) and inside["model"] == "tiny"
    assert "Size: 64x64" in Image.open(found.png).info["parameters"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".png"]
    assert found.cells("saturation", "guidance", "steps")[4, 2][3] == 4


def test_the_labelled_picture_has_x_from_left_to_right(pipe, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        helpers.compare,
        "grid",
        lambda images, columns, labels: shown.update(columns=columns, labels=labels) or images[0],
    )
    sweep(pipe, ("seed", [0, 1, 2]), ("guidance", [2, 3]), settings=Settings(PROMPT, steps=1), folder=tmp_path)
    assert shown["columns"] == 3
    assert shown["labels"] == [f"guidance {g}\nseed {s}" for g in (2, 3) for s in (0, 1, 2)]


def test_an_interrupted_sweep_goes_on_where_it_stopped(pipe, tmp_path, monkeypatch, drawn):
    axes = {"x": ("guidance", [1, 2, 3]), "settings": Settings(PROMPT, steps=2)}

    def stop(images, prompts):
        raise KeyboardInterrupt

    draw = helpers.compare._draw
    monkeypatch.setattr(
        helpers.compare,
        "_draw",
        lambda pipe, batch, tell: stop(0, 0) if batch[0].guidance == 3 else draw(pipe, batch, tell),
    )
    with pytest.raises(KeyboardInterrupt):
        sweep(pipe, **axes, seeds=[0, 1], folder=tmp_path)
    assert drawn == [2, 2]
    monkeypatch.setattr(helpers.compare, "_draw", draw)
    said = []
    resumed = sweep(pipe, **axes, seeds=[0, 1], folder=tmp_path, say=said.append)
    assert drawn == [2, 2, 2] and said[0] == "4 of 6 pictures are there from before."
    whole = sweep(pipe, **axes, seeds=[0, 1], folder=tmp_path / "again")
    assert resumed.rows == whole.rows and resumed.csv.name == whole.csv.name
    assert all(a.tobytes() == b.tobytes() for a, b in zip(resumed.images, whole.images, strict=True))


def test_other_weights_do_not_go_on_with_the_pictures_of_the_first(pipe):
    wanted = [helpers.compare._resolved(pipe, Settings(PROMPT))]
    before = helpers.compare._fingerprint(pipe, wanted)
    weight = pipe.unet.conv_out.weight
    with torch.no_grad():
        weight.view(-1)[0] += 1
    after = helpers.compare._fingerprint(pipe, wanted)
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    assert before != after != helpers.compare._fingerprint(pipe, [replace(wanted[0], seed=1)])


def test_a_metric_sees_each_picture_with_its_prompt(pipe, tmp_path):
    def rows(images, prompts):
        return [
            None if "star" in prompt else image.size == (64, 64) for image, prompt in zip(images, prompts, strict=True)
        ]

    found = sweep(pipe, ("prompt", [PROMPT, "a blue star"]), seeds=[0, 1], settings=Settings("-", steps=1),
                  metrics={"right": rows}, folder=tmp_path)  # fmt: skip
    assert [row["right"] for row in found.rows] == [True, True, None, None]
    assert found.cells("right", "prompt") == {PROMPT: (1.0, *interval(1.0, 2), 2)}
    with pytest.raises(ValueError, match="no column 'colour'"):
        found.cells("colour", "prompt")


def test_an_axis_that_changed_nothing_is_no_axis(pipe, tmp_path):
    """Without guidance a negative prompt is not read, and a guidance below 1 is the same as 1."""
    with pytest.raises(RuntimeError, match="'negative_prompt' changed nothing: '' and 'house'"):
        sweep(pipe, ("negative_prompt", ["", "house"]), settings=Settings(PROMPT, steps=1, guidance=1), folder=tmp_path)
    with pytest.raises(RuntimeError, match="'guidance' changed nothing: 0 and 1"):
        sweep(pipe, ("guidance", [0, 1, 2]), settings=Settings(PROMPT, steps=1), folder=tmp_path)
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"x": ("guidance", [])}, "at least one value"),
        ({"x": ("guidance", [1, "high"])}, "guidance is not a number"),
        ({"x": ("guidance", [1, float("nan")])}, "guidance is not a number"),
        ({"x": ("guidance", [2, 3, 2])}, "there twice"),
        ({"x": ("guidance", 3)}, "An axis is a name and its values"),
        ({"x": ("colour", ["red"])}, "no setting 'colour'"),
        ({"x": ("count", [1, 2])}, "no setting 'count'"),
        ({"x": ("seed", [1]), "y": ("seed", [2])}, "'seed' is there twice"),
        ({"x": ("steps", [2]), "prompts": []}, "at least one value"),
        ({"x": ("steps", [2, 2000])}, "2000"),
        ({"x": ("scheduler", ["DDIMScheduler", "DDMIScheduler"])}, "no scheduler 'DDMIScheduler'"),
        ({"x": ("scheduler", ["FlowMatchEulerDiscreteScheduler"])}, "no scheduler 'FlowMatch"),
        ({"x": ("seed", range(200)), "y": ("steps", range(1, 101))}, "20,000 pictures are too many for one grid"),
        ({"x": ("prompt", ["", PROMPT])}, "prompt is empty"),
    ],
)
def test_bad_axes_are_refused_before_any_work(pipe, tmp_path, drawn, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        sweep(pipe, **{"settings": Settings(PROMPT), "folder": tmp_path, **arguments})
    assert str(caught.value).count("\n") == 0
    assert not drawn and not list(tmp_path.iterdir())


def test_a_grid_that_does_not_fit_into_memory_is_refused(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers.compare.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with pytest.raises(ValueError, match="8 pictures take .* GiB, and 0.0 are free: draw fewer"):
        sweep(pipe, ("seed", range(8)), settings=Settings(PROMPT), folder=tmp_path)


def test_a_full_memory_is_met_with_smaller_batches(pipe, tmp_path, monkeypatch):
    def full(pipe, batch, watch):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(helpers.compare, "_latents", full)
    monkeypatch.setattr(helpers.compare, "_seconds_per_evaluation", lambda *_: 0.0)
    found = sweep(pipe, ("seed", [0, 1]), settings=Settings(PROMPT, steps=1), folder=tmp_path)
    assert len(found.images) == 2


def test_a_flow_model_is_swept_too(tmp_path):
    pipe = tiny.sd3(tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    found = sweep(pipe, ("guidance", [1, 3]), seeds=[0, 1], settings=Settings(PROMPT, steps=2), folder=tmp_path / "out")
    assert len(found.images) == 4


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "0 seconds"),
        (1.2, "1 second"),
        (2, "2 seconds"),
        (99, "99 seconds"),
        (99.6, "2 minutes"),
        (300, "5 minutes"),
    ],
)
def test_times_are_english(seconds, text):
    assert helpers.compare._time(seconds) == text


def test_the_table_as_a_data_frame(pipe, tmp_path):
    found = sweep(pipe, ("seed", [0, 1]), settings=Settings(PROMPT, steps=1), folder=tmp_path)
    frame = found.frame()
    assert list(frame.columns) == list(found.rows[0]) and frame["seed"].tolist() == [0, 1]
    assert frame["contrast"].tolist() == [row["contrast"] for row in found.rows]
