"""Comparisons that can be trusted: metrics with known errors, and grids of pictures that start from the same noise."""

import csv
import functools
import hashlib
import io
import itertools
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import psutil
import torch
from PIL import Image
from tqdm.auto import tqdm

from helpers.generate import Settings, decode, drawing, generate, model_name, notes, resolve, silenced
from helpers.images import CELL, ROOT, encoded, grid, save
from helpers.images import settings as settings_in
from helpers.loading.machine import letting_go
from helpers.loading.versions import watched
from helpers.metrics import clip_features as clip_features
from helpers.metrics import clip_score as clip_score
from helpers.metrics import contrast as contrast
from helpers.metrics import difference_with_interval as difference_with_interval
from helpers.metrics import diversity as diversity
from helpers.metrics import interval as interval
from helpers.metrics import kid as kid
from helpers.metrics import mean_with_interval as mean_with_interval
from helpers.metrics import pixels as pixels
from helpers.metrics import saturation as saturation
from helpers.mixture import sliced_wasserstein as sliced_wasserstein
from helpers.schedulers import fresh, one_run_with

AXES = tuple(field.name for field in fields(Settings) if field.name not in ("count", "strength"))
TOGETHER = 2**19  # pixels that are drawn in one batch: 32 pictures of 128 x 128, two of 512 x 512
ROWS = 8  # of the labelled picture, at least one for each value of y
MOST = 10_000  # pictures of one sweep
TIMED = 3  # steps of the run that only tells the pace

Metric = Callable[[list[Image.Image], list[str]], Sequence[float]]


class Sweep(NamedTuple):
    """What `sweep` found. Row k of the table belongs to picture k."""

    rows: list[dict]  # x, y, prompt, seed, then one column a metric
    images: list[Image.Image]
    picture: Image.Image  # labelled
    csv: Path
    png: Path

    def frame(self):
        """The rows as a pandas.DataFrame: a column for each axis and each metric."""
        import pandas  # here, since it takes its time and few ask for it

        return pandas.DataFrame(self.rows)

    def cells(self, metric: str, *by: str) -> dict:
        """For each value of a column, or tuple of values of several: (mean, its 95 % interval's ends, count).

        Of a metric of True and False it is the share and Wilson's interval, else the mean plus and minus 1.96 standard
        errors. None counts as nothing. Raises ValueError for a column that is not there.
        """
        for name in (metric, *by):
            if name not in self.rows[0]:
                raise ValueError(f"There is no column {name!r}: choose from {', '.join(self.rows[0])}.")
        groups: dict = {}
        for row in self.rows:
            if row[metric] is not None:
                key = row[by[0]] if len(by) == 1 else tuple(row[name] for name in by)
                groups.setdefault(key, []).append(row[metric])
        return {key: mean_with_interval(values) for key, values in groups.items()}


class Cost(NamedTuple):
    """What a sweep takes of which no picture is there from before."""

    pictures: int
    evaluations: int  # of the network, for one picture each


