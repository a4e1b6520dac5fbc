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

from storybook.judge import judge, share
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


def measure(folder: Path, guidance: float, count: int, training_pictures: int) -> list[tuple[str, str]]:
    """Rows (what, figure) for the model card."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    decibels, read_right, vae_error = round_trips(pipeline.vae)
    seen, held_out, two = seen_prompts(count), held_out_prompts(count), two_thing_prompts(count)
    seen_images = draw(pipeline, seen, guidance)
    seen_table = judge(seen_images, seen)
    held_out_table = judge(draw(pipeline, held_out, guidance), held_out)
    two_table = judge(draw(pipeline, two, guidance), two)
    nearest = nearest_training_render(seen_images, training_pictures)
    fresh = [Image.fromarray(picture[..., :3]) for picture in data.pictures("fresh", 500, seen_images[0].width)[:count]]
    fresh_nearest = nearest_training_render(fresh, training_pictures)
    placed = [row for row in seen_table if row["position"] is not None]
    size = pipeline.vae.config.sample_size
    what = ("object", "colour", "setting")
    return [
        ("VAE: PSNR on 500 fresh renders", f"{decibels:.1f} dB"),
        ("VAE: object, colour and setting right after a round trip", f"{read_right:.1%} of 500"),
        ("one thing, pair seen in training: object, colour and setting right", percent_right(seen_table, *what)),
        *((f"- {part} alone", f"{share(seen_table, part):.1%}") for part in what),
        ("- position alone, where it was asked for", f"{share(placed, 'position'):.1%} of {len(placed)}"),
        ("one thing, held-out pair: object, colour and setting right", percent_right(held_out_table, *what)),
        *((f"- {part} alone", f"{share(held_out_table, part):.1%}") for part in what),
        ("two things: both objects with their own colours", percent_right(two_table, "object", "colour")),
        ("- and the relation too", f"{share(two_table, 'object', 'colour', 'position'):.1%}"),
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
