"""A prompt panel below a cell: type, press Generate, watch, look. Thin over `generate`; for ipywidgets 7 and 8."""

import html
import random
import sys
import threading
import time
from pathlib import Path

import diffusers
import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image

from helpers import images
from helpers.generate import Settings, generate, resolve
from helpers.preview import LiveMeter, to_png

SHOWN = 256  # pixels; smaller pictures are enlarged by a whole factor, without smoothing


def prompt_panel(
    pipe: diffusers.DiffusionPipeline,
    settings: Settings | None = None,
    folder: str | Path = "outputs",
    threaded: bool | None = None,
) -> "PromptPanel":
    """A panel that shows its first picture already: that of `settings`, by default the model's first example.

    The last line of a cell shows it. Saved pictures go to `folder`, which is in the repository if it is relative.
    `threaded=False` draws in the kernel's own thread, where no Stop button can be heard; None decides by the machine:
    Colab does not show what a thread does to a widget.
    """
    if settings is None:
        model = getattr(pipe, "model", None)
        settings = Settings(model.examples[0] if model else "a red boat by the sea")
    panel = PromptPanel(pipe, resolve(pipe, settings), folder, threaded)
    panel.run(settings)
    return panel


class PromptPanel:
    """What `prompt_panel` makes. `picture` is the latest one (a PIL image), `box` the widgets."""

    def __init__(self, pipe, settings: Settings, folder: str | Path, threaded: bool | None):
        self.pipe = pipe
        self.picture: Image.Image | None = None
        self.error: Exception | None = None  # what went wrong in the latest run, with its traceback
        self._settings = settings  # for what has no control: size, scheduler
        self._folder = folder
        self._threaded = "google.colab" not in sys.modules if threaded is None else threaded
        self._meter = LiveMeter(pipe, self._show_progress)
        self._busy, self._stop, self._thread = threading.Lock(), threading.Event(), None

        wide = widgets.Layout(width="100%")
        name = {"description_width": "110px"}
        self.prompt = widgets.Text(settings.prompt, description="Prompt", style=name, layout=wide)
        self.negative_prompt = widgets.Text(settings.negative_prompt, description="Not wanted", style=name, layout=wide)
        self.steps = widgets.IntSlider(
            settings.steps, 1, max(50, settings.steps), description="Steps", style=name, continuous_update=False
        )
        self.guidance = widgets.FloatSlider(
            settings.guidance, min=0, max=max(15, settings.guidance), step=0.5,
            description="Guidance scale", style=name, continuous_update=False,
        )  # fmt: skip
        # Text, not a number box: that one would turn "abc" into 0 without a word.
        self.seed = widgets.Text(
            str(settings.seed), description="Seed", style=name, layout=widgets.Layout(width="240px")
        )
        self.dice = widgets.Button(description="New seed", icon="random", tooltip="Pick a seed by chance")
        self.go = widgets.Button(description="Generate", icon="play", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.save = widgets.Button(description="Save", icon="download", disabled=True)
        if not self._threaded:
            self.stop.tooltip = "Here the menu stops a run: Runtime, Interrupt execution"
        self.bar = widgets.IntProgress(0, 0, settings.steps)
        self.progress = widgets.HTML("")
        self.message = widgets.HTML("")
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display="none"))
        self.box = widgets.VBox(
            [
                self.prompt,
                self.negative_prompt,
                widgets.HBox([self.steps, self.guidance], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox([self.seed, self.dice]),
                widgets.HBox([self.go, self.stop, self.save]),
                widgets.HBox([self.bar, self.progress]),
                self.message,
                self.image,
            ],
            layout=widgets.Layout(max_width="720px"),
        )
        self.dice.on_click(lambda _: setattr(self.seed, "value", str(random.randrange(2**32))))
        self.go.on_click(self._on_generate)
        self.stop.on_click(self._on_stop)
        self.save.on_click(self._on_save)

    def _ipython_display_(self) -> None:
        display(self.box)

    def settings(self) -> Settings:
        """What the controls say, unchecked."""
        values = {**vars(self._settings), "seed": self.seed.value.strip()}
        for name in ("prompt", "negative_prompt", "steps", "guidance"):
            values[name] = getattr(self, name).value
        return Settings(**values)

    def run(self, settings: Settings | None = None) -> Image.Image | None:
        """Draw in this thread and show; by default what the controls say. The picture, or None with a message.

        Never raises: what goes wrong is one sentence in the message, and the exception itself is in `error`.
        """
        if not self._busy.acquire(blocking=False):
            return None
        try:
            return self._run(settings or self.settings())
        finally:
            self._busy.release()

    def wait(self, timeout: float | None = None) -> None:
        """Until the run that a click started is over."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, settings: Settings) -> Image.Image | None:
        self.error = None
        self._stop.clear()
        self.go.disabled, self.stop.disabled = True, not self._threaded
        self.bar.value, self.bar.max, self.bar.bar_style = 0, 1, ""
        self.progress.value = "starting"
        self._say("" if self._threaded else "Drawing; Runtime, Interrupt execution stops it.")
        said, start = [], time.perf_counter()
        try:
            drawn = generate(self.pipe, settings, on_step=self._on_step, should_stop=self._stop.is_set, say=said.append)
            if drawn:
                self.picture, self.save.disabled = drawn[0], False
                self._say(f"Drawn in {time.perf_counter() - start:.1f} s: {_words(self.picture)}", *said)
            else:
                self._say("Stopped; the picture below is the one from before.")
            return self.picture if drawn else None
        except KeyboardInterrupt:
            self._say("Stopped; the picture below is the one from before.")
        except Exception as error:  # a panel has no other place to tell it
            self.error = error
            self.bar.bar_style = "danger"
            self._say(_sentence(error), bad=True)
        finally:
            self._show()
            self.progress.value = ""
            self.go.disabled, self.stop.disabled = False, True
        return None

    def _on_step(self, step: int, steps: int, latents: torch.Tensor) -> None:
        self.bar.max, self.bar.value = steps, step
        self._meter(step, steps, latents)

    def _show_progress(self, line: str, preview: Image.Image, last: bool) -> None:
        self.progress.value = line
        if self.picture is not None and not last:  # the page stretches it to the size of the picture before
            self.image.value = to_png(preview)

    def _show(self) -> None:
        """The latest picture, instead of a preview."""
        if self.picture is None:
            return
        factor = -(-SHOWN // max(self.picture.size))  # rounded up
        size = (self.picture.width * factor, self.picture.height * factor)
        self.image.value = to_png(self.picture.resize(size, Image.Resampling.NEAREST))
        self.image.width, self.image.height = map(str, size)
        self.image.layout.display = None

    def _say(self, *sentences: str, bad: bool = False) -> None:
        """Everything here may hold what a person typed, so all of it is escaped."""
        text = "<br>".join(html.escape(sentence) for sentence in sentences)
        self.message.value = f'<span style="color: #b00020">{text}</span>' if bad else text

    def _on_generate(self, _) -> None:
        if not self._threaded:
            self.run()
        elif self._busy.acquire(blocking=False):  # a click during a run is ignored
            self._thread = threading.Thread(target=self._work, args=(self.settings(),), daemon=True)
            self._thread.start()

    def _work(self, settings: Settings) -> None:
        try:
            self._run(settings)
        finally:
            self._busy.release()

    def _on_stop(self, _) -> None:
        self._stop.set()
        self.progress.value = "stopping"

    def _on_save(self, _) -> None:
        if self.picture is None:
            return
        try:
            path = images.save(self.picture, folder=self._folder)
        except (OSError, ValueError) as error:
            self._say(_sentence(error), bad=True)
        else:
            shown = path.relative_to(images.ROOT) if path.is_relative_to(images.ROOT) else path
            self._say(f"Saved as {shown}, with its settings inside.")


def _words(picture: Image.Image) -> str:
    drawn = picture.info["settings"]
    return f"seed {drawn.seed}, {drawn.steps} steps, guidance scale {drawn.guidance:g}."


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
