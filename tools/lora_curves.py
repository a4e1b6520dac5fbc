"""What teaches storybook-sd a new thing, and what spoils it: `python -m tools.lora_curves` writes a table for page 09.

A row is a mean with its 95 % interval. Part "rank": adapters of several ranks learn the same zorps for as many steps;
"right" are zorps in colours and settings that were kept for the examination, "kept" unrelated prompts. Part "prior":
the castle is learned alone, or with prior preservation; "castle" are castles when asked for, "spoiled" ordinary houses
that look like it, "kept" houses that are right, "drift" is how far their pixels are from before. The table,
notebooks/data/lora.csv, and its picture belong to the weights: write them again after training. They took ten minutes
beside other work.
"""

import argparse
import csv
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers import lora
from helpers.images import ROOT, grid
from helpers.metrics import mean_with_interval
from helpers.pipelines import load
from storybook import probe
from storybook.judge import judge
from storybook.sample import seen_prompts
from storybook.world import COLOURS, KINDS, SETTINGS, Scene, Thing, caption, render
from storybook.world.novel import newcomers
from training.lora import encode, fit

TABLE = ROOT / "notebooks/data/lora.csv"
TAUGHT = ("red", "blue", "yellow", "white")
RANKS = (1, 4, 16)
STEPS, BATCH, RATE = 80, 4, 4e-3
PRIOR_SEED = 500  # of the class's pictures, away from the seeds of the examination
SHOWN = {"none": "before", "alone": "learned alone", "prior": "with prior"}
FIELDS = ("part", "method", "rank", "weights", "metric", "mean", "low", "high", "n")


def examiner() -> probe.Probe:
    """Tells zorps from everything that the model knows."""
    rng, kinds = random.Random("known"), tuple(KINDS)
    known = [render(Scene((Thing(kinds[k % len(kinds)]),), SETTINGS[k % 7]), rng, 64) for k in range(240)]
    return probe.fit({"zorp": newcomers("creature", 120, seed=1, size=64)[0], "known": known})


def right_zorps(images: Sequence[Image.Image], prompts: Sequence[str], judged_by: probe.Probe) -> list[bool]:
    """For each picture: a zorp to the probe, and to the judge of the colour and in the setting asked for."""
    rows = judge(list(images), [prompt.replace("zorp", "house") for prompt in prompts])
    kinds = probe.read(judged_by, images)
    return [bool(k == "zorp" and row["colour"] and row["setting"]) for k, row in zip(kinds, rows, strict=True)]


def draw(pipe, prompts: Sequence[str], first_seed: int = 0) -> list[Image.Image]:
    """One picture a prompt, picture k from seed first_seed + k."""
    seeds = [torch.Generator().manual_seed(first_seed + k) for k in range(len(prompts))]
    return pipe(list(prompts), num_inference_steps=10, guidance_scale=pipe.model.guidance, generator=seeds).images


def measured(pipe, questions: list[str], unrelated: list[str], judged_by: probe.Probe) -> dict[str, list[bool]]:
    """What the pipeline draws now: {"right": zorps, "kept": unrelated prompts}."""
    rows = judge(draw(pipe, unrelated), unrelated)
    return {
        "right": right_zorps(draw(pipe, questions), questions, judged_by),
        "kept": [all(row[part] is not False for part in ("object", "colour", "setting")) for row in rows],
    }


def curves(pipe, methods: Sequence[tuple[str, int]], steps: int, count: int) -> list[tuple]:
    """Rows for each (layers, rank), adapters of rank 0 being none; `count` unrelated prompts."""
    others = [colour for colour in COLOURS if colour not in TAUGHT]
    questions, unrelated = newcomers("creature", 28, colours=others, size=8)[1], seen_prompts(count)
    examples, judged_by, rows = encode(pipe, *newcomers("creature", 16, colours=TAUGHT)), examiner(), []
    for layers, rank in methods:
        weights = lora.attach(pipe, "zorp", rank=rank, layers=layers) if rank else 0
        if rank:
            fit(pipe, examples, steps, batch_size=BATCH, learning_rate=RATE)
        for metric, values in measured(pipe, questions, unrelated, judged_by).items():
            rows.append(("rank" if rank else "none", layers, rank, weights, metric, *mean_with_interval(values)))
            print(f"{layers} {rank}: {metric} {rows[-1][5]:.0%}", flush=True)
        if rank:
            lora.remove(pipe, "zorp")
    return rows


