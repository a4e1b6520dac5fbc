"""A prompt panel below a cell: type, press Generate, watch, look. Thin over `generate`; for ipywidgets 7 and 8."""

import io
import time
from pathlib import Path
from typing import BinaryIO

import diffusers
import ipywidgets as widgets
import torch
from PIL import Image

from helpers import images
from helpers.controls import Controls, on_upload, row
from helpers.generate import Settings, drawing, generate, model_name, partial, resolve
from helpers.grid_panel import grid_panel as grid_panel
from helpers.history import History, Run
from helpers.preview import LiveMeter, to_png
from helpers.runner import Runner, in_repository, link, stop_runs

SHOWN = 256  # pixels; smaller pictures are enlarged by a whole factor, without smoothing


def prompt_panel(
    pipe: diffusers.DiffusionPipeline,
    settings: Settings | None = None,
    folder: str | Path = "outputs",
    threaded: bool | None = None,
    image: Image.Image | None = None,
) -> "PromptPanel":
    """A panel that shows its first picture already: that of `settings`, by default the model's first example.

    The last line of a cell shows it. With `image` pictures start from that one. Saved pictures go to `folder`, which is
    in the repository if it is relative. `threaded=False` draws in the kernel's own thread, where no Stop button can be
    heard; None decides by the machine: Colab does not show what a thread does to a widget. A run that another panel
    has under way on this pipeline is stopped: it could no longer be, once its cell ran again.
    """
    if settings is None:
        model = getattr(pipe, "model", None)
        settings = Settings(model.examples[0] if model else "a red boat by the sea")
    stop_runs(pipe)
    with drawing:  # until the stopped run has given the pipeline its own scheduler back
        settings = resolve(pipe, settings, image)
    panel = PromptPanel(pipe, settings, folder, threaded, image)
    panel.run(settings)
    return panel


