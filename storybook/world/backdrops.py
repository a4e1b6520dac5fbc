"""What the settings look like: sky, land and weather, different in every picture.

`draw_backdrop` makes every random choice in the same order at every size, in shares of the picture's
side, so that one state of `rng` gives one picture, whatever its pixels.
"""

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from storybook.world.shapes import mix, oval, soft

WHITE = (255, 255, 255)

# Each setting between two of its palettes, chosen at random: sky above, sky at the horizon, land at the
# horizon, land below.
_PALETTES = {
    "meadow": (
        ((96, 174, 240), (206, 236, 250), (146, 204, 96), (84, 154, 62)),  # noon
        ((172, 208, 232), (250, 240, 208), (176, 208, 104), (112, 164, 70)),  # morning
        ((150, 166, 182), (212, 220, 222), (120, 170, 98), (70, 124, 70)),  # overcast
        ((60, 140, 214), (168, 218, 240), (108, 184, 84), (44, 122, 60)),  # high summer
        ((150, 206, 206), (236, 244, 220), (196, 210, 110), (130, 168, 66)),  # late summer
        ((92, 104, 152), (226, 186, 168), (104, 132, 78), (50, 82, 54)),  # evening
        ((74, 96, 128), (142, 164, 178), (70, 116, 76), (34, 70, 50)),  # before rain
    ),
    "starry night": (
        ((14, 18, 56), (50, 58, 120), (28, 44, 68), (14, 24, 44)),
        ((28, 14, 58), (88, 56, 124), (44, 34, 70), (24, 18, 44)),
        ((6, 26, 48), (24, 84, 112), (14, 48, 60), (8, 26, 38)),
        ((8, 8, 24), (34, 38, 72), (22, 26, 44), (12, 14, 26)),
        ((20, 36, 92), (82, 104, 168), (40, 62, 96), (22, 36, 66)),
        ((40, 52, 110), (124, 128, 190), (70, 84, 124), (40, 50, 84)),
    ),
    "sunset": (
        ((94, 62, 132), (255, 166, 92), (112, 62, 84), (66, 38, 66)),
        ((226, 112, 96), (255, 212, 122), (128, 70, 62), (78, 42, 50)),
        ((64, 58, 118), (240, 128, 128), (84, 54, 96), (48, 34, 70)),
        ((176, 70, 92), (255, 146, 70), (92, 46, 60), (54, 28, 44)),
        ((116, 110, 170), (255, 196, 160), (120, 84, 104), (78, 54, 80)),
        ((198, 150, 150), (255, 232, 176), (170, 104, 84), (112, 66, 64)),
        ((60, 30, 70), (232, 92, 70), (62, 34, 52), (34, 18, 36)),
    ),
    "sea": (
        ((130, 200, 244), (226, 242, 250), (46, 138, 190), (20, 92, 156)),
        ((92, 168, 226), (198, 230, 238), (60, 176, 186), (22, 118, 150)),
        ((168, 182, 194), (222, 226, 224), (92, 138, 152), (52, 96, 122)),
        ((178, 206, 230), (252, 232, 206), (96, 160, 190), (44, 106, 162)),
        ((70, 140, 214), (180, 222, 246), (26, 108, 178), (12, 66, 132)),
        ((84, 98, 140), (206, 168, 166), (58, 88, 130), (26, 48, 88)),  # dusk
        ((92, 106, 124), (158, 172, 180), (50, 84, 100), (26, 54, 74)),  # a storm coming
    ),
    "snow": (
        ((150, 182, 214), (222, 232, 242), (250, 252, 255), (212, 224, 242)),
        ((178, 178, 206), (240, 224, 226), (252, 248, 250), (222, 216, 234)),
        ((116, 150, 190), (188, 208, 228), (232, 240, 250), (190, 206, 230)),
        ((168, 176, 184), (214, 218, 222), (244, 246, 248), (206, 212, 220)),
        ((126, 186, 226), (226, 242, 248), (252, 254, 255), (206, 230, 242)),
        ((74, 94, 146), (150, 156, 196), (188, 198, 226), (140, 154, 196)),  # dusk
        ((108, 116, 130), (160, 168, 178), (206, 212, 220), (160, 170, 186)),  # heavy clouds
    ),
    "desert": (
        ((250, 214, 150), (255, 240, 206), (232, 184, 110), (204, 146, 78)),
        ((112, 188, 224), (232, 238, 220), (240, 202, 130), (214, 162, 90)),
        ((238, 176, 128), (252, 226, 186), (222, 150, 96), (178, 106, 66)),
        ((156, 206, 214), (250, 238, 204), (246, 216, 156), (222, 182, 118)),
        ((222, 190, 160), (246, 226, 198), (214, 172, 120), (176, 130, 86)),
        ((96, 96, 150), (224, 164, 140), (176, 118, 86), (120, 74, 62)),  # dusk
        ((70, 150, 206), (190, 222, 226), (224, 168, 96), (190, 122, 62)),
    ),
}
_HORIZON = {
    "meadow": (0.5, 0.76), "starry night": (0.68, 0.86), "sunset": (0.62, 0.8), "sea": (0.46, 0.7),
    "snow": (0.52, 0.76), "desert": (0.54, 0.76),
}  # fmt: skip


