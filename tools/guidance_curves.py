"""What guidance does to storybook-sd: `python -m tools.guidance_curves` writes notebooks/data/guidance.csv for page 04.

A row is one number with its 95 % interval, from n pictures (of diversity: n prompts; of kid: n pictures, and 1.96
standard errors). DDIM, the same prompts and the same noise in every row of a part. The
committed table took 5.5 minutes of CPU time.
"""

import argparse
import csv
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from PIL import Image

from helpers.compare import (
    clip_features,
    clip_score,
    contrast,
    diversity,
    kid,
    mean_with_interval,
    saturation,
)
from helpers.generate import decode
from helpers.guidance import Guide, cfg, denoise, start_noise, without_attention
from helpers.images import ROOT
from helpers.pipelines import load
from storybook.judge import judge
from storybook.sample import seen_prompts, two_thing_prompts
from storybook.world import parse, render

TABLE = ROOT / "notebooks/data/guidance.csv"
STEPS = 15
SCALES = (1, 2, 3, 4, 6, 9, 14)
BATCH = 20
APG = {"eta": 0.0, "use_original_formulation": True}  # the paper's formula, whose scale is ours minus 1
FIELDS = ("part", "method", "strength", "prompts", "metric", "mean", "low", "high", "n")
# For each method its strengths, and the guide of one strength. "pag" is added to guidance of scale 2.
METHODS: dict[str, tuple[tuple[float, ...], Callable[[float], Guide]]] = {
    "cfg": ((1, 2, 4, 7, 12), cfg),
    "interval": ((4, 7, 12), lambda w: lambda s: cfg(w if 0.2 <= s.share < 0.8 else 1)(s)),
    "rescale": ((4, 7, 12), lambda w: lambda s: rescale_noise_cfg(cfg(w)(s), s.cond, 0.7)),
    "cfg++": ((0.3, 0.6, 1.0), lambda w: lambda s: cfg(w * s.sigma / (s.sigma - s.low))(s)),
    "apg": ((4, 7, 12), lambda w: lambda s: in_x0(s, partial(normalized_guidance, guidance_scale=w - 1, **APG))),
    "pag": ((1, 3), lambda w: lambda s: cfg(2)(s) + w * (s.cond - s.weak)),
}
# (prompt, negative prompt): is what comes out red? The colour that is left unsaid is up to the model.
NEGATIVES = (
    ("a boat by the sea", ""),
    ("a boat by the sea", "a red boat"),
    ("a red boat by the sea", ""),
    ("a red boat by the sea", "a red boat"),
    ("a red boat by the sea", "red"),
)


def in_x0(step, guide: Callable) -> torch.Tensor:
    """The noise that belongs to what `guide` makes of the two guesses of the clean latents."""
    guess = guide(*((step.x - step.b * eps) / step.a for eps in (step.cond, step.empty)))
    return (step.x - step.a * guess) / step.b


def draw(pipe, prompts: list[str], seeds: list[int], guide: Guide, **more) -> tuple[list[Image.Image], list[float]]:
    """Pictures and the effective scale of each."""
    images, scales = [], []
    for k in range(0, len(prompts), BATCH):
        drawn = denoise(pipe, prompts[k : k + BATCH], start_noise(pipe, seeds[k : k + BATCH]), guide, STEPS, **more)
        pixels = pipe.image_processor.pt_to_numpy(decode(pipe, drawn.latents))
        images += pipe.image_processor.numpy_to_pil(pixels)
        scales += drawn.effective.tolist()
    return images, scales


def right(image: Image.Image, prompt: str) -> bool:
    """Object, colour and setting of a single thing; of two things both objects with their own colours."""
    (row,) = judge([image], [prompt])
    parts = ("object", "colour", "setting") if len(parse(prompt).things) == 1 else ("object", "colour")
    return all(row[part] is not False for part in parts)


def measured(images: list[Image.Image], prompts: list[str], scales: list[float]) -> list[tuple]:
    """(metric, mean, low, high, n) for one set of pictures."""
    values = {
        "right": [right(image, prompt) for image, prompt in zip(images, prompts, strict=True)],
        "clip": clip_score(images, prompts),
        "saturation": saturation(images),
        "contrast": contrast(images),
        "effective": scales,
    }
    return [(name, *mean_with_interval(found)) for name, found in values.items()]


