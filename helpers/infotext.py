"""The text in which A1111's web UI writes down how a picture was drawn, and which many other tools read and write.

A prompt of any number of lines, then "Negative prompt: " and its lines, then one line of `Key: value` pairs with commas
between them. A value that holds a comma, a colon, a quote or a new line is a JSON string. The form has one gap: a line
of the prompt that itself begins with "Negative prompt:" is read as the negative prompt.
"""

import json
import re
from typing import NamedTuple

from helpers.settings import Settings

NEGATIVE = "Negative prompt:"
MOST = 200_000  # characters; a person's prompt has a few hundred
# The value: quoted as in JSON, or all up to the next comma.
PAIR = re.compile(r'\s*([A-Za-z][\w ./\-]{0,60}):[ \t]*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')
# What A1111 calls the samplers of diffusers; the first name of each is the one that is written.
SAMPLERS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "PNDM": "PNDMScheduler",
    "PLMS": "PNDMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++ 2S": "DPMSolverSinglestepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "FlowMatch Euler": "FlowMatchEulerDiscreteScheduler",
    "FlowMatch Heun": "FlowMatchHeunDiscreteScheduler",
}
SCHEDULES = ("Karras", "Exponential", "SGM Uniform", "Polyexponential")  # which old versions put behind the sampler
OF_NO_MATTER = ("Model", "Model hash", "Version", "Batch size", "Batch pos")  # for what is drawn from the settings


class Found(NamedTuple):
    """What such a text says. `others` are the pairs that `settings` has no place for, or that make no sense."""

    settings: Settings
    model: str
    others: dict[str, str]


def write(settings: Settings, model: str, size: tuple[int, int]) -> str:
    """The text for a picture of `size`, (width, height) in pixels."""
    names = {scheduler: name for name, scheduler in reversed(SAMPLERS.items())}
    pairs = {
        "Steps": settings.steps,
        "Sampler": names.get(settings.scheduler, settings.scheduler),
        "CFG scale": settings.guidance,
        "Seed": settings.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
        "Denoising strength": settings.strength,
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value not in (None, ""))
    negative = [f"{NEGATIVE} {settings.negative_prompt}"] if settings.negative_prompt else []
    return "\n".join([settings.prompt, *negative, line])


def read(text: str) -> Found:
    """The settings in such a text, with None for what it does not say. Raises ValueError, one sentence, for others.

    Numbers are numbers afterwards, but nothing says that a model can draw them: `generate.resolve` does.
    """
    if not isinstance(text, str) or len(text) > MOST:
        raise ValueError("This is no text of settings: there should be a prompt and a line that begins with Steps.")
    *lines, last = text.replace("\r\n", "\n").rstrip().split("\n")
    pairs = _pairs(last)
    if "Steps" not in pairs:
        raise ValueError("This is no text of settings: there is no line that begins with Steps.")
    start = next((n for n, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    values = {"prompt": "\n".join(lines[:start]), "negative_prompt": "\n".join(lines[start:])}
    values["negative_prompt"] = values["negative_prompt"].removeprefix(NEGATIVE).removeprefix(" ")

    for schedule in SCHEDULES:
        if pairs.get("Sampler", "").endswith(f" {schedule}"):
            pairs["Sampler"] = pairs["Sampler"].removesuffix(f" {schedule}")
            pairs["Schedule type"] = schedule

    def take(key, name, convert):
        """Convert a pair and drop it, or leave it to the others if it makes no sense."""
        try:
            values[name] = convert(pairs[key])
            del pairs[key]
        except (KeyError, ValueError):  # also a number of more digits than Python reads
            pass

    take("Steps", "steps", int)
    take("CFG scale", "guidance", float)
    take("Seed", "seed", int)
    take("Denoising strength", "strength", float)
    take("Sampler", "scheduler", _scheduler)
    take("Size", "size", _size)
    values["width"], values["height"] = values.pop("size", (None, None))
    model = pairs.get("Model", "")
    return Found(Settings(**values), model, {key: pairs[key] for key in pairs if key not in OF_NO_MATTER})


def _pairs(line: str) -> dict[str, str]:
    """The pairs of a line that has nothing else in it, else {}."""
    found, end = {}, 0
    while end < len(line):
        pair = PAIR.match(line, end)
        if pair is None:
            return {}
        key, value = pair.groups()
        found[key.strip()] = _unquoted(value.strip())
        end = pair.end()
    return found


def _quoted(value) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n\\]', text) else text


def _unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text


def _scheduler(sampler: str) -> str:
    """The class of diffusers. Raises ValueError for a sampler that is not among ours."""
    if sampler in SAMPLERS.values():
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(sampler)
    return SAMPLERS[sampler]


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)