class _Canvas:
    """A picture to paint on in shares of its side: x from 0 at the left to 1, y from 0 at the top to 1."""

    def __init__(self, side: int):
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def polygon(self, corners: np.ndarray, colour: tuple) -> None:
        self.pen.polygon([tuple(p) for p in corners * self.side], fill=colour)

    def disc(self, x: float, y: float, rx: float, colour: tuple, ry: float | None = None) -> None:
        rx, ry = rx * self.side, (rx if ry is None else ry) * self.side
        x, y = x * self.side, y * self.side
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def stroke(self, corners: np.ndarray, colour: tuple, width: float) -> None:
        line = [tuple(p) for p in corners * self.side]
        self.pen.line(line, fill=colour, width=max(1, round(width * self.side)), joint="curve")

    def fill_below(self, ridge: np.ndarray, top: tuple, bottom: tuple) -> None:
        """Everything under a line (N, 2) from left to right, shaded from `top` at its highest point to `bottom`."""
        high = max(0, math.floor(ridge[:, 1].min() * self.side))
        if high >= self.side:
            return
        mask = Image.new("L", (self.side, self.side - high))
        under = [(x * self.side, y * self.side - high) for x, y in ridge]
        ImageDraw.Draw(mask).polygon([*under, (self.side, self.side), (0, self.side)], fill=255)
        self.image.paste(gradient(*mask.size, top, bottom), (0, high), mask)


def gradient(width: int, height: int, top: tuple, bottom: tuple) -> Image.Image:
    """A picture that goes from the colour `top` to the colour `bottom`."""
    ramp = np.linspace(np.array(top, float), np.array(bottom, float), max(height, 1))
    column = Image.fromarray(ramp.round().astype(np.uint8)[:, None, :])
    return column.resize((width, max(height, 1)), Image.Resampling.NEAREST)


def _ridge(rng: random.Random, base: float, height: float, waves: float) -> np.ndarray:
    """A rolling line: three sines of about `waves`, 2 `waves` and 3 `waves` bumps, `height` up and down."""
    x = np.linspace(0, 1, 49)
    y = np.full_like(x, base)
    for times, share in ((1, 0.6), (2, 0.28), (3, 0.12)):
        phase, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.2)
        y += height * share * np.sin(2 * math.pi * waves * times * stretch * x + phase)
    return np.stack([x, y], 1)


def _peaks(rng: random.Random, base: float, height: float, count: int) -> np.ndarray:
    """A jagged line of `count` mountains, up to `height` above `base`."""
    xs = np.linspace(-0.1, 1.1, 2 * count + 1)
    ys = [base - height * (rng.uniform(0.55, 1) if i % 2 else rng.uniform(0.05, 0.3)) for i in range(len(xs))]
    return np.stack([[x + rng.uniform(-0.3, 0.3) / count for x in xs], ys], 1)


def _sky(canvas: _Canvas, top: tuple, bottom: tuple, line: float, glow: tuple | None) -> None:
    """The sky down to `line`, with `glow` = (x, y, colour, reach) brightening it around the sun."""
    side = 48
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    share = np.clip(y / line, 0, 1)[..., None]
    colours = np.array(top, float) * (1 - share) + np.array(bottom, float) * share
    if glow:
        near = 0.75 * np.exp(-((x - glow[0]) ** 2 + (y - glow[1]) ** 2) / glow[3] ** 2)[..., None]
        colours = colours * (1 - near) + np.array(glow[2], float) * near
    small = Image.fromarray(colours.round().astype(np.uint8))
    canvas.image.paste(small.resize((canvas.side, canvas.side), Image.Resampling.BICUBIC))


