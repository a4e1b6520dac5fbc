"""The training pictures: rendered once, kept as one array on disk, rebuilt from their numbers."""

import os
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from storybook.world import Scene, caption, random_scene, render_with_masks

CACHE = Path("outputs/train/data")
CAPTION_DROPOUT = 0.1


def numbered_rng(split: str, index: int) -> random.Random:
    """The random state that fixes scene and picture number `index` of a split ("train", "fresh" ...)."""
    return random.Random(f"storybook {split} {index}")


def numbered_scene(split: str, index: int) -> tuple[Scene, random.Random]:
    """Scene number `index` of a split and the random state that draws its picture."""
    rng = numbered_rng(split, index)
    return random_scene(rng), rng


def draw(job: tuple[str, int, int]) -> np.ndarray:
    """The picture of one job (split, index, size) with an alpha channel that is 255 where the things are."""
    split, index, size = job
    scene, rng = numbered_scene(split, index)
    picture, masks = render_with_masks(scene, rng, size)
    things = np.logical_or.reduce(masks).astype(np.uint8) * 255
    return np.dstack([np.asarray(picture), things])


def pictures(split: str, count: int, size: int, draw=draw, cache: Path = CACHE) -> np.ndarray:
    """`count` pictures as uint8 (count, size, size, channels), memory-mapped from a file made on first use.

    A file that holds more pictures of the split serves too: they are numbered.
    """
    path = cache / f"{split}-{count}-{size}.npy"
    for file in cache.glob(f"{split}-*-{size}.npy"):
        held = file.stem.removeprefix(f"{split}-").removesuffix(f"-{size}")
        if held.isdecimal() and int(held) >= count:
            path = file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        shape = (count, *draw((split, 0, size)).shape)
        array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        jobs = ((split, index, size) for index in range(count))
        with Pool() as pool:
            drawn = pool.imap(draw, jobs, chunksize=64)
            for index, picture in enumerate(tqdm(drawn, f"rendering {split}", count, unit="picture", mininterval=2)):
                array[index] = picture
        array.flush()
        partial.rename(path)  # a killed run leaves no half-written file under the final name
    return np.load(path, mmap_mode="r")[:count]


def scenes(split: str, count: int) -> list[Scene]:
    """The scenes of `pictures(split, count, ...)`, in the same order."""
    return [numbered_scene(split, index)[0] for index in range(count)]


def captions(chosen: list[Scene], seed: int) -> list[str]:
    """One wording for each scene; another seed gives other wordings."""
    rng = random.Random(seed)
    return [caption(scene, rng) for scene in chosen]


def captions_for_guidance(chosen: list[Scene], generator: torch.Generator) -> list[str]:
    """One wording for each scene, but an empty caption in one of ten (Ho & Salimans, 2022)."""
    texts = captions(chosen, int(torch.randint(2**31, (), generator=generator)))
    dropped = torch.rand(len(chosen), generator=generator) < CAPTION_DROPOUT
    return ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]


def by_things(scenes: list[Scene]) -> list[int]:
    """Indices of the scenes, those of two things twice: they are harder."""
    return [index for index, scene in enumerate(scenes) for _ in scene.things]


def to_tensor(batch: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3 or 4) in 0..255 to float (B, 3, H, W) in [-1, 1], the range that the VAE works in."""
    return torch.from_numpy(np.ascontiguousarray(batch[..., :3])).permute(0, 3, 1, 2).float() / 127.5 - 1
