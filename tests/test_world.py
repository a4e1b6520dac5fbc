"""The storybook world: what is drawn, said and read back is one and the same scene."""

import random

import numpy as np
import pytest

from storybook.world import (
    COLOURS,
    HELD_OUT,
    KINDS,
    POSITIONS,
    SETTINGS,
    SIZES,
    Scene,
    Thing,
    caption,
    complete,
    masks,
    parse,
    random_scene,
    render,
    render_with_masks,
)


def test_the_world_is_as_large_as_promised():
    assert len(KINDS) >= 12 and len(COLOURS) >= 8 and len(SETTINGS) >= 7
    assert len(SIZES) == len(POSITIONS) == 3


def test_parse_reads_back_every_caption():
    rng = random.Random(0)
    for _ in range(3000):
        scene = random_scene(rng)
        assert parse(caption(scene, rng)) == scene
        assert parse(caption(scene)) == scene


def test_one_scene_has_several_wordings():
    scene = Scene((Thing("boat", "red", "small", "left"),), "sea")
    rng = random.Random(0)
    assert len({caption(scene, rng) for _ in range(100)}) >= 20


def test_random_scenes_never_show_a_held_out_pair():
    """Neither in words nor, where the colour is unsaid, in the picture."""
    rng = random.Random(1)
    drawn = set()
    for _ in range(5000):
        drawn |= {(thing.colour, thing.kind) for thing in complete(random_scene(rng), rng).things}
    assert not drawn & HELD_OUT
    assert len(drawn) == len(COLOURS) * len(KINDS) - len(HELD_OUT)


def test_held_out_pairs_can_be_drawn_when_asked_for():
    colour, kind = sorted(HELD_OUT)[0]
    assert complete(Scene((Thing(kind, colour),)), random.Random(0)).things[0].colour == colour


def test_the_same_random_state_draws_the_same_picture():
    scene = parse("a red boat by the sea")
    first, again, other = (np.asarray(render(scene, random.Random(seed))) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
    assert first.shape == (128, 128, 3)


def test_masks_are_where_the_thing_is():
    """Repaint the thing alone: every changed pixel lies in the mask or on its antialiased rim."""
    red, blue = (
        np.asarray(render(Scene((Thing("heart", colour, "large"),), "plain"), random.Random(5)), int)
        for colour in ("red", "blue")
    )
    (mask,) = masks(Scene((Thing("heart", "red", "large"),), "plain"), random.Random(5))
    changed = np.abs(red - blue).sum(2) > 30
    assert mask.dtype == bool and mask.shape == changed.shape
    assert (changed & mask).sum() / (changed | mask).sum() > 0.9


@pytest.mark.parametrize(("relation", "axis", "sign"), [("left of", 1, 1), ("right of", 1, -1), ("above", 0, 1)])
def test_two_things_stand_as_their_relation_says(relation, axis, sign):
    scene = Scene((Thing("star", "red"), Thing("cup", "blue")), "snow", relation)
    for seed in range(20):
        first, second = masks(scene, random.Random(seed))
        assert sign * (np.argwhere(second)[:, axis].mean() - np.argwhere(first)[:, axis].mean()) > 20
        assert not (first & second).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_thing_stays_inside_the_picture_and_grows_with_its_size(kind):
    for position in POSITIONS:
        areas = []
        for size in SIZES:
            (mask,) = masks(Scene((Thing(kind, "red", size, position),), "plain"), random.Random(2))
            areas.append(mask.sum())
            edges = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert edges.mean() < 0.05
        assert areas == sorted(areas) and areas[0] * 1.5 < areas[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red dragon in a castle", "does not know: dragon, in, castle"),
        ("", "names no thing"),
        ("at sunset", "names no thing"),
        ("a red boat and a blue cup and a tree", "names 3"),
        ("a red blue boat", "'red' and 'blue'"),
        ("a boat at sunset in the snow", "one setting"),
        ("a boat a cup", "Join two things"),
        ("a boat a cup above", "Join two things"),
        ("above a boat a cup", "Join two things"),
        ("a boat a red above cup", "Join two things"),
        ("a boat above a cup and", "one relation"),
        ("a boat and", "Join two things"),
        (None, "is text, and not NoneType"),
        (b"a boat", "is text, and not bytes"),
        ("a boat above a cup on the left", "how they stand to each other"),
        ("a boat red", "What is red?"),
    ],
)
def test_parse_says_what_it_cannot_read(text, says):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert says in str(error.value)
    assert str(error.value).count(".") == 1 or "?" in str(error.value)