def _clouds(canvas: _Canvas, rng: random.Random, line: float, colour: tuple, count: int) -> None:
    for _ in range(count):
        x, y, size = rng.uniform(0, 1), rng.uniform(0.06, line * 0.62), rng.uniform(0.045, 0.1)
        puffs = rng.randint(3, 5)
        canvas.disc(x, y + size * 0.35, size * 0.62 * puffs / 2, colour, size * 0.3)
        for i in range(puffs):
            away = (i - (puffs - 1) / 2) * size * 0.72
            rise = size * rng.uniform(0.6, 1) * (1 - 0.16 * abs(i - (puffs - 1) / 2))
            canvas.disc(x + away, y, rise * 0.72, colour)


def _streaks(canvas: _Canvas, rng: random.Random, line: float, colour: tuple, count: int) -> None:
    """Long thin clouds."""
    for _ in range(count):
        x, y, long = rng.uniform(0, 1), rng.uniform(0.08, line * 0.8), rng.uniform(0.12, 0.3)
        canvas.disc(x, y, long, colour, rng.uniform(0.012, 0.024))
        canvas.disc(x + rng.uniform(-0.1, 0.1), y - 0.02, long * 0.6, colour, 0.014)


def _birds(canvas: _Canvas, rng: random.Random, line: float, colour: tuple) -> None:
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, line * 0.55)
    for _ in range(rng.randint(2, 4)):
        bx, by, wing = x + rng.uniform(-0.14, 0.14), y + rng.uniform(-0.06, 0.06), rng.uniform(0.016, 0.026)
        shape = np.array([[-1, -0.5], [-0.5, -0.8], [0, 0], [0.5, -0.8], [1, -0.5]]) * wing + (bx, by)
        canvas.stroke(shape, colour, 0.007)


def _firs(canvas: _Canvas, rng: random.Random, ridge: np.ndarray, colour: tuple, snow: tuple | None = None) -> None:
    """A row of small firs along part of a line."""
    start, stop = sorted((rng.uniform(-0.1, 0.9), rng.uniform(0.2, 1.1)))
    for _ in range(rng.randint(5, 14)):
        x, tall = rng.uniform(start, stop), rng.uniform(0.05, 0.1)
        foot = float(np.interp(x, ridge[:, 0], ridge[:, 1])) + 0.015
        for k in range(3):
            wide, low = tall * (0.38 - 0.08 * k), foot - tall * 0.28 * k
            tip = np.array([[x - wide, low], [x, low - tall * 0.5], [x + wide, low]])
            canvas.polygon(tip, colour)
            if snow:
                canvas.polygon((tip - (x, low - tall * 0.5)) * 0.5 + (x, low - tall * 0.5), snow)


def _woods(canvas: _Canvas, rng: random.Random, ridge: np.ndarray, colour: tuple) -> None:
    """Round bushes and trees, far away, along part of a line."""
    start, stop = sorted((rng.uniform(-0.1, 0.9), rng.uniform(0.2, 1.1)))
    for _ in range(rng.randint(5, 14)):
        x, tall = rng.uniform(start, stop), rng.uniform(0.018, 0.04)
        canvas.disc(x, float(np.interp(x, ridge[:, 0], ridge[:, 1])) - tall * 0.5, tall, colour)


def _tufts(canvas: _Canvas, rng: random.Random, line: float, colour: tuple, count: int) -> None:
    """Blades of grass in threes."""
    for _ in range(count):
        x, y, tall = rng.uniform(0, 1), rng.uniform(line + 0.12, 1.02), rng.uniform(0.025, 0.05)
        for lean in (-0.7, 0, 0.7):
            tip = (x + lean * tall * 0.7, y - tall * (1 - 0.3 * abs(lean)))
            blade = np.array([(x - 0.008, y), tip, (x + 0.008, y)])
            canvas.polygon(blade, colour)


def _stones(canvas: _Canvas, rng: random.Random, line: float, colour: tuple, count: int) -> None:
    for _ in range(count):
        x, y, wide = rng.uniform(0, 1), rng.uniform(line + 0.14, 1), rng.uniform(0.02, 0.05)
        stone = np.array([[-1, 0.45], [-0.7, -0.3], [0.1, -0.65], [0.8, -0.25], [1, 0.45]]) * wide + (x, y)
        canvas.polygon(soft(stone, 2), mix(colour, WHITE, rng.uniform(0, 0.2)))


