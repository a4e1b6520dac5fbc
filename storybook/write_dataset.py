"""Write a folder of pictures and captions as `training.dataset` reads it: `python -m storybook.write_dataset FOLDER`.

The scenes are those that the bundled models train on, or close-ups, which a small model learns in minutes. No picture
shows a `HELD_OUT` pair.
"""

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from helpers.loading.versions import watched
from storybook.train.data import numbered_rng, numbered_scene
from storybook.world import COLOURS, HELD_OUT, KINDS, SETTINGS, Scene, Thing, caption, render


def training_scenes() -> Iterator[tuple[Scene, random.Random]]:
    """Scenes of the training split without end, each with the state that draws it."""
    return (numbered_scene("train", index) for index in itertools.count())


def close_ups(
    withheld: Set[tuple[str, str]] = HELD_OUT, settings: tuple[str, ...] = SETTINGS, split: str = "close-ups"
) -> Iterator[tuple[Scene, random.Random]]:
    """Scenes of one large thing in the middle without end; no pair (colour, kind) of `withheld`.

    Another name of the `split` gives other scenes and other pictures.
    """
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in withheld]
    for index in itertools.count():
        rng = numbered_rng(split, index)
        colour, kind = rng.choice(pairs)
        yield Scene((Thing(kind, colour, "large", "centre"),), rng.choice(settings)), rng


def in_brief(scene: Scene, rng: random.Random | None = None) -> str:
    """The caption without sizes and positions, which are the same in all close-ups."""
    return caption(replace(scene, things=tuple(Thing(one.kind, one.colour) for one in scene.things)), rng)


def write(
    folder: str | Path,
    count: int,
    scenes: Iterable[tuple[Scene, random.Random]] | None = None,
    size: int = 128,
    say: Callable[[Scene, random.Random], str] = caption,
) -> None:
    """The first `count` of `scenes` (default: `training_scenes()`) as FOLDER/images and FOLDER/captions.json.

    Pictures of `size` pixels, captions by `say`. Raises FileExistsError for a folder that has something in it,
    ValueError for a count below 1, before anything is drawn; a folder that was not finished does not appear.
    """
    folder = Path(folder)
    if count < 1:
        raise ValueError(f"{count} pictures are no training set: write one at least.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} has something in it: name a new folder.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    captions = {}
    drawn = itertools.islice(training_scenes() if scenes is None else scenes, count)
    for index, (scene, rng) in enumerate(tqdm(drawn, "rendering", count, disable=not watched())):
        name = f"{index:05d}.png"
        render(scene, rng, size).save(partial / "images" / name)
        captions[name] = say(scene, rng)
    (partial / "captions.json").write_text(json.dumps(captions, indent=0), encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def main() -> None:
    """The command line of `write`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--close-ups", action="store_true", help="one large thing in the middle of each picture")
    arguments = parser.parse_args()
    try:
        if arguments.close_ups:
            write(arguments.folder, arguments.count, close_ups(), say=in_brief)
        else:
            write(arguments.folder, arguments.count)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
