"""What guidance does to storybook-sd and storybook-sd3: `python -m tools.guidance_curves` makes page 04's table.

That is notebooks/data/guidance.csv. A row is one number with its 95 % interval, from n pictures (of diversity: n
prompts; of kid: n pictures, and 1.96 standard errors). DDIM, or Euler's steps for storybook-sd3, the same prompts and
the same noise in every row of a part. Parts of the table:

* check, negative, scale: two pictures for a test; negative prompts; plain guidance at growing scales.
* method: a method that improves on plain guidance, at one setting of its knob.
* plain: plain guidance of the same prompts and noise, each picture at the effective scale that the method gave it.
* gain: the first minus the second, picture by picture, so that what prompts and noise do is out of the interval.

`--model` and `--only` compute some of it again and leave the other rows as they are.
"""

import argparse
import csv
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from PIL import Image

from helpers.compare import (
    clip_features,
    clip_score,
    contrast,
    difference_with_interval,
    diversity,
    kid,
    mean_with_interval,
    saturation,
)
from helpers.generate import decode
from helpers.guidance import (
    Guide,
    cfg,
    denoise,
    noised_copy,
    start_noise,
    without_attention,
    without_layers,
)
from helpers.images import ROOT
from helpers.pipelines import load
from storybook.judge import judge
from storybook.sample import seen_prompts, two_thing_prompts
from storybook.world import parse, render

TABLE = ROOT / "notebooks/data/guidance.csv"
STEPS = 15
SCALES = (1, 2, 3, 4, 6, 9, 14)
BATCH = 20
SKIPPED = [2]  # blocks of storybook-sd3's four that skip-layer guidance leaves out
APG = {"eta": 0.0, "use_original_formulation": True}  # the paper's formula, whose scale is ours minus 1
FIELDS = ("model", "part", "method", "strength", "prompts", "metric", "mean", "low", "high", "n")


class Method(NamedTuple):
    """A proposal at one setting of its knob."""

    strength: float
    guide: Callable[[float], Guide]
    weaken: Callable | None = None


@cache
def worse(unet: torch.nn.Module) -> torch.nn.Module:
    """One copy for all steps."""
    return noised_copy(unet)


