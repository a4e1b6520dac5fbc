"""The statistics behind the model cards."""

import pytest
import torch
from PIL import Image

from storybook import evaluate, sample
from storybook.judge import Judge
from storybook.world import HELD_OUT, parse


def test_wilson_intervals_are_those_of_the_textbook():
    assert evaluate.interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.interval(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_prompts_ask_for_what_they_are_named_after():
    seen, held_out, two = (make(40) for make in (
        sample.seen_prompts, sample.held_out_prompts, sample.two_thing_prompts
    ))  # fmt: skip
    pairs = [{(thing.colour, thing.kind) for thing in parse(prompt).things} for prompt in seen]
    assert not any(pair & HELD_OUT for pair in pairs)
    assert {(t.colour, t.kind) for prompt in held_out for t in parse(prompt).things} == HELD_OUT
    assert all(len(parse(prompt).things) == 2 for prompt in two)
    assert sample.seen_prompts(40) == seen


def test_a_figure_comes_with_its_interval():
    table = [{"object": True, "all": True}] * 8 + [{"object": False, "all": False}] * 2
    assert evaluate.percent_right(table, "object") == "80.0% of 10 (95 % interval 49% to 94%)"


def test_accuracy_has_a_row_of_the_second_judge(monkeypatch):
    """A second judge that sees nothing right is not hidden by a first one that sees everything."""
    prompt = "a red boat by the sea"
    related = "a red boat to the left of a blue cup by the sea"
    prompts = {evaluate.ONE_SEEN: [prompt], evaluate.ONE_HELD_OUT: [prompt], evaluate.TWO: [related]}
    blank = Image.new("RGB", (64, 64))
    right = {"object": True, "colour": True, "setting": True, "position": None, "all": True}
    wrong = dict.fromkeys(right, False)
    monkeypatch.setattr(
        evaluate, "judge", lambda images, captions, network=None: [
            {**(wrong if network else right), "position": not network if text == related else None} for text in captions
        ],
    )  # fmt: skip
    rows = dict(evaluate.accuracy({what: [blank] for what in prompts}, prompts, Judge()))
    assert rows[f"{evaluate.TWO}: both objects with their own colours"].startswith("100.0%")
    assert rows[f"- by the second judge, {evaluate.TWO}"].startswith("0.0%")
    assert rows["- and the relation too, where it was asked for"] == "100.0% of 1"


def test_distances_to_the_nearest_render(monkeypatch):
    """Root mean square over pixels in 0..1: a picture is 0 away from itself, white is 1 away from black."""
    training = torch.zeros(3, 8, 8, 4, dtype=torch.uint8).numpy()
    monkeypatch.setattr(evaluate.data, "pictures", lambda split, count, size: training)
    images = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    assert evaluate.nearest_training_render(images, 3).tolist() == pytest.approx([0, 1], abs=1e-3)
