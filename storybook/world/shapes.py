"""What the things look like: each kind in two or three designs, as polygons with a role each.

Coordinates: x to the right, y down, a thing fits into [-1, 1] x [-1, 1]. The role picks the fill
colour, see `palette`. "body" is the colour that captions name, and covers most of every design.
"""

import colorsys

import numpy as np

from storybook.world.vocabulary import COLOURS


def oval(cx, cy, rx, ry, start=0.0, end=360.0, count=30):
    """An ellipse or an arc of it as (count, 2) points; angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, count, endpoint=end - start < 360))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1)


def points(*flat):
    """x0, y0, x1, y1 ... as (N, 2) points."""
    return np.array(flat, dtype=float).reshape(-1, 2)


def box(left, top, right, bottom):
    """A rectangle."""
    return points(left, top, right, top, right, bottom, left, bottom)


def soft(polygon, rounds=2):
    """The polygon with its corners cut off `rounds` times (Chaikin, 1974), which rounds them."""
    for _ in range(rounds):
        after = np.roll(polygon, -1, axis=0)
        polygon = np.stack([0.75 * polygon + 0.25 * after, 0.25 * polygon + 0.75 * after], 1).reshape(-1, 2)
    return polygon


def _rays(count, inner, outer):
    angles = np.radians(np.arange(2 * count) * 180 / count - 90)
    radii = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.06], 1)


def _heart(width=1.0):
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = width * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y + 0.02], 1)


def _petals(count, reach, long, wide):
    """`count` ovals around the head of a flower, each pointing outwards."""
    for angle in np.arange(count) * 2 * np.pi / count - np.pi / 2:
        out, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        ring = oval(0, 0, 1, 1, count=20)
        yield "body", ring[:, :1] * out * long + ring[:, 1:] * across * wide + out * reach + (0, -0.38)


_STEM = [
    ("leaf", box(-0.06, -0.1, 0.06, 1)),
    ("leaf", oval(0.3, 0.62, 0.28, 0.13)),
    ("leaf", oval(-0.3, 0.72, 0.28, 0.13)),
]
_TULIP = (0.6, -0.1, 0.24, 0.26, -0.24, 0.26, -0.6, -0.1)  # its lower half
_WHEELS = [
    ("ink", oval(-0.55, 0.48, 0.25, 0.25)),
    ("ink", oval(0.55, 0.48, 0.25, 0.25)),
    ("pale", oval(-0.55, 0.48, 0.11, 0.11)),
    ("pale", oval(0.55, 0.48, 0.11, 0.11)),
]

KINDS = {
    "house": [
        [  # a cottage
            ("dark", box(0.4, -0.9, 0.64, -0.3)),
            ("body", box(-0.72, -0.18, 0.72, 1)),
            ("dark", points(-0.98, -0.14, 0, -1, 0.98, -0.14)),
            ("wood", box(-0.2, 0.38, 0.2, 1)),
            ("glow", box(-0.56, 0.08, -0.28, 0.36)),
            ("glow", box(0.28, 0.08, 0.56, 0.36)),
        ],
        [  # a tall one with a round window
            ("body", box(-0.52, -0.3, 0.52, 1)),
            ("dark", points(-0.74, -0.2, 0, -1.05, 0.74, -0.2)),
            ("pale", oval(0, -0.45, 0.14, 0.14)),
            ("glow", box(-0.38, -0.05, -0.1, 0.28)),
            ("glow", box(0.1, -0.05, 0.38, 0.28)),
            ("wood", np.concatenate([oval(0, 0.6, 0.18, 0.18, 180, 360, 12), points(0.18, 1, -0.18, 1)])),
        ],
        [  # a long one
            ("body", box(-0.92, -0.02, 0.92, 0.92)),
            ("dark", points(-1.02, 0.06, -0.7, -0.62, 0.7, -0.62, 1.02, 0.06)),
            ("wood", box(-0.62, 0.34, -0.28, 0.92)),
            ("glow", box(-0.1, 0.28, 0.22, 0.6)),
            ("glow", box(0.42, 0.28, 0.74, 0.6)),
        ],
    ],
    "tree": [
        [  # three crowns in one
            ("wood", box(-0.15, 0.3, 0.15, 1)),
            ("body", oval(-0.38, 0.12, 0.46, 0.42)),
            ("body", oval(0.38, 0.12, 0.46, 0.42)),
            ("body", oval(0, -0.38, 0.56, 0.6)),
        ],
        [  # a fir
            ("wood", box(-0.12, 0.6, 0.12, 1)),
            ("body", points(-0.82, 0.74, 0, -0.1, 0.82, 0.74)),
            ("dark", points(-0.42, 0.32, 0, -0.12, 0.42, 0.32, 0, 0.42)),
            ("body", points(-0.66, 0.28, 0, -0.52, 0.66, 0.28)),
            ("dark", points(-0.34, -0.14, 0, -0.5, 0.34, -0.14, 0, -0.04)),
            ("body", points(-0.5, -0.18, 0, -1.02, 0.5, -0.18)),
        ],
        [  # a round crown on a forked trunk
            ("wood", points(-0.13, 1, -0.09, 0.3, -0.34, -0.02, 0, 0.16, 0.34, -0.02, 0.09, 0.3, 0.13, 1)),
            ("body", oval(0, -0.28, 0.8, 0.72)),
            ("light", oval(-0.3, -0.52, 0.13, 0.11)),
            ("light", oval(0.28, -0.3, 0.13, 0.11)),
            ("light", oval(-0.14, -0.04, 0.13, 0.11)),
        ],
    ],
    "boat": [
        [  # two sails
            ("wood", box(-0.06, -0.95, 0.06, 0.4)),
            ("pale", points(0.1, -0.9, 0.82, 0.2, 0.1, 0.2)),
            ("body", points(-0.12, -0.7, -0.12, 0.2, -0.7, 0.2)),
            ("body", points(-1, 0.36, 1, 0.36, 0.66, 1, -0.66, 1)),
        ],
        [  # one tall sail and a pennant
            ("wood", box(-0.28, -0.95, -0.18, 0.4)),
            ("body", points(-0.28, -1, -0.28, -0.74, -0.66, -0.86)),
            ("pale", soft(points(-0.14, -0.84, 0.78, 0.22, -0.14, 0.22), 1)),
            ("body", points(-0.14, -0.22, 0.2, -0.22, 0.5, 0.02, -0.14, 0.02)),
            ("body", np.concatenate([oval(0, 0.36, 1, 0.62, 0, 180)])),
        ],
        [  # a steamer
            ("dark", box(0.06, -0.86, 0.36, -0.2)),
            ("pale", box(0.06, -0.66, 0.36, -0.5)),
            ("pale", box(-0.5, -0.28, 0.6, 0.34)),
            ("glass", oval(-0.28, 0.02, 0.11, 0.11)),
            ("glass", oval(0.04, 0.02, 0.11, 0.11)),
            ("glass", oval(0.36, 0.02, 0.11, 0.11)),
            ("body", points(-1.02, 0.3, 1.02, 0.22, 0.74, 0.96, -0.74, 0.96)),
        ],
    ],
    "rocket": [
        [  # slim
            ("flame", points(-0.24, 0.62, 0.24, 0.62, 0, 1.08)),
            ("dark", points(-0.3, 0.1, -0.72, 0.78, -0.26, 0.66)),
            ("dark", points(0.3, 0.1, 0.72, 0.78, 0.26, 0.66)),
            ("body", np.concatenate([oval(0, 0.05, 0.42, 1.05, 180, 360), points(0.3, 0.68, -0.3, 0.68)])),
            ("glow", oval(0, -0.22, 0.19, 0.19)),
        ],
        [  # stout, with a nose of its own
            ("flame", points(-0.32, 0.58, 0.32, 0.58, 0.14, 0.96, 0, 0.8, -0.14, 0.96)),
            ("dark", soft(points(-0.4, 0, -0.92, 0.5, -0.8, 0.86, -0.34, 0.56), 1)),
            ("dark", soft(points(0.4, 0, 0.92, 0.5, 0.8, 0.86, 0.34, 0.56), 1)),
            ("body", soft(points(0, -1.3, 0.6, -0.3, 0.46, 0.66, -0.46, 0.66, -0.6, -0.3), 2)),
            ("dark", soft(points(0, -1.22, 0.3, -0.58, -0.3, -0.58), 1)),
            ("glow", oval(0, -0.18, 0.17, 0.17)),
            ("glow", oval(0, 0.28, 0.12, 0.12)),
        ],
    ],
    "fish": [
        [  # with a dorsal fin
            ("dark", points(0.42, 0, 1, -0.52, 0.86, 0, 1, 0.52)),
            ("dark", points(-0.2, -0.46, 0.32, -0.78, 0.36, -0.34)),
            ("body", oval(-0.2, 0, 0.8, 0.54)),
            ("pale", oval(-0.6, -0.13, 0.15, 0.15)),
            ("ink", oval(-0.63, -0.13, 0.07, 0.07)),
        ],
        [  # round and striped
            ("dark", soft(points(0.4, 0, 1.06, -0.5, 0.8, 0, 1.06, 0.5), 1)),
            ("dark", soft(points(-0.4, 0.5, 0.1, 1, 0.3, 0.4), 1)),
            ("body", oval(-0.16, 0, 0.74, 0.7)),
            ("light", oval(0.1, 0, 0.09, 0.52)),
            ("light", oval(0.36, 0, 0.07, 0.36)),
            ("pale", oval(-0.5, -0.18, 0.17, 0.17)),
            ("ink", oval(-0.54, -0.18, 0.08, 0.08)),
        ],
        [  # long
            ("dark", points(0.5, 0, 0.98, -0.4, 0.98, 0.4)),
            ("dark", soft(points(-0.3, -0.26, 0.04, -0.62, 0.5, -0.2), 1)),
            ("body", soft(points(-1.1, 0.04, -0.5, -0.44, 0.5, -0.26, 0.72, 0, 0.5, 0.26, -0.5, 0.46), 2)),
            ("light", soft(points(-0.5, 0.34, 0.4, 0.22, 0.3, 0.08, -0.4, 0.12), 1)),
            ("pale", oval(-0.6, -0.1, 0.12, 0.12)),
            ("ink", oval(-0.63, -0.1, 0.06, 0.06)),
        ],
    ],
    "flower": [
        [*_STEM, *_petals(6, 0.42, 0.29, 0.29), ("centre", oval(0, -0.38, 0.23, 0.23))],
        [  # a tulip
            ("leaf", box(-0.06, 0, 0.06, 1)),
            ("leaf", soft(points(0.02, 0.96, 0.66, -0.1, 0.34, 0.9), 1)),
            ("leaf", soft(points(-0.02, 0.96, -0.66, 0, -0.34, 0.9), 1)),
            ("dark", soft(points(-0.3, -0.3, 0, -1.1, 0.3, -0.3), 1)),
            ("body", soft(points(-0.56, -0.96, 0, -0.4, 0.56, -0.96, *_TULIP), 1)),
        ],
        [*_STEM, *_petals(9, 0.42, 0.26, 0.15), ("centre", oval(0, -0.38, 0.27, 0.27))],
    ],
    "mushroom": [
        [  # a dome
            ("pale", points(-0.24, 0, 0.24, 0, 0.36, 1, -0.36, 1)),
            ("body", np.concatenate([oval(0, 0.16, 0.98, 1.1, 180, 360), points(0.8, 0.26, -0.8, 0.26)])),
            ("pale", oval(-0.42, -0.3, 0.19, 0.19)),
            ("pale", oval(0.12, -0.52, 0.17, 0.17)),
            ("pale", oval(0.5, -0.1, 0.16, 0.16)),
        ],
        [  # a bell
            ("pale", soft(points(-0.2, -0.1, 0.2, -0.1, 0.3, 1.06, -0.3, 1.06), 1)),
            ("body", soft(points(0, -1.2, 0.5, -0.8, 0.82, 0.4, -0.82, 0.4, -0.5, -0.8), 2)),
            ("pale", oval(-0.28, -0.1, 0.15, 0.15)),
            ("pale", oval(0.22, -0.42, 0.14, 0.14)),
            ("pale", oval(0.34, 0.08, 0.12, 0.12)),
        ],
        [  # wide and flat, with gills
            ("pale", points(-0.2, 0, 0.2, 0, 0.28, 0.96, -0.28, 0.96)),
            ("light", oval(0, 0, 0.9, 0.22)),
            ("body", np.concatenate([oval(0, 0, 1.02, 0.74, 180, 360), oval(0, 0, 1.02, 0.1, 0, 180)])),
            ("pale", oval(-0.46, -0.26, 0.14, 0.11)),
            ("pale", oval(0, -0.46, 0.15, 0.12)),
            ("pale", oval(0.46, -0.26, 0.14, 0.11)),
        ],
    ],
    "star": [
        [("body", _rays(5, 0.47, 1.02))],
        [("body", soft(_rays(5, 0.56, 1.16), 1))],
        [("body", _rays(5, 0.47, 1.02)), ("light", _rays(5, 0.2, 0.44))],
    ],
    "heart": [
        [("body", _heart())],
        [("body", _heart(1.08)), ("light", oval(-0.46, -0.46, 0.2, 0.17))],
    ],
    "balloon": [
        [  # on a string
            ("ink", box(-0.025, 0.4, 0.025, 1)),
            ("dark", points(0, 0.36, 0.14, 0.56, -0.14, 0.56)),
            ("body", oval(0, -0.28, 0.62, 0.72)),
            ("light", oval(-0.24, -0.55, 0.12, 0.18)),
        ],
        [  # with a basket
            ("ink", points(-0.34, 0.2, -0.3, 0.2, -0.14, 0.7, -0.18, 0.7)),
            ("ink", points(0.34, 0.2, 0.3, 0.2, 0.14, 0.7, 0.18, 0.7)),
            ("wood", box(-0.22, 0.66, 0.22, 1)),
            ("body", soft(points(-0.8, -0.8, 0, -1.16, 0.8, -0.8, 0.78, -0.1, 0.3, 0.5, -0.3, 0.5, -0.78, -0.1), 2)),
            ("light", oval(0, -0.32, 0.17, 0.7)),
        ],
    ],
    "car": [
        [  # a saloon
            ("body", points(-0.58, 0, -0.34, -0.5, 0.36, -0.5, 0.64, 0)),
            ("glass", points(-0.4, -0.04, -0.25, -0.38, 0, -0.38, 0, -0.04)),
            ("glass", points(0.1, -0.04, 0.1, -0.38, 0.29, -0.38, 0.44, -0.04)),
            ("body", points(-1, 0.06, -0.9, -0.06, 0.9, -0.06, 1, 0.1, 1, 0.46, -1, 0.46)),
            *_WHEELS,
        ],
        [  # a beetle
            ("body", np.concatenate([oval(0, 0.1, 0.7, 0.76, 180, 360)])),
            ("glass", np.concatenate([oval(-0.06, 0.02, 0.46, 0.5, 180, 270, 12), points(-0.06, 0.02)])),
            ("glass", np.concatenate([points(0.06, 0.02), oval(0.06, 0.02, 0.46, 0.5, 270, 360, 12)])),
            ("body", soft(points(-1.06, 0, 1.06, 0, 1.06, 0.5, -1.06, 0.5), 2)),
            *_WHEELS,
        ],
        [  # a van
            ("body", soft(points(-1, -0.62, 0.62, -0.62, 1.02, 0, 1.02, 0.48, -1, 0.48), 1)),
            ("glass", box(-0.78, -0.42, -0.4, -0.06)),
            ("glass", box(-0.24, -0.42, 0.14, -0.06)),
            ("glass", points(0.3, -0.42, 0.54, -0.42, 0.78, -0.06, 0.3, -0.06)),
            *_WHEELS,
        ],
    ],
    "cup": [
        [  # a mug
            ("body", np.concatenate([oval(0.62, 0.2, 0.36, 0.4, -90, 90), oval(0.62, 0.2, 0.19, 0.22, 90, -90)])),
            ("body", points(-0.76, -0.5, 0.66, -0.5, 0.5, 0.84, -0.6, 0.84)),
            ("dark", oval(-0.05, -0.5, 0.71, 0.18)),
            ("wood", oval(-0.05, -0.47, 0.58, 0.11)),
        ],
        [  # a tea cup on its saucer
            ("light", oval(0, 0.68, 0.98, 0.2)),
            ("body", np.concatenate([oval(0.66, -0.02, 0.32, 0.3, -90, 90), oval(0.66, -0.02, 0.16, 0.15, 90, -90)])),
            ("body", np.concatenate([oval(-0.04, -0.32, 0.76, 1, 0, 180)])),
            ("dark", oval(-0.04, -0.34, 0.76, 0.17)),
            ("wood", oval(-0.04, -0.31, 0.62, 0.1)),
        ],
    ],
}
FLOATING = {"rocket", "fish", "star", "heart", "balloon"}  # these hang in the air, the others stand


def mix(a, b, share):
    """The colour that lies `share` of the way from `a` to `b`."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def palette(colour: str, shift: float) -> dict:
    """Fill colours by role for a thing of this colour; `shift` in [-1, 1] varies its lightness."""
    hue, light, strength = colorsys.rgb_to_hls(*(value / 255 for value in COLOURS[colour]))
    light = min(0.97, light * (1 + 0.08 * shift))
    body = tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, light, strength))
    return {
        "body": body,
        "dark": mix(body, (20, 10, 30), 0.3),
        "light": mix(body, (255, 255, 255), 0.55) if colour != "white" else (222, 222, 226),
        "outline": mix(body, (25, 20, 40), 0.72),
        "wood": (126, 88, 62),
        "glow": (255, 240, 178),
        "glass": (196, 226, 240),
        "pale": (250, 242, 226),
        "leaf": (70, 140, 70),
        "centre": (250, 213, 58) if colour not in ("yellow", "orange") else (150, 84, 40),
        "flame": (255, 176, 60),
        "ink": (48, 44, 60),
    }
