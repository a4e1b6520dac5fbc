"""Which part of a picture is to be redrawn: masks, white where it is, by shape, by controls or as a picture."""

import html

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display
from PIL import Image, ImageDraw

from helpers.controls import on_upload
from helpers.images import opened
from helpers.preview import to_png

SHAPES = ("rectangle", "ellipse")
SHOWN = 256  # pixels, at least
TINT = (255, 0, 128)


def shape_mask(
    size: tuple[int, int], shape: str, across: tuple[float, float], down: tuple[float, float]
) -> Image.Image:
    """A mask (mode L, 0 or 255) of `size`, (width, height), with a rectangle or an ellipse in it.

    `across` is from where to where it reaches from left to right, `down` from top to bottom, in % of the side. Raises
    ValueError, one sentence, for another shape and for one that has no area or leaves the picture.
    """
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {str(shape)[:40]!r}: choose one of {', '.join(SHAPES)}.")
    for name, (start, end) in (("across", across), ("down", down)):
        if not 0 <= start < end <= 100:
            raise ValueError(f"From {start:g} % to {end:g} % {name} is no part of a picture: take 0 to 100, growing.")
    mask = Image.new("L", size)
    sides = [[round(share / 100 * side) for share in span] for span, side in zip((across, down), size, strict=True)]
    (left, right), (top, bottom) = sides
    draw = ImageDraw.Draw(mask)
    # Pillow counts the last pixel in.
    getattr(draw, shape)((left, top, max(left, right - 1), max(top, bottom - 1)), fill=255)
    return mask


def mask_from(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Any picture as a mask of `size`: what is lighter than middle grey is redrawn.

    Raises ValueError, one sentence, if nothing is.
    """
    mask = picture.convert("L").resize(size, Image.Resampling.BOX).point(lambda value: 255 * (value >= 128))
    if not mask.getbbox():
        raise ValueError("Nothing in the mask is lighter than middle grey: paint white what is to be redrawn.")
    return mask


def on_latents(mask: Image.Image, factor: int) -> torch.Tensor:
    """The mask as the library lays it over latents, (1, 1, h, w) of 0 and 1.

    It looks at one pixel of each `factor` x `factor`, the upper left one. Raises ValueError, one sentence, if all that
    is white falls between those.
    """
    white = torch.from_numpy(np.asarray(mask.convert("L")).copy())[None, None] / 255 >= 0.5
    found = torch.nn.functional.interpolate(
        white.float(), size=(mask.height // factor, mask.width // factor), mode="nearest"
    )
    if not found.any():
        raise ValueError(f"The mask is too small: latents see one pixel of each {factor} x {factor}, so make it wider.")
    return found


def tinted(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what the mask has in white tinted."""
    over = Image.new("RGB", picture.size, TINT)
    return Image.composite(Image.blend(picture.convert("RGB"), over, 0.45), picture.convert("RGB"), mask)


class MaskControls:
    """Controls below a cell for a mask on `picture`; `mask` is what they say (mode L), ready for `generate`."""

    def __init__(
        self,
        picture: Image.Image,
        shape: str = "rectangle",
        across: tuple[int, int] = (25, 75),
        down: tuple[int, int] = (25, 75),
    ):
        self.picture = picture
        self.shape = widgets.Dropdown(description="Shape", options=SHAPES, value=shape)
        self.across, self.down = (
            widgets.IntRangeSlider(description=name, min=0, max=100, value=span, continuous_update=False)
            for name, span in (("Across, %", across), ("Down, %", down))
        )
        self.file = widgets.FileUpload(accept="image/*", description="Mask from a picture")
        self.message = widgets.HTML()
        self.image = widgets.Image(format="png", width=str(max(SHOWN, picture.width)))
        self.box = widgets.VBox([self.shape, self.across, self.down, self.file, self.message, self.image])
        for control in (self.shape, self.across, self.down):
            control.observe(lambda _: self._try(self._draw), "value")
        on_upload(
            self.file, lambda name, content: self._try(lambda: self._show(mask_from(opened(content), picture.size)))
        )
        self._draw()

    def _ipython_display_(self) -> None:
        display(self.box)

    def _draw(self) -> None:
        self._show(shape_mask(self.picture.size, self.shape.value, self.across.value, self.down.value))

    def _show(self, mask: Image.Image) -> None:
        self.mask = mask
        self.message.value = ""
        shown = tinted(self.picture, mask)
        factor = -(-SHOWN // max(shown.size))
        self.image.value = to_png(shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST))

    def _try(self, work) -> None:
        """Do what a control asks for; or the mask stays, and one sentence says why."""
        try:
            work()
        except ValueError as error:
            self.message.value = f'<div role="alert">{html.escape(str(error))}</div>'
