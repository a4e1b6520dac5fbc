"""Samplers: which suit a model, how to make one, their names in other programs, and the predicted x0 of any step."""

import functools
import inspect
import operator
from collections.abc import Iterator, Mapping
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


class WebUiSampler(NamedTuple):
    """One sampler by its names in the Stable Diffusion web UI (A1111) and in ComfyUI; empty where it has none there."""

    a1111: str
    comfyui: str
    name: str  # the class in diffusers; empty where there is none
    arguments: dict
    flow: str = ""  # the class for flow models
    note: str = ""


class WebUiSchedule(NamedTuple):
    """One way to space the noise levels by its names there. Of two names of A1111 the second follows a slash."""

    a1111: str
    comfyui: str
    arguments: dict
    note: str = ""


_2M, _SDE = "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
WEB_UI_SAMPLERS = (
    WebUiSampler("Euler", "euler", "EulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler"),
    WebUiSampler("Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
    WebUiSampler("Heun", "heun", "HeunDiscreteScheduler", {}, "FlowMatchHeunDiscreteScheduler"),
    WebUiSampler("LMS", "lms", "LMSDiscreteScheduler", {}, note="needs scipy"),
    WebUiSampler("DPM2", "dpm_2", "KDPM2DiscreteScheduler", {}),
    WebUiSampler("DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", {}),
    WebUiSampler("DPM++ 2M", "dpmpp_2m", _2M, {}, _2M),
    WebUiSampler("DPM++ 2M SDE", "dpmpp_2m_sde", _2M, _SDE),
    WebUiSampler("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", _2M, {**_SDE, "solver_type": "heun"}),
    WebUiSampler("DPM++ 3M SDE", "dpmpp_3m_sde", _2M, {**_SDE, "solver_order": 3}, note="coefficients not compared"),
    WebUiSampler("DPM++ SDE", "dpmpp_sde", "DPMSolverSDEScheduler", {}, note="needs torchsde"),
    WebUiSampler("DDIM", "ddim", "DDIMScheduler", {}),
    WebUiSampler("", "ddpm", "DDPMScheduler", {}),
    WebUiSampler("PLMS", "", "PNDMScheduler", {"skip_prk_steps": True}),
    WebUiSampler("UniPC", "uni_pc", "UniPCMultistepScheduler", {"solver_type": "bh1"}, "UniPCMultistepScheduler"),
    WebUiSampler("", "uni_pc_bh2", "UniPCMultistepScheduler", {"solver_type": "bh2"}, "UniPCMultistepScheduler"),
    WebUiSampler("", "deis", "DEISMultistepScheduler", {}, "DEISMultistepScheduler"),
    WebUiSampler("LCM", "lcm", "LCMScheduler", {}, "FlowMatchLCMScheduler", note="for distilled weights"),
    WebUiSampler("", "ipndm", "", {}, note="IPNDMScheduler has noise levels of its own"),
    WebUiSampler("DPM++ 2S a", "dpmpp_2s_ancestral", "", {}, note="DPMSolverSinglestepScheduler adds no noise"),
    WebUiSampler("DPM fast", "dpm_fast", "", {}),
    WebUiSampler("DPM adaptive", "dpm_adaptive", "", {}, note="it would choose its own steps"),
    WebUiSampler("Restart", "", "", {}),
)
WEB_UI_SCHEDULES = (
    WebUiSchedule("Uniform/Normal", "normal", {"timestep_spacing": "linspace"}),
    WebUiSchedule("SGM Uniform", "sgm_uniform", {"timestep_spacing": "trailing"}, "nearly: rounds otherwise"),
    WebUiSchedule("Simple", "simple", {"timestep_spacing": "trailing"}, "nearly: rounds otherwise"),
    WebUiSchedule("DDIM", "ddim_uniform", {"timestep_spacing": "leading", "steps_offset": 1}),
    WebUiSchedule("Karras", "karras", {"use_karras_sigmas": True}),
    WebUiSchedule("Exponential", "exponential", {"use_exponential_sigmas": True}),
    WebUiSchedule("Beta", "beta", {"use_beta_sigmas": True}, "needs scipy; there in timesteps, here in sigma"),
)


def schedulers(pipe: diffusers.DiffusionPipeline) -> tuple[str, ...]:
    """Names for `Settings.scheduler` that suit this pipeline, its own one first."""
    own = type(pipe.scheduler).__name__
    family = FLOW_SCHEDULERS if own.startswith("FlowMatch") else DIFFUSION_SCHEDULERS
    return (own, *(name for name in family if name != own))


def make(name: str, config: Mapping, **changes) -> diffusers.SchedulerMixin:
    """The scheduler `name` of diffusers for the model whose own scheduler has `config`; `changes` are its arguments.

    Unlike `from_config` it keeps the shift of a flow model, which solvers for both kinds of model call `flow_shift`,
    and clips no latents where `config` says nothing of clipping. Raises ValueError, one sentence, for a name that is
    not in diffusers, for a scheduler of the other kind of model or without a package it needs, and for an argument
    that it does not have.
    """
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if cls is None:
        raise ValueError(f"There is no scheduler {name!r} in diffusers: check the spelling.")
    if missing := getattr(cls, "_backends", None):  # a stand-in for a class whose package is not installed
        packages = " ".join(one for one in missing if one != "torch")
        raise ValueError(f"{name} needs a package that is not installed: pip install {packages}.")
    known = inspect.signature(cls.__init__).parameters
    if unknown := [key for key in changes if key not in known]:
        raise ValueError(f"{name} has no argument {', '.join(unknown)}: leave it out.")
    carried = {}
    if is_flow(config):
        if "use_flow_sigmas" in known:
            shift = config.get("shift", config.get("flow_shift", 1.0))
            carried = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        elif "shift" not in known:
            raise ValueError(f"{name} is not for a flow model, which predicts a velocity: it knows no flow sigmas.")
        else:
            carried = {"shift": config.get("shift", config.get("flow_shift", 1.0))}
    elif "prediction_type" not in known:
        target = config.get("prediction_type", "epsilon")
        raise ValueError(f"{name} is not for a model that predicts {target}: it does not ask what the model predicts.")
    elif "clip_sample" in known:
        carried = {"clip_sample": config.get("clip_sample", False)}
    # from_config warns of keys that a class does not know; those that begin with a line say what was a default.
    own = {key: value for key, value in config.items() if key in known or key.startswith("_")}
    try:
        return cls.from_config(own, **(carried | changes))
    except ImportError as error:  # which a class raises for one of its arguments
        raise ValueError(f"{name} needs scipy for beta sigmas: pip install scipy.") from error


def from_web_ui(sampler: str, config: Mapping, schedule: str = "") -> diffusers.SchedulerMixin:
    """What is nearest in diffusers to a sampler and a schedule of A1111 or ComfyUI, for the model of this `config`.

    Also takes A1111's older names with both in one, such as "DPM++ 2M Karras". Raises ValueError, one sentence, for
    names that are not in the tables, samplers that diffusers lacks and schedules that a sampler cannot have.
    """
    levels = {name: row for row in WEB_UI_SCHEDULES for name in (*row.a1111.split("/"), row.comfyui)}
    known = {name: row for row in WEB_UI_SAMPLERS for name in (row.a1111, row.comfyui) if name}
    first, _, last = str(sampler).rpartition(" ")
    if not schedule and first in known and sampler not in known:
        sampler, schedule = first, last
    if sampler not in known:
        raise ValueError(f"There is no sampler {sampler!r} in the table: choose one of {', '.join(known)}.")
    if schedule and schedule not in levels:
        raise ValueError(f"There is no schedule {schedule!r} in the table: choose one of {', '.join(levels)}.")
    row = known[sampler]
    name = row.flow if is_flow(config) else row.name
    if not name:
        why = " for flow models" if row.name else f" ({row.note})" if row.note else ""
        raise ValueError(f"diffusers has no {sampler}{why}: choose another sampler.")
    return make(name, config, **row.arguments, **(levels[schedule].arguments if schedule else {}))


def is_flow(config: Mapping) -> bool:
    """Whether a scheduler of this configuration is for a model that predicts the velocity of a flow."""
    return bool(config.get("use_flow_sigmas")) or "beta_start" not in config


def set_steps(scheduler: diffusers.SchedulerMixin, steps: int) -> torch.Tensor:
    """`scheduler.set_timesteps(steps)`; returns the timesteps, at which the model will be asked.

    Raises ValueError, one sentence and before any work, for a number of steps that the trained timesteps do not allow.
    """
    trained = scheduler.config.num_train_timesteps
    try:
        count = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        count = 0
    if not 1 <= count <= trained:
        raise ValueError(f"The steps {steps!r} are not a whole number from 1 to {trained}, the trained timesteps.")
    scheduler.set_timesteps(count)
    return scheduler.timesteps


def steps_for(scheduler: diffusers.SchedulerMixin, evaluations: int) -> int:
    """The most steps for which a pipeline asks the model at most so often. Raises ValueError where one step asks more.

    Two-stage samplers ask twice a step, PNDM once more in all. With guidance one evaluation gives both predictions.
    """
    for steps in range(evaluations, 0, -1):
        if len(set_steps(scheduler, steps)) <= evaluations:
            return steps
    raise ValueError(f"{type(scheduler).__name__} cannot do with {evaluations} evaluations: give it more.")


def draw_latents(
    pipe: diffusers.DiffusionPipeline,
    scheduler: diffusers.SchedulerMixin,
    prompts: list[str],
    evaluations: int,
    guidance: float,
) -> torch.Tensor:
    """Latents (B, C, h, w) of one picture a prompt in at most so many evaluations; picture k starts from seed k.

    For schedulers with arguments of their own; with a plain name `helpers.generate` does. The pipeline gets its own
    scheduler back. Raises ValueError as `steps_for` does.
    """
    steps, own = steps_for(scheduler, evaluations), pipe.scheduler
    pipe.scheduler = scheduler
    try:
        return pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(k) for k in range(len(prompts))],
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = own


def fresh(own: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    """A new scheduler `name` for the pipeline that has `own`, which stays as it is. ValueError as from `make`."""
    return type(own).from_config(own.config) if name == type(own).__name__ else make(name, own.config)


@contextmanager
def one_run_with(pipe: diffusers.DiffusionPipeline, name: str) -> Iterator[None]:
    """Swap the sampler for one run. Samplers remember their steps, so the pipeline's own is not touched at all."""
    own = pipe.scheduler
    pipe.scheduler = for_this_run = remember(fresh(own, name))
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
