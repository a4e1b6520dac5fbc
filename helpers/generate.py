"""The one way in which notebooks, panel and grid draw: `generate(pipe, Settings("a red boat"))`. No widget needed."""

import operator
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import diffusers
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from helpers.clean import remember
from helpers.login import can_ask
from helpers.memory import free

# Samplers that share SD1.5's noise schedule, so that one can stand in for another; and those for flow matching.
DIFFUSION_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

SMALL_VOCABULARY = 5000  # entries; CLIP's has 49,408 and can spell any word, a small one cannot
T5_TOKENS = 256  # what StableDiffusion3Pipeline lets its T5 encoder read

_drawing = threading.RLock()  # a panel draws in a thread of its own, and a pipeline serves one run at a time


@dataclass(frozen=True)
class Settings:
    """Everything that decides a picture, besides the model. None means "as the model likes it"."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    scheduler: str | None = None  # a class of diffusers, see `schedulers(pipe)`
    count: int = 1  # picture k of a batch has the seed `seed + k`


class _Stopped(Exception):
    """Leaves the denoising loop early. `pipe._interrupt` would go on to decode the half-done noise."""


def generate(
    pipe: diffusers.DiffusionPipeline,
    settings: Settings,
    on_step: Callable[[int, int, torch.Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = print,
) -> list[Image.Image]:
    """Draw `settings.count` RGB pictures, or none at all ([]) if `should_stop` said so.

    `on_step(step, steps, latents)` is called after every step, with step = 1..steps and the latents of the whole batch,
    (count, C, h, w), to look at and not to change; without it a progress bar is shown. `helpers.preview.LiveMeter` is
    one such function, and any may ask `clean_latents(pipe.scheduler)` for the guess of the finished latents. `steps`
    counts the calls of the model, so two-stage samplers have more of them than `settings.steps`. `should_stop()` is
    asked after every step but the last. Each picture carries what drew it in `image.info`: "settings" (filled in, its
    own seed) and "model".

    Where the GPU's memory runs full, a pipeline with a plan starts again under the next one down, and a picture is
    decoded in tiles; `say` is told so. If decoding fails all the same, the finished latents are in `pipe.kept_latents`
    for `decode(pipe, pipe.kept_latents)`, and the steps need not be repeated.

    What the model will not see of the prompt is told to `say`, one sentence each (`notes`). Raises ValueError, one
    sentence, for settings that cannot be drawn, RuntimeError naming the stage if numbers stop being finite. Whatever
    happens, an error in a callback included, the pipeline is left as it was. Two threads draw one after the other.
    """
    settings = resolve(pipe, settings)
    said = notes(pipe, settings)
    for sentence in said:
        say(sentence)
    watched = can_ask() or sys.stderr.isatty()  # a bar in a page that nobody watches is only litter
    bar = tqdm(total=settings.steps, leave=False, disable=not watched) if on_step is None else None

    def after_step(pipe, index, timestep, tensors):
        steps = pipe.num_timesteps
        if index == 0:
            _require_finite(tensors["prompt_embeds"], "the text encoder's output")
        _require_finite(tensors["latents"], f"the latents after step {index + 1} of {steps}")
        if on_step is not None:
            on_step(index + 1, steps, tensors["latents"])
        if bar is not None:
            bar.total, bar.n = steps, index + 1  # also after a new start
            bar.refresh()
        if should_stop is not None and index + 1 < steps and should_stop():
            raise _Stopped
        return {}

    def denoise() -> torch.Tensor:
        # CPU generators, one a picture: the same seed gives the same noise on every device and in every batch.
        generators = [torch.Generator("cpu").manual_seed(settings.seed + k) for k in range(settings.count)]
        return pipe(
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.height,
            width=settings.width,
            num_images_per_prompt=settings.count,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        ).images

    with _drawing, _scheduler(pipe, settings.scheduler), _quiet(pipe, bool(said)):
        try:
            latents = _with_less_memory(pipe, denoise, settings, say)
            pipe.kept_latents = latents  # until they are a picture
            pixels = decode(pipe, latents, say)
        except _Stopped:
            return []
        finally:
            pipe.maybe_free_model_hooks()  # an offloaded pipeline that was left early is still on the GPU
            if bar is not None:
                bar.close()
    _require_finite(pixels, "the decoded picture")
    pipe.kept_latents = None
    images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(pixels))
    for k, image in enumerate(images):
        image.info["settings"] = replace(settings, seed=settings.seed + k, count=1)
        image.info["model"] = model_name(pipe)
    return images


@torch.no_grad()
def decode(
    pipe: diffusers.DiffusionPipeline, latents: torch.Tensor, say: Callable[[str], None] = print
) -> torch.Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1]; in tiles if the GPU's memory is full.

    Raises RuntimeError, one sentence, if it is too full for tiles as well.
    """
    vae = pipe.vae
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    whole = _unless_full(lambda: vae.decode(scaled, return_dict=False)[0])
    if whole is None:
        say("The memory is full while decoding, so the picture is decoded in tiles, which may differ a little in tone.")
        whole = _unless_full(lambda: _decode_in_tiles(vae, scaled))
    if whole is None:
        raise RuntimeError(
            "The memory is full while decoding: free some, then decode(pipe, pipe.kept_latents) makes the picture."
        )
    hidden = [False] * len(whole)
    if getattr(pipe, "safety_checker", None) is not None:  # in a pipeline from elsewhere
        whole, hidden = pipe.run_safety_checker(whole, whole.device, whole.dtype)
    return pipe.image_processor.postprocess(whole, "pt", [not h for h in hidden])


