"""What the panels share: Generate and Stop, a bar, a message, a file to download, and one run at a time."""

import base64
import html
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import diffusers
import ipywidgets as widgets
import torch
from IPython.display import display

from helpers.loading.registry import ROOT

LONGEST = 300  # characters of a sentence that is shown
DOUBLE_CLICK_S = 0.3  # clicks made during a run without threads are heard at its end, all within this time

_runners = weakref.WeakSet()


class Runner:
    """A run in a thread, which Stop ends, or in the kernel's own, which an interrupt ends. Clicks during it do nothing.

    A panel is a subclass with its widgets in `box`: `_prepare()` reads its controls as Generate is pressed, and
    `_draw(...)` is called with what that returned, draws, and says what came of it. `threaded=None` decides by the
    machine: Colab does not show what a thread does to a widget. `error` is what went wrong in the latest run.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, threaded: bool | None):
        self.pipe = pipe
        self.error: Exception | None = None  # with its traceback
        self._threaded = "google.colab" not in sys.modules if threaded is None else threaded
        self._busy, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._ended = 0.0  # when the latest run did
        self.go = widgets.Button(description="Generate", icon="play", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True, tooltip="Ends the run at this step")
        if not self._threaded:
            self.stop.tooltip = "Here the menu stops a run: Runtime, Interrupt execution"
        self.bar = widgets.IntProgress(0, 0, 1)
        self.progress, self.message = widgets.HTML(""), widgets.HTML("")
        self.go.on_click(self._on_generate)
        self.stop.on_click(lambda _: self.stop_run())
        _runners.add(self)

    def _ipython_display_(self) -> None:
        display(self.box)

    def wait(self, timeout: float | None = None) -> None:
        """Until the run that a click started is over."""
        if self._thread is not None:
            self._thread.join(timeout)

    def stop_run(self) -> None:
        """End the run that is under way, if any, after the step that it is at."""
        self._stop.set()
        if self._busy.locked():
            self.progress.value = "stopping"

    def _prepare(self) -> tuple:
        raise NotImplementedError

    def _draw(self, *prepared):
        raise NotImplementedError

    def _on_generate(self, _) -> None:
        if not self._threaded:
            if time.perf_counter() - self._ended > DOUBLE_CLICK_S:
                self._run_here(*self._prepare())
        elif self._begin():
            self._thread = threading.Thread(target=self._work, args=self._prepare(), daemon=True)
            self._thread.start()

    def _run_here(self, *prepared):
        """The run in this thread, unless there is one: what `_draw` returns, or None."""
        return self._work(*prepared) if self._begin() else None

    def _begin(self) -> bool:
        """Whether a run may begin, since there is none. A Stop from now on is for this one."""
        free = self._busy.acquire(blocking=False)
        if free:
            self._stop.clear()
        return free

    def _work(self, *prepared):
        """Never raises: what goes wrong is one sentence in the message."""
        try:
            return self._run(*prepared)
        finally:
            self._busy.release()

    def _run(self, *prepared):
        self.error = None
        self.go.disabled, self.stop.disabled = True, not self._threaded
        self.bar.value, self.bar.max, self.bar.bar_style = 0, 1, ""
        self.progress.value = "starting"
        self._say("" if self._threaded else "Drawing; Runtime, Interrupt execution stops it.")
        try:
            return self._draw(*prepared)
        except KeyboardInterrupt:
            self._say("Stopped; what is below is from before.")
        except Exception as error:  # a panel has no other place to tell it
            self.error = error
            self.bar.bar_style = "danger"
            self._say(sentence(error), bad=True)
        finally:
            self.progress.value = ""
            self.go.disabled, self.stop.disabled = False, True
            self._ended = time.perf_counter()
        return None

    def _say(self, *sentences: str, bad: bool = False) -> None:
        """Everything here may hold what a person typed, so all of it is escaped."""
        text = "<br>".join(html.escape(short(sentence)) for sentence in sentences)
        role, edge = ("alert", "border-left: 4px solid #d33; padding-left: 8px; ") if bad else ("status", "")
        self.message.value = f'<div role="{role}" style="{edge}line-height: 1.4">{text}</div>' if text else ""

    def _try(self, work: Callable[[], None]) -> None:
        """Do what a control asks for, or say in one sentence why not."""
        try:
            work()
        except (ValueError, OSError, MemoryError) as error:
            self._say(sentence(error), bad=True)


def stop_runs(pipe: diffusers.DiffusionPipeline) -> None:
    """Stop what other panels have under way on this pipeline, as their cells run again: nothing else could any more."""
    for runner in list(_runners):
        if runner.pipe is pipe:
            runner.stop_run()


def link(name: str, content: bytes, kind: str, text: str = "Download") -> str:
    """HTML of a button that downloads `content` as `name`, of the MIME type `kind`.

    The file is in the link, which so works where the kernel is on another machine, and in Colab's frames.
    """
    file = base64.b64encode(content).decode()
    return (
        f'<a download="{html.escape(name)}" class="jupyter-button widget-button" style="width: auto; margin: 0; '
        f'box-sizing: border-box; display: block" href="data:{kind};base64,{file}">{html.escape(text)}</a>'
    )


def in_repository(path: Path) -> Path:
    """The path as it is shown: without what is above the repository."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def short(sentence: str) -> str:
    """A sentence to show, which may quote what somebody typed: 10,000 characters, say."""
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]} …"


def sentence(error: Exception) -> str:
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
