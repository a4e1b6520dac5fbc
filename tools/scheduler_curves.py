"""How near samplers come to the exact curve, and how right they draw: `python -m tools.scheduler_curves`.

For both bundled models and growing numbers of evaluations, into notebooks/data/scheduler_curves.csv, which notebook 05
plots; with `--only storybook-sd3` for that model alone, where the other's rows stay. The error is the root mean square
distance of the latents to those of 1,000 small steps from the same noise, beside the root mean square of the latter. A
sampler that adds noise has no such curve, and so no error.
"""

import argparse
import csv
import os
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from tqdm import tqdm

from helpers.generate import decode
from helpers.images import ROOT
from helpers.pipelines import load
from helpers.schedulers import draw_latents, make
from storybook.judge import judge, share
from storybook.sample import seen_prompts

PATH = ROOT / "notebooks/data/scheduler_curves.csv"
COLUMNS = ("model", "sampler", "evaluations", "prompts", "right", "error")
EVALUATIONS = (2, 5, 10, 20, 50)
MORE = 100  # for the first sampler of each model alone
PROMPTS, COMPARED = 24, 4  # pictures that are judged, and the first of them that are compared with the reference
REFERENCE = 1000  # steps


class Sampler(NamedTuple):
    """A scheduler of diffusers and its arguments, under the name that the plots show."""

    label: str
    name: str
    arguments: dict
    random: bool = False  # adds new noise


TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
SAMPLERS = {
    "storybook-sd": (
        Sampler("DDIM", "DDIMScheduler", {"set_alpha_to_one": True, **TRAILING}),
        Sampler("PNDM", "PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "leading", "steps_offset": 1}),
        Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", TRAILING),
        Sampler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", KARRAS),
        Sampler("Euler a", "EulerAncestralDiscreteScheduler", TRAILING, random=True),
    ),
    "storybook-sd3": (
        Sampler("Euler", "FlowMatchEulerDiscreteScheduler", {}),
        Sampler("Heun", "FlowMatchHeunDiscreteScheduler", {}),
        Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {}),
        Sampler("UniPC", "UniPCMultistepScheduler", {}),
    ),
}


def error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference, beside that of the reference."""
    return ((latents - reference).square().mean() / reference.square().mean()).sqrt().item()


def judged(pipe: diffusers.DiffusionPipeline, latents: torch.Tensor, prompts: list[str]) -> float:
    """The share of pictures in which the judge finds object, colour and setting right."""
    pixels = pipe.image_processor.pt_to_numpy(decode(pipe, latents))
    return share(judge(pipe.image_processor.numpy_to_pil(pixels), prompts), "object", "colour", "setting")


def measure(name: str) -> list[dict]:
    """The rows of one bundled model."""
    pipe, prompts = load(name), seen_prompts(PROMPTS)
    config, samplers = pipe.scheduler.config, SAMPLERS[name]
    plain = make(samplers[0].name, config, **samplers[0].arguments)
    reference = draw_latents(pipe, plain, prompts[:COMPARED], REFERENCE, pipe.model.guidance)
    rows = []
    for sampler in tqdm(samplers, name, unit="sampler"):
        for evaluations in (*EVALUATIONS, MORE) if sampler is samplers[0] else EVALUATIONS:
            scheduler = make(sampler.name, config, **sampler.arguments)
            latents = draw_latents(pipe, scheduler, prompts, evaluations, pipe.model.guidance)
            off = "" if sampler.random else f"{error(latents[:COMPARED], reference):.4f}"
            right = f"{judged(pipe, latents, prompts):.4f}"
            rows.append(dict(zip(COLUMNS, (name, sampler.label, evaluations, PROMPTS, right, off), strict=True)))
    return rows


def write(rows: list[dict], path: Path) -> None:
    """The table as a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> list[dict]:
    """The rows of a table that is there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """One model after the other; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SAMPLERS, help="one of the two models")
    args = parser.parse_args()
    names = list(SAMPLERS)
    for name in [args.only] if args.only else names:
        with torch.no_grad():
            rows = [row for row in read(PATH) if row["model"] != name] + measure(name)
        write(sorted(rows, key=lambda row: names.index(row["model"])), PATH)


if __name__ == "__main__":
    main()
