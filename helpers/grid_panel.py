"""An X/Y grid below a cell: two settings, their values as lists, the cost, Generate. Thin over `compare.sweep`."""

import html
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import ipywidgets as widgets

from helpers.compare import AXES, Sweep, cost, sweep
from helpers.controls import below, counted, look, reader, row, text_area
from helpers.generate import Settings, drawing, resolve, schedulers
from helpers.preview import to_png
from helpers.runner import Runner, in_repository, link, sentence, short, stop_runs

NUMBERS = {"steps": int, "guidance": float, "seed": int, "height": int, "width": int}
TEXTS = ("prompt", "negative_prompt")  # which have commas of their own


class _Stopped(Exception):
    """Leaves `sweep`, which keeps the pictures that are finished."""


def grid_panel(
    pipe: diffusers.DiffusionPipeline,
    x: tuple[str, Sequence] = ("guidance", (1, 4, 8)),
    y: tuple[str, Sequence] | None = None,
    settings: Settings | None = None,
    folder: str | Path = "outputs",
    threaded: bool | None = None,
) -> "GridPanel":
    """A panel for `sweep(pipe, x, y)`: what these say is in its controls, and nothing is drawn before Generate.

    The last line of a cell shows it. Settings without a control come from `settings`, by default the model's own. The
    picture and the CSV go to `folder`, as `sweep` says, and a run that was stopped goes on where it was. `threaded` is
    that of `prompt_panel`; as there, what another panel has under way on this pipeline is stopped. Raises ValueError,
    one sentence, for axes or settings that `sweep` refuses, and for values that hold what separates them.
    """
    if settings is None:
        model = getattr(pipe, "model", None)
        settings = Settings(model.examples[0] if model else "a red boat by the sea")
    stop_runs(pipe)
    with drawing:  # until the stopped run has given the pipeline its own scheduler back
        settings = resolve(pipe, settings)
    cost(pipe, x, y, settings=settings)
    return GridPanel(pipe, x, y, settings, folder, threaded)