def resolve(pipe: diffusers.DiffusionPipeline, settings: Settings) -> Settings:
    """The same settings with every None filled in from the model. Raises ValueError, one sentence, for bad ones."""
    model = getattr(pipe, "model", None)  # set by pipelines.load; a pipeline from elsewhere has SD1.5's defaults
    steps = settings.steps if settings.steps is not None else getattr(model, "steps", 25)
    guidance = settings.guidance if settings.guidance is not None else getattr(model, "guidance", 7.5)
    own, size = own_size(pipe), getattr(model, "size", None) or max(own_size(pipe))
    # The registry may ask for less than the size of training: 1024 pixels take twice the time of 768.
    height = settings.height if settings.height is not None else min(size, own[0])
    width = settings.width if settings.width is not None else min(size, own[1])
    scheduler = settings.scheduler or type(pipe.scheduler).__name__

    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        if not isinstance(text, str):
            raise ValueError(f"The {name} is not text: write one string, and use count for several pictures.")
    if not settings.prompt.strip():
        raise ValueError("The prompt is empty: write what the picture should show.")
    if scheduler not in schedulers(pipe):
        raise ValueError(
            f"There is no scheduler {scheduler!r} for this model: choose one of {', '.join(schedulers(pipe))}."
        )
    try:
        guidance = float(guidance)
    except (TypeError, ValueError):
        guidance = -1.0
    if not 0 <= guidance < float("inf"):
        raise ValueError("The guidance is not a number of 0 or more: 1 switches it off, 3 to 8 is usual.")
    return replace(
        settings,
        steps=_whole(steps, "steps", 1, 500),
        guidance=guidance,
        seed=_whole(settings.seed, "seed", 0, 2**63 - 1),
        height=_side(pipe, height, "height", own[0]),
        width=_side(pipe, width, "width", own[1]),
        scheduler=scheduler,
        count=_whole(settings.count, "count", 1, 64),
    )


def notes(pipe: diffusers.DiffusionPipeline, settings: Settings) -> list[str]:
    """Sentences on what the model will not see of the two prompts: the words cut off, the words it never learned."""
    t5 = getattr(pipe, "tokenizer_3", None)
    tokenizer, limit = (t5, T5_TOKENS) if t5 is not None else (pipe.tokenizer, pipe.tokenizer.model_max_length)
    sentences = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        cut = cut_off(tokenizer, text, limit)
        if cut:
            sentences.append(f"The {name} is too long for the model, which does not see its end: {cut!r}.")
        unknown = unknown_words(pipe.tokenizer, text)
        if unknown:
            sentences.append(f"The model has never seen these words of the {name}: {', '.join(unknown)}.")
    return sentences


