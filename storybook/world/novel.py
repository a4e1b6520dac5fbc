"""What no bundled model has ever seen, to be taught to them: a one-eyed creature, one castle among the
houses, and ink drawings.

None of it is in `KINDS`, so training pictures never show it and `parse` does not know its words. Scenes are those of
the world, with a house where the newcomer stands; captions put a made-up word there.
"""

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from storybook.world.language import caption
from storybook.world.render import render
from storybook.world.shapes import KINDS, box, oval, points
from storybook.world.vocabulary import COLOURS, SETTINGS, Scene, Thing

STAND_IN = "house"  # stands on the ground, as both newcomers do
WORDS = {"creature": "zorp", "castle": "zik house"}  # a new kind of thing; and one of the houses, of which there is one

DESIGNS = {
    "creature": [
        ("dark", points(-0.66, -0.4, -0.6, -1.02, -0.16, -0.66)),
        ("dark", points(0.66, -0.4, 0.6, -1.02, 0.16, -0.66)),
        ("dark", oval(-0.38, 0.88, 0.3, 0.14)),
        ("dark", oval(0.38, 0.88, 0.3, 0.14)),
        ("body", oval(0, 0.1, 0.86, 0.82)),
        ("pale", oval(0, -0.06, 0.48, 0.48)),
        ("ink", oval(0, -0.02, 0.22, 0.22)),
    ],
    "castle": [
        ("ink", box(-0.7, -1.04, -0.64, -0.76)),
        ("flame", points(-0.64, -1.04, -0.28, -0.94, -0.64, -0.84)),
        ("body", box(-0.42, 0.06, 0.42, 1)),
        ("body", box(-0.42, -0.14, -0.22, 0.1)),
        ("body", box(-0.1, -0.14, 0.1, 0.1)),
        ("body", box(0.22, -0.14, 0.42, 0.1)),
        ("body", box(-0.94, -0.28, -0.4, 1)),
        ("body", box(0.4, -0.28, 0.94, 1)),
        ("dark", points(-1.02, -0.24, -0.67, -0.86, -0.32, -0.24)),
        ("dark", points(0.32, -0.24, 0.67, -0.86, 1.02, -0.24)),
        ("wood", np.concatenate([oval(0, 0.62, 0.24, 0.26, 180, 360, 12), points(0.24, 1, -0.24, 1)])),
        ("glow", box(-0.76, 0.02, -0.58, 0.3)),
        ("glow", box(0.58, 0.02, 0.76, 0.3)),
    ],
}
CASTLE_COLOUR = "purple"
INK, PAPER = np.array([34, 40, 78]), np.array([248, 236, 208])  # the two ends of an ink drawing's colours
MARGIN = 1 / 16  # of the side, left as bare paper


def render_novel(what: str, scene: Scene, rng: random.Random, size: int = 128) -> Image.Image:
    """`scene`, which holds one `STAND_IN`, with the newcomer `what` ("creature" or "castle") in its place.

    RGB, `size` x `size` pixels. Raises ValueError as `render` does.
    """
    return render(scene, rng, size, DESIGNS[what])


def novel_caption(what: str, scene: Scene) -> str:
    """The caption of `scene`, which holds one `STAND_IN`, with the newcomer's word in its place."""
    return caption(scene).replace(STAND_IN, WORDS[what])


def newcomers(
    what: str, count: int, seed: int = 0, colours: Sequence[str] = tuple(COLOURS), size: int = 128
) -> tuple[list[Image.Image], list[str]]:
    """`count` pictures of a newcomer, through all settings and `colours`, and their captions.

    A castle is always of `CASTLE_COLOUR`, and captions do not say it.
    """
    rng, pictures, captions = random.Random(f"{what} {seed}"), [], []
    for k in range(count):
        colour = CASTLE_COLOUR if what == "castle" else colours[k % len(colours)]
        shown = Thing(STAND_IN, colour)
        said = Thing(STAND_IN) if what == "castle" else shown
        setting = SETTINGS[k % len(SETTINGS)]
        pictures.append(render_novel(what, Scene((shown,), setting), rng, size))
        captions.append(novel_caption(what, Scene((said,), setting)))
    return pictures, captions


def in_ink(picture: Image.Image) -> Image.Image:
    """The picture as an ink drawing: its lightness between `INK` and `PAPER`, with a margin of bare paper."""
    light = np.asarray(picture.convert("L"), float)[..., None] / 255
    drawn = INK + light * (PAPER - INK)
    edge = round(picture.width * MARGIN)
    drawn[:edge], drawn[-edge:], drawn[:, :edge], drawn[:, -edge:] = PAPER, PAPER, PAPER, PAPER
    return Image.fromarray(drawn.round().astype(np.uint8))


def ink_drawings(count: int, seed: int = 0, size: int = 128) -> tuple[list[Image.Image], list[str]]:
    """`count` known things in ink, through all kinds and settings, and their captions, which say no colour."""
    rng, pictures, captions, kinds = random.Random(f"ink {seed}"), [], [], tuple(KINDS)
    for k in range(count):
        scene = Scene((Thing(kinds[k % len(kinds)]),), SETTINGS[k % len(SETTINGS)])
        pictures.append(in_ink(render(scene, rng, size)))
        captions.append(f"an ink drawing of {caption(scene)}")
    return pictures, captions


def off_ink(picture: Image.Image) -> float:
    """How far the colours of a picture are from those of ink on paper: mean distance in RGB, 0 to 255 times sqrt(3).

    0 for `in_ink` up to rounding, whatever the picture shows.
    """
    rgb, along = np.asarray(picture.convert("RGB"), float), PAPER - INK
    share = np.clip((rgb - INK) @ along / (along @ along), 0, 1)[..., None]
    return float(np.linalg.norm(rgb - INK - share * along, axis=-1).mean())
