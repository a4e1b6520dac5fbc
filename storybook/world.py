"""A little flat-design world whose pictures come with the truth about what they show.

A `Scene` holds one or two `Thing`s in a setting. `caption` writes it as a sentence, `parse` reads
the sentence back, `render` draws it and `masks` says where each thing is. Whatever a scene leaves
unsaid (None), the renderer chooses.
"""

import colorsys
import math
import random
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "orange": (243, 139, 33),
    "yellow": (250, 213, 58),
    "green": (58, 160, 84),
    "blue": (52, 105, 214),
    "purple": (128, 66, 178),
    "pink": (243, 138, 182),
    "white": (246, 246, 244),
}
SIZES = ("small", "medium", "large")
POSITIONS = ("left", "centre", "right")
RELATIONS = ("left of", "right of", "above")

# Every phrase that captions use. `caption` writes them (the first of a list is the usual one) and
# `parse` reads them, so the two cannot drift apart.
SIZE_PHRASES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
POSITION_PHRASES = {
    "left": ("on the left", "on the left side"),
    "centre": ("in the middle", "in the centre"),
    "right": ("on the right", "on the right side"),
}
RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    None: ("and", "next to"),
}
SETTING_PHRASES = {
    "plain": ("on a plain background", "in front of a plain wall"),
    "meadow": ("in a meadow", "in a green meadow"),
    "starry night": ("under a starry night sky", "at night under the stars", "at night"),
    "sunset": ("at sunset", "in front of a sunset"),
    "sea": ("by the sea", "at the sea", "at the seaside"),
    "snow": ("in the snow", "in a snowy landscape"),
    "desert": ("in the desert", "in a sandy desert"),
}
SETTINGS = tuple(SETTING_PHRASES)
INTROS = ("", "", "a picture of", "a drawing of")


@dataclass(frozen=True)
class Thing:
    """One object. `kind` is always said; colour, size and position are None where unsaid."""

    kind: str
    colour: str | None = None
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """One or two things in a setting (None where unsaid).

    `relation` says where the first of two things is, seen from the second; None: side by side.
    """

    things: tuple[Thing, ...]
    setting: str | None = None
    relation: str | None = None


# --- shapes -----------------------------------------------------------------------------------
# A kind is a list of (role, polygon). Coordinates: x to the right, y down, the thing fits into
# [-1, 1] x [-1, 1]. The role picks the fill colour, see `_palette`.


def _oval(cx, cy, rx, ry, start=0.0, end=360.0, count=30):
    angles = np.radians(np.linspace(start, end, count, endpoint=end - start < 360))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1)


def _points(*flat):
    return np.array(flat, dtype=float).reshape(-1, 2)


def _box(left, top, right, bottom):
    return _points(left, top, right, top, right, bottom, left, bottom)


def _star():
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.where(np.arange(10) % 2 == 0, 1.02, 0.47)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.06], 1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y + 0.02], 1)


def _petals():
    for angle in np.radians(np.arange(6) * 60 - 90):
        yield "body", _oval(0.42 * math.cos(angle), -0.38 + 0.42 * math.sin(angle), 0.29, 0.29)


