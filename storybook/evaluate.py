"""Measure a bundled pipeline with two judges: `python -m storybook.evaluate models/storybook-sd --write`.

Prints the figures that the model card states; `--write` puts them there. The second judge is trained
here, on other renders and from another seed than the bundled one, and had no part in any choice that
was made while the models were trained. Where the two disagree, shapes are mush.
"""

import argparse
import math
import platform
import statistics
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from helpers.compare import interval
from helpers.images import to_image
from storybook.judge import Judge, judge, share
from storybook.sample import STEPS, STOCK, draw, held_out_prompts, seen_prompts, two_thing_prompts
from storybook.train import data
from storybook.train import judge as judge_training
from storybook.train.vae import fine_detail, psnr
from storybook.world import caption, complete

ONE_SEEN, ONE_HELD_OUT, TWO = "one thing, pair seen in training", "one thing, held-out pair", "two things"
BEGIN, END = "<!-- figures: made by storybook.evaluate -->", "<!-- end of figures -->"


def second_judge(pictures: int = 24_000, steps: int = 1200) -> Judge:
    """A judge that shares nothing with the bundled one but its shape; trained on first use, then kept in outputs/."""
    return judge_training.fit("second-judge", pictures, steps, seed=1)[0].cpu()  # where the judge looks


@torch.no_grad()
def round_trips(vae, count: int = 500) -> tuple[float, float, float, float]:
    """(mean PSNR in dB, share the judge reads right, RMS error in 0..1, share of fine detail) on fresh renders."""
    size = vae.config.sample_size
    fresh = data.to_tensor(data.pictures("fresh", count, size))
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in fresh.split(32)]).clamp(-1, 1)
    captions = []
    for index in range(count):
        scene, rng = data.numbered_scene("fresh", index)
        captions.append(caption(complete(scene, rng)))
    table = judge(to_image(decoded), captions)
    error = ((decoded - fresh) / 2).square().mean((1, 2, 3)).sqrt().median().item()
    detail = (fine_detail(decoded) / fine_detail(fresh)).mean().item()
    return psnr(decoded, fresh).mean().item(), share(table, "object", "colour", "setting"), error, detail


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


def accuracy(images: dict[str, list], prompts: dict[str, list[str]], second: Judge) -> list[tuple[str, str]]:
    """Rows (what, figure): how much of what was asked the judges find in the pictures."""
    tables = {what: judge(images[what], asked) for what, asked in prompts.items()}
    seconds = {what: judge(images[what], asked, second) for what, asked in prompts.items()}
    rows = []
    for what in (ONE_SEEN, ONE_HELD_OUT):
        parts = ("object", "colour", "setting")
        rows.append((f"{what}: object, colour and setting right", percent_right(tables[what], *parts)))
        rows.append((f"- by the second judge, {what}", percent_right(seconds[what], *parts)))
        rows += [(f"- {part} alone", f"{share(tables[what], part):.1%}") for part in parts]
        placed = [row for row in tables[what] if row["position"] is not None]
        if placed:
            shown = f"{share(placed, 'position'):.1%} of {len(placed)}"
            rows.append(("- position alone, where it was asked for", shown))
    two = tables[TWO]
    related = [row for row in two if row["position"] is not None]
    rows.append((f"{TWO}: both objects with their own colours", percent_right(two, "object", "colour")))
    rows.append((f"- by the second judge, {TWO}", percent_right(seconds[TWO], "object", "colour")))
    shown = f"{share(related, 'object', 'colour', 'position'):.1%} of {len(related)}"
    rows.append(("- and the relation too, where it was asked for", shown))
    right = share([row for row in related if row["setting"] is not None], "all")
    rows.append(("- and the setting too: relation and all else right", f"{right:.1%}"))
    return rows


def measure(folder: Path, guidance: float, count: int, training_pictures: int) -> list[tuple[str, str]]:
    """Rows (what, figure) for the model card."""
    second = second_judge()
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    decibels, read_right, vae_error, detail = round_trips(pipeline.vae)
    prompts = {
        ONE_SEEN: seen_prompts(count),
        ONE_HELD_OUT: held_out_prompts(count),
        TWO: two_thing_prompts(count),
    }
    images = {what: draw(pipeline, asked, guidance) for what, asked in prompts.items()}
    size = pipeline.vae.config.sample_size
    nearest = nearest_training_render(images[ONE_SEEN], training_pictures)
    fresh = [Image.fromarray(picture[..., :3]) for picture in data.pictures("fresh", 500, size)[:count]]
    fresh_nearest = nearest_training_render(fresh, training_pictures)
    steps, stock_guidance = STOCK[type(pipeline).__name__]
    stock = draw(pipeline, prompts[ONE_SEEN], stock_guidance, steps=steps)
    parts = ("object", "colour", "setting")
    rows = [
        ("VAE: PSNR on 500 fresh renders", f"{decibels:.1f} dB"),
        ("VAE: fine detail, beside the renders'", f"{detail:.2f}"),
        ("VAE: object, colour and setting right after a round trip", f"{read_right:.1%} of 500"),
        *accuracy(images, prompts, second),
        (
            f"no argument but the prompt ({steps} steps, guidance {stock_guidance:g}), {ONE_SEEN}",
            percent_right(judge(stock, prompts[ONE_SEEN]), *parts),
        ),
        ("- the same by the second judge", percent_right(judge(stock, prompts[ONE_SEEN], second), *parts)),
        ("distance between two seeds of one prompt, mean", f"{distances_between_seeds(pipeline, guidance):.3f}"),
        (
            f"distance to the nearest of {training_pictures:,} training renders, least and median",
            f"{nearest.min():.3f}, {np.median(nearest):.3f}",
        ),
        (
            f"the same for {len(fresh)} fresh renders, which cannot be copies",
            f"{fresh_nearest.min():.3f}, {np.median(fresh_nearest):.3f}",
        ),
        ("the VAE's own error on a render, median", f"{vae_error:.3f}"),
        (f"one {size}x{size} picture, {STEPS} steps with guidance", f"{seconds_per_picture(pipeline, guidance):.2f} s"),
    ]
    if getattr(pipeline, "text_encoder_3", None) is not None:
        pipeline.text_encoder_3 = None
        prompts = {what: asked[: math.ceil(count / 3)] for what, asked in prompts.items()}
        images = {what: draw(pipeline, asked, guidance) for what, asked in prompts.items()}
        rows += [(f"without T5: {what}", shown) for what, shown in accuracy(images, prompts, second) if what[0] != "-"]
    return rows


def main() -> None:
    """Measure, print, and with --write put the figures into the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=300, help="prompts of each sort")
    parser.add_argument("--training-pictures", type=int, default=60_000)
    parser.add_argument("--write", action="store_true", help="into the folder's README.md")
    args = parser.parse_args()
    rows = measure(args.folder, args.guidance, args.count, args.training_pictures)
    text = "\n".join(["| measured | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])
    text += (
        f"\n\nGuidance {args.guidance:g}, {STEPS} steps, the folder's own scheduler, {args.count} prompts each "
        "where a row says no other number. "
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
