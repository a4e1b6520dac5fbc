"""The one way in which notebooks, panel and grid draw: `generate(pipe, Settings("a red boat"))`. No widget needed."""

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import diffusers
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from helpers.loading.machine import free, letting_go
from helpers.loading.versions import watched
from helpers.prompts import cut_off as cut_off
from helpers.prompts import notes as notes
from helpers.prompts import unknown_words as unknown_words
from helpers.schedulers import DIFFUSION_SCHEDULERS as DIFFUSION_SCHEDULERS
from helpers.schedulers import FLOW_SCHEDULERS as FLOW_SCHEDULERS
from helpers.schedulers import one_run_with, predicted_x0
from helpers.schedulers import schedulers as schedulers
from helpers.settings import Settings as Settings

STRENGTH = 0.8  # where a picture is given and no strength

# The classes of diffusers that start from a picture, and that redraw a part of one, beside each text-to-image class.
FROM_IMAGE = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
}
WITH_MASK = {
    "StableDiffusionPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3InpaintPipeline",
}

drawing = threading.RLock()  # a panel draws in a thread of its own, and a pipeline serves one run at a time


class _NotFinite(RuntimeError):
    """NaN or infinity; `half` says whether float32 may be the remedy."""

    def __init__(self, message: str, half: bool):
        super().__init__(message)
        self.half = half


class _Stopped(Exception):
    """Leaves the denoising loop early, and with it the pipeline, which would go on to decode the half-done noise."""


