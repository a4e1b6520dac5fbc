"""What a CPU cannot say: every plan, offloading and four bits on a CUDA GPU, on the bundled models."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_planned import adapter

from helpers.generate import Settings, generate
from helpers.loading.plan import STRATEGIES, WITHOUT_T5, plans
from helpers.memory import GIB, Budget, free, meter
from helpers.pipelines import MODELS, load
from helpers.preview import LiveMeter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
FOUR_BITS = importlib.util.find_spec("bitsandbytes") is not None
NAMES = [name for name, one in STRATEGIES.items() if name != "cpu" and (one.t5 != "nf4" or FOUR_BITS)]
SETTINGS = Settings(MODELS["storybook-sd3"].examples[0], seed=3, steps=12)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.fixture(scope="module")
def on_the_cpu():
    """The same picture in float32, with T5 and without it."""
    with_t5, without = load("storybook-sd3", "cpu"), None
    drawn = {True: pixels(generate(with_t5, SETTINGS)[0])}
    card = plans("storybook-sd3", Budget("cpu", 0.0, 60.0, None, 50.0))["cpu"]
    without = load("storybook-sd3", replace(card, t5=None))
    drawn[False] = pixels(generate(without, SETTINGS)[0])
    return drawn


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_draws_as_the_cpu_does(on_the_cpu, name):
    pipe = load("storybook-sd3", name)
    assert pipe.plan.name == name
    first, again = (pixels(generate(pipe, SETTINGS, on_step=LiveMeter(pipe, lambda *_: None))[0]) for _ in range(2))
    assert np.abs(first - on_the_cpu[name not in WITHOUT_T5]).mean() < (12 if name.endswith("nf4") else 5)  # of 255
    assert np.abs(again - first).max() <= 8
    called = pipe(SETTINGS.prompt, num_inference_steps=2, output_type="latent").images
    assert called.device.type == "cuda" and torch.isfinite(called).all()
    start = Image.fromarray(first.astype(np.uint8))
    assert generate(pipe, SETTINGS, start, Image.new("L", start.size, 255))[0].size == start.size
    pipe.unload()
    assert np.abs(pixels(generate(pipe, SETTINGS)[0]) - first).max() <= 8


@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_is_empty_after_unload_and_after_an_interrupt(name):
    pipe = load("storybook-sd3", name)
    pipe.unload()
    free()
    before = torch.cuda.memory_allocated()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, SETTINGS, on_step=interrupt)
    pipe.unload()
    assert torch.cuda.memory_allocated() <= before + 2**24  # what cuBLAS keeps for itself
    assert len(generate(pipe, SETTINGS)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_stays(tmp_path, name):
    pipe, prompts = load("storybook-sd3", name), MODELS["storybook-sd3"].examples
    before = [pixels(generate(pipe, replace(SETTINGS, prompt=text, steps=4))[0]) for text in prompts]
    pipe.load_lora_weights(adapter(pipe, tmp_path, 3.0))
    after = [pixels(generate(pipe, replace(SETTINGS, prompt=text, steps=4))[0]) for text in prompts]
    assert all(np.abs(a - b).mean() > 1 for a, b in zip(before, after, strict=True))
    pipe.unload()
    assert np.abs(pixels(generate(pipe, replace(SETTINGS, prompt=prompts[2], steps=4))[0]) - after[2]).max() <= 8


@pytest.mark.parametrize("name", [name for name in NAMES if STRATEGIES[name].offload is None])
def test_the_peak_is_below_the_prediction(name):
    plan = plans("storybook-sd3", Budget.detect())[name]
    pipe = load("storybook-sd3", plan)
    with meter() as used:
        generate(pipe, SETTINGS)
    assert used.peak_vram_gib <= plan.peak_vram_gib + 64 * 2**20 / GIB


def test_weights_go_straight_to_the_gpu():
    pipe = load("storybook-sd3", "resident")
    places = {tensor.device.type for network in pipe.stage.networks.values() for tensor in network.module.parameters()}
    assert places == {"cuda"} and pipe.device.type == "cuda"


@pytest.mark.parametrize("name", ["resident", "model-offload"])
def test_stable_diffusion_15s_plans(name):
    pipe = load("storybook-sd", name)
    first = pixels(generate(pipe, Settings(MODELS["storybook-sd"].examples[0]))[0])
    expected = pixels(generate(load("storybook-sd", "cpu"), Settings(MODELS["storybook-sd"].examples[0]))[0])
    assert np.abs(first - expected).mean() < 5
    assert LiveMeter(pipe).rgb is not None
