"""Write a folder of pictures and captions as `training.dataset` reads it: `python -m storybook.write_dataset FOLDER`.

The scenes are numbered as those that the bundled models train on, so no picture shows a `HELD_OUT` pair.
"""

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from helpers.loading.versions import watched
from storybook.train.data import numbered_scene
from storybook.world import Scene, caption, render


def training_scenes(single: bool = False) -> Iterator[tuple[Scene, random.Random]]:
    """Scenes of the training split without end, each with the state that draws it; `single` leaves out those of two."""
    for index in itertools.count():
        scene, rng = numbered_scene("train", index)
        if not single or len(scene.things) == 1:
            yield scene, rng


def write(
    folder: str | Path, count: int, scenes: Iterable[tuple[Scene, random.Random]] | None = None, size: int = 128
) -> None:
    """The first `count` of `scenes` (default: `training_scenes()`) as FOLDER/images and FOLDER/captions.json.

    Pictures of `size` pixels. Raises FileExistsError for a folder that has something in it, ValueError for a count
    below 1, before anything is drawn; a folder that was not finished does not appear.
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
        captions[name] = caption(scene, rng)
    (partial / "captions.json").write_text(json.dumps(captions, indent=0), encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def main() -> None:
    """The command line of `write`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--single", action="store_true", help="one thing in each picture")
    arguments = parser.parse_args()
    try:
        write(arguments.folder, arguments.count, training_scenes(arguments.single))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
