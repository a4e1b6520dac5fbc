"""What is asked of a model and how it draws that: for `storybook.evaluate` at the end, and on the way for the training.

Prompts of three sorts, always the same ones, pictures of them from numbered seeds, and a glance at a model that
still trains.
"""

import random
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from helpers.images import grid
from storybook.judge import judge, share
from storybook.world import HELD_OUT, KINDS, SETTINGS, Scene, Thing, caption, random_scene
from storybook.world.vocabulary import allowed_colours

STEPS = 25
# what the stock pipelines do when they are given a prompt and nothing else
STOCK = {"StableDiffusionPipeline": (50, 7.5), "StableDiffusion3Pipeline": (28, 7.0)}


def seen_prompts(count: int) -> list[str]:
    """Single things in colour and setting pairs that training pictures do show."""
    prompts, rng = [], random.Random("seen prompts")
    while len(prompts) < count:
        scene = random_scene(rng)
        if len(scene.things) == 1 and scene.things[0].colour and scene.setting:
            prompts.append(caption(scene, rng))
    return prompts


def _prompts_of(pairs: list[tuple[str, str]], count: int, rng: random.Random) -> list[str]:
    """Single things in each (colour, kind) of `pairs` in turn, in every setting."""
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [caption(Scene((Thing(kind, colour),), rng.choice(SETTINGS)), rng) for colour, kind in chosen]


def held_out_prompts(count: int) -> list[str]:
    """Single things in the pairs of `HELD_OUT`, in every setting."""
    return _prompts_of(sorted(HELD_OUT), count, random.Random("held-out prompts"))


def close_up_prompts(count: int) -> list[str]:
    """As `held_out_prompts`, but in pairs that training pictures do show: no sizes, no positions."""
    rng = random.Random("close-up prompts")
    pairs = [(colour, kind) for kind in KINDS for colour in allowed_colours(kind)]
    rng.shuffle(pairs)
    return _prompts_of(pairs, count, rng)


def two_thing_prompts(count: int) -> list[str]:
    """Two things, each with its colour."""
    prompts, rng = [], random.Random("two-thing prompts")
    while len(prompts) < count:
        scene = random_scene(rng)
        if len(scene.things) == 2 and all(thing.colour for thing in scene.things):
            prompts.append(caption(scene, rng))
    return prompts


def draw(pipeline, prompts: list[str], guidance: float, first_seed: int = 0, steps: int = STEPS) -> list[Image.Image]:
    """One picture a prompt, picture k from seed first_seed + k, 25 at a time."""
    images = []
    for start in tqdm(range(0, len(prompts), 25), "drawing", unit="batch", leave=False):
        part = prompts[start : start + 25]
        seeds = [torch.Generator().manual_seed(first_seed + start + k) for k in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images
    return images


def glance(pipeline, path: Path) -> None:
    """While a model trains: what the judge reads in 64 pictures goes into progress.csv beside `path`, a few to `path`.

    25 steps at the stock guidance scale, which is where half-trained models fail first.
    """
    pipeline.set_progress_bar_config(disable=True)
    prompts = seen_prompts(32) + two_thing_prompts(32)
    images = draw(pipeline, prompts, STOCK[type(pipeline).__name__][1])
    grid(images[24:40], columns=4, labels=prompts[24:40]).save(path)
    table = judge(images, prompts)
    one, two = share(table[:32], "object", "colour", "setting"), share(table[32:], "object", "colour")
    print(f"\n{path.stem}: right on {one:.0%} of 32 single things and {two:.0%} of 32 pairs", flush=True)
    log = path.parent / "progress.csv"
    if not log.exists():
        log.write_text("step,single_things,pairs\n")
    with log.open("a") as file:
        file.write(f"{int(path.stem.split('-')[-1])},{one:.4f},{two:.4f}\n")
