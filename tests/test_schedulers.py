"""Schedulers are made as a model needs them, counted in evaluations, and found by what they draw."""

import csv

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from helpers import compatibility
from helpers.compatibility import draw, perfect_model, survey
from helpers.mixture import Mixture, example
from helpers.schedulers import (
    DIFFUSION_SCHEDULERS,
    FLOW_SCHEDULERS,
    WEB_UI_SAMPLERS,
    WEB_UI_SCHEDULES,
    draw_latents,
    from_web_ui,
    is_flow,
    make,
    one_run_with,
    set_steps,
    steps_for,
)

SD = PNDMScheduler.from_pretrained(tiny.CONFIGS / "scheduler").config
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0).config
NAMES = [(name, row) for row in WEB_UI_SAMPLERS for name in (row.a1111, row.comfyui) if name]


def one_step(scheduler):
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = set_steps(scheduler, 10)[0]
    if not is_flow(scheduler.config):
        x = scheduler.scale_model_input(x * scheduler.init_noise_sigma, t)
    return scheduler.step(x, t, x).prev_sample


# make


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_the_noise_schedule_is_the_models(name):
    made = make(name, SD)
    assert type(made).__name__ == name
    assert torch.allclose(made.alphas_cumprod, DDIMScheduler.from_config(SD).alphas_cumprod)
    assert not made.config.get("clip_sample", False)


def test_latents_are_not_clipped_where_nothing_is_said_of_it():
    said = {key: value for key, value in SD.items() if key != "clip_sample"}
    assert DDIMScheduler.from_config(said).config.clip_sample  # the library's default, which is for pixels
    assert not make("DDIMScheduler", said).config.clip_sample
    assert make("DDIMScheduler", {**said, "clip_sample": True}).config.clip_sample


def test_what_the_model_does_not_say_is_the_classs_own():
    assert "timestep_spacing" in SD["_use_default_values"]
    assert make("EulerDiscreteScheduler", SD).config.timestep_spacing == "linspace"
    assert make("EulerDiscreteScheduler", SD, timestep_spacing="trailing").config.timestep_spacing == "trailing"
    said = make("DDIMScheduler", SD, timestep_spacing="trailing").config
    assert make("EulerDiscreteScheduler", said).config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    "name", [*FLOW_SCHEDULERS, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_a_flow_keeps_its_shift(name):
    made = make(name, FLOW)
    assert made.config.get("shift", made.config.get("flow_shift")) == 3.0
    assert is_flow(made.config)
    back = make("FlowMatchEulerDiscreteScheduler", made.config)
    assert back.config.shift == 3.0
    straight = make(name, FLOW, **{"shift" if name in FLOW_SCHEDULERS else "flow_shift": 1.0})
    for scheduler in (made, straight):
        set_steps(scheduler, 10)
    level = straight.sigmas[: len(straight.sigmas) // 2].float()  # the lowest ones are shifted twice, or moved to 0
    assert torch.allclose(made.sigmas[: len(level)].float(), 3 * level / (1 + 2 * level), atol=5e-3)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("DDMIScheduler", SD, "There is no scheduler 'DDMIScheduler'"),
        ("StableDiffusionPipeline", SD, "There is no scheduler"),
        (7, SD, "There is no scheduler 7"),
        ("DDIMScheduler", FLOW, "not for a flow model"),
        ("FlowMatchEulerDiscreteScheduler", SD, "not for a model that predicts epsilon"),
        ("IPNDMScheduler", SD, "not for a model that predicts epsilon"),
    ],
)
def test_what_does_not_fit_is_refused(name, config, said):
    with pytest.raises(ValueError, match=said) as error:
        make(name, config)
    assert "\n" not in str(error.value)


def test_an_argument_that_a_class_lacks_is_refused():
    with pytest.raises(ValueError, match="DDIMScheduler has no argument use_karras_sigmas"):
        make("DDIMScheduler", SD, use_karras_sigmas=True)


def test_a_missing_package_is_named():
    if diffusers.utils.is_scipy_available():
        assert one_step(make("LMSDiscreteScheduler", SD)).isfinite().all()
        return
    with pytest.raises(ValueError, match="pip install scipy"):
        make("LMSDiscreteScheduler", SD)
    with pytest.raises(ValueError, match="pip install scipy"):
        make("EulerDiscreteScheduler", SD, use_beta_sigmas=True)


