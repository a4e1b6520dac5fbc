"""Says what a storybook picture shows. It learned from renders alone, never from generated pictures.

`look` names what is in each picture, `judge` compares that with captions.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from storybook.world import COLOURS, KINDS, POSITIONS, SETTINGS, Scene, Thing, parse

WEIGHTS = Path(__file__).parent.parent / "models/storybook-judge/model.safetensors"
SIDE = 64  # pictures of any size are averaged or enlarged to this

KIND_NAMES, COLOUR_NAMES = tuple(KINDS), tuple(COLOURS)  # in the order of the heads
# one thing at a position, or two beside or above each other
ARRANGEMENTS = (*POSITIONS, "beside", "above")
# The first slot holds a single thing, or the left one, or the upper one; the second slot the other.
HEADS = {
    "arrangement": len(ARRANGEMENTS),
    "setting": len(SETTINGS),
    "kind_1": len(KIND_NAMES),
    "colour_1": len(COLOUR_NAMES),
    "kind_2": len(KIND_NAMES),
    "colour_2": len(COLOUR_NAMES),
}


class Judge(nn.Module):
    """A small convolutional network: pictures (B, 3, 64, 64) in [-1, 1] to logits for each head."""

    def __init__(self):
        super().__init__()

        def block(inputs, outputs, stride):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.body = nn.Sequential(
            block(3, 32, 2), block(32, 64, 1), block(64, 64, 2), block(64, 96, 1),
            block(96, 128, 2), block(128, 128, 1), block(128, 128, 2),
            nn.Flatten(), nn.Linear(128 * 16, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in HEADS.items()})

    def forward(self, images):
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}


def slots(scene: Scene) -> tuple[str, list[Thing]]:
    """(arrangement, things in slot order) of a scene whose position or relation is said."""
    if len(scene.things) == 1:
        return scene.things[0].position, list(scene.things)
    things = list(reversed(scene.things)) if scene.relation == "right of" else list(scene.things)
    return ("above" if scene.relation == "above" else "beside"), things


def in_bytes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as they are stored: matrices and filters in 8 bits, with a scale for each output; the rest in 16.

    All bundled weights share 40 MB, and a classifier's verdicts hardly feel the rounding.
    """
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim > 1:
            scale = tensor.float().abs().amax(tuple(range(1, tensor.ndim)), keepdim=True).clamp(min=1e-12) / 127
            stored[name] = (tensor.float() / scale).round().to(torch.int8).contiguous()
            stored[f"{name}.scale"] = scale
        else:
            stored[name] = tensor.half() if tensor.is_floating_point() else tensor
    return stored


@cache
def bundled_network() -> Judge:
    """The bundled judge, float32; read once.

    Raises FileNotFoundError that says how to make the weights where they are missing.
    """
    if not WEIGHTS.exists():
        raise FileNotFoundError(
            f"The judge's weights are missing: {WEIGHTS}; `python -m storybook.train.judge` makes them."
        )
    stored = load_file(WEIGHTS)
    scales = {name.removesuffix(".scale"): stored.pop(name) for name in list(stored) if name.endswith(".scale")}
    network = Judge().eval()
    network.load_state_dict({name: tensor.float() * scales.get(name, 1.0) for name, tensor in stored.items()})
    return network


def to_input(image: Image.Image) -> np.ndarray:
    """A picture of any size as uint8 (64, 64, 3), as the judge sees it."""
    return np.asarray(
        image.convert("RGB").resize(
            (SIDE, SIDE), Image.Resampling.BOX if image.width > SIDE else Image.Resampling.BICUBIC
        )
    )


@torch.inference_mode()
def look(images: list[Image.Image], network: Judge | None = None) -> list[Scene]:
    """What each picture shows, as the bundled judge or another network of its kind sees it.

    Sizes are not judged; relations come out as "left of" or "above".
    """
    network, seen = network or bundled_network(), []
    for start in range(0, len(images), 256):
        pixels = torch.from_numpy(np.stack([to_input(image) for image in images[start : start + 256]]))
        logits = network(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        best = {name: values.argmax(1).tolist() for name, values in logits.items()}
        for index in range(len(pixels)):
            arrangement = ARRANGEMENTS[best["arrangement"][index]]
            things = [
                Thing(KIND_NAMES[best[f"kind_{n}"][index]], COLOUR_NAMES[best[f"colour_{n}"][index]]) for n in (1, 2)
            ]
            setting = SETTINGS[best["setting"][index]]
            if arrangement in POSITIONS:
                seen.append(Scene((Thing(things[0].kind, things[0].colour, None, arrangement),), setting))
            else:
                seen.append(Scene(tuple(things), setting, "left of" if arrangement == "beside" else "above"))
    return seen


def compare(seen: Scene, asked: Scene) -> dict:
    """Which parts of `asked` the picture got right: True, False, or None where nothing was asked.

    object, colour: of all things asked for, each colour on its own thing, wherever they are; position:
    the place of a single thing or the relation of two. "all" sums up what was asked.
    """
    (shown_arrangement, shown), (arrangement, things) = slots(seen), slots(asked)
    orders = [things, things[::-1]]

    def matches(order, part):
        return len(order) == len(shown) and all(
            getattr(a, part) in (None, getattr(s, part)) for a, s in zip(order, shown, strict=True)
        )

    def kinds_and_colours(order):
        return matches(order, "kind") and matches(order, "colour")

    order = next((o for o in orders if kinds_and_colours(o)), None) or next(
        (o for o in orders if matches(o, "kind")), orders[0]
    )
    row = {
        "object": matches(order, "kind"),
        "colour": matches(order, "colour") if any(thing.colour for thing in order) else None,
        "setting": seen.setting == asked.setting if asked.setting else None,
        "position": None,
    }
    if len(asked.things) == 1 and asked.things[0].position:
        row["position"] = len(shown) == 1 and shown_arrangement == arrangement
    elif asked.relation:
        row["position"] = row["object"] and shown_arrangement == arrangement and order == things
    row["all"] = all(right is not False for right in row.values())
    return row


def judge(images: list[Image.Image], captions: list[str], network: Judge | None = None) -> list[dict]:
    """One row a picture: caption, seen (a Scene), object, colour, setting, position, all.

    `network` takes the place of the bundled judge.
    Raises ValueError when the two lists differ in length or a caption is not of this world.
    """
    if len(images) != len(captions):
        raise ValueError(
            f"{len(images)} pictures came with {len(captions)} captions; give one caption for each picture."
        )
    asked = [parse(caption) for caption in captions]
    return [
        {"caption": caption, "seen": seen, **compare(seen, scene)}
        for caption, scene, seen in zip(captions, asked, look(images, network), strict=True)
    ]


def share(table: list[dict], *parts: str) -> float:
    """The share of rows in which all `parts` are right (a part that nobody asked for counts as right)."""
    if not table:
        raise ValueError("The table has no rows, so there is no share to tell.")
    return sum(all(row[part] is not False for part in parts) for row in table) / len(table)