# Of each model. "pag" and "slg" are added to plain guidance, of scale 2 and 4; "auto" takes the place of plain guidance
# and asks no empty prompt.
METHODS = {
    "storybook-sd": {
        "cfg": Method(7, cfg),
        "interval": Method(7, lambda w: lambda s: cfg(w if 0.2 <= s.share < 0.8 else 1)(s)),
        "rescale": Method(7, lambda w: lambda s: rescale_noise_cfg(cfg(w)(s), s.cond, 0.7)),
        "cfg++": Method(0.6, lambda w: lambda s: cfg(w * s.sigma / (s.sigma - s.low))(s)),
        "apg": Method(7, lambda w: lambda s: in_x0(s, partial(normalized_guidance, guidance_scale=w - 1, **APG))),
        "pag": Method(3, lambda w: lambda s: cfg(2)(s) + w * (s.cond - s.weak), without_attention),
        "auto": Method(3, lambda w: lambda s: s.weak + w * (s.cond - s.weak), lambda unet: nullcontext(worse(unet))),
    },
    "storybook-sd3": {
        "cfg": Method(7, cfg),
        "slg": Method(2.8, lambda w: lambda s: skip_layer(s, w), without_layers(SKIPPED)),
        "zero*": Method(7, lambda w: lambda s: zero_star(s, w)),
    },
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


def skip_layer(step, scale: float) -> torch.Tensor:
    """Plain guidance of scale 4, and away from the network that lacks a block, at the steps of page 04."""
    return cfg(4)(step) + (scale * (step.cond - step.weak) if 0.01 < step.share < 0.5 else 0)


def zero_star(step, scale: float) -> torch.Tensor:
    """CFG-Zero* (2503.18886) with one step that stands still."""
    if step.share == 0:
        return torch.zeros_like(step.cond)
    best = cfg_zero_star_scale(step.cond.flatten(1), step.empty.flatten(1)).view(-1, 1, 1, 1)
    return cfg(scale)(step._replace(empty=best * step.empty))


def draw(pipe, prompts: list[str], seeds: list[int], guide: Guide | list[float], **more) -> tuple[list, list[float]]:
    """Pictures and the effective scale of each. `guide` may be a list: plain guidance, a scale for each picture."""
    images, scales = [], []
    for part in (slice(k, k + BATCH) for k in range(0, len(prompts), BATCH)):
        own = cfg(torch.tensor(guide[part]).view(-1, 1, 1, 1)) if isinstance(guide, list) else guide
        drawn = denoise(pipe, prompts[part], start_noise(pipe, seeds[part]), own, STEPS, **more)
        pixels = pipe.image_processor.pt_to_numpy(decode(pipe, drawn.latents))
        images += pipe.image_processor.numpy_to_pil(pixels)
        scales += drawn.effective.tolist()
    return images, scales


def right(image: Image.Image, prompt: str) -> bool:
    """Object, colour and setting of a single thing; of two things both objects with their own colours."""
    (row,) = judge([image], [prompt])
    parts = ("object", "colour", "setting") if len(parse(prompt).things) == 1 else ("object", "colour")
    return all(row[part] is not False for part in parts)


def values_of(images: list[Image.Image], prompts: list[str]) -> dict[str, list]:
    """One number, or True or False, for each picture."""
    return {
        "right": [right(image, prompt) for image, prompt in zip(images, prompts, strict=True)],
        "clip": clip_score(images, prompts),
        "saturation": saturation(images),
        "contrast": contrast(images),
    }


def measured(images: list[Image.Image], prompts: list[str], scales: list[float]) -> list[tuple]:
    """(metric, mean, low, high, n) for one set of pictures."""
    values = values_of(images, prompts) | {"effective": scales}
    return [(name, *mean_with_interval(found)) for name, found in values.items()]


def gains(images: list[Image.Image], others: list[Image.Image], prompts: list[str]) -> list[tuple]:
    """(metric, mean, low, high, n) of the differences between pictures of the same prompt and noise."""
    ours, theirs = values_of(images, prompts), values_of(others, prompts)
    return [(name, *difference_with_interval(ours[name], theirs[name])) for name in ours]


def of_the_set(images: list[Image.Image], prompts: list[str], renders: torch.Tensor) -> list[tuple]:
    """Diversity between the seeds of one prompt, and KID to renders, (metric, mean, low, high, n)."""
    features = clip_features(images)
    groups = [[k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    spread = mean_with_interval([diversity(features[group]) for group in groups])
    distance, error = kid(features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))], renders)
    return [("diversity", *spread), ("kid", distance, distance - 1.96 * error, distance + 1.96 * error, len(images))]


def renders_for(count: int) -> torch.Tensor:
    """What KID compares with: features of renders, as many easy as hard, three times as many as prompts."""
    rng = random.Random("renders for kid")
    renders = [render(parse(prompt), rng) for prompt in (*seen_prompts(3 * count), *two_thing_prompts(3 * count))]
    return clip_features(renders)[torch.randperm(6 * count, generator=torch.Generator().manual_seed(1))]


def twice(prompts: list[str]) -> list[str]:
    """Every prompt two times in a row, for two seeds."""
    return [prompt for prompt in prompts for _ in range(2)]


def scale_rows(pipe, count: int) -> list[tuple]:
    """Rows of the part "scale": `count` easy and as many hard prompts, two seeds each, at every scale."""
    rows, sorts = [], {"easy": twice(seen_prompts(count)), "hard": twice(two_thing_prompts(count))}
    renders = renders_for(count)
    for scale in SCALES:
        every, asked = [], []
        for sort, prompts in sorts.items():
            images, effective = draw(pipe, prompts, list(range(len(prompts))), cfg(scale))
            rows += [("scale", "cfg", scale, sort, *found) for found in measured(images, prompts, effective)]
            every, asked = every + images, asked + prompts
        rows += [("scale", "cfg", scale, "all", *found) for found in of_the_set(every, asked, renders)]
        print(f"scale {scale}: right {rows[-12][5]:.0%} easy, {rows[-7][5]:.0%} hard", flush=True)
    return rows