def generate(
    pipe: diffusers.DiffusionPipeline,
    settings: Settings,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    on_step: Callable[[int, int, torch.Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = print,
) -> list[Image.Image]:
    """Draw `settings.count` RGB pictures, or none at all ([]) if `should_stop` said so.

    With `image` they start from it: `settings.strength`, above 0 to 1, is the share of the noise levels that are
    passed anew. With `mask` too, only what is white in it is redrawn. Both are cropped at their centre to the shape
    that is drawn, and enlarged or reduced to its size.

    `on_step(step, steps, latents)` is called after every step, with step = 1..steps and the latents of the whole batch,
    (count, C, h, w), to look at and not to change; without it a progress bar is shown. `helpers.preview.LiveMeter` is
    one such function, and any may ask `predicted_x0(pipe.scheduler)` for the guess of the finished latents. `steps`
    counts the calls of the model, so two-stage samplers have more of them than `settings.steps`, and pictures that
    start from another one fewer. `should_stop()` is asked after every step but the last. Each picture carries what
    drew it in `image.info`: "settings" (filled in, its own seed) and "model".

    Where the GPU's memory runs full, a pipeline with a plan starts again under a smaller one, and a picture is
    decoded in tiles; where numbers outgrow float16, it is drawn again in float32, if there is room; `say` is told so.
    If decoding fails all the same, the finished latents are in `pipe.kept_latents` for
    `decode(pipe, pipe.kept_latents)`, and the steps need not be repeated. After a stop, and after an interrupt too,
    `partial(pipe)` gives the pictures as they were going to be.

    What the model will not see of the prompt is told to `say`, one sentence each (`notes`). Raises ValueError, one
    sentence, for settings that cannot be drawn, RuntimeError naming the stage if numbers stop being finite. Whatever
    happens, an error in a callback included, the pipeline is left as it was, and nothing that the run had made stays
    in memory. Two threads draw one after the other.
    """
    settings = resolve(pipe, settings, image, mask)
    size = settings.width, settings.height
    image, mask = (None if one is None else _fitted(one, mode, size) for one, mode in ((image, "RGB"), (mask, "L")))
    for sentence in notes(pipe, settings):
        say(sentence)
    bar = tqdm(total=settings.steps, leave=False, disable=not watched()) if on_step is None else None
    watch = _Watch(on_step, should_stop, bar)
    with letting_go(), drawing, one_run_with(pipe, settings.scheduler), silenced(pipe):
        pipe.kept_guess = None
        try:
            latents = _within_range(pipe, _Draw(pipe, settings, image, mask, watch), settings, say)
            pipe.kept_latents = latents  # until they are a picture
            pixels = decode(pipe, latents, say)
        except _Stopped:
            pipe.kept_guess = _Guess(predicted_x0(pipe.scheduler), settings, watch.step)
            return []
        except KeyboardInterrupt:
            if watch.step:
                pipe.kept_guess = _Guess(predicted_x0(pipe.scheduler), settings, watch.step)
            raise
        finally:
            pipe.maybe_free_model_hooks()  # an offloaded pipeline that was left early is still on the GPU
            if bar is not None:
                bar.close()
    pipe.kept_latents = None
    return _pictures(pipe, pixels, settings)


def partial(pipe: diffusers.DiffusionPipeline, say: Callable[[str], None] = print) -> list[Image.Image]:
    """The pictures of the latest run if it was stopped or interrupted: the model's last guess of the finished ones.

    [] if that run ended, or was left before its first step was done. `image.info` has "stopped_after", the number of
    steps, beside "settings", which draw the whole picture. Raises RuntimeError as `decode` does.
    """
    with letting_go(), drawing:
        guess = getattr(pipe, "kept_guess", None)
        if guess is None:
            return []
        try:
            pixels = decode(pipe, guess.latents, say)
        finally:
            pipe.maybe_free_model_hooks()
    images = _pictures(pipe, pixels, guess.settings)
    for image in images:
        image.info["stopped_after"] = guess.step
    return images


def _pictures(pipe, pixels: torch.Tensor, settings: Settings) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [0, 1] as RGB pictures that know what drew them."""
    images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(pixels))
    for k, drawn in enumerate(images):
        drawn.info["settings"] = replace(settings, seed=settings.seed + k, count=1)
        drawn.info["model"] = model_name(pipe)
    return images


@torch.no_grad()
def decode(
    pipe: diffusers.DiffusionPipeline, latents: torch.Tensor, say: Callable[[str], None] = print
) -> torch.Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1], one after the other; in tiles if the memory is full.

    What float16 cannot hold is decoded in float32. Raises RuntimeError, one sentence, if the memory is too full for
    tiles as well, or if numbers are not finite.
    """
    vae = pipe.vae
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    if not hasattr(pipe, "stage"):  # whose VAE takes any dtype, and may have another one when it comes
        scaled = scaled.to(vae.dtype)

    def whole() -> torch.Tensor:
        return torch.cat([vae.decode(one, return_dict=False)[0] for one in scaled.split(1)])

    pixels = _unless_full(whole)
    if pixels is None:
        say("The memory is full while decoding, so the picture is decoded in tiles, which may differ a little in tone.")
        with _tiling(vae, latents):
            pixels = _unless_full(whole)
    if pixels is None:
        raise RuntimeError(
            "The memory is full while decoding: free some, then decode(pipe, pipe.kept_latents) makes the picture."
        )
    if not torch.isfinite(pixels).all() and pixels.dtype == torch.float16 and torch.isfinite(scaled).all():
        with _in_float32([*vae.parameters(), *vae.buffers()]):
            scaled = scaled.float()
            pixels = whole()
    _require_finite(pixels, "the decoded picture")  # before infinity becomes white
    hidden = [False] * len(pixels)
    if getattr(pipe, "safety_checker", None) is not None:  # in a pipeline from elsewhere
        pixels, hidden = pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
    return pipe.image_processor.postprocess(pixels, "pt", [not h for h in hidden])


def resolve(
    pipe: diffusers.DiffusionPipeline,
    settings: Settings,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Settings:
    """The same settings with every None filled in from the model. Raises ValueError, one sentence, for bad ones."""
    model = getattr(pipe, "model", None)  # set by pipelines.load; a pipeline from elsewhere has SD1.5's defaults
    steps = settings.steps if settings.steps is not None else getattr(model, "steps", 25)
    guidance = settings.guidance if settings.guidance is not None else getattr(model, "guidance", 7.5)
    own, size = own_size(pipe), getattr(model, "size", None) or max(own_size(pipe))
    # The registry may ask for less than the size of training: 1024 pixels take twice the time of 768.
    height = settings.height if settings.height is not None else min(size, own[0])
    width = settings.width if settings.width is not None else min(size, own[1])
    scheduler = settings.scheduler or type(pipe.scheduler).__name__
    texts = {name: _text(getattr(settings, name), name.replace("_", " ")) for name in ("prompt", "negative_prompt")}
    if not texts["prompt"].strip():
        raise ValueError("The prompt is empty: write what the picture should show.")
    if scheduler not in schedulers(pipe):
        raise ValueError(
            f"There is no scheduler {str(scheduler)[:40]!r} here: choose one of {', '.join(schedulers(pipe))}."
        )
    guidance = _number(guidance)
    if guidance is None or guidance < 0:
        raise ValueError("The guidance is not a number of 0 or more: 1 switches it off, 3 to 8 is usual.")
    steps, count = _whole(steps, "steps", 1, 500), _whole(settings.count, "count", 1, 64)
    return replace(
        settings,
        **texts,
        steps=steps,
        guidance=guidance,
        seed=_whole(settings.seed, "seed", 0, 2**63 - count),
        height=_side(pipe, height, "height", own[0]),
        width=_side(pipe, width, "width", own[1]),
        scheduler=scheduler,
        count=count,
        strength=_strength(pipe, settings, steps, image, mask),
    )


def own_size(pipe: diffusers.DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was trained on."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def model_name(pipe: diffusers.DiffusionPipeline) -> str:
    """The name in the registry, or the last part of the folder or hub id that the pipeline came from."""
    model = getattr(pipe, "model", None)
    return model.name if model else str(getattr(pipe.config, "_name_or_path", "")).rstrip("/").split("/")[-1]


class _Guess(NamedTuple):
    """What is left of a run that was stopped: the predicted x0 (B, C, h, w) after `step` steps."""

    latents: torch.Tensor
    settings: Settings
    step: int


@dataclass
class _Watch:
    """What a pipeline of diffusers calls after every step."""

    on_step: Callable[[int, int, torch.Tensor], None] | None
    should_stop: Callable[[], bool] | None
    bar: tqdm | None
    step: int = 0  # so many are done

    def __call__(self, pipe, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        steps = pipe.num_timesteps
        if index == 0:
            _require_finite(tensors["prompt_embeds"], "the text encoder's output")
        _require_finite(tensors["latents"], f"the latents after step {index + 1} of {steps}")
        self.step = index + 1
        if self.on_step is not None:
            self.on_step(index + 1, steps, tensors["latents"])
        if self.bar is not None:
            self.bar.total, self.bar.n = steps, index + 1  # also after a new start
            self.bar.refresh()
        if self.should_stop is not None and index + 1 < steps and self.should_stop():
            raise _Stopped
        return {}


@dataclass
class _Draw:
    """The latents (count, C, h, w) of one run. `stage` is what it is at: "encode" or "denoise"."""

    pipe: diffusers.DiffusionPipeline
    settings: Settings
    image: Image.Image | None
    mask: Image.Image | None
    watch: _Watch
    stage: str = "encode"

    def __call__(self) -> torch.Tensor:
        settings = self.settings
        # CPU generators, one a picture: the same seed gives the same noise on every device and in every batch.
        generators = [torch.Generator("cpu").manual_seed(settings.seed + k) for k in range(settings.count)]
        return self._pipeline()(
            **self._texts(),
            **self._from_picture(),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="latent",
            callback_on_step_end=self.watch,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        ).images

    def _texts(self) -> dict:
        """The prompts; or of a pipeline with a plan, what its encoders make of them."""
        self.stage = "encode"
        texts, count = (self.settings.prompt, self.settings.negative_prompt), self.settings.count
        stage = getattr(self.pipe, "stage", None)
        if stage is None:
            return {"prompt": texts[0], "negative_prompt": texts[1], "num_images_per_prompt": count}
        stage.prepare()
        found = stage.encode(*texts)
        for one in found.values():
            _require_finite(one, "the text encoder's output")
        self.stage = "denoise"
        return {name: one.repeat_interleave(count, dim=0) for name, one in found.items()}

    def _from_picture(self) -> dict:
        size = {"height": self.settings.height, "width": self.settings.width}
        if self.image is None:
            return size
        # A copy for each picture, so that each has noise of its own seed.
        found = {"image": [self.image] * self.settings.count, "strength": self.settings.strength}
        if self.mask is not None:
            return found | size | {"mask_image": [self.mask] * self.settings.count}
        return found | (size if "3" in type(self.pipe).__name__ else {})  # SD1.5's class takes the picture's own

    def _pipeline(self) -> diffusers.DiffusionPipeline:
        if self.image is None:
            return self.pipe
        name = (FROM_IMAGE if self.mask is None else WITH_MASK)[type(self.pipe).__name__]
        cls, parts = getattr(diffusers, name), dict(self.pipe.components)
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = parts["safety_checker"] is not None
        other = cls(**parts)
        other.set_progress_bar_config(disable=True)
        return other


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"The {name} is not text: write one string, and use count for several pictures.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {name} has half a character in it: type it again rather than paste it.") from None
    return str(value)  # numpy has strings of its own


def _number(value) -> float | None:
    """A finite number from a widget, a form or a person; text such as "4.5" counts."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None  # nor NaN


def _whole(value, name: str, low: int, high: int) -> int:
    """A whole number from a widget, a form or a person; text such as "42" counts."""
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        shown = str(value)[:40] if number is None or abs(number) < 10**40 else "with its many digits"
        raise ValueError(f"The {name} {shown!r} is not a whole number from {low} to {high}: change it and run again.")
    return number


def _side(pipe, value, name: str, own: int) -> int:
    patch = getattr(pipe, "patch_size", 1)
    multiple = pipe.vae_scale_factor * patch
    low, high = max(multiple, own // 4 // multiple * multiple), own * 4
    positions = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "pos_embed_max_size", None)
    if positions is not None:  # beyond them the transformer does not know where a patch is
        high = min(high, positions * multiple)
    side = _whole(value, name, low, high)
    if side % multiple:
        near = max(low, min(high, round(side / multiple) * multiple))
        raise ValueError(f"The {name} {side} is not divisible by {multiple}: try {near}.")
    return side


def _strength(pipe, settings: Settings, steps: int, image, mask) -> float | None:
    for name, one in (("image", image), ("mask", mask)):
        if one is not None and not isinstance(one, Image.Image):
            raise ValueError(f"The {name} is not a picture: open it with PIL's Image.open.")
    if image is None:
        if mask is not None:
            raise ValueError("There is a mask and no image: give the picture that it is for.")
        return settings.strength
    if type(pipe).__name__ not in FROM_IMAGE:
        raise ValueError(f"{type(pipe).__name__} does not start from a picture here: load sd15 or a model like it.")
    strength = _number(STRENGTH if settings.strength is None else settings.strength)
    if strength is None or not 0 < strength <= 1:
        raise ValueError("The strength is not a number above 0 and up to 1: 0.3 keeps most of the picture, 0.8 little.")
    if int(steps * strength) < 1:
        raise ValueError(f"A strength of {strength:g} leaves none of {steps} steps: raise one of them.")
    return strength


def _fitted(picture: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """Upright, cropped at the centre to the shape of `size`, (width, height), and of that size."""
    picture = ImageOps.exif_transpose(picture).convert(mode)
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _within_range(pipe, draw: _Draw, settings: Settings, say: Callable[[str], None]) -> torch.Tensor:
    """`draw()` with less memory if need be, and again in float32 if its numbers outgrow float16."""
    try:
        return _with_less_memory(pipe, draw, settings, say)
    except _NotFinite as error:
        wide = _denoising_in_float32(pipe, draw.stage) if error.half else None
        if wide is None:
            raise
    say("Numbers outgrow float16, which ends at 65,504, so the picture is drawn again in float32, which takes longer.")
    with wide:
        return _with_less_memory(pipe, draw, settings, say)


def _denoising_in_float32(pipe, stage: str) -> AbstractContextManager | None:
    """For the time of one run; None where that is out of reach."""
    if hasattr(pipe, "stage"):
        return pipe.stage.in_float32() if stage == "denoise" and pipe.stage.has_room_for_float32() else None
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [one for part in networks for one in (*part.parameters(), *part.buffers())]
    # Without memory of their own they wait elsewhere, where diffusers copies them from layer by layer.
    return None if any(one.is_meta for one in tensors) else _in_float32(tensors)


def _with_less_memory(pipe, draw: _Draw, settings: Settings, say: Callable[[str], None]) -> torch.Tensor:
    """`draw()`, and again under smaller plans as long as the memory is full and the pipeline has one."""
    while True:
        try:
            with letting_go():
                return draw()
        except torch.OutOfMemoryError:
            if not hasattr(pipe, "stage"):
                raise
        # Out here the error is gone, and with it the tensors that its traceback held on to.
        sentence = pipe.stage.step_down(draw.stage, settings.height, settings.width, settings.count)
        if sentence is None:
            raise RuntimeError("The memory is full and no smaller plan is left: draw a smaller picture.")
        say(sentence)


def _unless_full(draw: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        with letting_go():
            return draw()
    except torch.OutOfMemoryError:
        pass
    free()
    return None


@contextmanager
def _tiling(vae, latents: torch.Tensor) -> Iterator[None]:
    """A quarter of the picture at a time, and a bit over, so that the seams can be blended."""
    own = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = max(2, max(latents.shape[-2:]) // 2)
    vae.tile_sample_min_size = vae.tile_latent_min_size * factor
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = own


@contextmanager
def _in_float32(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Those that are in float16 are in float32 for a while; no number changes."""
    half = [one for one in tensors if one.dtype == torch.float16]
    try:
        for one in half:
            one.data = one.data.float()
        yield
    finally:
        for one in half:
            one.data = one.data.half()


def _require_finite(tensor: torch.Tensor, stage: str) -> None:
    if not torch.isfinite(tensor).all():
        half = tensor.dtype == torch.float16
        remedy = (
            "float16 ends at 65,504, the plan cpu computes in float32" if half else "lower the guidance, or load anew"
        )
        raise _NotFinite(f"There are NaN or infinite numbers in {stage}: {remedy}.", half)


@contextmanager
def silenced(pipe) -> Iterator[None]:
    """Silence the pipeline's own bar and warnings: `notes` has said what matters, and samplers print all they have."""
    own = vars(pipe).get("progress_bar")  # None: that of its class
    levels = (diffusers.utils.logging.get_verbosity(), transformers_logging.get_verbosity())
    pipe.progress_bar = lambda iterable=None, total=None: tqdm(iterable, total=total, disable=True)
    diffusers.utils.logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        del pipe.progress_bar
        if own is not None:
            pipe.progress_bar = own
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