def test_one_run_with_another_scheduler_clips_no_latents():
    pipe = type("Pipe", (), {"scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear")})()
    with one_run_with(pipe, "DDIMScheduler"):
        assert isinstance(pipe.scheduler, DDIMScheduler) and not pipe.scheduler.config.clip_sample
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)


# Steps


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "many", None, True])
def test_steps_that_were_not_trained_are_refused(steps):
    for scheduler in (make("EulerDiscreteScheduler", SD), FlowMatchEulerDiscreteScheduler()):
        before = scheduler.timesteps.clone()
        with pytest.raises(ValueError, match="not a whole number from 1 to 1000"):
            set_steps(scheduler, steps)
        assert torch.equal(scheduler.timesteps, before)


def test_steps_for_counts_what_the_model_is_asked():
    counted = {"DDIMScheduler": 10, "PNDMScheduler": 9, "HeunDiscreteScheduler": 5, "KDPM2DiscreteScheduler": 5}
    for name, steps in counted.items():
        scheduler = make(name, SD)
        assert steps_for(scheduler, 10) == steps
        assert len(scheduler.timesteps) <= 10 < len(set_steps(scheduler, steps + 1))
    with pytest.raises(ValueError, match="cannot do with 0 evaluations"):
        steps_for(make("DDIMScheduler", SD), 0)


