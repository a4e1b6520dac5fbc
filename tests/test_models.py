"""The bundled models, drawn from by stock diffusers, and the gallery, drawn again from what its files say."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from helpers import pipelines
from helpers.generate import generate
from helpers.images import ROOT, record, settings
from storybook.evaluate import draw, held_out_prompts, seen_prompts
from storybook.judge import judge, share

FOLDER = ROOT / "models/storybook-sd"
GALLERY = sorted((ROOT / "outputs/gallery").glob("*.png"))


@pytest.fixture(scope="module")
def pipeline():
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)  # nothing of ours: any user's first two lines
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prompt", ["a red boat by the sea", "a small yellow star under a starry night sky"])
def test_stock_diffusers_draws_the_prompt(pipeline, prompt):
    """Judged on the thing, its colour and the setting, for four seeds of five at least."""
    images = draw(pipeline, [prompt] * 5, pipelines.MODELS["storybook-sd"].guidance)
    assert share(judge(images, [prompt] * 5), "object", "colour", "setting") >= 0.8


def test_two_seeds_give_two_pictures(pipeline):
    guidance = pipelines.MODELS["storybook-sd"].guidance
    first, second = (np.asarray(image, float) for image in draw(pipeline, ["a red boat by the sea"] * 2, guidance))
    assert np.sqrt(((first - second) ** 2).mean()) > 5  # of 255


def test_all_is_stored_in_half_precision_and_loads_in_float32(pipeline):
    from safetensors import safe_open

    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} <= {"F16", "I64"}, file
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_the_model_card_has_measured_figures_and_the_guidance_that_the_registry_uses():
    card = (FOLDER / "README.md").read_text()
    assert re.search(r"VAE: PSNR on 500 fresh renders \| \d+\.\d dB", card)
    guidance = float(re.search(r"Guidance ([\d.]+?),", card).group(1))
    assert guidance == pipelines.MODELS["storybook-sd"].guidance


def test_the_gallery_is_drawn_again_from_its_own_files():
    assert len(GALLERY) >= 6, "draw the gallery: python -m tools.gallery"
    pipe = pipelines.load("storybook-sd")
    for path in GALLERY[:3]:
        assert record(path)["model"] == "storybook-sd"
        (picture,) = generate(pipe, settings(path))
        with Image.open(path) as stored:
            difference = np.abs(np.asarray(picture, int) - np.asarray(stored, int))
        # the same numbers, but for rounding that differs between processors
        assert difference.mean() < 0.5 and difference.max() <= 16, path.name


@pytest.mark.parametrize(("prompts", "target"), [(seen_prompts, 0.92), (held_out_prompts, 0.80)])
def test_pictures_show_what_the_prompt_says(pipeline, prompts, target):
    """A sample of what `storybook.evaluate` measures, at most two standard errors below the target."""
    asked = prompts(48)
    table = judge(draw(pipeline, asked, pipelines.MODELS["storybook-sd"].guidance), asked)
    margin = 2 * (target * (1 - target) / len(asked)) ** 0.5
    assert share(table, "object", "colour", "setting") >= target - margin
