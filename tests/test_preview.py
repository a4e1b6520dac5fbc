import inspect
import types
from base64 import b64decode

import numpy as np
import pytest
import tiny
import torch
from diffusers import PNDMScheduler

from helpers import preview
from helpers.generate import Settings, generate
from helpers.latent_rgb import fit_rgb
from helpers.memory import Budget, plans
from helpers.pipelines import Model, load
from helpers.preview import LiveMeter
from helpers.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS, predicted_x0, remember

PROMPT = "a red boat by the sea"
SD15_CONFIG = PNDMScheduler.from_pretrained(tiny.CONFIGS / "scheduler").config


def scheduler(name, **more):
    cls = getattr(__import__("diffusers"), name)
    made = cls.from_config({**SD15_CONFIG, **more}) if name in DIFFUSION_SCHEDULERS else cls(shift=3.0)
    made.set_timesteps(6)
    return remember(made)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 6, 3.0, (PROMPT,), folder=str(folder)))


@pytest.fixture(scope="module")
def sd3_model(tmp_path_factory):
    folder = tiny.sd3_folder(tmp_path_factory.mktemp("sd3"))
    return Model("tiny", "StableDiffusion3Pipeline", None, 4, 3.0, (PROMPT,), folder=str(folder))


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    "DDIMScheduler DDPMScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler".split(),
)
def test_predicted_x0_are_the_librarys_where_it_has_them(name, target):
    made = scheduler(name, prediction_type=target)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=random) * made.init_noise_sigma
    for t in made.timesteps:
        made.scale_model_input(x, t)
        step = made.step(torch.randn(x.shape, generator=random), t, x)
        theirs = step.pred_original_sample
        assert torch.allclose(predicted_x0(made), theirs, atol=1e-4 * theirs.abs().max().item())
        x = step.prev_sample


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS + FLOW_SCHEDULERS)
def test_the_exact_answer_gives_the_exact_latents(name):
    made = scheduler(name)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = made.timesteps[:1]
    if name in FLOW_SCHEDULERS:
        x, answer = made.scale_noise(x0, t, noise), noise - x0
    else:
        x, answer = made.add_noise(x0, noise, t), noise
        made.scale_model_input(x, t[0])
    made.step(answer, t[0], x)
    assert torch.allclose(predicted_x0(made), x0, atol=2e-3)  # of noise that is up to 15 times as large


def test_other_targets_and_no_step_yet():
    made = scheduler("DDIMScheduler", prediction_type="sample")
    with pytest.raises(ValueError, match=r"^There is no step to look back at: .*\.$"):
        predicted_x0(made)
    answer = torch.randn(1, 4, 8, 8)
    made.step(answer, made.timesteps[0], answer)
    assert predicted_x0(made) is answer
    made.register_to_config(prediction_type="colour")
    with pytest.raises(ValueError, match="predicts 'colour'"):
        predicted_x0(made)


def test_a_scheduler_that_remembers_steps_as_before():
    plain, made = PNDMScheduler.from_config(SD15_CONFIG), scheduler("PNDMScheduler")
    assert inspect.signature(made.step) == inspect.signature(plain.step)  # pipelines look for eta and generator there
    plain.set_timesteps(6)
    x = torch.randn(1, 4, 8, 8)
    for t in plain.timesteps:
        assert torch.equal(made.step(x, t, x, return_dict=False)[0], plain.step(x, t, x).prev_sample)
    with pytest.raises(ValueError):
        predicted_x0(plain)


class LinearVae:
    """Decodes each latent to 8x8 pixels of one colour, a linear function of its three channels."""

    config = types.SimpleNamespace(
        block_out_channels=(1,) * 4, latent_channels=3, sample_size=512, scaling_factor=0.5, shift_factor=0.1
    )
    device, dtype = torch.device("cpu"), torch.float32
    colours = torch.tensor([[0.05, 0.02, 0.0], [0.0, 0.1, 0.0], [-0.03, 0.0, 0.08]])

    def decode(self, z):
        pictures = torch.einsum("bchw,cr->brhw", z, self.colours).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return types.SimpleNamespace(sample=pictures + 0.2)

    def encode(self, pictures):
        z = torch.einsum("bchw,cr->brhw", pictures[..., ::8, ::8] - 0.2, self.colours.inverse())
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: z))


def test_a_linear_vae_is_fitted_exactly():
    vae = LinearVae()
    rgb = fit_rgb(vae)
    assert rgb.weight.shape == (3, 3) and rgb.r2 == pytest.approx(1.0, abs=1e-5)
    latents = torch.randn(2, 3, 5, 7)  # as the denoiser has them: scaled and shifted
    expected = vae.decode(latents / 0.5 + 0.1).sample[..., ::8, ::8]
    assert torch.allclose(rgb(latents), expected, atol=1e-3)
    assert torch.allclose(rgb(latents[0].half()), expected[0], atol=1e-2)


