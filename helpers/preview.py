"""Watch a picture appear: `meter = LiveMeter(pipe)`, then `generate(pipe, settings, on_step=meter)`."""

import io
import sys
import time
from base64 import b64encode
from collections.abc import Callable

import diffusers
import psutil
import torch
from PIL import Image

from helpers.images import grid, to_image
from helpers.latent_rgb import LatentToRgb, fit_rgb
from helpers.memory import GIB
from helpers.schedulers import predicted_x0

SHARE = 0.04  # of the steps' time that watching may cost; 5 % is the promise, the rest is for updates that take longer
SHOWN = 192  # pixels of the longer side of a preview, which a latent has far fewer of


class LiveMeter:
    """An `on_step` for `generate` that shows step, seconds a step, time left, the most memory, and the picture so far.

    In a notebook it is a line and a small picture that change in place, elsewhere a line of text. The picture is the
    model's guess of the finished one (`predicted_x0`; of a batch, all in rows) through `rgb`, the map of `fit_rgb`,
    smoothly enlarged. The map is made at once, or at the first step where the VAE comes and goes. It shows so rarely
    that it costs at most 5 % of the time between steps; `share` says what it did cost. One meter may watch any number
    of runs. `show(line, picture, last)` puts both elsewhere than below the cell; `last` is true at a run's last step.
    `memory()` is what the line says of the memory: the most that was seen after any step of this run.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, show: Callable[[str, Image.Image, bool], None] | None = None):
        self.pipe = pipe
        self.rgb: LatentToRgb | None = None
        self.line = ""  # as shown last
        self.picture: Image.Image | None = None
        self.share = 0.0  # of the time between the first step and the last one, spent here
        self._show_elsewhere = show
        self._process = psutil.Process()
        self._ram = self._vram = 0  # bytes, the most so far
        stage = getattr(pipe, "stage", None)
        # Networks on the CPU beside a GPU may be offloaded ones: then the first latents tell where they compute.
        later = pipe.device.type in ("cpu", "meta") and torch.accelerator.is_available()
        if not (later if stage is None else stage.encoders_leave):
            self._prepare(pipe.device if stage is None else stage.device)

    def __call__(self, step: int, steps: int, latents: torch.Tensor) -> None:
        now = time.perf_counter()
        if step == 1:
            if self.rgb is None:
                self._prepare(latents.device)
            self._start, self._spent = time.perf_counter(), 0.0
            self._show = self._show_elsewhere or _Display()
            self._ram = self._vram = 0
            now = self._start
        self._ram = max(self._ram, self._process.memory_info().rss)
        if torch.cuda.is_available():
            free, self._vram_total = torch.cuda.mem_get_info()
            self._vram = max(self._vram, self._vram_total - free)
        elapsed = now - self._start
        # One more is held back for the last step, which is always shown.
        if step == steps or self._spent + 2 * self._cost <= SHARE * elapsed:
            self.line = self._line(step, steps, elapsed - self._spent)
            self.picture = self._picture()
            self._show(self.line, self.picture, step == steps)
            self._cost = time.perf_counter() - now
            self._spent += self._cost
        self.share = self._spent / elapsed if elapsed else 0.0

    def _prepare(self, device: torch.device) -> None:
        self.rgb = fit_rgb(self.pipe.vae, device)
        for _ in range(2):  # the first PNG of a process takes longer
            start = time.perf_counter()
            to_png(Image.new("RGB", (SHOWN, SHOWN)))
        self._cost = 4 * (time.perf_counter() - start)  # a guess of what an update takes

    def _line(self, step: int, steps: int, seconds: float) -> str:
        parts = [f"step {step} of {steps}"]
        if step > 1:
            each = seconds / (step - 1)
            parts += [f"{each:.2f} s/it", f"{each * (steps - step):.0f} s left"]
        return ", ".join([*parts, self.memory()])

    def memory(self) -> str:
        """The most memory in use after any step of this run, by the process and on the whole GPU."""
        ram = f"RAM at most {self._ram / GIB:.1f} GiB"
        if not self._vram:
            return ram
        return f"VRAM at most {self._vram / GIB:.1f} of {self._vram_total / GIB:.1f} GiB, {ram}"

    def _picture(self) -> Image.Image:
        small = [to_image(colours) for colours in self.rgb(predicted_x0(self.pipe.scheduler))]
        scale = SHOWN / max(small[0].size)
        size = round(small[0].width * scale), round(small[0].height * scale)
        large = [one.resize(size, Image.Resampling.BICUBIC) for one in small]
        return large[0] if len(large) == 1 else grid(large)


class _Display:
    """A line and a picture below a cell, made by the first call; in plain Python a line, rewritten in a terminal."""

    def __init__(self):
        self.handles = None

    def __call__(self, line: str, picture: Image.Image, last: bool) -> None:
        if not _in_notebook():
            if sys.stdout.isatty():
                print(f"\r{line:<79}", end="\n" if last else "", flush=True)
            elif last:
                print(line)
            return
        from IPython.display import display

        # As plain text and PNG, so that nothing has to be escaped and every page shows the last state.
        contents = (
            {"text/plain": line},
            {"image/png": b64encode(to_png(picture)).decode(), "text/plain": "the picture so far"},
        )
        if self.handles is None:
            self.handles = [display(content, raw=True, display_id=True) for content in contents]
        else:
            for handle, content in zip(self.handles, contents, strict=True):
                handle.update(content, raw=True)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def to_png(picture: Image.Image) -> bytes:
    """The file of a picture that is looked at once, little compressed because that takes the time."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
