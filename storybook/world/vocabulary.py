"""What can be said: colours, sizes, places, settings, and the two records that hold a scene."""

from dataclasses import dataclass

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

# No training picture shows these: they measure whether a model can combine what it knows.
HELD_OUT = frozenset({
    ("red", "tree"), ("orange", "boat"), ("yellow", "rocket"), ("green", "heart"),
    ("blue", "mushroom"), ("purple", "car"), ("pink", "fish"), ("white", "flower"),
})  # fmt: skip


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


def allowed_colours(kind: str) -> list[str]:
    """The colours in which training pictures show this kind."""
    return [colour for colour in COLOURS if (colour, kind) not in HELD_OUT]
