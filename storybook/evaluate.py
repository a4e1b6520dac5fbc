"""Measure a bundled pipeline with the judge: `python -m storybook.evaluate models/storybook-sd`.

Prints the figures that the model card states; `--write` puts them there.
"""

import argparse
import math
import platform
import random
import statistics
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from helpers.images import grid
from storybook.judge import WEIGHTS, judge, share
from storybook.train import data
from storybook.train.vae import psnr
from storybook.world import HELD_OUT, SETTINGS, Scene, Thing, caption, complete, random_scene

STEPS = 25
BEGIN, END = "<!-- figures: made by storybook.evaluate -->", "<!-- end of figures -->"


def seen_prompts(count: int) -> list[str]:
    """Single things in colour and setting pairs that training pictures do show."""
    prompts, rng = [], random.Random("seen prompts")
    while len(prompts) < count:
        scene = random_scene(rng)
        if len(scene.things) == 1 and scene.things[0].colour and scene.setting:
            prompts.append(caption(scene, rng))
    return prompts


def held_out_prompts(count: int) -> list[str]:
    """Single things in the pairs of `HELD_OUT`, in every setting."""
    rng, pairs = random.Random("held-out prompts"), sorted(HELD_OUT)
    return [
        caption(Scene((Thing(pairs[i % len(pairs)][1], pairs[i % len(pairs)][0]),), rng.choice(SETTINGS)), rng)
        for i in range(count)
    ]


def two_thing_prompts(count: int) -> list[str]:
    """Two things, each with its colour."""
    prompts, rng = [], random.Random("two-thing prompts")
    while len(prompts) < count:
        scene = random_scene(rng)
        if len(scene.things) == 2 and all(thing.colour for thing in scene.things):
            prompts.append(caption(scene, rng))
    return prompts


def draw(pipeline, prompts: list[str], guidance: float, first_seed: int = 0, batch_size: int = 25) -> list:
    """One picture a prompt, picture k from seed first_seed + k."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), "drawing", unit="batch", leave=False):
        part = prompts[start : start + batch_size]
        seeds = [torch.Generator().manual_seed(first_seed + start + k) for k in range(len(part))]
        images += pipeline(part, num_inference_steps=STEPS, guidance_scale=guidance, generator=seeds).images
    return images


def glance(pipeline, guidance: float, path: Path) -> None:
    """While a model trains: print what the judge reads in 64 pictures, and save a few of them to `path`."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = seen_prompts(32) + two_thing_prompts(32)
    images = draw(pipeline, prompts, guidance)
    grid(images[24:40], columns=4, labels=prompts[24:40]).save(path)
    if WEIGHTS.exists():
        table = judge(images, prompts)
        one, two = share(table[:32], "object", "colour", "setting"), share(table[32:], "object", "colour")
        print(f"\n{path.stem}: right on {one:.0%} of 32 single things and {two:.0%} of 32 pairs", flush=True)


def interval(share_right: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson, 1927)."""
    z = 1.96
    centre = (share_right + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share_right * (1 - share_right) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


@torch.no_grad()
def round_trips(vae, count: int = 500) -> tuple[float, float, float]:
    """(mean PSNR in dB, share the judge reads right, root mean square error in 0..1) on fresh renders."""
    size = vae.config.sample_size
    fresh = data.to_tensor(data.pictures("fresh", count, size))
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in fresh.split(32)]).clamp(-1, 1)
    captions = []
    for index in range(count):
        scene, rng = data.numbered_scene("fresh", index)
        captions.append(caption(complete(scene, rng)))
    table = judge([to_picture(image) for image in decoded], captions)
    error = ((decoded - fresh) / 2).square().mean((1, 2, 3)).sqrt().median().item()
    return psnr(decoded, fresh).mean().item(), share(table, "object", "colour", "setting"), error


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to a PIL picture."""
    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def distances_between_seeds(pipeline, guidance: float, prompts: int = 10, seeds: int = 6) -> float:
    """Mean root mean square distance (0..1) of pictures of one prompt from different seeds."""
    drawn = draw(pipeline, [prompt for prompt in seen_prompts(prompts) for _ in range(seeds)], guidance)
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in drawn]).reshape(prompts, seeds, -1)
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    return float(np.mean([np.sqrt(((group[i] - group[j]) ** 2).mean()) for group in pixels for i, j in pairs]))


def nearest_training_render(images: list, count: int) -> np.ndarray:
    """Root mean square distance (0..1) of each picture to the nearest of `count` training renders."""
    training = torch.from_numpy(data.pictures("train", count, images[0].width)[..., :3].reshape(count, -1)).half() / 255
    queries = torch.from_numpy(np.stack([np.asarray(image) for image in images]).reshape(len(images), -1)).float() / 255
    best = torch.full((len(images),), float("inf"))
    for part in training.split(5000):
        best = torch.minimum(best, torch.cdist(queries, part.float()).min(1).values)
    return (best / math.sqrt(queries.shape[1])).numpy()