def cost(
    pipe: diffusers.DiffusionPipeline,
    x: tuple[str, Sequence],
    y: tuple[str, Sequence] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> Cost:
    """What the same call of `sweep` would take. Nothing is drawn. Raises ValueError as `sweep` does."""
    _, _, wanted = _wanted(pipe, x, y, prompts, seeds, settings)
    return Cost(len(wanted), sum(_evaluations(pipe, wanted)))


def sweep(
    pipe: diffusers.DiffusionPipeline,
    x: tuple[str, Sequence],
    y: tuple[str, Sequence] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Settings | None = None,
    metrics: dict[str, Metric] | None = None,
    folder: str | Path = "outputs",
    say: Callable[[str], None] = print,
    on_step: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Draw every combination of two settings: `sweep(pipe, x=("guidance", [1, 3, 7]), y=("steps", [5, 25]))`.

    An axis is a field of `Settings` (a prompt or a seed as well) and its values. In each cell there is one picture for
    each of `prompts` (default: that of `settings`) and `seeds` (default: its seed). Each picture has a generator of its
    own, so that one seed means the same noise in all cells. What no axis says comes from `settings`. A metric takes
    pictures and prompts, and gives one number, True, False or None for each; default: saturation and contrast.

    The cost is said first. What is drawn is kept in `folder`, so that the same call after an interrupt goes on where it
    stopped; at the end a CSV and a labelled PNG are there, named after the axes, in which `helpers.images.record` finds
    the axes and the first picture's settings. `on_step(done, evaluations)` is called
    after every step, those of the run that measures the pace included (done is 0 then); what it raises ends the sweep
    and is passed on. Without it a progress bar is shown. Raises ValueError, one sentence, before any work starts: for
    what `resolve` refuses, an unknown axis, an empty or a repeating one, or pictures that do not fit into the RAM.
    Raises RuntimeError if two values of an axis gave the same pictures everywhere: then the setting was ignored, and
    the grid would lie.
    """
    metrics = {"saturation": _alone(saturation), "contrast": _alone(contrast)} if metrics is None else metrics
    axes, points, wanted = _wanted(pipe, x, y, prompts, seeds, settings)
    stem = "-by-".join(axis[0] for axis in (x, y) if axis) + f"-{_fingerprint(pipe, wanted)}"
    place = ROOT / Path(folder).expanduser()
    parts = place / f"{stem}.parts"

    found = {index: image for index, one in enumerate(wanted) if (image := _kept(parts / f"{index}.png", one))}
    batches = _batches(wanted, [index for index in range(len(wanted)) if index not in found])
    each = _evaluations(pipe, wanted)
    evaluations = sum(each[index] for batch in batches for index in batch)

    def tell(before: int, share: int, step: int, steps: int) -> None:
        if on_step is not None:
            on_step(before + share * step // steps, evaluations)

    for sentence in dict.fromkeys(note for one in dict.fromkeys(map(_texts, wanted)) for note in notes(pipe, one)):
        say(sentence)
    if found:
        say(f"{len(found)} of {len(wanted)} pictures are there from before.")
    if batches:
        say(f"{sum(map(len, batches))} pictures, {evaluations:,} evaluations of the network for one picture each.")
        # In proportion: a batch that shares its time among many pictures is the one that is measured.
        most = [wanted[index] for index in max(batches, key=len)]
        with drawing:
            seconds = _seconds_per_evaluation(pipe, most, functools.partial(tell, 0, 0)) * evaluations
        say(f"At the pace of one step measured now: about {_time(seconds)}, decoding and metrics not counted.")
    done = 0
    with tqdm(total=evaluations, unit="eval", leave=False, disable=on_step is not None or not watched()) as bar:
        for batch in batches:
            share = sum(each[index] for index in batch)
            with drawing:
                drawn = _draw(pipe, [wanted[index] for index in batch], functools.partial(tell, done, share))
            for index, image in zip(batch, drawn, strict=True):
                found[index] = image
                save(image, folder=parts, name=str(index))
            bar.update(share)
            done += share
    images = [found[index] for index in range(len(wanted))]
    _require_effect(axes, images)

    rows = [dict(point) for point in points]
    for name, metric in metrics.items():
        values = list(metric(images, [one.prompt for one in wanted]))
        if len(values) != len(rows):
            raise ValueError(
                f"The metric {name!r} gave {len(values)} values for {len(rows)} pictures: give one for each."
            )
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    picture = _labelled(axes, x[0], y[0] if y else None, points, images)
    csv_path, png_path = place / f"{stem}.csv", place / f"{stem}.png"
    _write(csv_path, _csv(rows).encode())
    picture.info |= {"settings": wanted[0], "model": model_name(pipe), "axes": axes}
    _write(png_path, encoded(picture))
    shutil.rmtree(parts, ignore_errors=True)  # all of it is in the result
    return Sweep(rows, images, picture, csv_path, png_path)


def _alone(metric: Callable[[Sequence[Image.Image]], list[float]]) -> Metric:
    """A metric of pictures that needs no prompts; one picture after the other, whatever their sizes."""
    return lambda images, prompts: [metric([image])[0] for image in images]


def _any_prompt(x, y, prompts) -> str:
    """Settings need a prompt, also where every picture's own comes from an axis."""
    given = [list(axis[1])[:1] for axis in (x, y) if axis and axis[0] == "prompt"] + [list(prompts or [])[:1]]
    return next((values[0] for values in given if values), "")


def _axes(x, y, prompts, seeds) -> dict[str, list]:
    """All that varies, slowest first: y, x, prompts, seeds."""
    axes: dict[str, list] = {}
    for axis in (
        y,
        x,
        ("prompt", prompts) if prompts is not None else None,
        ("seed", seeds) if seeds is not None else None,
    ):
        if axis is None:
            continue
        if (
            not isinstance(axis, tuple)
            or len(axis) != 2
            or isinstance(axis[1], str)
            or not hasattr(axis[1], "__iter__")
        ):
            raise ValueError('An axis is a name and its values, such as ("guidance", [1, 3, 7]).')
        name, values = axis[0], list(axis[1])
        if name not in AXES:
            raise ValueError(f"There is no setting {name!r} to vary: choose one of {', '.join(AXES)}.")
        if name in axes:
            raise ValueError(f"The setting {name!r} is there twice: vary each in one place.")
        if not values:
            raise ValueError(f"There is nothing to draw: give {name!r} at least one value.")
        count = math.prod(map(len, axes.values())) * len(values)
        if count > MOST:
            raise ValueError(
                f"{count:,} pictures are too many for one grid: {MOST:,} are the most, so shorten an axis."
            )
        if any(values[k] in values[:k] for k in range(len(values))):
            raise ValueError(f"A value of {name!r} is there twice: name each once.")
        axes[name] = values
    return axes


def _wanted(
    pipe, x, y, prompts, seeds, settings: Settings | None
) -> tuple[dict[str, list], list[dict], list[Settings]]:
    """What varies, the values of each picture, and all of its settings."""
    axes, base = _axes(x, y, prompts, seeds), settings or Settings(_any_prompt(x, y, prompts))
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    wanted = [_resolved(pipe, replace(base, count=1, strength=None, **point)) for point in points]
    _require_room(wanted)
    return axes, points, wanted


def _resolved(pipe, one: Settings) -> Settings:
    one = resolve(pipe, one)
    known = pipe.scheduler.config.num_train_timesteps
    if one.steps > known:
        raise ValueError(f"{one.steps} steps are more than the {known} of the model's training: take fewer.")
    return one


def _require_room(wanted: list[Settings]) -> None:
    in_the_grid = (max(2 * CELL, one.height, one.width) ** 2 for one in wanted)
    needed = 3 * (sum(one.height * one.width for one in wanted) + sum(in_the_grid)) / 2**30
    free = psutil.virtual_memory().available / 2**30
    if needed > free:
        raise ValueError(f"{len(wanted):,} pictures take {needed:.1f} GiB, and {free:.1f} are free: draw fewer.")


def _fingerprint(pipe, wanted: list[Settings]) -> str:
    """Eight letters that change with the settings, the weights (some of each tensor are read) and the library."""
    seen = hashlib.sha256(repr((wanted, model_name(pipe), diffusers.__version__)).encode())
    seen.update(repr(sorted(dict(pipe.scheduler.config).items(), key=lambda item: item[0])).encode())
    for name, part in sorted(pipe.components.items()):
        for tensor in part.parameters() if isinstance(part, torch.nn.Module) else ():
            if not tensor.is_meta:
                some = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)]
                seen.update(name.encode() + some.float().cpu().numpy().tobytes())
    return seen.hexdigest()[:8]


