"""A picture of your own, as a model can start from it."""

from pathlib import Path

from PIL import Image, ImageOps

from helpers.images import opened

LEAST = 16  # pixels of the shorter side; below, there is nothing to see


def prepared(source: str | Path | bytes, width: int, height: int) -> Image.Image:
    """The picture in a file, or the file's bytes, as RGB of this size: upright, white where it is transparent.

    What does not fit the shape is cut off on both sides, never squeezed. Raises ValueError, one sentence, if there is
    no such file, if it is no picture, or one of under 16 pixels or over 50 million.
    """
    if not isinstance(source, bytes):
        path = Path(source).expanduser()
        try:
            source = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"There is no file {str(path)!r}: write its path as seen from this notebook.") from None
        except OSError as error:
            reason = (error.strerror or "it cannot be read").lower()
            raise ValueError(f"The file {str(path)!r} cannot be read ({reason}): choose a picture.") from error
    picture = opened(source)
    if min(picture.size) < LEAST:
        raise ValueError(f"The picture has {picture.width} x {picture.height} pixels: {LEAST} a side are the least.")
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