@pytest.mark.parametrize("channels", [4, 16])
def test_any_number_of_channels(channels):
    rgb = fit_rgb(tiny.vae(channels))
    assert rgb.weight.shape == (channels, 3) and torch.isfinite(rgb.weight).all() and rgb.r2 <= 1
    assert rgb(torch.randn(channels, 8, 8)).shape == (3, 8, 8)


def test_the_meter_in_plain_python(sd15, capsys):
    meter = LiveMeter(sd15)
    picture = generate(sd15, Settings(PROMPT, seed=3), on_step=meter)[0]
    steps = sd15.scheduler.config.get("skip_prk_steps") and 7  # PNDM looks twice at its first step
    line = capsys.readouterr().out
    assert line == meter.line + "\n"
    assert line.startswith(f"step {steps} of {steps}, ") and " s/it, 0 s left" in line and "RAM " in line
    assert ("VRAM" in line) == torch.cuda.is_available()
    assert meter.picture.size == (192, 192) and np.asarray(meter.picture).std() > 0
    assert picture.tobytes() == generate(sd15, Settings(PROMPT, seed=3), on_step=lambda *_: None)[0].tobytes()
    generate(sd15, Settings(PROMPT, steps=1, scheduler="DDIMScheduler"), on_step=meter)  # and a second run
    assert capsys.readouterr().out.startswith("step 1 of 1, RAM")


def test_the_meter_computes_where_the_pipeline_does(sd15, sd3_model, monkeypatch):
    """Where a VAE is offloaded, its own device is another one: the first latents tell, or the plan."""
    seen = []
    monkeypatch.setattr(preview, "fit_rgb", lambda vae, device: seen.append(device.type))
    monkeypatch.setattr(LiveMeter, "_picture", lambda meter: None)
    LiveMeter(sd15)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    meter = LiveMeter(sd15, show=lambda *_: None)
    assert seen == ["cpu"]
    meter(1, 2, torch.empty(1, 4, 8, 8, device="meta"))
    assert seen == ["cpu", "meta"]
    pipe = load(sd3_model, "resident")
    pipe.stage.device = torch.device("meta")
    LiveMeter(pipe)
    assert seen == ["cpu", "meta", "meta"]


@pytest.mark.parametrize(("ram", "leaves"), [(8.0, False), (0.3, True)])
def test_the_meter_waits_where_the_vae_comes_later(sd3_model, ram, leaves, capsys):
    pipe = load(sd3_model, plans(sd3_model, Budget("cpu", 0.0, ram, None, 50.0))["staged"])
    meter = LiveMeter(pipe)
    assert (meter.rgb is None) == leaves
    generate(pipe, Settings(PROMPT), on_step=meter)
    assert meter.rgb.weight.shape[0] == 16 and capsys.readouterr().out.startswith("step 4 of 4")


def test_in_a_notebook_one_line_and_one_picture_change_in_place(sd15, monkeypatch):
    shown = []

    class Handle:
        def update(self, content, raw):
            shown.append(("update", content, raw))

    def display(content, raw, display_id):
        shown.append(("new", content, raw))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(preview, "_in_notebook", lambda: True)
    monkeypatch.setattr(preview, "SHARE", 1e9)  # show every step
    meter = LiveMeter(sd15)
    meter._cost = 0.0
    generate(sd15, Settings(PROMPT, scheduler="DDIMScheduler"), on_step=meter)
    assert [kind for kind, *_ in shown] == ["new"] * 2 + ["update"] * 10
    for (_, line, raw), (_, picture, _) in zip(shown[::2], shown[1::2], strict=True):
        assert raw and line["text/plain"].startswith("step ") and b64decode(picture["image/png"]).startswith(b"\x89PNG")
        assert "text/html" not in line  # nothing to escape
    assert shown[-2][1]["text/plain"] == meter.line


@pytest.mark.parametrize("cost", [0.01, 0.3, 2.0])
def test_watching_costs_little(sd15, monkeypatch, cost):
    clock = types.SimpleNamespace(now=0.0)
    meter = LiveMeter(sd15)
    monkeypatch.setattr(preview.time, "perf_counter", lambda: clock.now)
    shows = []

    def picture():
        clock.now += cost
        shows.append(clock.now)

    monkeypatch.setattr(meter, "_picture", picture)
    monkeypatch.setattr(preview._Display, "__call__", lambda *_: None)
    for step in range(1, 101):
        clock.now += 1.0
        meter(step, 100, None)
    assert meter.share <= 0.05 and shows[-1] == clock.now  # the last step is shown in any case
    assert len(shows) >= (2 if cost > 1 else 12)
