"""The near misses that storybook-clip is trained to tell from a caption, and what its end tokens must name."""

import random

import pytest

from storybook.train.clip import ANSWERS, misplaced, recoloured, said
from storybook.world import Scene, caption, parse, random_scene


@pytest.mark.parametrize("miss", [misplaced, recoloured])
def test_a_near_miss_is_another_scene_in_nearly_the_same_words(miss):
    rng = random.Random(0)
    for seed in range(500):
        scene = random_scene(rng)
        near = miss(scene, rng)
        assert isinstance(near, Scene) and near != scene and near.setting == scene.setting
        first, second = (caption(s, random.Random(seed)).split() for s in (scene, near))
        assert parse(" ".join(second)) == near
        assert len(set(first) ^ set(second)) <= 8


def test_a_near_miss_moves_what_was_placed():
    rng = random.Random(1)
    scene = parse("a red boat to the left of a blue cup by the sea")
    assert {misplaced(scene, rng).relation for _ in range(50)} == {"right of", "above"}
    assert recoloured(scene, rng) == parse("a blue boat to the left of a red cup by the sea")
    assert misplaced(parse("a cup on the left"), rng).things[0].position in ("centre", "right")


def test_what_a_caption_says_is_numbered_and_the_rest_is_ignored():
    scene = parse("a red boat to the left of a blue cup by the sea")
    found = {name: number for name, number in zip(ANSWERS, said(scene), strict=True)}
    assert {name: ANSWERS[name][number] for name, number in found.items() if number != -100} == {
        "kind": "boat", "colour": "red", "setting": "sea", "relation": "left of",
        "second kind": "cup", "second colour": "blue",
    }  # fmt: skip
    assert found["position"] == -100
    assert said(parse("a cup on the right"))[1:] == [-100, -100, ANSWERS["position"].index("right"), -100, -100, -100]