def of_the_set(images: list[Image.Image], prompts: list[str], renders: torch.Tensor) -> list[tuple]:
    """Diversity between the seeds of one prompt, and KID to renders, (metric, mean, low, high, n)."""
    features = clip_features(images)
    groups = [[k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    spread = mean_with_interval([diversity(features[group]) for group in groups])
    distance, error = kid(features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))], renders)
    return [("diversity", *spread), ("kid", distance, distance - 1.96 * error, distance + 1.96 * error, len(images))]


def scale_curves(pipe, count: int) -> list[tuple]:
    """Rows of the part "scale": `count` easy and as many hard prompts, two seeds each, at every scale."""
    rows, sorts = [], {"easy": seen_prompts(count), "hard": two_thing_prompts(count)}
    rng = random.Random("renders for kid")
    renders = [render(parse(prompt), rng) for prompt in (*seen_prompts(3 * count), *two_thing_prompts(3 * count))]
    renders = clip_features(renders)[torch.randperm(6 * count, generator=torch.Generator().manual_seed(1))]
    for scale in SCALES:
        every, asked = [], []
        for sort, prompts in sorts.items():
            prompts = [prompt for prompt in prompts for _ in range(2)]
            images, effective = draw(pipe, prompts, list(range(len(prompts))), cfg(scale))
            rows += [("scale", "cfg", scale, sort, *found) for found in measured(images, prompts, effective)]
            every, asked = every + images, asked + prompts
        rows += [("scale", "cfg", scale, "all", *found) for found in of_the_set(every, asked, renders)]
        print(f"scale {scale}: right {rows[-12][5]:.0%} easy, {rows[-7][5]:.0%} hard", flush=True)
    return rows


def method_curves(pipe, count: int) -> list[tuple]:
    """Rows of the part "method": half of the `count` prompts are easy, half hard, a seed each."""
    prompts = seen_prompts(count // 2) + two_thing_prompts(count - count // 2)
    rows, seeds = [], list(range(1000, 1000 + count))
    for name, (strengths, guide) in METHODS.items():
        weaken = without_attention if name == "pag" else None
        for strength in strengths:
            images, effective = draw(pipe, prompts, seeds, guide(strength), weaken=weaken)
            rows += [("method", name, strength, "all", *found) for found in measured(images, prompts, effective)]
            print(f"{name} {strength}: {rows[-5][4:6]}", flush=True)
    return rows


def negative_rows(pipe, count: int) -> list[tuple]:
    """Rows of the part "negative": the share of pictures whose thing is red in the judge's eyes, at scale 4."""
    rows = []
    for prompt, negative in NEGATIVES:
        images, _ = draw(pipe, [prompt] * count, list(range(2000, 2000 + count)), cfg(4), negative=negative)
        for metric, part in (("red", "colour"), ("boat", "object")):
            found = [row[part] for row in judge(images, ["a red boat"] * count)]
            rows.append(("negative", "cfg", 4, f"{prompt} | {negative}", metric, *mean_with_interval(found)))
        print(f"{prompt!r} without {negative!r}: {rows[-2][4:6]}", flush=True)
    return rows


def check_rows(pipe) -> list[tuple]:
    """Two pictures that a test draws again, so that the table is known to belong to the weights."""
    prompts = seen_prompts(2)
    images, effective = draw(pipe, prompts, [0, 1], METHODS["rescale"][1](6))
    return [("check", "rescale", 6, "easy", *found) for found in measured(images, prompts, effective)]


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
    """Draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="prompts of each sort; 10 or more, KID needs as many")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.count < 10:
        parser.error(f"--count {args.count} is too few: KID takes 10 or more.")
    pipe = load("storybook-sd")
    rows = check_rows(pipe) + negative_rows(pipe, args.count)
    rows += scale_curves(pipe, args.count) + method_curves(pipe, args.count)
    write(rows, args.out)
    print(f"wrote {len(rows)} rows to {args.out}")


if __name__ == "__main__":
    main()
