"""A prompt panel below a cell: type, press Generate, watch, look. Thin over `generate`; for ipywidgets 7 and 8."""

import base64
import html
import io
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import BinaryIO

import diffusers
import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image

from helpers import images
from helpers.controls import Controls, on_upload, row, short
from helpers.generate import Settings, generate, model_name, partial, resolve
from helpers.history import History, Run
from helpers.preview import LiveMeter, to_png

SHOWN = 256  # pixels; smaller pictures are enlarged by a whole factor, without smoothing
DOUBLE_CLICK_S = 0.3  # clicks made during a run without threads are heard at its end, all within this time

_panels = weakref.WeakSet()


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
    settings = resolve(pipe, settings, image)
    for other in list(_panels):
        if other.pipe is pipe:
            other.stop_run()
    panel = PromptPanel(pipe, settings, folder, threaded, image)
    panel.run(settings)
    return panel


class PromptPanel(Controls):
    """What `prompt_panel` makes. `picture` is the latest one (a PIL image), `pictures` its run's, `box` the widgets."""

    def __init__(self, pipe, settings: Settings, folder: str | Path, threaded: bool | None, image: Image.Image | None):
        super().__init__(pipe, settings, self._try)
        self.pictures: list[Image.Image] = []
        self.error: Exception | None = None  # what went wrong in the latest run, with its traceback
        self.history = History(self._bring_back)
        self._folder = folder
        self._threaded = "google.colab" not in sys.modules if threaded is None else threaded
        self._meter = LiveMeter(pipe, self._show_progress)
        self._busy, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._ended = 0.0  # when the latest run did
        self._run_shown: Run | None = None

        self.go = widgets.Button(description="Generate", icon="play", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True, tooltip="Ends the run at this step")
        self.save = widgets.Button(description="Save", icon="save", disabled=True, tooltip="Writes a PNG with settings")
        self.download = widgets.HTML("")
        self.load_file = widgets.FileUpload(accept=".png", description="Load settings")
        self.load_file.layout.width = "auto"
        if not self._threaded:
            self.stop.tooltip = "Here the menu stops a run: Runtime, Interrupt execution"
        self.bar = widgets.IntProgress(0, 0, settings.steps)
        self.progress = widgets.HTML("")
        self.message = widgets.HTML("")
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display="none"))
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
        self.go.on_click(self._on_generate)
        self.stop.on_click(lambda _: self.stop_run())
        self.save.on_click(lambda _: self._try(self._save))
        on_upload(self.load_file, lambda name, file: self._try(lambda: self.load(io.BytesIO(file), name)))
        _panels.add(self)

    def _ipython_display_(self) -> None:
        display(self.box)

    @property
    def picture(self) -> Image.Image | None:
        """The latest one; of several, the first."""
        return self.pictures[0] if self.pictures else None

    def run(self, settings: Settings | None = None) -> Image.Image | None:
        """Draw in this thread and show; by default what the controls say. The picture, or None with a message.

        Starts from the panel's starting picture, if there is one. Never raises: what goes wrong is one sentence in the
        message, and the exception itself is in `error`. None too if it was stopped: `picture` is how far it came.
        """
        if not self._busy.acquire(blocking=False):
            return None
        try:
            return self._run(settings or self.settings(), self.start)
        finally:
            self._busy.release()

    def wait(self, timeout: float | None = None) -> None:
        """Until the run that a click started is over."""
        if self._thread is not None:
            self._thread.join(timeout)

    def stop_run(self) -> None:
        """End the run that is under way, if any, after the step that it is at."""
        self._stop.set()
        if self._busy.locked():
            self.progress.value = "stopping"

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

    def _run(self, settings: Settings, start: Image.Image | None) -> Image.Image | None:
        self.error, stopped = None, False
        self._stop.clear()
        self.go.disabled, self.stop.disabled = True, not self._threaded
        self.bar.value, self.bar.max, self.bar.bar_style = 0, 1, ""
        self.progress.value = "starting"
        self._say("" if self._threaded else "Drawing; Runtime, Interrupt execution stops it.")
        said, begun = [], time.perf_counter()
        try:
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
        except KeyboardInterrupt:  # once more, while the picture so far was decoded
            self._say("Stopped; the picture below is the one from before.")
        except Exception as error:  # a panel has no other place to tell it
            self.error = error
            self.bar.bar_style = "danger"
            self._say(_sentence(error), bad=True)
        finally:
            self._show()
            self.progress.value = ""
            self.go.disabled, self.stop.disabled = False, True
            self._ended = time.perf_counter()
        return None

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
        name, file = images.file_stem(self._run_shown.settings), base64.b64encode(images.encoded(sheet)).decode()
        # A link with the file in it works where the kernel is on another machine, and in Colab's frames.
        look = "jupyter-button widget-button"
        self.download.value = (
            f'<a download="{name}.png" class="{look}" href="data:image/png;base64,{file}">Download</a>'
        )

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

    def _say(self, *sentences: str, bad: bool = False) -> None:
        """Everything here may hold what a person typed, so all of it is escaped."""
        text = "<br>".join(html.escape(short(sentence)) for sentence in sentences)
        style = ' role="alert" style="border-left: 4px solid #d33; padding-left: 8px"' if bad else ' role="status"'
        self.message.value = f"<div{style}>{text}</div>" if text else ""

    def _try(self, work) -> None:
        """Do what a control asks for, or say in one sentence why not."""
        try:
            work()
        except (ValueError, OSError, MemoryError) as error:
            self._say(_sentence(error), bad=True)

    def _on_generate(self, _) -> None:
        if not self._threaded:
            if time.perf_counter() - self._ended > DOUBLE_CLICK_S:
                self.pick_seed()
                self.run()
        elif self._busy.acquire(blocking=False):  # a click during a run is ignored
            self.pick_seed()
            self._thread = threading.Thread(target=self._work, args=(self.settings(), self.start), daemon=True)
            self._thread.start()

    def _work(self, settings: Settings, start: Image.Image | None) -> None:
        try:
            self._run(settings, start)
        finally:
            self._busy.release()

    def _save(self) -> None:
        paths = [images.save(picture, folder=self._folder) for picture in self.pictures]
        shown = [path.relative_to(images.ROOT) if path.is_relative_to(images.ROOT) else path for path in paths]
        self._say(f"Saved as {', '.join(map(str, shown))}, with the settings inside.")


def _words(pictures) -> str:
    """What drew them, with the seed in any case."""
    drawn = pictures[0].info["settings"]
    seeds = f"seed {drawn.seed}" if len(pictures) == 1 else f"seeds {drawn.seed} to {drawn.seed + len(pictures) - 1}"
    stopped = pictures[0].info.get("stopped_after")
    end = f", stopped after step {stopped}" if stopped is not None else ""
    return f"{seeds}, {drawn.steps} steps, guidance scale {drawn.guidance:g}{end}"


def _sentence(error: Exception) -> str:
    """One line to read. ValueError and RuntimeError of ours are sentences already."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU's memory is full: restart the kernel, or draw a smaller picture."
    if isinstance(error, MemoryError):
        return "The RAM is full: restart the kernel, or draw a smaller picture."
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    first = text[0] if text else ""
    if " " not in first:  # a name or a number, which says nothing without the kind of error
        first = f"{type(error).__name__}: {first}" if first else f"It ended with {type(error).__name__}"
    return first if first.endswith((".", "!", "?")) else f"{first}."