def _plain(canvas: _Canvas, rng: random.Random) -> tuple:
    hue, strength, light = rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.34, 0.9)
    wall = tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue, light, strength))
    lamp = (rng.uniform(0, 1), rng.uniform(0, 0.7), mix(wall, WHITE, 0.6), rng.uniform(0.3, 0.8))
    _sky(canvas, mix(wall, WHITE, 0.12), mix(wall, (60, 50, 70), rng.uniform(0.04, 0.16)), 1, lamp)
    if rng.random() < 0.6:  # a floor or a table
        edge = rng.uniform(0.7, 0.84)
        floor = mix(wall, rng.choice(((120, 90, 70), (90, 90, 110), (250, 246, 240))), rng.uniform(0.3, 0.6))
        canvas.fill_below(np.array([[0, edge], [1, edge]]), floor, mix(floor, (60, 50, 70), 0.12))
    return WHITE


def _landscape(canvas: _Canvas, rng: random.Random, setting: str) -> tuple:
    """A setting with a sky; the colour of its light is returned."""
    one, other = rng.sample(_PALETTES[setting], 2)
    share = rng.random()
    top, bottom, land, low = (mix(a, b, share) for a, b in zip(one, other, strict=True))
    line = rng.uniform(*_HORIZON[setting])
    night, dusk = setting == "starry night", setting == "sunset"
    sun_x, sun_y = rng.uniform(0.08, 0.92), rng.uniform(0.08, max(0.12, line - 0.3))
    glow = None
    if dusk:
        sun_y = line - rng.uniform(-0.06, 0.16)
        glow = (sun_x, sun_y, (255, 228, 150), rng.uniform(0.2, 0.4))
    _sky(canvas, top, bottom, line, glow)
    air = mix(bottom, top, 0.35)  # what far things fade into

    if night:
        for _ in range(rng.randint(14, 44)):
            canvas.disc(rng.random(), rng.uniform(0, line), rng.uniform(0.004, 0.011), mix((255, 248, 210), top, 0.1))
        if rng.random() < 0.75:
            moon = rng.uniform(0.05, 0.1)
            canvas.disc(sun_x, sun_y, moon, (248, 240, 204))
            if rng.random() < 0.65:
                side = moon * rng.choice((-0.5, 0.5))
                canvas.disc(sun_x + side, sun_y - moon * 0.2, moon * 0.85, mix(top, bottom, sun_y))
    elif dusk:
        canvas.disc(sun_x, sun_y, rng.uniform(0.08, 0.16), (255, 226, 138))
    elif rng.random() < (0.3 if setting == "snow" else 0.55):
        pale = 0.6 if setting == "snow" else 0.1
        canvas.disc(sun_x, sun_y, rng.uniform(0.05, 0.085), mix((255, 234, 140), bottom, pale))
    if night or dusk or setting == "desert":
        _streaks(canvas, rng, line, mix(bottom, top, 0.3) if night else mix(bottom, WHITE, 0.25), rng.randint(0, 3))
    else:
        _clouds(canvas, rng, line, mix(bottom, WHITE, 0.75), rng.randint(0, 4))
    if not night and rng.random() < 0.3:
        _birds(canvas, rng, line, mix(top, (30, 30, 50), 0.7))

    far = mix(air, low if night or dusk else (92, 112, 140), 0.45)
    if setting == "sea":
        if rng.random() < 0.5:
            x, wide = rng.uniform(0, 1), rng.uniform(0.12, 0.3)
            canvas.polygon(oval(x, line + 0.01, wide, rng.uniform(0.04, 0.11), 180, 360), mix(far, (80, 130, 90), 0.4))
    elif setting == "desert":
        if rng.random() < 0.45:  # flat-topped rocks
            x, wide, tall = rng.uniform(0.05, 0.95), rng.uniform(0.08, 0.2), rng.uniform(0.05, 0.13)
            rock = np.array([[-1, 0], [-0.7, -1], [0.6, -1], [0.75, -0.55], [1, 0]]) * (wide, tall) + (x, line + 0.03)
            canvas.polygon(rock, mix(air, (170, 96, 70), 0.55))
    elif rng.random() < 0.5:
        range_line = _peaks(rng, line + 0.04, rng.uniform(0.1, 0.24), rng.randint(2, 4))
        canvas.fill_below(range_line, mix(far, WHITE, 0.3) if setting == "snow" else far, mix(far, bottom, 0.5))

    if setting == "sea":
        _water(canvas, rng, line, land, low)
        return mix(bottom, WHITE, 0.72)
    rolling = rng.uniform(0.012, 0.06)
    if rng.random() < 0.65:  # a hill or a dune behind
        behind = _ridge(rng, line - rng.uniform(0, 0.06), rolling * 1.4, rng.uniform(0.5, 1.4))
        canvas.fill_below(behind, mix(land, air, 0.4), mix(land, air, 0.2))
        if setting != "desert" and rng.random() < 0.5:
            trees = mix(mix(land, (20, 60, 50), 0.55), air, 0.25)
            (_firs if setting == "snow" or rng.random() < 0.5 else _woods)(canvas, rng, behind, trees)
    front = _ridge(rng, line + 0.03, rolling, rng.uniform(0.4, 1.2))
    canvas.fill_below(front, land, low)
    if setting == "desert":
        for _ in range(rng.randint(0, 2)):  # the side of a dune that lies in the shade
            crest = _ridge(rng, rng.uniform(line + 0.1, 0.92), rolling, rng.uniform(0.5, 1.1))
            canvas.fill_below(crest, mix(land, low, rng.uniform(0.2, 0.9)), low)
    elif setting != "starry night" and rng.random() < 0.3:
        trees = mix(land, (30, 60, 60) if setting != "sunset" else (40, 24, 50), 0.5)
        if setting == "snow":
            _firs(canvas, rng, front, trees, WHITE)
        else:
            _woods(canvas, rng, front, trees)
    blade = {"meadow": mix(low, (30, 80, 30), 0.35), "snow": (176, 168, 150)}.get(setting, mix(low, (20, 16, 30), 0.3))
    if setting not in ("snow", "desert"):
        _tufts(canvas, rng, line, blade, rng.randint(0, 12))
    if rng.random() < 0.5:
        stone = mix(low, (120, 120, 128), 0.25 if night or dusk else 0.6)
        _stones(canvas, rng, line, mix(stone, land, 0.3) if setting == "desert" else stone, rng.randint(1, 4))
    if setting == "snow" and rng.random() < 0.75:
        for _ in range(rng.randint(8, 40)):
            canvas.disc(rng.random(), rng.random(), rng.uniform(0.006, 0.013), WHITE)
    return {
        "starry night": (214, 216, 240), "sunset": (255, 232, 214), "snow": (242, 246, 255),
    }.get(setting, mix(bottom, WHITE, 0.72))  # fmt: skip