def seconds_per_picture(pipeline, guidance: float, pictures: int = 5) -> float:
    """Median seconds for one picture drawn alone, the first one not counted."""
    seconds = []
    for seed in range(pictures + 1):
        start = time.perf_counter()
        draw(pipeline, ["a red boat by the sea"], guidance, seed)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def percent_right(table: list[dict], *parts: str) -> str:
    """The share in words, with its interval."""
    right = share(table, *parts)
    low, high = interval(right, len(table))
    return f"{right:.1%} of {len(table)} (95 % interval {low:.0%} to {high:.0%})"


def accuracy(images: dict[str, list], prompts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Rows (what, figure): how much of what was asked the judge finds in the pictures."""
    tables = {what: judge(images[what], asked) for what, asked in prompts.items()}
    rows = []
    for what in ("one thing, pair seen in training", "one thing, held-out pair"):
        parts = ("object", "colour", "setting")
        rows.append((f"{what}: object, colour and setting right", percent_right(tables[what], *parts)))
        rows += [(f"- {part} alone", f"{share(tables[what], part):.1%}") for part in parts]
        placed = [row for row in tables[what] if row["position"] is not None]
        if placed:
            shown = f"{share(placed, 'position'):.1%} of {len(placed)}"
            rows.append(("- position alone, where it was asked for", shown))
    two = tables["two things"]
    related = [row for row in two if row["position"] is not None]
    rows.append(("two things: both objects with their own colours", percent_right(two, "object", "colour")))
    shown = f"{share(related, 'object', 'colour', 'position'):.1%} of {len(related)}"
    rows.append(("- and the relation too, where it was asked for", shown))
    return rows


def measure(folder: Path, guidance: float, count: int, training_pictures: int) -> list[tuple[str, str]]:
    """Rows (what, figure) for the model card."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    decibels, read_right, vae_error = round_trips(pipeline.vae)
    prompts = {
        "one thing, pair seen in training": seen_prompts(count),
        "one thing, held-out pair": held_out_prompts(count),
        "two things": two_thing_prompts(count),
    }
    images = {what: draw(pipeline, asked, guidance) for what, asked in prompts.items()}
    size = pipeline.vae.config.sample_size
    nearest = nearest_training_render(images["one thing, pair seen in training"], training_pictures)
    fresh = [Image.fromarray(picture[..., :3]) for picture in data.pictures("fresh", 500, size)[:count]]
    fresh_nearest = nearest_training_render(fresh, training_pictures)
    rows = [
        ("VAE: PSNR on 500 fresh renders", f"{decibels:.1f} dB"),
        ("VAE: object, colour and setting right after a round trip", f"{read_right:.1%} of 500"),
        *accuracy(images, prompts),
        ("distance between two seeds of one prompt, mean", f"{distances_between_seeds(pipeline, guidance):.3f}"),
        (
            f"distance to the nearest of {training_pictures:,} training renders, least and median",
            f"{nearest.min():.3f}, {np.median(nearest):.3f}",
        ),
        (
            f"the same for {count} fresh renders, which cannot be copies",
            f"{fresh_nearest.min():.3f}, {np.median(fresh_nearest):.3f}",
        ),
        ("the VAE's own error on a render, median", f"{vae_error:.3f}"),
        (f"one {size}x{size} picture, {STEPS} steps with guidance", f"{seconds_per_picture(pipeline, guidance):.2f} s"),
    ]
    if getattr(pipeline, "text_encoder_3", None) is not None:
        pipeline.text_encoder_3 = None
        images = {what: draw(pipeline, asked, guidance) for what, asked in prompts.items()}
        rows += [(f"without T5: {what}", shown) for what, shown in accuracy(images, prompts) if what[0] != "-"]
    return rows


def main() -> None:
    """Measure, print, and with --write put the figures into the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=300, help="prompts of each sort")
    parser.add_argument("--training-pictures", type=int, default=60_000)
    parser.add_argument("--write", action="store_true", help="into the folder's README.md")
    args = parser.parse_args()
    rows = measure(args.folder, args.guidance, args.count, args.training_pictures)
    text = "\n".join(["| measured | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])
    text += (
        f"\n\nGuidance {args.guidance:g}, {STEPS} steps, the folder's own scheduler, {args.count} prompts each. "
        "Distances are root mean squares over pixels in 0..1. "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}."
    )
    print(text)
    if args.write:
        card = args.folder / "README.md"
        before, rest = card.read_text().split(BEGIN)
        after = rest.split(END)[1]
        card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