def cut_off(tokenizer, text: str, limit: int | None = None) -> str:
    """The end of `text` beyond `limit` tokens (default: the tokenizer's own limit); "" if all of it fits."""
    limit = limit or tokenizer.model_max_length
    room = limit - tokenizer.num_special_tokens_to_add()
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets = tokens["offset_mapping"]
    return text[offsets[room][0] :].strip() if len(offsets) > room else ""


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words of `text`, in order and once each, that a small tokenizer does not hold as a whole.

    A tokenizer made for one small world knows exactly the words of its captions, each as one token `word</w>`; any
    other word falls apart into letters that the model has never learned from. A large vocabulary gives [].
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) >= SMALL_VOCABULARY:
        return []
    words = re.findall(r"[^\W\d_]+|\d", text.lower())
    return list(dict.fromkeys(word for word in words if f"{word}</w>" not in vocabulary))


def schedulers(pipe: diffusers.DiffusionPipeline) -> tuple[str, ...]:
    """Names for `Settings.scheduler` that suit this pipeline, its own one first."""
    own = type(pipe.scheduler).__name__
    family = FLOW_SCHEDULERS if own.startswith("FlowMatch") else DIFFUSION_SCHEDULERS
    return (own, *(name for name in family if name != own))


def own_size(pipe: diffusers.DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was trained on."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    # Under some plans (helpers.planned) the network is loaded later.
    size = pipe.default_sample_size if network is None else network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def model_name(pipe: diffusers.DiffusionPipeline) -> str:
    """The name in the registry, or the last part of the folder or hub id that the pipeline came from."""
    model = getattr(pipe, "model", None)
    return model.name if model else str(getattr(pipe.config, "_name_or_path", "")).rstrip("/").split("/")[-1]


def _whole(value, name: str, low: int, high: int) -> int:
    """A whole number from a widget, a form or a person; text such as "42" counts."""
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ValueError(
            f"The {name} {str(value)[:40]!r} is not a whole number from {low} to {high}: change it and run again."
        )
    return number


def _side(pipe, value, name: str, own: int) -> int:
    multiple = pipe.vae_scale_factor * getattr(pipe, "patch_size", 1)
    low, high = max(multiple, own // 4 // multiple * multiple), own * 4
    side = _whole(value, name, low, high)
    if side % multiple:
        near = max(low, min(high, round(side / multiple) * multiple))
        raise ValueError(f"The {name} {side} is not divisible by {multiple}: try {near}.")
    return side


def _with_less_memory(
    pipe, draw: Callable[[], torch.Tensor], settings: Settings, say: Callable[[str], None]
) -> torch.Tensor:
    """`draw()`, and again under smaller plans as long as the memory is full and the pipeline has one."""
    while True:
        try:
            return draw()
        except torch.OutOfMemoryError:
            if not hasattr(pipe, "step_down"):
                raise
        # Out here the error is gone, and with it the tensors that its traceback held on to.
        sentence = pipe.step_down(settings.height, settings.width)
        if sentence is None:
            raise RuntimeError("The memory is full and no smaller plan is left: draw a smaller picture.")
        say(sentence)


def _unless_full(draw: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        return draw()
    except torch.OutOfMemoryError:
        pass
    free()
    return None


def _decode_in_tiles(vae, latents: torch.Tensor) -> torch.Tensor:
    """A quarter of the picture at a time, and a bit over, so that the seams can be blended."""
    own = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = max(2, max(latents.shape[-2:]) // 2)
    vae.tile_sample_min_size = vae.tile_latent_min_size * factor
    vae.enable_tiling()
    try:
        return vae.decode(latents, return_dict=False)[0]
    finally:
        vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = own


def _require_finite(tensor: torch.Tensor, stage: str) -> None:
    if not torch.isfinite(tensor).all():
        raise RuntimeError(f"There are NaN or infinite numbers in {stage}: try another seed, or a lower guidance.")


@contextmanager
def _scheduler(pipe, name: str) -> Iterator[None]:
    """Swap the sampler for one run. Samplers remember their steps, so the pipeline's own is not touched at all."""
    own = pipe.scheduler
    cls = type(own) if name == type(own).__name__ else getattr(diffusers, name)
    pipe.scheduler = remember(cls.from_config(own.config))
    try:
        yield
    finally:
        pipe.scheduler = own


@contextmanager
def _quiet(pipe, said: bool) -> Iterator[None]:
    """Silence the pipeline's own bar, and its warning about a long prompt where ours has said it already."""
    own = dict(getattr(pipe, "_progress_bar_config", {}))
    levels = (diffusers.utils.logging.get_verbosity(), transformers_logging.get_verbosity())
    pipe.set_progress_bar_config(**{**own, "disable": True})
    if said:
        diffusers.utils.logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**own)
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