def method_rows(pipe, count: int, name: str) -> list[tuple]:
    """Rows of the parts "method", "plain" and "gain": `count` easy and as many hard prompts, two seeds each."""
    strength, guide, weaken = METHODS[pipe.model.name][name]
    easy_and_hard = zip(seen_prompts(count), two_thing_prompts(count), strict=True)
    prompts, renders = twice([prompt for pair in easy_and_hard for prompt in pair]), renders_for(count)
    seeds = list(range(1000, 1000 + len(prompts)))
    images, effective = draw(pipe, prompts, seeds, guide(strength), weaken=weaken)
    found = {"method": measured(images, prompts, effective) + of_the_set(images, prompts, renders)}
    if name != "cfg":  # which is its own match
        plain, scales = draw(pipe, prompts, seeds, effective)
        found["plain"] = measured(plain, prompts, scales) + of_the_set(plain, prompts, renders)
        found["gain"] = gains(images, plain, prompts)
    print(f"{name} {strength}: {found['method'][0]}, gain {found.get('gain', [None])[0]}", flush=True)
    return [(part, name, strength, "all", *row) for part, rows in found.items() for row in rows]


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


def check_rows(pipe, count: int) -> list[tuple]:
    """Two pictures that a test draws again, so that the table is known to belong to the weights."""
    prompts = seen_prompts(2)
    name, scale = CHECKED[pipe.model.name]
    images, effective = draw(pipe, prompts, [0, 1], METHODS[pipe.model.name][name].guide(scale))
    return [("check", name, scale, "easy", *found) for found in measured(images, prompts, effective)]


CHECKED = {"storybook-sd": ("rescale", 6), "storybook-sd3": ("zero*", 6)}
JOBS = {
    "storybook-sd": {"check": check_rows, "negative": negative_rows, "scale": scale_rows},
    "storybook-sd3": {"check": check_rows},
}
for _model, _methods in METHODS.items():
    JOBS[_model] |= {_name: partial(method_rows, name=_name) for _name in _methods}


def job_of(row: list[str]) -> tuple[str, str]:
    """The model and the name of the job that compute this row of the table."""
    model, part, method = row[:3]
    return model, part if part in JOBS[model] else method


def merged(old: list[list[str]], new: list[list[str]], model: str, job: str) -> list[list[str]]:
    """The table with the rows of this job replaced, in the order of JOBS."""
    order = [(model, name) for model, jobs in JOBS.items() for name in jobs]
    rows = [row for row in old if job_of(row) != (model, job)] + new
    return sorted(rows, key=lambda row: order.index(job_of(row)))


def read(path: Path) -> list[list[str]]:
    """The rows of a table that is there, without its header."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def write(rows: list[list[str]], path: Path) -> None:
    """The CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Draw, measure, write; after every job, so that what is done stays when the next one is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12, help="prompts of each sort; 10 or more, KID needs as many")
    parser.add_argument("--model", choices=JOBS, help="by default both")
    names = list(dict.fromkeys(name for jobs in JOBS.values() for name in jobs))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="JOB", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.count < 10:
        parser.error(f"--count {args.count} is too few: KID takes 10 or more.")
    for model in [args.model] if args.model else JOBS:
        pipe = load(model)
        for job in (name for name in args.only if name in JOBS[model]):
            rows = [
                [model, *(f"{one:.4g}" if isinstance(one, float) else str(one) for one in row)]
                for row in JOBS[model][job](pipe, args.count)
            ]
            write(merged(read(args.out), rows, model, job), args.out)
            print(f"{model}, {job}: {len(rows)} rows in {args.out}", flush=True)


if __name__ == "__main__":
    main()