KINDS = {
    "house": [
        ("body", _box(-0.72, -0.18, 0.72, 1)),
        ("dark", _points(-0.98, -0.14, 0, -1, 0.98, -0.14)),
        ("wood", _box(-0.2, 0.38, 0.2, 1)),
        ("glow", _box(-0.56, 0.08, -0.28, 0.36)),
        ("glow", _box(0.28, 0.08, 0.56, 0.36)),
    ],
    "tree": [
        ("wood", _box(-0.15, 0.3, 0.15, 1)),
        ("body", _oval(-0.38, 0.12, 0.46, 0.42)),
        ("body", _oval(0.38, 0.12, 0.46, 0.42)),
        ("body", _oval(0, -0.38, 0.56, 0.6)),
    ],
    "boat": [
        ("wood", _box(-0.06, -0.95, 0.06, 0.4)),
        ("pale", _points(0.1, -0.9, 0.82, 0.2, 0.1, 0.2)),
        ("body", _points(-0.12, -0.7, -0.12, 0.2, -0.7, 0.2)),
        ("body", _points(-1, 0.36, 1, 0.36, 0.66, 1, -0.66, 1)),
    ],
    "rocket": [
        ("flame", _points(-0.24, 0.62, 0.24, 0.62, 0, 1.08)),
        ("dark", _points(-0.3, 0.1, -0.72, 0.78, -0.26, 0.66)),
        ("dark", _points(0.3, 0.1, 0.72, 0.78, 0.26, 0.66)),
        ("body", np.concatenate([_oval(0, 0.05, 0.42, 1.05, 180, 360), _points(0.3, 0.68, -0.3, 0.68)])),
        ("glow", _oval(0, -0.22, 0.19, 0.19)),
    ],
    "fish": [
        ("dark", _points(0.42, 0, 1, -0.52, 0.86, 0, 1, 0.52)),
        ("dark", _points(-0.2, -0.46, 0.32, -0.78, 0.36, -0.34)),
        ("body", _oval(-0.2, 0, 0.8, 0.54)),
        ("pale", _oval(-0.6, -0.13, 0.15, 0.15)),
        ("ink", _oval(-0.63, -0.13, 0.07, 0.07)),
    ],
    "flower": [
        ("leaf", _box(-0.06, -0.1, 0.06, 1)),
        ("leaf", _oval(0.3, 0.62, 0.28, 0.13)),
        ("leaf", _oval(-0.3, 0.72, 0.28, 0.13)),
        *_petals(),
        ("centre", _oval(0, -0.38, 0.23, 0.23)),
    ],
    "mushroom": [
        ("pale", np.concatenate([_box(-0.24, 0, 0.24, 0.1)[:2], _points(0.36, 1, -0.36, 1)])),
        ("body", np.concatenate([_oval(0, 0.16, 0.98, 1.1, 180, 360), _points(0.8, 0.26, -0.8, 0.26)])),
        ("pale", _oval(-0.42, -0.3, 0.19, 0.19)),
        ("pale", _oval(0.12, -0.52, 0.17, 0.17)),
        ("pale", _oval(0.5, -0.1, 0.16, 0.16)),
    ],
    "star": [("body", _star())],
    "heart": [("body", _heart())],
    "balloon": [
        ("ink", _box(-0.025, 0.4, 0.025, 1)),
        ("dark", _points(0, 0.36, 0.14, 0.56, -0.14, 0.56)),
        ("body", _oval(0, -0.28, 0.62, 0.72)),
        ("light", _oval(-0.24, -0.55, 0.12, 0.18)),
    ],
    "car": [
        ("body", _points(-0.58, 0, -0.34, -0.5, 0.36, -0.5, 0.64, 0)),
        ("glass", _points(-0.4, -0.04, -0.25, -0.38, 0, -0.38, 0, -0.04)),
        ("glass", _points(0.1, -0.04, 0.1, -0.38, 0.29, -0.38, 0.44, -0.04)),
        ("body", _points(-1, 0.06, -0.9, -0.06, 0.9, -0.06, 1, 0.1, 1, 0.46, -1, 0.46)),
        ("ink", _oval(-0.55, 0.48, 0.25, 0.25)),
        ("ink", _oval(0.55, 0.48, 0.25, 0.25)),
        ("pale", _oval(-0.55, 0.48, 0.1, 0.1)),
        ("pale", _oval(0.55, 0.48, 0.1, 0.1)),
    ],
    "cup": [
        ("body", np.concatenate([_oval(0.62, 0.2, 0.36, 0.4, -90, 90), _oval(0.62, 0.2, 0.19, 0.22, 90, -90)])),
        ("body", _points(-0.76, -0.5, 0.66, -0.5, 0.5, 0.84, -0.6, 0.84)),
        ("dark", _oval(-0.05, -0.5, 0.71, 0.18)),
        ("wood", _oval(-0.05, -0.47, 0.58, 0.11)),
    ],
}
FLOATING = {"rocket", "fish", "star", "heart", "balloon"}  # these hang in the air, the others stand

# No training picture shows these: they measure whether a model can combine what it knows.
HELD_OUT = frozenset({
    ("red", "tree"), ("orange", "boat"), ("yellow", "rocket"), ("green", "heart"),
    ("blue", "mushroom"), ("purple", "car"), ("pink", "fish"), ("white", "flower"),
})  # fmt: skip


