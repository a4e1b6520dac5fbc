"""What is taught on page 09: the newcomers of the world, and the probe that tells them from what is known."""

import random

import numpy as np
import pytest
from PIL import Image

from storybook import probe
from storybook.judge import judge
from storybook.world import COLOURS, KINDS, SETTINGS, Scene, Thing, parse, render, words
from storybook.world.novel import DESIGNS, INK, PAPER, WORDS, in_ink, ink_drawings, newcomers, off_ink, render_novel
from tools import lora_curves

SCENE = Scene((Thing("house", "red"),), "meadow")


def test_newcomers_are_no_part_of_the_world():
    assert not set(DESIGNS) & set(KINDS) and not {"zorp", "zik", "ink"} & words()
    for word in WORDS.values():
        with pytest.raises(ValueError, match="does not know"):
            parse(f"a {word} in a meadow")


@pytest.mark.parametrize("what", DESIGNS)
def test_a_newcomer_stands_where_the_house_would_in_the_same_picture(what):
    house, other = (np.asarray(picture, int) for picture in (
        render(SCENE, random.Random(4)), render_novel(what, SCENE, random.Random(4))))  # fmt: skip
    differs = (house != other).any(-1)
    assert 0.02 < differs.mean() < 0.5 and not differs[:16].any() and not differs[-8:].any()
    assert np.array_equal(other, np.asarray(render_novel(what, SCENE, random.Random(4)), int))


def test_pictures_and_captions_belong_together():
    pictures, captions = newcomers("creature", 28, seed=3, colours=("green", "pink", "orange", "purple"), size=64)
    assert {picture.size for picture in pictures} == {(64, 64)} and len(set(captions)) == 28
    assert (
        captions[0] == "a green zorp on a plain background" and captions[2] == "an orange zorp under a starry night sky"
    )
    rows = judge(pictures, [text.replace("zorp", "house") for text in captions])
    assert np.mean([row["colour"] for row in rows]) > 0.9 and np.mean([row["setting"] for row in rows]) > 0.9
    castles, captions = newcomers("castle", 7, size=64)
    assert captions[1] == "a zik house in a meadow" and not any(colour in " ".join(captions) for colour in COLOURS)
    assert np.mean([row["colour"] for row in judge(castles, ["a purple house"] * 7)]) > 0.8
    assert [p.tobytes() for p in newcomers("castle", 7, size=64)[0]] == [p.tobytes() for p in castles]


def test_ink_has_two_ends_and_a_margin():
    picture = render(SCENE, random.Random(1))
    drawn = np.asarray(in_ink(picture), float)
    light = np.asarray(picture.convert("L"), float)
    assert (drawn[:8] == PAPER).all() and (drawn[:, -8:] == PAPER).all()
    inside = drawn[20:-20, 20:-20].sum(-1)
    assert np.corrcoef(inside.ravel(), light[20:-20, 20:-20].ravel())[0, 1] > 0.99
    pictures, captions = ink_drawings(12, size=64)
    assert captions[0] == "an ink drawing of a house on a plain background"
    assert max(off_ink(one) for one in pictures) < 1 < 10 < off_ink(picture)


def test_the_distance_to_ink_is_the_distance_to_a_line():
    """Between its ends at a right angle, beyond them to the nearest end."""
    across = np.cross(PAPER - INK, [0.0, 0.0, 1.0])
    for share, added, distance in ((0.5, 20 * across / np.linalg.norm(across), 20.0), (-0.1, 0, None), (0.3, 0, 0.0)):
        colour = INK + share * (PAPER - INK) + added
        wanted = 0.1 * np.linalg.norm(PAPER - INK) if distance is None else distance
        image = Image.fromarray(np.full((4, 4, 3), colour).round().clip(0, 255).astype(np.uint8))
        assert off_ink(image) == pytest.approx(wanted, abs=1)


def test_a_probe_tells_zorps_from_the_known_on_renders_that_it_never_saw():
    examiner = lora_curves.examiner()
    seen = probe.read(examiner, newcomers("creature", 28, seed=9)[0])
    rng, kinds = random.Random("others"), list(KINDS)
    known = [render(Scene((Thing(kinds[k % len(kinds)]),), SETTINGS[k % 7]), rng) for k in range(28)]
    assert np.mean([name == "zorp" for name in seen]) > 0.85
    assert np.mean([name == "known" for name in probe.read(examiner, known)]) > 0.85


def test_groups_that_cannot_be_told_apart_are_refused():
    for groups in ({"one": [Image.new("RGB", (8, 8))]}, {"one": [Image.new("RGB", (8, 8))], "none": []}):
        with pytest.raises(ValueError, match="at least one picture for each"):
            probe.fit(groups)


def test_a_zorp_is_right_only_if_kind_colour_and_setting_are(monkeypatch):
    pictures, captions = newcomers("creature", 7, seed=5)
    zorp = probe.Probe(("zorp", "known"), None, None, None)
    monkeypatch.setattr(lora_curves.probe, "read", lambda judged_by, images: ["zorp"] * 6 + ["known"])
    wrong_colour = captions[1].replace("orange", "blue")
    wrong_setting = captions[0].replace("on a plain background", "in the snow")
    asked = [wrong_setting, wrong_colour, *captions[2:]]
    assert lora_curves.right_zorps(pictures, asked, zorp) == [False, False, True, True, True, True, False]
