"""The judge is right on renders it has never seen, and its table says what was right."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from storybook.judge import Judge, bundled_network, compare, in_bytes, judge, look, share
from storybook.train import judge as training
from storybook.train.judge import fresh_table
from storybook.world import Scene, Thing, parse, render


@pytest.fixture(scope="module")
def table():
    return fresh_table(2000)


@pytest.mark.parametrize("part", ["object", "colour", "setting", "position"])
def test_each_part_is_right_on_99_percent_of_fresh_renders(table, part):
    asked = [row for row in table if row[part] is not None]
    assert len(asked) > 1500
    assert share(asked, part) >= 0.99


def test_the_judge_is_measured_on_pictures_that_it_never_saw(monkeypatch):
    looked_at = []
    monkeypatch.setattr(training, "judge", lambda images, captions: looked_at.extend(images) or [])
    fresh_table(40)
    fresh = {np.asarray(image).tobytes() for image in looked_at}
    seen = {training.draw((split, index, 128)).tobytes() for split in ("judge", "second-judge") for index in range(40)}
    assert len(fresh) == 40 and len(seen) == 80 and not fresh & seen


SEEN = Scene((Thing("boat", "red"), Thing("star", "blue")), "sea", "left of")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("a red boat to the left of a blue star by the sea", (True, True, True, True)),
        ("a blue star to the right of a red boat", (True, True, None, True)),
        ("a blue star to the left of a red boat", (True, True, None, False)),
        ("a blue boat to the left of a red star", (True, False, None, True)),
        ("a red boat above a blue star", (True, True, None, False)),
        ("a blue star and a red boat in the snow", (True, True, False, None)),
        ("a red boat", (False, False, None, None)),
        ("a boat and a star", (True, None, None, None)),
    ],
)
def test_compare(asked, expected):
    row = compare(SEEN, parse(asked))
    assert tuple(row[part] for part in ("object", "colour", "setting", "position")) == expected
    assert row["all"] == (False not in expected)


def test_pictures_of_any_size_and_mode():
    picture = render(parse("a large red heart in the middle on a plain background"), random.Random(0), 200)
    for variant in (picture, picture.resize((64, 64)), picture.resize((40, 40)), picture.convert("RGBA")):
        (seen,) = look([variant])
        assert (seen.things[0].kind, seen.things[0].colour, seen.setting) == ("heart", "red", "plain")


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="1 pictures came with 2 captions"):
        judge([Image.new("RGB", (64, 64))], ["a boat", "a cup"])
    with pytest.raises(ValueError, match="does not know: dragon"):
        judge([Image.new("RGB", (64, 64))], ["a dragon"])
    with pytest.raises(ValueError, match="no rows"):
        share([], "object")


def test_weights_in_bytes_come_back_nearly_as_they_were(tmp_path, monkeypatch):
    """Within half a step of 127 of each output's largest weight; what is not a matrix within half precision."""
    torch.manual_seed(0)
    network = Judge().eval()
    save_file(in_bytes(network.state_dict()), tmp_path / "model.safetensors")
    monkeypatch.setattr("storybook.judge.WEIGHTS", tmp_path / "model.safetensors")
    back = bundled_network.__wrapped__().state_dict()
    for name, weights in network.state_dict().items():
        error = (back[name] - weights).abs()
        if weights.ndim > 1:
            largest = weights.flatten(1).abs().amax(1).view(-1, *[1] * (weights.ndim - 1))
            assert (error <= largest / 127 * 0.501).all(), name
        else:
            assert torch.allclose(back[name].float(), weights.float(), atol=1e-3), name