UNKNOWN = [
    (Scene(()), "holds 0"),
    (Scene((Thing("cup"),) * 3), "holds 3"),
    (Scene((Thing("dragon"),)), "no thing 'dragon' here: choose one of house"),
    (Scene((Thing("cup", "black"),)), "no colour 'black' here: choose one of red"),
    (Scene((Thing("cup", size="giant"),)), "no size 'giant'"),
    (Scene((Thing("cup", position="below"),)), "no position 'below'"),
    (Scene((Thing("cup"),), "moon"), "no setting 'moon'"),
    (Scene((Thing("cup"), Thing("star")), relation="under"), "no relation 'under'"),
]


@pytest.mark.parametrize(("scene", "says"), UNKNOWN, ids=[row[1] for row in UNKNOWN])
@pytest.mark.parametrize("use", [lambda scene: render(scene, random.Random(0)), caption], ids=["render", "caption"])
def test_a_scene_of_another_world_is_refused(scene, says, use):
    with pytest.raises(ValueError, match=says) as error:
        use(scene)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("size", [64.0, "64", None, 7, 0, -64, 10**9])
def test_a_size_that_no_picture_has_is_refused(size):
    with pytest.raises(ValueError, match=f"{size!r} is not a whole number|8 to 4096 pixels wide; {size} was asked"):
        render(parse("a boat"), random.Random(0), size)
    assert render(parse("a boat"), random.Random(0), np.int64(32)).size == (32, 32)


def test_the_prompt_does_not_explain_the_picture():
    """At most 70 % of the variance of pixels lies between captions; the rest is what a seed may choose."""
    scenes = [random_scene(random.Random(f"explained {index}")) for index in range(120)]
    drawn = np.stack([
        [np.asarray(render(scene, random.Random(f"{index} {k}"), 32), float) for k in range(6)]
        for index, scene in enumerate(scenes)
    ])  # fmt: skip
    within = drawn.var(axis=1, ddof=1).mean()
    total = drawn.reshape(-1, *drawn.shape[2:]).var(axis=0).mean()
    assert within / total >= 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_several_designs_and_its_colour_fills_them(kind):
    assert len(KINDS[kind]) >= 2
    for design in KINDS[kind]:
        assert np.abs(np.concatenate([polygon for _, polygon in design])).max() < 1.35
    looks = {
        masks(Scene((Thing(kind, "red", "large", "centre"),), "plain"), random.Random(seed))[0].tobytes()
        for seed in range(8)
    }
    assert len(looks) > 4  # tilt, stretch and design differ


def test_one_random_state_is_one_picture_at_every_size():
    scene = parse("a red boat to the left of a green tree by the sea")
    small, large = (np.asarray(render(scene, random.Random(4), size).resize((32, 32)), float) for size in (128, 256))
    assert np.abs(small - large).mean() < 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_colours_stay_what_they_are_in_every_light(setting):
    """The median of a heart's pixels, made equally bright, is nearest to the colour of that name."""
    bright = {name: np.array(rgb) / max(rgb) for name, rgb in COLOURS.items()}
    for colour in COLOURS:
        scene = Scene((Thing("heart", colour, "large", "centre"),), setting)
        for seed in range(6):
            picture, (mask,) = render_with_masks(scene, random.Random(seed))
            shown = np.median(np.asarray(picture, float)[mask], axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(shown / shown.max() - bright[name]).sum())
            assert nearest == colour, (shown, seed)
