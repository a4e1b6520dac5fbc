"""Watch a picture appear: `meter = LiveMeter(pipe)`, then `generate(pipe, settings, on_step=meter)`.

The preview needs no decoding. Each channel of a latent is close to a mixture of colours, so that a linear map from
latents to RGB, fitted here to the very VAE in use, draws a small picture for the price of one matrix product.
"""

import io
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import psutil
import torch
from PIL import Image

from helpers.clean import clean_latents
from helpers.images import to_image
from helpers.memory import GIB

PICTURES, HELD_OUT = 48, 16  # made for the fit, the latter only for its R2
SIDE = 128  # pixels of each at most
SHARE = 0.04  # of the steps' time that watching may cost; 5 % is the promise, the rest is for updates that take longer
SHOWN = 192  # pixels; a preview is enlarged by a whole factor


@dataclass(frozen=True)
class LatentToRgb:
    """A linear map from latents, as the denoiser has them, to colours averaged over the VAE's factor."""

    weight: torch.Tensor  # (C, 3), float32 on the CPU
    bias: torch.Tensor  # (3,)
    r2: float  # of the colours' variance, the share that it explains in pictures that it was not fitted to

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., C, h, w) of any dtype and device to colours (..., 3, h, w), about -1 to 1, on the CPU."""
        return torch.einsum("...chw,cr->...rhw", latents.float().cpu(), self.weight) + self.bias[:, None, None]


@torch.no_grad()
def fit_rgb(vae: diffusers.AutoencoderKL) -> LatentToRgb:
    """Fit the map by least squares to 32 pictures that this VAE encodes, and measure R2 on 16 others.

    The pictures are made on the spot and are the same for every call: what the VAE decodes from smooth random latents.
    A small VAE cannot encode just any picture, but these it can. Takes a second or two.
    """
    config = vae.config
    shift = getattr(config, "shift_factor", None) or 0
    factor = 2 ** (len(config.block_out_channels) - 1)
    side = min(SIDE, config.sample_size) // factor
    coarse = torch.randn(PICTURES, config.latent_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(1.2 * coarse, (side, side), mode="bicubic")  # that lowers the variance
    latents, colours = [], []
    for few in (smooth / config.scaling_factor + shift).to(vae.device, vae.dtype).split(4):
        pictures = vae.decode(few).sample.clamp(-1, 1)
        latents.append((vae.encode(pictures).latent_dist.mode().double().cpu() - shift) * config.scaling_factor)
        colours.append(torch.nn.functional.avg_pool2d(pictures.double().cpu(), factor))
    # One row for each place of each picture.
    x, y = (torch.cat(maps).permute(0, 2, 3, 1).reshape(PICTURES, side**2, -1) for maps in (latents, colours))
    (x_test, x), (y_test, y) = ((z[:HELD_OUT].flatten(0, 1), z[HELD_OUT:].flatten(0, 1)) for z in (x, y))
    weight = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    bias = y.mean(0) - x.mean(0) @ weight
    unexplained = (x_test @ weight + bias - y_test).square().sum() / (y_test - y_test.mean(0)).square().sum()
    return LatentToRgb(weight.float(), bias.float(), 1 - unexplained.item())


class LiveMeter:
    """An `on_step` for `generate` that shows step, seconds a step, time left, memory, and the picture so far.

    In a notebook it is a line and a small picture that change in place, elsewhere a line of text. The picture is the
    model's guess of the finished one (`clean_latents`, the first of a batch) through `rgb`, the map of `fit_rgb`,
    which is made when the VAE is there. It shows so rarely that it costs at most 5 % of the time between steps;
    `share` says what it did cost. One meter may watch any number of runs. `show(line, picture, last)` puts both
    elsewhere than below the cell; `last` is true at a run's last step.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, show: Callable[[str, Image.Image, bool], None] | None = None):
        self.pipe = pipe
        self.rgb: LatentToRgb | None = None
        self.line = ""  # as shown last
        self.picture: Image.Image | None = None
        self.share = 0.0  # of the time between the first step and the last one, spent here
        self._show_elsewhere = show
        if pipe.vae is not None:  # else it is loaded with the first picture
            self._prepare()

    def __call__(self, step: int, steps: int, latents: torch.Tensor) -> None:
        now = time.perf_counter()
        if step == 1:
            if self.rgb is None:
                self._prepare()
            self._start, self._spent = time.perf_counter(), 0.0
            self._show = self._show_elsewhere or _Display()
            now = self._start
        elapsed = now - self._start
        # One more is held back for the last step, which is always shown.
        if step == steps or self._spent + 2 * self._cost <= SHARE * elapsed:
            self.line = self._line(step, steps, elapsed - self._spent)
            self.picture = self._picture()
            self._show(self.line, self.picture, step == steps)
            self._cost = time.perf_counter() - now
            self._spent += self._cost
        self.share = self._spent / elapsed if elapsed else 0.0

    def _prepare(self) -> None:
        self.rgb = fit_rgb(self.pipe.vae)
        for _ in range(2):  # the first PNG of a process takes longer
            start = time.perf_counter()
            to_png(Image.new("RGB", (SHOWN, SHOWN)))
        self._cost = 4 * (time.perf_counter() - start)  # a guess of what an update takes

    def _line(self, step: int, steps: int, seconds: float) -> str:
        parts = [f"step {step} of {steps}"]
        if step > 1:
            each = seconds / (step - 1)
            parts += [f"{each:.2f} s/it", f"{each * (steps - step):.0f} s left"]
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            parts.append(f"VRAM {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB")
        parts.append(f"RAM {psutil.Process().memory_info().rss / GIB:.1f} GiB")
        return ", ".join(parts)

    def _picture(self) -> Image.Image:
        small = to_image(self.rgb(clean_latents(self.pipe.scheduler)[0]))
        factor = -(-SHOWN // max(small.size))
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


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