def _mix(a, b, share):
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _palette(colour: str, shift: float) -> dict:
    """Fill colours by role for a thing of this colour; `shift` in [-1, 1] varies its lightness."""
    hue, light, strength = colorsys.rgb_to_hls(*(value / 255 for value in COLOURS[colour]))
    light = min(0.97, light * (1 + 0.05 * shift))
    body = tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, light, strength))
    return {
        "body": body,
        "dark": _mix(body, (20, 10, 30), 0.3),
        "light": _mix(body, (255, 255, 255), 0.55),
        "outline": _mix(body, (25, 20, 40), 0.72),
        "wood": (126, 88, 62),
        "glow": (255, 240, 178),
        "glass": (196, 226, 240),
        "pale": (250, 242, 226),
        "leaf": (70, 140, 70),
        "centre": (250, 213, 58) if colour not in ("yellow", "orange") else (150, 84, 40),
        "flame": (255, 176, 60),
        "ink": (48, 44, 60),
    }


# --- settings ---------------------------------------------------------------------------------
# sky top, sky bottom, ground top, ground bottom, horizon as a share of the height
_BACKDROPS = {
    "plain": ((236, 232, 222), (214, 208, 198), None, None, 1.0),
    "meadow": ((124, 190, 240), (208, 236, 250), (134, 196, 92), (88, 156, 66), 0.66),
    "starry night": ((16, 20, 58), (52, 58, 118), (28, 44, 66), (16, 26, 46), 0.8),
    "sunset": ((94, 62, 132), (255, 166, 92), (112, 62, 84), (66, 38, 66), 0.74),
    "sea": ((146, 208, 244), (226, 242, 250), (46, 138, 190), (20, 92, 156), 0.6),
    "snow": ((166, 190, 214), (220, 230, 240), (250, 252, 255), (216, 226, 242), 0.66),
    "desert": ((250, 214, 150), (255, 240, 206), (232, 184, 110), (204, 146, 78), 0.68),
}
_STARS = _points(
    .06, .1, .2, .3, .31, .08, .44, .22, .57, .06, .63, .36, .78, .24, .92, .1, .95, .42, .1, .52,
)  # fmt: skip
_FLAKES = _points(
    .08, .14, .24, .42, .36, .12, .52, .3, .66, .1, .74, .48, .9, .26, .14, .7, .86, .76, .46, .56,
)  # fmt: skip


def _gradient(width, height, top, bottom):
    ramp = np.linspace(np.array(top, float), np.array(bottom, float), max(height, 1))
    column = Image.fromarray(ramp.round().astype(np.uint8)[:, None, :])
    return column.resize((width, max(height, 1)), Image.Resampling.NEAREST)


def _blend_ellipse(image, cx, cy, rx, ry, colour):
    ImageDraw.Draw(image).polygon([tuple(p) for p in _oval(cx, cy, rx, ry)], fill=colour)


