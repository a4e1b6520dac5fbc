"""Samplers: which suit a model, one of them for a single run, and the predicted x0 that follows from any step of it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import diffusers
import torch

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


def schedulers(pipe: diffusers.DiffusionPipeline) -> tuple[str, ...]:
    """Names for `Settings.scheduler` that suit this pipeline, its own one first."""
    own = type(pipe.scheduler).__name__
    family = FLOW_SCHEDULERS if own.startswith("FlowMatch") else DIFFUSION_SCHEDULERS
    return (own, *(name for name in family if name != own))


@contextmanager
def one_run_with(pipe: diffusers.DiffusionPipeline, name: str) -> Iterator[None]:
    """Swap the sampler for one run. Samplers remember their steps, so the pipeline's own is not touched at all."""
    own = pipe.scheduler
    cls = type(own) if name == type(own).__name__ else getattr(diffusers, name)
    pipe.scheduler = for_this_run = remember(cls.from_config(own.config))
    try:
        yield
    finally:
        pipe.scheduler = own
        del for_this_run.step  # which refers to it, so that both and the latents would wait for the garbage collector


class Seen(NamedTuple):
    """What the latest step was made of: the model was shown `sample` at `timestep` and said `output` (guided)."""

    output: torch.Tensor  # (B, C, h, w)
    timestep: torch.Tensor | float
    sample: torch.Tensor  # (B, C, h, w), of the scale that the scheduler uses
    index: int | None  # of the step, where the scheduler counted it before


def remember(scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """Let this scheduler keep what its latest `step` was given, in `scheduler.seen` (None before); returns it."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature
    def remembering(model_output, timestep, sample, *args, **kwargs):
        scheduler.seen = Seen(model_output, timestep, sample, getattr(scheduler, "step_index", None))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.seen, scheduler.step = None, remembering
    return scheduler


def predicted_x0(scheduler: diffusers.SchedulerMixin) -> torch.Tensor:
    """The finished latents (B, C, h, w) as the model guessed them at the latest step of a scheduler that remembers.

    `generate` makes every scheduler remember, so that its `on_step` may call `predicted_x0(pipe.scheduler)`. Knows
    the targets epsilon, v_prediction, sample and flow matching's velocity. Raises ValueError, one sentence, before the
    first step or for another target.
    """
    if getattr(scheduler, "seen", None) is None:
        raise ValueError("There is no step to look back at: call this in the on_step of generate.")
    output, timestep, sample, index = scheduler.seen
    target = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if target == "flow_prediction":  # on the straight line (1 - sigma) x0 + sigma noise, with velocity noise - x0
        return sample - float(timestep) / scheduler.config.num_train_timesteps * output
    if target == "sample":
        return output
    if float(getattr(scheduler, "init_noise_sigma", 1)) != 1:  # Euler's family counts in x0 + sigma noise
        sigma = float(scheduler.sigmas[index])
        sample = sample / (sigma**2 + 1) ** 0.5  # as the model was shown it
    else:
        left = float(scheduler.alphas_cumprod[int(timestep)])  # sqrt(left) x0 + sqrt(1 - left) noise
        sigma = ((1 - left) / left) ** 0.5
    share = 1 / (sigma**2 + 1) ** 0.5  # of x0; that of the noise is sigma times as much
    if target == "epsilon":
        return sample / share - sigma * output
    if target == "v_prediction":
        return share * sample - sigma * share * output
    raise ValueError(f"A model that predicts {target!r} says nothing about the clean latents that is known here.")