def _kept(path: Path, wanted: Settings) -> Image.Image | None:
    """The picture that an interrupted sweep left, if it is this one and whole."""
    try:
        if settings_in(path) != wanted:
            return None
        with Image.open(path) as image:
            image.load()
            return image.convert("RGB")
    except (OSError, ValueError):
        return None


def _texts(one: Settings) -> Settings:
    return Settings(one.prompt, one.negative_prompt)


def _batches(wanted: list[Settings], missing: list[int]) -> list[list[int]]:
    """Pictures that differ in texts and seed alone can be drawn together."""
    alike: dict[tuple, list[int]] = {}
    for index in missing:
        one = wanted[index]
        alike.setdefault((one.steps, one.guidance, one.height, one.width, one.scheduler), []).append(index)
    batches = []
    for (_, _, height, width, _), indices in alike.items():
        size = max(1, TOGETHER // (height * width))
        batches += [indices[k : k + size] for k in range(0, len(indices), size)]
    return batches


def _evaluations(pipe, wanted: list[Settings]) -> list[int]:
    """How often the network is asked for each picture: once a timestep, twice with guidance."""

    @functools.cache
    def timesteps(scheduler: str, steps: int) -> int:
        made = fresh(pipe.scheduler, scheduler)  # another thread may be drawing with the pipeline's own
        made.set_timesteps(steps)
        return len(made.timesteps)

    return [timesteps(one.scheduler, one.steps) * (2 if one.guidance > 1 else 1) for one in wanted]


def _seconds_per_evaluation(pipe, batch: list[Settings], on_step: Callable[[int, int], None]) -> float:
    """Measured between the first and the second step of a run of three, of which nothing is kept."""
    ends = []

    def watch(pipe, index, timestep, tensors):
        tensors["latents"].flatten()[0].item()  # a GPU answers only when it is done
        ends.append(time.perf_counter())
        on_step(index + 1, TIMED)
        return {}

    _latents(pipe, [replace(one, steps=TIMED) for one in batch], watch)
    return (ends[1] - ends[0]) / len(batch) / (2 if batch[0].guidance > 1 else 1)


def _latents(pipe, batch: list[Settings], watch: Callable) -> torch.Tensor:
    """Of pictures with the same steps, guidance, size and scheduler, (len(batch), C, h, w)."""
    first, stage = batch[0], getattr(pipe, "stage", None)
    if stage is None:
        texts = {"prompt": [one.prompt for one in batch], "negative_prompt": [one.negative_prompt for one in batch]}
    else:
        stage.prepare()
        encoded = [stage.encode(one.prompt, one.negative_prompt) for one in batch]
        texts = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
    with letting_go(), one_run_with(pipe, first.scheduler), silenced(pipe):
        return pipe(
            **texts,
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            generator=[torch.Generator("cpu").manual_seed(one.seed) for one in batch],
            output_type="latent",
            callback_on_step_end=watch,
        ).images


def _draw(pipe, batch: list[Settings], on_step: Callable[[int, int], None]) -> list[Image.Image]:
    """A single picture by `generate`, which also knows what to do when the memory is full."""
    if len(batch) == 1:
        return generate(pipe, batch[0], on_step=lambda step, steps, _: on_step(step, steps), say=lambda _: None)

    def watch(pipe, index, timestep, tensors):
        on_step(index + 1, pipe.num_timesteps)
        return {}

    try:
        latents = _latents(pipe, batch, watch)
    except torch.OutOfMemoryError:
        latents = None
    if latents is None:  # out here, where the error no longer holds on to what it met
        share = len(batch)
        return [
            image
            for k, one in enumerate(batch)
            for image in _draw(pipe, [one], lambda step, steps, k=k: on_step(k * steps + step, share * steps))
        ]
    made = decode(pipe, latents)
    images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(made))
    for one, image in zip(batch, images, strict=True):
        image.info |= {"settings": one, "model": model_name(pipe)}
    return images


