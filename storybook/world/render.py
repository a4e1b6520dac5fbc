"""The picture: a backdrop and one or two things on it, and where each of them is."""

import math
import operator
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from storybook.world.backdrops import draw_backdrop, gradient
from storybook.world.language import require_known
from storybook.world.shapes import FLOATING, KINDS, mix, palette
from storybook.world.vocabulary import POSITIONS, SETTINGS, SIZES, Scene, Thing, allowed_colours

LARGEST = 4096  # pixels; it is drawn at twice the size, in 200 MB
_RADIUS_ALONE = {"small": 0.17, "medium": 0.23, "large": 0.3}
_RADIUS_OF_TWO = {"small": 0.155, "medium": 0.185, "large": 0.215}
_COLUMN = {"left": 0.27, "centre": 0.5, "right": 0.73}


@dataclass(frozen=True)
class _Placed:
    """A thing, where it stands and how: lengths in shares of the picture's side, tilt in degrees."""

    thing: Thing
    polygons: list
    x: float
    y: float
    radius: float
    stretch: float  # width beside height
    tilt: float
    mirror: bool
    shade: float


def complete(scene: Scene, rng: random.Random) -> Scene:
    """The scene with everything unsaid chosen by `rng`; a held-out pair only if it was asked for.

    `render(scene, rng)` starts with this, so `complete` with `rng` in the same state tells the
    whole truth about that picture. One of two things has no position: the relation gives it.
    Raises ValueError, in one sentence, for a scene of other things than this world has.
    """
    require_known(scene)
    alone = len(scene.things) == 1
    things = tuple(
        replace(
            thing,
            colour=thing.colour or rng.choice(allowed_colours(thing.kind)),
            size=thing.size or rng.choices(SIZES, (1, 3, 1))[0],
            position=(thing.position or rng.choices(POSITIONS, (1, 3, 1))[0]) if alone else None,
        )
        for thing in scene.things
    )
    relation = None if alone else scene.relation or rng.choice(("left of", "right of"))
    return Scene(things, scene.setting or rng.choice(SETTINGS), relation)


def _place(scene: Scene, rng: random.Random) -> list[_Placed]:
    """Where and how the things of a completed scene stand."""
    placed = []
    for index, thing in enumerate(scene.things):
        floats = thing.kind in FLOATING
        jitter_x, jitter_y = rng.uniform(-0.045, 0.045), rng.uniform(-0.045, 0.045)
        if len(scene.things) == 1:
            radius = _RADIUS_ALONE[thing.size]
            x = _COLUMN[thing.position]
            y = 0.45 + jitter_y if floats else 0.85 - radius
        else:
            radius = _RADIUS_OF_TWO[thing.size]
            first = index == 0
            if scene.relation == "above":
                x, y = 0.5 + jitter_x, 0.25 if first else 0.73
            else:
                x = 0.27 if first == (scene.relation == "left of") else 0.73
                y = 0.45 + jitter_y if floats else 0.83 - radius
        radius *= rng.uniform(0.92, 1.08)
        x = min(max(x + jitter_x, 1.06 * radius), 1 - 1.06 * radius)
        tilt = rng.uniform(-12, 12) if floats else rng.uniform(-2.5, 2.5)
        design = rng.choice(KINDS[thing.kind])
        stretch, mirror, shade = rng.uniform(0.92, 1.05), rng.random() < 0.5, rng.uniform(-1, 1)
        placed.append(_Placed(thing, design, x, y + jitter_y * 0.7, radius, stretch, tilt, mirror, shade))
    return placed


def _to_pixels(polygon: np.ndarray, placed: _Placed, side: int) -> list[tuple]:
    cos, sin = math.cos(math.radians(placed.tilt)), math.sin(math.radians(placed.tilt))
    local = polygon * (-placed.stretch if placed.mirror else placed.stretch, 1)
    turned = local @ np.array([[cos, sin], [-sin, cos]])
    return [tuple(p) for p in (turned * placed.radius + (placed.x, placed.y)) * side]


