"""Pictures on the page and on disk: labelled grids, tensors as pictures, PNG files that know how they were drawn."""

import io
import itertools
import json
import os
import re
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from helpers import infotext
from helpers.loading.registry import ROOT as ROOT
from helpers.settings import Settings

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
CELL = 160  # pixels; smaller pictures are enlarged by a whole factor, so that a label has room beside them
GAP = 8
FONT_SIZE = 15
TITLE_SIZE = 20
SHOWN = 1200  # about as wide as a notebook shows a picture, in pixels
LIBRARIES = ("torch", "diffusers", "transformers")
MOST_PIXELS = 50_000_000  # of a picture to start from: beyond, opening it takes more memory than drawing


def grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """One RGB picture with all of them in rows of `columns` (default: at most 5), a label under each, a title above.

    Long labels are wrapped, never cut; small pictures are enlarged by a whole factor without smoothing. Raises
    ValueError for no pictures or a number of labels that is not the number of pictures.
    """
    images, labels = list(images), [str(label) for label in labels] if labels is not None else []
    if not images:
        raise ValueError("There are no pictures to put into the grid: draw at least one.")
    if labels and len(labels) != len(images):
        raise ValueError(f"There are {len(images)} pictures and {len(labels)} labels: give one label for each.")
    if columns is not None and columns < 1:
        raise ValueError("A grid needs at least one column.")
    columns = min(columns or 5, len(images))
    side = max(max(image.size) for image in images)
    factor = -(-CELL // side)  # rounded up
    images = [
        image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        for image in images
    ]
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = -(-len(images) // columns)
    total = GAP + columns * (width + GAP)

    scale = max(1, round(total / SHOWN))  # a page shows a wide grid smaller, its letters too
    size, title_size = FONT_SIZE * scale, TITLE_SIZE * scale
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(title_size)
    texts = [wrap(label, font, width) for label in labels]
    heading = wrap(title, title_font, total - 2 * GAP) if title else []
    line, title_line = round(size * 1.4), round(title_size * 1.4)
    # Each row is as tall as its longest label.
    below = [max((len(t) for t in texts[r * columns : (r + 1) * columns]), default=0) * line for r in range(rows)]
    top = GAP + (len(heading) * title_line + GAP if heading else 0)

    sheet = Image.new("RGB", (total, top + sum(height + b + GAP for b in below)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, text in enumerate(heading):
        draw.text((GAP, GAP + n * title_line), text, "black", title_font)
    y = top
    for row in range(rows):
        for column, image in enumerate(images[row * columns : (row + 1) * columns]):
            x = GAP + column * (width + GAP)
            sheet.paste(image, (x, y))
            for n, text in enumerate(texts[row * columns + column] if texts else []):
                draw.text((x, y + height + n * line), text, "black", font)
        y += height + below[row] + GAP
    return sheet


def side_by_side(left: Image.Image, right: Image.Image, labels: tuple[str, str] | None = None) -> Image.Image:
    """Two pictures in one row, to compare them."""
    return grid([left, right], columns=2, labels=labels)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of `text`, none wider than `width` pixels; a word that is wider than a line is broken."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and not _fits(f"{line} {word}", font, width):
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while len(line) > 1 and not _fits(line, font, width):
                ends = range(1, min(len(line), int(width) + 1))  # longer ones fit less
                end = max(1, bisect_left(ends, True, key=lambda end, line=line: not _fits(line[:end], font, width)))
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


def _fits(line: str, font: ImageFont.FreeTypeFont, width: float) -> bool:
    return len(line) <= width and font.getlength(line) <= width  # a letter is a pixel at least, and long lines are slow


def to_image(tensor: torch.Tensor) -> Image.Image | list[Image.Image]:
    """(3, H, W) in [-1, 1], as a VAE decodes it, to an RGB picture; (B, 3, H, W) to a list of B. Clips what is outside.

    Raises ValueError for another shape or for numbers that are not finite.
    """
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3:
        raise ValueError(f"A picture is a tensor of shape (3, H, W) or (B, 3, H, W), not {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError("The tensor has NaN or infinite numbers in it: look for the step that made them.")
    pixels = ((tensor.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if tensor.ndim == 3:
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]


def save(
    image: Image.Image, settings: Settings | None = None, folder: str | Path = "outputs", name: str | None = None
) -> Path:
    """Write a PNG with its settings inside and return where: `<prompt>-<seed>.png`, numbered rather than overwriting.

    `encoded` says which settings those are. A relative `folder` is in the repository. The file appears whole or not
    at all, an interrupt included. Raises ValueError without any settings, OSError in one sentence where nothing can be
    written.
    """
    content, settings = _encode(image, settings)
    folder = ROOT / Path(folder).expanduser()
    try:
        # An interrupt reaches the main thread alone, so that what another one does is done whole.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_write, content, folder, file_stem(settings, name)).result()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        raise type(error)(
            error.errno, f"The picture was not saved in {place} ({reason}): free some space or choose another folder."
        ) from error


def encoded(image: Image.Image, settings: Settings | None = None) -> bytes:
    """The PNG file that `save` writes, with its settings inside twice: as JSON, and as other tools read them.

    A picture from `generate` knows what drew it, its own seed in a batch included, and that is what is stored;
    `settings` is for pictures from elsewhere. Raises ValueError without any settings.
    """
    return _encode(image, settings)[0]


def file_stem(settings: Settings, name: str | None = None) -> str:
    """The name of a file for such a picture, without .png: only letters and digits of any prompt reach the disk."""
    stem = re.sub(r"[^a-z0-9]+", "-", (name or settings.prompt).lower().removesuffix(".png")).strip("-")[:60]
    return (stem or "picture") if name else f"{stem or 'picture'}-{settings.seed}"


def _encode(image: Image.Image, settings: Settings | None) -> tuple[bytes, Settings]:
    model, known = image.info.get("model", ""), image.info.get("settings")
    stopped, axes = image.info.get("stopped_after"), image.info.get("axes")
    if isinstance(known, str):  # a picture that was saved and opened again
        try:
            found = _parse(known)
            known, model = _settings(found), found.get("model", "")
            stopped, axes = found.get("stopped_after"), found.get("axes")
        except (ValueError, RecursionError):
            known = None
    settings = known or settings
    if settings is None:
        raise ValueError("Nothing is known about this picture: give its settings too, save(image, settings).")
    record = {
        "settings": asdict(settings),
        "model": model,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    if stopped is not None:
        record["stopped_after"] = stopped
    if axes is not None:
        record["axes"] = axes
    size = (
        image.size if axes is None else (settings.width, settings.height)
    )  # a grid's picture is larger than any in it
    chunks = PngImagePlugin.PngInfo()
    for key, text in (
        ("settings", json.dumps(record, ensure_ascii=False, default=str)),
        ("parameters", infotext.write(settings, model, size)),
    ):
        chunks.add_itxt(key, text.encode("utf-8", "replace").decode())
    content = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(content, format="PNG", pnginfo=chunks)
    return content.getvalue(), settings


def opened(content: bytes) -> Image.Image:
    """A photo or drawing of somebody's as an RGB picture to start from: upright, white where it is transparent.

    Raises ValueError, one sentence, for what is no picture or has more than 50 million pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:  # known before anything is decoded
                raise ValueError(
                    f"The picture has {image.width} x {image.height} pixels: make it smaller, "
                    f"{MOST_PIXELS // 10**6} million are the most."
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits; Pillow would make all above 255 white
                upright = upright.point(lambda value: value / 256).convert("L")
            upright = upright.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("The file is not a picture that can be opened: choose a PNG or a JPEG.") from error
    return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")


def settings(file: str | Path | BinaryIO) -> Settings:
    """The settings inside a PNG of `save` or of another tool that writes like A1111. Raises ValueError, one sentence.

    Of another tool's file they may be ones that no model here can draw; what it does not say is None.
    """
    return _settings(record(file))


def record(file: str | Path | BinaryIO) -> dict:
    """All that a PNG says: {"settings": {...}, "model": name, "versions": {library: version}}, from the JSON of `save`.

    "stopped_after" is there for a picture that was stopped: the step that it is from. "axes" is there for a grid of
    `sweep`: each setting that varies, with its values; "settings" is then the first picture's. Without such JSON the
    text of A1111 is read; then "versions" is empty, and "others" holds what `Settings` has no place for. A relative
    path is in the repository, as for `save`, or else in the working folder. Raises ValueError, one sentence.
    """
    shown, place = "The file", file
    if isinstance(file, (str, Path)):
        shown, path = file, Path(file).expanduser()
        place = ROOT / path if (ROOT / path).exists() else path
    try:
        with Image.open(place) as image:
            chunks = dict(image.info)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {shown}: choose a PNG that save() wrote.") from error
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ValueError(f"{shown} is not a picture: choose a PNG that save() wrote.") from error
    try:
        return _parse(chunks["settings"])
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    try:
        found = infotext.read(chunks["parameters"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{shown} has no settings inside: only pictures of save(), A1111 and tools like it carry them."
        ) from error
    return {"settings": asdict(found.settings), "model": found.model, "versions": {}, "others": found.others}


def _parse(text: str) -> dict:
    """The record in a PNG. Raises ValueError, or RecursionError, for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError("no record")
    if not isinstance(found["settings"].get("prompt"), str):
        raise ValueError("no prompt")
    return found


def _settings(record: dict) -> Settings:
    known = {field.name for field in fields(Settings)}
    return Settings(**{key: value for key, value in record["settings"].items() if key in known})


def _write(content: bytes, folder: Path, stem: str) -> Path:
    """Write the file and give it the first free name, which two writers never share; nothing is left if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.part"
    try:
        temporary.write_bytes(content)
        for number in itertools.count(1):
            path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                _rename(temporary, path)
                return path
            except FileExistsError:
                pass
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    """Raises FileExistsError rather than overwrite, also where another process takes the name at this moment."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # some disks, and Google Drive, have no links: there the name is taken before the file is whole
        path.open("xb").close()
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink()
            raise