class PromptPanel(Runner, Controls):
    """What `prompt_panel` makes. `picture` is the latest one (a PIL image), `pictures` its run's, `box` the widgets."""

    def __init__(self, pipe, settings: Settings, folder: str | Path, threaded: bool | None, image: Image.Image | None):
        Runner.__init__(self, pipe, threaded)
        Controls.__init__(self, pipe, settings, self._try)
        self.pictures: list[Image.Image] = []
        self.history = History(self._bring_back)
        self._folder = folder
        self._meter = LiveMeter(pipe, self._show_progress)
        self._run_shown: Run | None = None

        self.save = widgets.Button(description="Save", icon="save", disabled=True, tooltip="Writes a PNG with settings")
        self.download = widgets.HTML("")
        self.load_file = widgets.FileUpload(accept=".png", description="Load settings")
        for button in (self.go, self.stop, self.save, self.load_file):
            button.layout.width = "auto"  # so that all stand in one row
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", margin="0", display="none"))
        self.box = widgets.VBox(
            [
                *self.rows,
                row(self.go, self.stop, self.save, self.download, self.load_file),
                row(self.bar, self.progress),
                self.message,
                self.image,
                self.history.box,
            ],
            layout=widgets.Layout(max_width="760px"),
        )
        self.set_start(image)
        self.save.on_click(lambda _: self._try(self._save))
        on_upload(self.load_file, lambda name, file: self._try(lambda: self.load(io.BytesIO(file), name)))

    @property
    def picture(self) -> Image.Image | None:
        """The latest one; of several, the first."""
        return self.pictures[0] if self.pictures else None

    def run(self, settings: Settings | None = None) -> Image.Image | None:
        """Draw in this thread and show; by default what the controls say. The picture, or None with a message.

        Starts from the panel's starting picture, if there is one. Never raises: what goes wrong is one sentence in the
        message, and the exception itself is in `error`. None too if it was stopped: `picture` is how far it came.
        """
        return self._run_here(settings or self.settings(), self.start)

    def load(self, file: str | Path | BinaryIO, name: str = "The file") -> None:
        """Set the controls to the settings inside a PNG of `save` or A1111, as far as this model can draw them.

        What it cannot is left as it was and said in the message. Raises ValueError, one sentence, if there are none.
        """
        record = images.record(file)
        said = self.restore_what_fits(record["settings"])
        if record.get("model") not in ("", None, model_name(self.pipe)):
            said.append(f"It was drawn with {record['model']}: this is {model_name(self.pipe)}, whose picture differs.")
        if record.get("others"):
            said.append(f"Not used, for nothing here knows it: {', '.join(record['others'])}.")
        self._say(f"{name} has settings inside: press Generate to draw it again.", *said)

    def _prepare(self) -> tuple[Settings, Image.Image | None]:
        self.pick_seed()
        return self.settings(), self.start

    def _draw(self, settings: Settings, start: Image.Image | None) -> Image.Image | None:
        try:
            return self._draw_and_tell(settings, start)
        finally:
            self._show()

    def _draw_and_tell(self, settings: Settings, start: Image.Image | None) -> Image.Image | None:
        said, begun, stopped = [], time.perf_counter(), False
        try:
            drawn = generate(
                self.pipe, settings, start, on_step=self._on_step, should_stop=self._stop.is_set, say=said.append
            )
        except KeyboardInterrupt:
            drawn = []
        if drawn:
            line = f"Drawn in {time.perf_counter() - begun:.1f} s: {_words(drawn)}; {self._meter.memory()}."
        else:
            stopped, drawn = True, partial(self.pipe, said.append)
            line = "Stopped; the picture below is the one from before."
            if drawn:
                line = f"Stopped after step {drawn[0].info['stopped_after']}, with what it was going to be so far."
        if drawn:
            self._run_shown = Run(tuple(drawn), start)
            self.pictures = drawn
            self.history.add(self._run_shown)
        self._say(line, *said)
        return None if stopped else self.picture

    def _on_step(self, step: int, steps: int, latents: torch.Tensor) -> None:
        self.bar.max, self.bar.value = steps, step
        self._meter(step, steps, latents)

    def _show_progress(self, line: str, preview: Image.Image, last: bool) -> None:
        self.progress.value = line
        if self.picture is not None and not last:  # the page stretches it to the width of the picture before
            self.image.value = to_png(preview)

    def _show(self) -> None:
        """The latest run, instead of a preview, and its file to download."""
        if self._run_shown is None:
            return
        sheet = self._run_shown.sheet
        factor = -(-SHOWN // max(sheet.size))  # rounded up
        size = (sheet.width * factor, sheet.height * factor)
        self.image.value = to_png(sheet.resize(size, Image.Resampling.NEAREST))
        self.image.width = str(size[0])
        self.image.layout.display = None
        self.save.disabled = False
        name = f"{images.file_stem(self._run_shown.settings)}.png"
        self.download.value = link(name, images.encoded(sheet), "image/png")

    def _bring_back(self, run: Run) -> None:
        """A thumbnail was clicked. During a run its controls come back, and its picture has to wait."""
        self.restore(run.settings)
        self.set_start(run.start)
        if self._busy.acquire(blocking=False):
            try:
                self.pictures, self._run_shown = list(run.pictures), run
                self._show()
                self._say(f"Back again: {_words(run.pictures)}.")
            finally:
                self._busy.release()

    def _save(self) -> None:
        paths = [images.save(picture, folder=self._folder) for picture in self.pictures]
        self._say(f"Saved as {', '.join(str(in_repository(path)) for path in paths)}, with the settings inside.")


def _words(pictures) -> str:
    """What drew them, with the seed in any case."""
    drawn = pictures[0].info["settings"]
    seeds = f"seed {drawn.seed}" if len(pictures) == 1 else f"seeds {drawn.seed} to {drawn.seed + len(pictures) - 1}"
    stopped = pictures[0].info.get("stopped_after")
    end = f", stopped after step {stopped}" if stopped is not None else ""
    return f"{seeds}, {drawn.steps} steps, guidance scale {drawn.guidance:g}{end}"