def prior_rows(pipe, steps: int) -> tuple[list[tuple], Image.Image]:
    """Rows of the part "prior", and a picture: one row before, one learned alone, one with prior preservation.

    Eight prompts of houses are for the prior, 24 others for the examination.
    """
    scenes = [Scene((Thing("house", colour),), SETTINGS[k % 7]) for k, colour in enumerate([*COLOURS] * 4)]
    texts, castles = [caption(scene) for scene in scenes], newcomers("castle", 14, size=8)[1]
    own, houses = draw(pipe, texts[:8], PRIOR_SEED), texts[8:]
    rng = random.Random("houses")
    plain = [render(scenes[k % len(scenes)], rng, 64) for k in range(240)]
    judged_by = probe.fit({"castle": newcomers("castle", 120, seed=1, size=64)[0], "house": plain})
    learned, before = encode(pipe, *newcomers("castle", 6)), draw(pipe, houses)
    rows, shown, labels = [], [], []
    for method, prior in (("none", None), ("alone", None), ("prior", encode(pipe, own, texts[:8]))):
        if method != "none":
            lora.attach(pipe, "castle", rank=8, layers="all")
            fit(pipe, learned, steps, prior, batch_size=2, learning_rate=RATE)
        found = {"castle": draw(pipe, castles), "spoiled": draw(pipe, houses)}
        values = {metric: [name == "castle" for name in probe.read(judged_by, found[metric])] for metric in found}
        judged = judge(found["spoiled"], houses)
        values["kept"] = [bool(row["object"] and row["colour"] and row["setting"]) for row in judged]
        values["drift"] = [rms(*pair) for pair in zip(before, found["spoiled"], strict=True)]
        rows += [("prior", method, 8, 0, metric, *mean_with_interval(some)) for metric, some in values.items()]
        print(method, {metric: f"{np.mean(some):.3f}" for metric, some in values.items()}, flush=True)
        if method != "none":
            lora.remove(pipe, "castle")
        shown += [*found["castle"][:2], *found["spoiled"][:4]]
        labels += [f"{SHOWN[method]}: {text}" for text in (*castles[:2], *houses[:4])]
    return rows, grid(shown, columns=6, labels=labels).quantize(96)


def rms(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference of two pictures' pixels, 0 to 1."""
    return float(np.sqrt(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)) / 255)


def check_rows(pipe) -> list[tuple]:
    """The mean of one picture's pixels, 0 to 255, which a test draws again to know that the table fits the weights."""
    (image,) = draw(pipe, seen_prompts(1))
    return [("check", "none", 0, 0, "brightness", float(np.mean(image)), 0.0, 255.0, 1)]


def write(rows: list[tuple], path: Path) -> None:
    """The CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in row] for row in rows)
    os.replace(temporary, path)


def main() -> None:
    """Train, draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, for each adapter")
    parser.add_argument("--count", type=int, default=14, help="unrelated prompts")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.steps < 1 or args.count < 2:
        parser.error("--steps takes 1 or more, --count 2 or more.")
    methods = [("none", 0), *((layers, rank) for layers in lora.LAYERS for rank in RANKS)]
    pipe = load("storybook-sd")
    rows = check_rows(pipe) + curves(pipe, methods, args.steps, args.count)
    more, picture = prior_rows(pipe, args.steps)
    rows += more
    write(rows, args.out)
    picture.save(args.out.with_suffix(".png"))
    print(f"wrote {len(rows)} rows to {args.out}")


if __name__ == "__main__":
    main()
