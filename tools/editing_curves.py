"""What edits keep and what they change: `python -m tools.editing_curves` writes notebooks/data/editing.csv for page 08.

A row is one number with its 95 % interval, from n pictures: renders of the storybook world, of which it is known where
their thing is. Distances are root mean squares over pixels in 0..1, of latents beside the latents' own size. The metric
"second" is "right" in the eyes of `storybook.evaluate.second_judge`, which had no part in any choice that was made
while the models were trained. Its own training, on first use, takes longer than all the rest.
"""

import argparse
import csv
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from helpers.compare import mean_with_interval
from helpers.editing import Denoiser, away, encode, first_level, noise_like, pictures, run, seeded
from helpers.editing_inpaint import inpaint
from helpers.editing_inversion import distance, invert
from helpers.editing_mask import on_latents, shape_mask
from helpers.generate import own_size
from helpers.images import ROOT
from helpers.pipelines import load
from storybook.evaluate import second_judge
from storybook.judge import Judge, judge
from storybook.world import COLOURS, HELD_OUT, KINDS, SETTINGS, Scene, Thing, caption, render_with_masks

TABLE = ROOT / "notebooks/data/editing.csv"
FIELDS = ("part", "model", "method", "x", "metric", "mean", "low", "high", "n")
STEPS = 20
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
MARGIN = 4  # % of the side that a mask reaches beyond its thing
ROUNDS = 3
# How a part is redrawn: steps, rounds, and how many steps a round has.
REDRAWN = {
    "replacement": (STEPS, 1, 1),
    "replacement, more steps": (ROUNDS * STEPS, 1, 1),
    "resampling": (STEPS, ROUNDS, 1),
}
INVERTED = (5, 10, 20, 40)  # steps
COMPARED = 4  # pictures that are inverted; their errors hardly differ


class Source(NamedTuple):
    """A render to start from."""

    image: Image.Image
    thing: np.ndarray  # (side, side) of bool: where its thing is
    mask: Image.Image  # a box around that
    prompt: str  # what it shows
    recoloured: str  # the same thing in another colour
    replaced: str  # another thing of another colour in the same setting


def sources(count: int, side: int) -> list[Source]:
    """The first `count` of a fixed series, of side x side pixels. No prompt asks for a pair that training left out."""
    rng, found = random.Random("pictures to edit"), []
    while len(found) < count:
        (colour, new), (kind, other) = rng.sample(list(COLOURS), 2), rng.sample(list(KINDS), 2)
        setting = rng.choice(SETTINGS)
        if {(colour, kind), (new, kind), (new, other)} & HELD_OUT:
            continue
        scene = Scene((Thing(kind, colour, "large", "centre"),), setting)
        image, (thing,) = render_with_masks(scene, rng, side)
        texts = [caption(Scene((Thing(*one),), setting)) for one in ((kind, colour), (kind, new), (other, new))]
        found.append(Source(image, thing, box_around(thing), *texts))
    return found


def box_around(thing: np.ndarray) -> Image.Image:
    """A mask of the smallest rectangle that holds the thing, and a margin."""
    spans = [np.flatnonzero(thing.any(axis)) for axis in (0, 1)]
    side = len(thing) / 100
    reach = [(max(0, span[0] / side - MARGIN), min(100, (span[-1] + 1) / side + MARGIN)) for span in spans]
    return shape_mask(thing.shape[::-1], "rectangle", *reach)


def right(images: list[Image.Image], prompts: list[str], *parts: str, second: Judge | None = None) -> dict[str, list]:
    """Whether the judge finds these parts of the prompts in the pictures, and whether a second one does."""
    graders = {"right": None} | ({} if second is None else {"second": second})
    return {
        name: [all(row[part] is not False for part in parts) for row in judge(images, prompts, grader)]
        for name, grader in graders.items()
    }


def rows_of(start: tuple, metrics: dict[str, list]) -> list[tuple]:
    """A row for each metric, with mean and interval."""
    return [(*start, name, *mean_with_interval(values)) for name, values in metrics.items()]


def recoloured(
    pipe, given: list[Source], strength: float, method: str = "img2img", steps: int = STEPS, second: Judge | None = None
) -> dict:
    """Metrics of a changed colour. To the starting level "img2img" noises the picture, "inversion" walks it up."""
    first = first_level(pipe, steps, strength)
    denoiser = Denoiser(pipe, [one.recoloured for one in given], steps)
    known = encode(pipe, [one.image for one in given])
    if method == "inversion":
        x = invert(Denoiser(pipe, [one.prompt for one in given], steps, 1.0), known, first)
    else:
        x = denoiser.mix(known, noise_like(known, seeded(range(len(given)))), first)
    images = pictures(pipe, run(denoiser, x, first))
    return {
        **right(images, [one.recoloured for one in given], "object", "colour", "setting", second=second),
        "away": [away(image, one.image) for image, one in zip(images, given, strict=True)],
        "outside": [away(image, one.image, ~one.thing) for image, one in zip(images, given, strict=True)],
    }


