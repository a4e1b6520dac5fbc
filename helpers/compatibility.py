"""Which schedulers of diffusers suit a model: each one draws with a perfect model, and what it draws is looked at.

The perfect model is rung 0's, the mixture of `helpers.mixture`, noised as `config` says.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import diffusers
import numpy as np
import torch

from helpers.mixture import Mixture, example, sliced_wasserstein
from helpers.schedulers import is_flow, make, set_steps

STEPS, POINTS = 50, 2000
FAR = 0.075  # sliced Wasserstein distance; two samples of the data are about 0.03 apart

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Verdict(NamedTuple):
    """What became of one scheduler. It suits the model if `problem` is empty."""

    name: str
    distance: float | None  # between what it drew and the data; None where it did not get so far
    problem: str


def perfect_model(mixture: Mixture, config: Mapping) -> Model:
    """A function of noised points (n, 2, 1, 1) and a timestep, as a pipeline's model is, that makes no mistake.

    It predicts epsilon at the noise levels of `config`, or the velocity if `config` is of a flow model. Timesteps may
    lie between two trained ones: the logarithm of sigma is then interpolated.
    """
    if is_flow(config):
        trained = config["num_train_timesteps"]

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            sigma = float(t) / trained
            points = x.flatten(1)
            return (mixture.noise(points, 1 - sigma, sigma) - mixture.clean(points, 1 - sigma, sigma)).view_as(x)

        return velocity
    alphas = diffusers.DDPMScheduler.from_config(dict(config)).alphas_cumprod.double().numpy()
    logs = np.log((1 - alphas) / alphas) / 2

    def noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = float(np.exp(np.interp(float(t), np.arange(len(logs)), logs)))
        share = (sigma**2 + 1) ** -0.5
        return mixture.noise(x.flatten(1), share, sigma * share).view_as(x)

    return noise


def draw(
    scheduler: diffusers.SchedulerMixin, model: Model, noise: torch.Tensor, steps: int, seed: int = 0
) -> torch.Tensor:
    """What the loop of a pipeline makes of `noise`, standard normal. Raises ValueError as `set_steps` does."""
    x, generator = noise, torch.Generator().manual_seed(seed)  # one for all steps: noise must be new at each
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    timesteps = set_steps(scheduler, steps)
    if not is_flow(scheduler.config):  # flows start from noise as it is
        x = x * scheduler.init_noise_sigma
    for t in timesteps:
        seen = x if is_flow(scheduler.config) else scheduler.scale_model_input(x, t)
        x = scheduler.step(model(seen, t), t, x, **draws).prev_sample
    return x


def survey(config: Mapping) -> list[Verdict]:
    """Every scheduler that diffusers has, tried on a model whose own scheduler has this `config`."""
    mixture, generator = example(), torch.Generator().manual_seed(0)
    data, _ = mixture.sample(POINTS, generator, exact=True)
    noise, model = torch.randn(POINTS, 2, 1, 1, generator=generator), perfect_model(mixture, config)
    names = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # what they do not like they log at every step; the verdict says it
    try:
        return [_try(name, config, model, noise, data) for name in names]
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _try(name: str, config: Mapping, model: Model, noise: torch.Tensor, data: torch.Tensor) -> Verdict:
    try:
        drawn = draw(make(name, config), model, noise, STEPS).flatten(1)
    except ValueError as error:
        return Verdict(name, None, _first_line(error))
    except Exception as error:  # whatever a class that was made for something else may raise
        return Verdict(name, None, f"stops with {type(error).__name__}: {_first_line(error)}")
    distance = sliced_wasserstein(drawn.to(data), data).item() if torch.isfinite(drawn).all() else float("inf")
    return Verdict(name, distance, "" if distance < FAR else "runs, but draws other points than the data")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
