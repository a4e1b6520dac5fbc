"""The latest runs of a panel as thumbnails: a click, or Enter, brings one back."""

import base64
import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import ipywidgets as widgets
from PIL import Image, ImageOps

from helpers.images import grid
from helpers.settings import Settings

KEPT = 12  # runs
SIDE = 64  # pixels of a thumbnail


@dataclass(frozen=True)
class Run:
    """What one press of Generate made. Picture k has the seed k after the first one's."""

    pictures: tuple[Image.Image, ...]
    start: Image.Image | None = None  # what they started from

    @property
    def settings(self) -> Settings:
        return replace(self.pictures[0].info["settings"], count=len(self.pictures))

    @cached_property
    def sheet(self) -> Image.Image:
        """The picture, or all of them with their seeds in one, which knows the settings of the whole run."""
        first = self.pictures[0]
        if len(self.pictures) == 1:
            return first
        sheet = grid(self.pictures, labels=[f"seed {picture.info['settings'].seed}" for picture in self.pictures])
        sheet.info = {**first.info, "settings": self.settings}
        return sheet


class History:
    """A row of thumbnails, the newest first, at most 12: `box` is the widget, `on_pick(run)` is called by a click.

    They are buttons, which a keyboard reaches and a screen reader names, with the picture as their background:
    ipywidgets has no picture that can be clicked.
    """

    def __init__(self, on_pick: Callable[[Run], None]):
        self.runs: list[Run] = []
        self._on_pick = on_pick
        self._pictures = widgets.HTML(layout=widgets.Layout(display="none"))  # styles count in what is hidden too
        self._buttons: list[tuple[widgets.Button, str]] = []  # each with its style
        self.box = widgets.HBox([self._pictures], layout=widgets.Layout(flex_flow="row wrap"))

    def add(self, run: Run) -> None:
        """Put a run in front; the thirteenth goes."""
        settings = run.settings
        button = widgets.Button(
            description=f"seed {settings.seed}",
            tooltip=f"Bring back: {settings.prompt[:200]}",
            layout=widgets.Layout(width="76px", height="92px"),
        )
        name = f"thumbnail-{uuid.uuid4().hex}"  # a page may hold several panels
        button.add_class(name)
        button.on_click(lambda _: self._on_pick(run))
        self.runs.insert(0, run)
        self._buttons.insert(0, (button, _style(name, run.sheet)))
        del self.runs[KEPT:]
        for old, _ in self._buttons[KEPT:]:
            old.close()
        del self._buttons[KEPT:]
        self._pictures.value = f"<style>{''.join(style for _, style in self._buttons)}</style>"
        self.box.children = (self._pictures, *(button for button, _ in self._buttons))


def _style(name: str, picture: Image.Image) -> str:
    """The look of a button: nothing that a person typed is in it."""
    file = io.BytesIO()
    ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return (
        f".{name} {{ background: url({url}) no-repeat center 4px !important; padding: {SIDE + 4}px 2px 0 !important; "
        f"font-size: 11px !important; line-height: 20px !important }} "
        f".{name}:focus-visible {{ outline: 2px solid currentColor !important }}"
    )