class GridPanel(Runner):
    """What `grid_panel` makes. `found` is the latest `Sweep`, or None; `box` holds the widgets."""

    def __init__(self, pipe, x, y, settings: Settings, folder: str | Path, threaded: bool | None):
        super().__init__(pipe, threaded)
        self.found: Sweep | None = None
        self._settings, self._folder, self._reader = settings, folder, reader(pipe)

        self.prompt, self.prompt_note = text_area("Prompt", "What the pictures should show"), widgets.HTML()
        self.seed = widgets.Text(str(settings.seed), description="Seed", **look())
        names = [(name.replace("_", " "), name) for name in AXES]
        self.x = widgets.Dropdown(options=names, description="Columns", **look())
        self.x_values = widgets.Text(description="Column values", **look())
        self.y = widgets.Dropdown(options=[("nothing", None), *names], description="Rows", **look())
        self.y_values = widgets.Text(description="Row values", **look())
        self.cost = widgets.HTML()
        self.downloads = widgets.HBox()
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", margin="0", display="none"))
        for button in (self.go, self.stop):
            button.layout.width = "auto"
        self.box = widgets.VBox(
            [
                self.prompt,
                self.prompt_note,
                row(self.seed),
                row(self.x, self.x_values),
                row(self.y, self.y_values),
                self.cost,
                row(self.go, self.stop, self.downloads),
                row(self.bar, self.progress),
                self.message,
                self.image,
            ],
            layout=widgets.Layout(max_width="760px"),
        )
        self.prompt.value = settings.prompt
        for (name, text), axis in zip(((self.x, self.x_values), (self.y, self.y_values)), (x, y), strict=True):
            name.value, text.value = (None, "") if axis is None else (axis[0], written(*axis))
            self._hint(name, text)
            name.observe(lambda _, name=name, text=text: self._hint(name, text, clear=True), "value")
        for control in (self.prompt, self.seed, self.x, self.x_values, self.y, self.y_values):
            control.observe(lambda _: self._count(), "value")
        self._count()

    def _hint(self, name: widgets.Dropdown, text: widgets.Text, clear: bool = False) -> None:
        """The values of one setting are none of another."""
        examples = {"scheduler": ", ".join(schedulers(self.pipe)[:3]), "guidance": "1, 3, 7.5", None: ""}
        examples |= dict.fromkeys(TEXTS, "between semicolons: a boat; a red boat")
        text.placeholder, text.disabled = examples.get(name.value, "such as 8, 16, 24"), name.value is None
        if clear:
            text.value = ""

    def _count(self) -> None:
        """What it will take, or what is wrong, while people type."""
        self.prompt_note.value = counted(self._reader, "prompt", self.prompt.value)
        try:
            pictures, evaluations = cost(self.pipe, **self._arguments(*self._prepare()))
            said = f"{pictures} pictures, {evaluations:,} evaluations of the network for one picture each"
        except ValueError as error:
            said = html.escape(short(sentence(error)))
        self.cost.value = below(said)

    def _prepare(self) -> tuple[str, str, tuple, tuple]:
        axes = ((self.x.value, self.x_values.value), (self.y.value, self.y_values.value))
        return self.prompt.value, self.seed.value.strip(), *axes

    def _arguments(self, prompt: str, seed: str, x: tuple[str, str], y: tuple[str | None, str]) -> dict:
        x, y = ((name, values(name, text)) if name else None for name, text in (x, y))
        return {"x": x, "y": y, "settings": replace(self._settings, prompt=prompt, seed=seed)}

    def _draw(self, *prepared) -> None:
        said, begun = [], time.perf_counter()

        def say(line: str) -> None:
            said.append(line)
            self._say(*said)

        self._first = None  # the time of the first step, and what was done after it
        try:
            self.found = sweep(
                self.pipe, **self._arguments(*prepared), folder=self._folder, say=say, on_step=self._on_step
            )
        except (_Stopped, KeyboardInterrupt):
            self._say("Stopped; the pictures that are finished are kept, and Generate goes on from there.")
            return
        self._show(self.found)
        files = " and ".join(str(in_repository(path)) for path in (self.found.png, self.found.csv))
        self._say(f"Drawn in {time.perf_counter() - begun:.0f} s, saved as {files}.", *said)

    def _on_step(self, done: int, evaluations: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        now = time.perf_counter()
        if done and self._first is None:
            self._first = now, done
        self.bar.max, self.bar.value = evaluations, done
        self.progress.value = f"{done:,} of {evaluations:,} evaluations" if done else "measuring the pace"
        if done and done > self._first[1]:
            left = (now - self._first[0]) / (done - self._first[1]) * (evaluations - done)
            self.progress.value += f", {left:.0f} s left"

    def _show(self, found: Sweep) -> None:
        self.image.value, self.image.width = to_png(found.picture), str(found.picture.width)
        self.image.layout.display = None
        files = ((found.png, "image/png", "Download picture"), (found.csv, "text/csv", "Download table"))
        self.downloads.children = [
            widgets.HTML(link(path.name, path.read_bytes(), kind, text)) for path, kind, text in files
        ]


def values(setting: str, text: str) -> list:
    """A list as people type it: "1, 3, 7.5" for numbers and names; prompts stand between semicolons.

    Raises ValueError, one sentence, for a place with nothing in it (no negative prompt is a value, though) and for
    what is not a number where the setting is one.
    """
    parts = [part.strip() for part in text.split(_separator(setting))]
    if setting != "negative_prompt" and not all(parts):
        where = "nothing" if parts == [""] else "an empty place"
        raise ValueError(f"There is {where} in the list for {setting}: {_between(setting)}.")
    return [_number(setting, part) for part in parts] if setting in NUMBERS else parts


def written(setting: str, found: Sequence) -> str:
    """The text that `values` reads as these values. Raises ValueError, one sentence, where there is none."""
    text = f"{_separator(setting)} ".join(map(str, found))
    if values(setting, text) != list(found):
        raise ValueError(f"{str(found)[:80]} cannot be typed as a list for {setting}: {_between(setting)}.")
    return text


def _separator(setting: str) -> str:
    return ";" if setting in TEXTS else ","


def _between(setting: str) -> str:
    return f"write values with {'semicolons' if setting in TEXTS else 'commas'} between them"


def _number(setting: str, part: str) -> int | float:
    kind = NUMBERS[setting]
    try:
        number = kind(part)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{part[:40]!r} in the list for {setting} is not {words}: {_between(setting)}.") from None
    return int(number) if kind is float and number.is_integer() else number