def _draw_polygons(draw, polygons, fills, width):
    """Fill polygons; with `width` also stroke them in the same colour, which makes them larger."""
    for polygon, fill in zip(polygons, fills, strict=True):
        draw.polygon(polygon, fill=fill)
        if width:
            draw.line(polygon + polygon[:2], fill=fill, width=width, joint="curve" if len(polygon) < 12 else None)


def _draw_shadow(image: Image.Image, placed: _Placed) -> None:
    """What a standing thing darkens on the ground at its foot."""
    side = image.width
    x, y, wide = placed.x * side, (placed.y + placed.radius * 0.97) * side, placed.radius * 0.95 * side
    for share, alpha in ((1.0, 28), (0.75, 34)):
        mask = Image.new("L", image.size)
        rim = (x - wide * share, y - wide * 0.16 * share, x + wide * share, y + wide * 0.16 * share)
        ImageDraw.Draw(mask).ellipse(rim, fill=alpha)
        image.paste((20, 16, 40), (0, 0), mask)


def _draw_thing(image: Image.Image, placed: _Placed, light: tuple) -> Image.Image:
    """Draw one thing onto `image`, lit by `light`; its silhouette (mode L, 0 or 255) is returned."""
    side = image.width
    colours = palette(placed.thing.colour, placed.shade)
    polygons = [_to_pixels(polygon, placed, side) for _, polygon in placed.polygons]
    stroke = max(2, round(side * 0.016))
    silhouette = Image.new("L", image.size)
    _draw_polygons(ImageDraw.Draw(silhouette), polygons, [255] * len(polygons), stroke)
    image.paste(colours["outline"], (0, 0), silhouette)
    _draw_polygons(ImageDraw.Draw(image), polygons, [colours[role] for role, _ in placed.polygons], 0)
    # darker towards the foot
    upper, lower = (round((placed.y + sign * placed.radius) * side) for sign in (-1, 1))
    box = (0, max(0, upper), side, min(side, lower))
    shaded = gradient(side, box[3] - box[1], light, mix(light, (150, 140, 170), 0.3))
    image.paste(ImageChops.multiply(image.crop(box), shaded), box, silhouette.crop(box))
    return silhouette


def render(scene: Scene, rng: random.Random, size: int = 128, design: list | None = None) -> Image.Image:
    """Draw `scene` as an RGB picture of `size` x `size` pixels, 8 to 4096.

    `rng` decides the variations and whatever the scene leaves unsaid: the same scene and the same
    state of `rng` give the same picture. `design`, polygons as in `KINDS`, takes the place of the things'
    own. Raises ValueError, in one sentence, for another size and for
    a scene of other things than this world has.
    """
    return render_with_masks(scene, rng, size, design)[0]


def masks(scene: Scene, rng: random.Random, size: int = 128) -> list[np.ndarray]:
    """Where each thing is visible: one boolean array (size, size) a thing.

    Given `rng` in the same state as `render` got it, the masks fit that picture. A later thing
    hides what it covers of an earlier one.
    """
    return render_with_masks(scene, rng, size)[1]


def render_with_masks(
    scene: Scene, rng: random.Random, size: int = 128, design: list | None = None
) -> tuple[Image.Image, list[np.ndarray]]:
    """What `render` and `masks` return, from one drawing."""
    try:
        size = operator.index(size)  # numpy has whole numbers of its own
    except TypeError:
        raise ValueError(f"The size {size!r} is not a whole number of pixels: 128 is usual.") from None
    if not 8 <= size <= LARGEST:
        raise ValueError(f"A picture is 8 to {LARGEST} pixels wide; {size} was asked for.")
    scene = complete(scene, rng)
    placed = [replace(one, polygons=design) if design else one for one in _place(scene, rng)]
    canvas, light = draw_backdrop(scene.setting, rng, 2 * size)  # drawn at twice the size, then averaged
    for thing in placed:
        if thing.thing.kind not in FLOATING and not (scene.relation == "above" and thing is placed[0]):
            _draw_shadow(canvas, thing)
    layers = [np.asarray(_draw_thing(canvas, thing, light).reduce(2)) > 127 for thing in placed]
    for index in range(len(layers) - 1):
        for later in layers[index + 1 :]:
            layers[index] = layers[index] & ~later
    return canvas.reduce(2), layers