def _water(canvas: _Canvas, rng: random.Random, line: float, land: tuple, low: tuple) -> None:
    canvas.fill_below(np.array([[0, line], [1, line]]), land, low)
    foam = mix(land, WHITE, 0.45)
    for _ in range(rng.randint(3, 12)):
        x, y = rng.random(), rng.uniform(line + 0.04, 0.98)
        wide = rng.uniform(0.04, 0.12) * (0.6 + y - line)
        bow = np.array([[-1, 0], [-0.5, -0.22], [0, -0.3], [0.5, -0.22], [1, 0]]) * (wide, 0.06) + (x, y)
        canvas.stroke(bow, mix(foam, land, rng.uniform(0, 0.5)), 0.01)
    if rng.random() < 0.45:  # a beach in front
        shore = _ridge(rng, rng.uniform(0.86, 0.95), 0.02, rng.uniform(0.4, 1.2))
        canvas.fill_below(shore - (0, 0.014), foam, foam)
        canvas.fill_below(shore, (242, 220, 170), (226, 196, 140))
        _stones(canvas, rng, 0.8, (190, 176, 158), rng.randint(0, 3))


def draw_backdrop(setting: str, rng: random.Random, side: int) -> tuple[Image.Image, tuple]:
    """The setting alone, `side` pixels wide, and the colour of its light (white: as it is)."""
    canvas = _Canvas(side)
    light = _plain(canvas, rng) if setting == "plain" else _landscape(canvas, rng, setting)
    return canvas.image, light