def strength_rows(name: str, pipe, given: list[Source], second: Judge | None) -> list[tuple]:
    """Rows of the part "strength". Strength 0 is the VAE's round trip alone, the floor of every distance."""
    images = pictures(pipe, encode(pipe, [one.image for one in given]))
    floor = {
        "away": [away(image, one.image) for image, one in zip(images, given, strict=True)],
        "outside": [away(image, one.image, ~one.thing) for image, one in zip(images, given, strict=True)],
    }
    rows = rows_of(("strength", name, "img2img", 0), floor)
    for method in ("img2img", "inversion") if name == "storybook-sd" else ("img2img",):
        for strength in STRENGTHS:
            found = recoloured(pipe, given, strength, method, second=second)
            rows += rows_of(("strength", name, method, strength), found)
            print(name, method, strength, *(f"{row[4]} {row[5]:.2f}" for row in rows[-len(found) :]), flush=True)
    return rows


def redrawn(pipe, given: list[Source], steps: int, rounds: int, jump: int, second: Judge | None) -> dict:
    """Metrics of a thing replaced by another one inside its box."""
    denoiser = Denoiser(pipe, [one.replaced for one in given], steps)
    known, generators = encode(pipe, [one.image for one in given]), seeded(range(100, 100 + len(given)))
    noise = noise_like(known, generators)
    mask = torch.cat([on_latents(one.mask, pipe.vae_scale_factor) for one in given]).to(known)
    images = pictures(pipe, inpaint(denoiser, noise, known, mask, noise, 0, rounds, jump, generators))
    behind = [np.asarray(one.mask) == 0 for one in given]
    return {
        **right(images, [one.replaced for one in given], "object", "colour", second=second),
        "setting": right(images, [one.replaced for one in given], "setting")["right"],
        "outside": [away(image, one.image, out) for image, one, out in zip(images, given, behind, strict=True)],
        "seam": [seam(image, one.mask) for image, one in zip(images, given, strict=True)],
    }


def seam(image: Image.Image, mask: Image.Image) -> float:
    """The mean absolute difference of neighbouring pixels across the border of the mask, 0 to 1."""
    shown, inside = np.asarray(image, float) / 255, np.asarray(mask) > 0
    steps = [(np.abs(np.diff(shown, axis=axis)).mean(-1), np.diff(inside, axis=axis)) for axis in (0, 1)]
    return float(np.concatenate([change[border] for change, border in steps]).mean())


def inpaint_rows(name: str, pipe, given: list[Source], second: Judge | None) -> list[tuple]:
    """Rows of the part "inpaint". The method "source" has the seam of the untouched pictures."""
    rows = rows_of(("inpaint", name, "source", 0), {"seam": [seam(one.image, one.mask) for one in given]})
    for method, how in REDRAWN.items():
        found = redrawn(pipe, given, *how, second)
        rows += rows_of(("inpaint", name, method, how[0] * how[1]), found)
        print(name, method, *(f"{row[4]} {row[5]:.3f}" for row in rows[-len(found) :]), flush=True)
    return rows


def inversion_rows(name: str, pipe, given: list[Source]) -> list[tuple]:
    """Rows of the part "inversion": latents walked up and down again, one prompt and one scale both ways."""
    rows, known = [], encode(pipe, [one.image for one in given])
    for scale in (1.0, pipe.model.guidance):
        for rounds in (1, ROUNDS):
            for steps in INVERTED:
                denoiser = Denoiser(pipe, [one.prompt for one in given], steps, scale)
                back = run(denoiser, invert(denoiser, known, rounds=rounds))
                errors = [distance(*pair) for pair in zip(back, known, strict=True)]
                rows += rows_of(("inversion", name, f"scale {scale:g}, rounds {rounds}", steps), {"error": errors})
                print(*rows[-1][2:6], flush=True)
    return rows


def check_rows(name: str, pipe) -> list[tuple]:
    """Two pictures in few steps that a test draws again, so that the table is known to belong to the weights."""
    given = sources(2, own_size(pipe)[0])
    return rows_of(("check", name, "img2img", 0.5), recoloured(pipe, given, 0.5, steps=6))


def write(rows: list[tuple], path: Path) -> None:
    """The CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in row] for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="pictures, 2 or more")
    parser.add_argument("--one-judge", action="store_true", help='without the metric "second"')
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count {args.count} is too few: an interval takes 2 pictures or more.")
    rows, second = [], None if args.one_judge else second_judge()
    for name in ("storybook-sd", "storybook-sd3"):
        pipe = load(name)
        given = sources(args.count, own_size(pipe)[0])
        rows += check_rows(name, pipe) + strength_rows(name, pipe, given, second)
        if name == "storybook-sd":
            rows += inpaint_rows(name, pipe, given, second) + inversion_rows(name, pipe, given[:COMPARED])
    write(rows, args.out)
    print(f"wrote {len(rows)} rows to {args.out}")


if __name__ == "__main__":
    main()