def test_draw_latents_draws_as_the_pipeline_and_gives_its_scheduler_back(tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny.sd15(tmp_path), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    own, ddim = pipe.scheduler, make("DDIMScheduler", pipe.scheduler.config)
    both = draw_latents(pipe, ddim, ["a boat", "a house"], 3, 2.0)
    assert pipe.scheduler is own and len(ddim.timesteps) == 3
    pipe.scheduler = ddim
    seed = torch.Generator().manual_seed(1)
    alone = pipe("a house", num_inference_steps=3, guidance_scale=2.0, generator=seed, output_type="latent").images
    assert torch.allclose(both[1:], alone, atol=1e-4) and not torch.allclose(both[:1], alone, atol=0.1)
    with pytest.raises(ValueError, match="0 evaluations"):
        draw_latents(pipe, make("DDIMScheduler", own.config), ["a boat"], 0, 2.0)
    assert pipe.scheduler is ddim


# Names of other programs


@pytest.mark.parametrize(("name", "row"), NAMES, ids=[name for name, _ in NAMES])
def test_every_row_of_the_table_can_be_made(name, row):
    if not row.name:
        with pytest.raises(ValueError, match="diffusers has no"):
            from_web_ui(name, SD)
        return
    missing = getattr(getattr(diffusers, row.name), "_backends", None)
    if missing:
        with pytest.raises(ValueError, match="pip install"):
            from_web_ui(name, SD)
        return
    made = from_web_ui(name, SD)
    assert type(made).__name__ == row.name
    assert all(made.config[key] == value for key, value in row.arguments.items())
    assert one_step(made).isfinite().all()
    if row.flow:
        assert is_flow(from_web_ui(name, FLOW).config) and type(from_web_ui(name, FLOW)).__name__ == row.flow
    else:
        with pytest.raises(ValueError, match="for flow models"):
            from_web_ui(name, FLOW)


@pytest.mark.parametrize("row", WEB_UI_SCHEDULES, ids=lambda row: row.comfyui)
def test_every_schedule_of_the_table_can_be_made(row):
    for name in (*row.a1111.split("/"), row.comfyui):
        if "use_beta_sigmas" in row.arguments and not diffusers.utils.is_scipy_available():
            with pytest.raises(ValueError, match="pip install scipy"):
                from_web_ui("DPM++ 2M", SD, name)
            continue
        made = from_web_ui("DPM++ 2M", SD, name)
        assert all(made.config[key] == value for key, value in row.arguments.items())
        assert one_step(made).isfinite().all()


def test_schedules_stop_where_the_other_programs_stop():
    """The timesteps in closed form: evenly from 999 to 0; every 1000/n from the end; every 1000//n above 1."""
    linspace = set_steps(from_web_ui("Euler", SD, "normal"), 10)
    assert torch.allclose(linspace.double(), torch.linspace(999, 0, 10).double(), atol=1e-3)
    simple = set_steps(from_web_ui("Euler", SD, "simple"), 10)
    assert simple.tolist() == [999 - int(k * 1000 / 10) for k in range(10)]
    leading = set_steps(from_web_ui("DDIM", SD, "ddim_uniform"), 10)
    assert leading.tolist() == [100 * k + 1 for k in reversed(range(10))]


def test_both_in_one_name():
    made = from_web_ui("DPM++ 2M SDE Karras", SD)
    assert made.config.algorithm_type == "sde-dpmsolver++" and made.config.use_karras_sigmas
    assert from_web_ui("DPM++ 2M SDE Heun", SD).config.solver_type == "heun"
    with pytest.raises(ValueError, match="There is no schedule 'Carras'"):
        from_web_ui("DPM++ 2M Carras", SD)
    with pytest.raises(ValueError, match="There is no sampler 'DPM 7'"):
        from_web_ui("DPM 7", SD)
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler has no argument use_karras_sigmas"):
        from_web_ui("Euler a Karras", SD)


# Which suit


def test_the_perfect_model_knows_the_noise_of_one_gaussian():
    gaussian = Mixture(torch.ones(1), torch.tensor([[1.0, -2.0]]), torch.tensor([1e-3]))
    x0 = torch.tensor([[1.0, -2.0]]).expand(5, 2)
    eps = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    alpha = DDIMScheduler.from_config(SD).alphas_cumprod[400]
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    answer = perfect_model(gaussian, SD)(x.view(5, 2, 1, 1), torch.tensor(400))
    assert answer.shape == (5, 2, 1, 1) and torch.allclose(answer.flatten(1), eps, atol=1e-2)
    x = 0.6 * x0 + 0.4 * eps
    answer = perfect_model(gaussian, FLOW)(x.view(5, 2, 1, 1), torch.tensor(400.0))
    assert torch.allclose(answer.flatten(1), eps - x0, atol=1e-2)


def test_draw_adds_new_noise_at_each_step_of_a_seed():
    model, noise = perfect_model(example(), SD), torch.zeros(50, 2, 1, 1)
    runs = [draw(make("DDPMScheduler", SD), model, noise, 10, seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert runs[0].std() > 0.3  # of one and the same start


def test_draw_gives_each_scheduler_noise_of_its_own_scale():
    model, noise = perfect_model(example(), SD), torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    ddim = draw(make("DDIMScheduler", SD, set_alpha_to_one=True), model, noise, 10)
    euler = draw(make("EulerDiscreteScheduler", SD, timestep_spacing="leading"), model, noise, 10)
    assert torch.allclose(ddim, euler, atol=1e-3)  # one and the same sampler


def test_the_survey_finds_what_suits_and_says_why_not(monkeypatch):
    tried = (
        "DDIMScheduler DDPMScheduler DPMSolverMultistepScheduler EDMEulerScheduler DDIMInverseScheduler "
        "FlowMatchEulerDiscreteScheduler CogVideoXDPMScheduler"
    ).split()
    monkeypatch.setattr(compatibility, "dir", lambda module: tried, raising=False)
    found = {one.name: one for one in survey(SD)}
    assert sorted(found) == sorted(tried)
    suits = {name for name, one in found.items() if not one.problem}
    assert suits == {"DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"}
    assert found["EDMEulerScheduler"].problem == "runs, but draws other points than the data"
    assert found["EDMEulerScheduler"].distance > 2 * compatibility.FAR
    assert "stops with TypeError" in found["CogVideoXDPMScheduler"].problem
    assert "does not ask what the model predicts" in found["FlowMatchEulerDiscreteScheduler"].problem
    on_flow = {one.name for one in survey(FLOW) if not one.problem}
    assert on_flow == {"DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"}


# The command


def test_the_commands_table_is_written_whole_or_not_at_all(tmp_path):
    from tools.scheduler_curves import COLUMNS, error, write

    path = tmp_path / "data" / "curves.csv"
    row = dict(zip(COLUMNS, ("m", "s", 5, 24, "0.5000", ""), strict=True))
    write([row], path)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()}]
    with pytest.raises(ValueError):
        write([row, {"unknown": 1}], path)
    assert len(path.read_text().splitlines()) == 2 and [one.name for one in path.parent.iterdir()] == [path.name]
    two = torch.full((1, 4), 2.0)
    assert error(two + 1, two) == pytest.approx(0.5) and error(two, two) == 0