def _require_effect(axes: dict[str, list], images: list[Image.Image]) -> None:
    """Raises RuntimeError if two values of an axis gave the same pixels in every cell."""
    shape = [len(values) for values in axes.values()]
    seen = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images]).reshape(shape)
    for place, (name, values) in enumerate(axes.items()):
        for i, j in itertools.combinations(range(len(values)), 2):
            if np.array_equal(seen.take(i, place), seen.take(j, place)):
                raise RuntimeError(
                    f"The setting {name!r} changed nothing: {values[i]!r} and {values[j]!r} gave identical pictures. "
                    "Drop one of them, or look for what ignores it (a guidance of 1 or less is no guidance)."
                )


def _labelled(axes, x: str, y: str | None, points: list[dict], images: list[Image.Image]) -> Image.Image:
    """x from left to right; a row for each value of y, and within it for the first prompts and seeds."""
    rest = [name for name in axes if name not in (x, y)]
    each = max(1, ROWS // len(axes.get(y, [0])))
    rows: dict[str, list[int]] = {}
    others: dict[str, None] = {}
    for index, point in enumerate(points):
        other = repr([point[name] for name in rest])
        if len(others) < each:
            others[other] = None
        if other in others:
            rows.setdefault(repr([point.get(y), other]), []).append(index)
    order = [index for row in rows.values() for index in row]
    labels = ["\n".join(f"{name} {points[index][name]}" for name in axes if len(axes[name]) > 1) for index in order]
    return grid([images[index] for index in order], columns=len(axes[x]), labels=labels)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, in place of what an equal sweep wrote before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.part"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _time(seconds: float) -> str:
    number, unit = (seconds, "second") if seconds < 99.5 else (seconds / 60, "minute")
    return f"{number:.0f} {unit}{'' if f'{number:.0f}' == '1' else 's'}"