def _backdrop(setting: str, look: dict, side: int) -> Image.Image:
    """The setting alone. `look` holds the small variations: shift, tint, mirror."""
    sky_top, sky_bottom, ground_top, ground_bottom, horizon = _BACKDROPS[setting]
    tint = look["tint"]
    sky_top, sky_bottom = (
        _mix(c, (255, 255, 255) if tint > 0 else (40, 40, 80), abs(tint)) for c in (sky_top, sky_bottom)
    )
    line = round(side * (horizon + look["shift"]))
    image = Image.new("RGB", (side, side), sky_bottom)
    image.paste(_gradient(side, min(line + side // 12, side), sky_top, sky_bottom))
    draw = ImageDraw.Draw(image)

    def x_of(x):
        return side * (1 - x if look["mirror"] else x)

    def disc(x, y, r, colour):
        _blend_ellipse(image, x_of(x), side * y, side * r, side * r, colour)

    if setting == "meadow":
        for x, y, r in ((0.66, 0.17, 0.06), (0.74, 0.14, 0.08), (0.83, 0.17, 0.06)):
            disc(x, y, r, (250, 252, 255))
        disc(0.14, 0.14, 0.085, (255, 232, 130))
    elif setting == "starry night":
        for x, y in _STARS:
            disc(x, y, 0.011, (255, 248, 210))
        disc(0.83, 0.15, 0.085, (248, 240, 200))
        disc(0.795, 0.13, 0.07, _mix(sky_top, sky_bottom, 0.15))
    elif setting == "sunset":
        disc(0.7, horizon + look["shift"], 0.16, (255, 222, 130))
    elif setting == "desert":
        disc(0.82, 0.16, 0.075, (255, 250, 226))
    if ground_top is not None:
        ground = _gradient(side, side, ground_top, ground_bottom)
        mask = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(mask)
        pen.rectangle((0, line + side // 16 if setting in ("meadow", "snow") else line, side, side), fill=255)
        if setting in ("meadow", "snow"):
            pen.polygon([tuple(p) for p in _oval(x_of(0.28), line + side * 0.22, side * 0.62, side * 0.24)], fill=255)
        elif setting == "desert":
            far = [(x_of(-0.2), line + 2), (x_of(0.3), line - side * 0.11), (x_of(0.75), line + 2)]
            draw.polygon(far, fill=_mix(ground_top, ground_bottom, 0.75))
        image.paste(ground, (0, 0), mask)
    if setting == "sea":
        for x, y, half in ((0.2, 0.68, 0.1), (0.7, 0.73, 0.12), (0.36, 0.83, 0.13), (0.84, 0.9, 0.1)):
            y = side * (y + look["shift"])
            draw.line(
                (x_of(x) - side * half, y, x_of(x) + side * half, y), fill=(120, 192, 226), width=max(2, side // 64)
            )
    elif setting == "snow":
        for x, y in _FLAKES:
            disc(x, y, 0.013, (255, 255, 255))
    return image


# --- layout: every random choice is made here, so that `render` and `masks` agree ----------------

_RADIUS_ALONE = {"small": 0.17, "medium": 0.23, "large": 0.3}
_RADIUS_OF_TWO = {"small": 0.155, "medium": 0.185, "large": 0.215}
_COLUMN = {"left": 0.28, "centre": 0.5, "right": 0.72}


def _allowed_colours(kind):
    return [colour for colour in COLOURS if (colour, kind) not in HELD_OUT]


def complete(scene: Scene, rng: random.Random) -> Scene:
    """The scene with everything unsaid chosen by `rng`; a held-out pair only if it was asked for.

    `render(scene, rng)` starts with this, so `complete` with `rng` in the same state tells the
    whole truth about that picture. One of two things has no position: the relation gives it.
    """
    if not 1 <= len(scene.things) <= 2:
        raise ValueError(f"A scene holds one or two things; this one holds {len(scene.things)}.")
    alone = len(scene.things) == 1
    things = tuple(
        replace(
            thing,
            colour=thing.colour or rng.choice(_allowed_colours(thing.kind)),
            size=thing.size or rng.choices(SIZES, (1, 3, 1))[0],
            position=(thing.position or rng.choices(POSITIONS, (1, 3, 1))[0]) if alone else None,
        )
        for thing in scene.things
    )
    relation = None if alone else scene.relation or rng.choice(("left of", "right of"))
    return Scene(things, scene.setting or rng.choice(SETTINGS), relation)


def _layout(scene: Scene, rng: random.Random):
    """(backdrop look, placed things); a placed thing is (thing, x, y, radius, tilt, mirror, shade)."""
    scene = complete(scene, rng)
    look = {"shift": rng.uniform(-0.03, 0.03), "tint": rng.uniform(-0.08, 0.12), "mirror": rng.random() < 0.5}
    placed = []
    for index, thing in enumerate(scene.things):
        jitter_x, jitter_y = rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)
        if len(scene.things) == 1:
            radius = _RADIUS_ALONE[thing.size]
            x = _COLUMN[thing.position]
            y = 0.46 if thing.kind in FLOATING else 0.84 - radius
        else:
            radius = _RADIUS_OF_TWO[thing.size]
            first = index == 0
            if scene.relation == "above":
                x, y = 0.5 + 2 * jitter_x, 0.25 if first else 0.73
            else:
                x = 0.27 if first == (scene.relation == "left of") else 0.73
                y = 0.46 if thing.kind in FLOATING else 0.82 - radius
        radius *= rng.uniform(0.93, 1.07)
        x = min(max(x + jitter_x, radius), 1 - radius)
        tilt = rng.uniform(-9, 9) if thing.kind in FLOATING else 0.0
        placed.append((thing, x, y + jitter_y, radius, tilt, rng.random() < 0.5, rng.uniform(-1, 1)))
    return scene.setting, look, placed


def _place(points, x, y, radius, tilt, mirror, side):
    """Polygon points in pixels of a picture `side` wide."""
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    local = points * (-1 if mirror else 1, 1)
    turned = local @ np.array([[cos, sin], [-sin, cos]])
    return [tuple(p) for p in (turned * radius + (x, y)) * side]


def _draw_polygons(draw, polygons, fills, width):
    """Fill polygons; with `width` also stroke them in the same colour, which makes them larger."""
    for polygon, fill in zip(polygons, fills, strict=True):
        draw.polygon(polygon, fill=fill)
        if width:
            draw.line(polygon + polygon[:2], fill=fill, width=width, joint="curve" if len(polygon) < 12 else None)


def _draw_thing(image: Image.Image, placed_thing) -> Image.Image:
    """Draw one thing onto `image`; its silhouette (mode L, 0 or 255) is returned."""
    thing, x, y, radius, tilt, mirror, shade = placed_thing
    side = image.width
    palette = _palette(thing.colour, shade)
    roles = [role for role, _ in KINDS[thing.kind]]
    polygons = [_place(points, x, y, radius, tilt, mirror, side) for _, points in KINDS[thing.kind]]
    stroke = max(2, round(side * 0.018))
    silhouette = Image.new("L", image.size, 0)
    _draw_polygons(ImageDraw.Draw(silhouette), polygons, [255] * len(polygons), stroke)
    image.paste(palette["outline"], (0, 0), silhouette)
    _draw_polygons(ImageDraw.Draw(image), polygons, [palette[role] for role in roles], 0)
    # a soft light from above
    box = (0, max(0, round((y - radius) * side)), side, min(side, round((y + radius) * side)))
    light = _gradient(side, box[3] - box[1], (255, 255, 255), (205, 200, 214))
    image.paste(ImageChops.multiply(image.crop(box), light), box, silhouette.crop(box))
    return silhouette


def render(scene: Scene, rng: random.Random, size: int = 128) -> Image.Image:
    """Draw `scene` as an RGB picture of `size` x `size` pixels.

    `rng` decides the small variations and whatever the scene leaves unsaid: the same scene and the
    same state of `rng` give the same picture.
    """
    return render_with_masks(scene, rng, size)[0]


def masks(scene: Scene, rng: random.Random, size: int = 128) -> list[np.ndarray]:
    """Where each thing is visible: one boolean array (size, size) a thing.

    Given `rng` in the same state as `render` got it, the masks fit that picture. A later thing
    hides what it covers of an earlier one.
    """
    return render_with_masks(scene, rng, size)[1]


def render_with_masks(scene: Scene, rng: random.Random, size: int = 128) -> tuple[Image.Image, list[np.ndarray]]:
    """What `render` and `masks` return, from one drawing."""
    if size < 8:
        raise ValueError(f"A picture is at least 8 pixels wide; {size} was asked for.")
    setting, look, placed = _layout(scene, rng)
    canvas = _backdrop(setting, look, 2 * size)  # drawn at twice the size, then averaged
    layers = [np.asarray(_draw_thing(canvas, thing).reduce(2)) > 127 for thing in placed]
    for index in range(len(layers) - 1):
        for later in layers[index + 1 :]:
            layers[index] = layers[index] & ~later
    return canvas.reduce(2), layers


# --- scenes and captions ------------------------------------------------------------------------


def random_scene(rng: random.Random) -> Scene:
    """A scene of the training distribution: never a `HELD_OUT` pair, some things left unsaid.

    About one scene in three has two things.
    """

    def random_thing(alone):
        kind = rng.choice(tuple(KINDS))
        colour = rng.choice(_allowed_colours(kind)) if rng.random() < 0.96 else None
        size = rng.choice(SIZES) if rng.random() < (0.5 if alone else 0.25) else None
        position = rng.choice(POSITIONS) if alone and rng.random() < 0.4 else None
        return Thing(kind, colour, size, position)

    setting = rng.choice(SETTINGS) if rng.random() < 0.92 else None
    if rng.random() < 0.65:
        return Scene((random_thing(True),), setting)
    first, second = random_thing(False), random_thing(False)
    while (first.kind, first.colour) == (second.kind, second.colour):
        second = random_thing(False)
    relation = rng.choice(RELATIONS) if rng.random() < 0.85 else None
    return Scene((first, second), setting, relation)


def _noun_phrase(thing, choose):
    words = [choose(SIZE_PHRASES[thing.size])] if thing.size else []
    words += [thing.colour] if thing.colour else []
    words.append(thing.kind)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words. Without `rng` always the plainest wording, with it one of several."""
    choose = rng.choice if rng else (lambda options: options[0])
    text = _noun_phrase(scene.things[0], choose)
    if len(scene.things) == 2:
        text += f" {choose(RELATION_PHRASES[scene.relation])} {_noun_phrase(scene.things[1], choose)}"
    elif scene.things[0].position:
        text += " " + choose(POSITION_PHRASES[scene.things[0].position])
    intro = choose(INTROS)
    if scene.setting:
        where = choose(SETTING_PHRASES[scene.setting])
        if rng and not intro and rng.random() < 0.15:
            return f"{where}, {text}"
        text += " " + where
    return f"{intro} {text}".strip()


def _phrase_table():
    tables = {
        "size": SIZE_PHRASES,
        "position": POSITION_PHRASES,
        "relation": RELATION_PHRASES,
        "setting": SETTING_PHRASES,
    }
    table = [
        (phrase, role, value)
        for role, options in tables.items()
        for value, phrases in options.items()
        for phrase in phrases
    ]
    table += [(colour, "colour", colour) for colour in COLOURS] + [(kind, "kind", kind) for kind in KINDS]
    table += [(intro, "filler", None) for intro in {*INTROS} - {""}] + [
        (word, "filler", None) for word in ("a", "an", "the")
    ]
    return sorted(table, key=lambda row: -len(row[0].split()))  # the longest phrase wins


_PHRASES = _phrase_table()


def words() -> set[str]:
    """Every word that captions are made of."""
    return {word for phrase, _, _ in _PHRASES for word in phrase.split()}


def _read_phrases(text):
    """(role, value) pairs of the phrases in `text`, and the words that belong to none."""
    words = re.findall(r"[\w-]+", text.lower())
    found, unknown, at = [], [], 0
    while at < len(words):
        for phrase, role, value in _PHRASES:
            parts = phrase.split()
            if words[at : at + len(parts)] == parts:
                found.append((role, value))
                at += len(parts)
                break
        else:
            unknown.append(words[at])
            at += 1
    return found, unknown


def parse(text: str) -> Scene:
    """The scene that a caption describes: `parse(caption(scene, rng)) == scene`.

    Raises ValueError, in one sentence, for words outside this world or a sentence it cannot draw.
    """
    found, unknown = _read_phrases(text)
    if unknown:
        raise ValueError(f"The storybook world does not know: {', '.join(dict.fromkeys(unknown))}.")
    things, pending = [], {}
    said = {"relation": [], "setting": [], "position": []}
    for role, value in found:
        if role in ("size", "colour"):
            if role in pending:
                raise ValueError(f"One thing has one {role}; {pending[role]!r} and {value!r} were given.")
            pending[role] = value
        elif role == "kind":
            things.append(Thing(value, **pending))
            pending = {}
        elif role != "filler":
            said[role].append(value)
    if pending:
        raise ValueError(f"What is {' and '.join(pending.values())}? Name a thing: {', '.join(KINDS)}.")
    if not things:
        raise ValueError(f"The caption names no thing; it needs one of: {', '.join(KINDS)}.")
    if len(things) > 2:
        raise ValueError(f"A scene holds one or two things; this caption names {len(things)}.")
    for role, values in said.items():
        if len(values) > 1:
            raise ValueError(f"A caption gives one {role}; this one gives {len(values)}.")
    if len(said["relation"]) != len(things) - 1:
        raise ValueError("Join two things with 'to the left of', 'to the right of', 'above' or 'and'.")
    if said["position"]:
        if len(things) == 2:
            raise ValueError("With two things, say how they stand to each other, not where one is.")
        things[0] = replace(things[0], position=said["position"][0])
    return Scene(tuple(things), *said["setting"] or [None], *said["relation"])
