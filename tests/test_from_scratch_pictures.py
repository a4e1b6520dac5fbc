"""Whole pictures: from_scratch against the pipelines of diffusers, from the same seeds, and what cannot be drawn."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import random_sd
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from random_sd import SCHEDULERS

import from_scratch
from benchmarks.parity_full import difference

STORYBOOK = Path(__file__).resolve().parent.parent / "models" / "storybook-sd"
NAMES = list(SCHEDULERS)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return random_sd.pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def sd(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    theirs.save_pretrained(folder)
    return from_scratch.load(folder)


@pytest.fixture(scope="module")
def boat():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((56, 40), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def left_half():
    mask = Image.new("L", (56, 40), 0)
    mask.paste(255, (0, 0, 24, 40))
    return mask


def latents(sd, **settings) -> torch.Tensor:
    """The latents after the last step."""
    steps = []
    sd.generate(**settings, on_step=lambda step, count, latents: steps.append((step, count, latents.clone())))
    assert [s[:2] for s in steps] == [(n + 1, len(steps)) for n in range(len(steps))]
    return steps[-1][2]


def expected(kind, theirs, name: str, seeds: list[int], **settings) -> torch.Tensor:
    pipe = kind(**{**theirs.components, "scheduler": SCHEDULERS[name]()}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(**settings, generator=generators, output_type="latent").images


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_text_to_image(sd, theirs, name, guidance):
    prompts, negatives = ["a red boat", "a blue house"], ["a tree", ""]
    a = latents(sd, prompt=prompts, negative_prompt=negatives, steps=5, guidance=guidance, seed=[3, 8], sampler=name)
    b = expected(
        StableDiffusionPipeline,
        theirs,
        name,
        [3, 8],
        prompt=prompts,
        negative_prompt=negatives,
        num_inference_steps=5,
        guidance_scale=guidance,
    )
    assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_image_to_image(sd, theirs, boat, name, strength):
    a = latents(sd, prompt="a boat", image=boat, steps=6, strength=strength, seed=2, sampler=name)
    b = expected(
        StableDiffusionImg2ImgPipeline,
        theirs,
        name,
        [2],
        prompt="a boat",
        image=boat,
        strength=strength,
        num_inference_steps=6,
    )
    assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddpm"])  # theirs draws once more before the steps
def test_inpainting(sd, theirs, boat, left_half, name, strength):
    a = latents(sd, prompt="a boat", image=boat, mask=left_half, steps=6, strength=strength, seed=2, sampler=name)
    b = expected(
        StableDiffusionInpaintPipeline,
        theirs,
        name,
        [2],
        prompt="a boat",
        image=boat,
        mask_image=left_half,
        height=40,
        width=56,
        strength=strength,
        num_inference_steps=6,
    )
    assert difference(a, b) < TOLERANCE


def test_inpainting_keeps_what_is_black(sd, boat, left_half):
    options = {"prompt": "a boat", "image": boat, "steps": 4, "seed": 1}
    kept = latents(sd, **options, mask=left_half, strength=1.0)
    with torch.no_grad():
        clean = sd.encode_image(boat, 40, 56, torch.Generator().manual_seed(1))
    assert torch.equal(kept[..., 3:], clean[..., 3:])
    assert (kept[..., :3] - clean[..., :3]).abs().mean() > 0.1


def test_the_bundled_model_draws_what_it_draws_in_diffusers():
    """Names, heads, groups, scaling and tokens of a trained model, not only of random ones."""
    sd = from_scratch.load(STORYBOOK)
    pipe = StableDiffusionPipeline.from_pretrained(STORYBOOK, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, prompt in (("ddim", "a red boat by the sea"), ("ddpm", "a large blue house in the snow")):
        a = latents(sd, prompt=prompt, negative_prompt="a tree", steps=8, seed=4, sampler=name)
        settings = {"prompt": prompt, "negative_prompt": "a tree", "num_inference_steps": 8}
        b = expected(StableDiffusionPipeline, pipe, name, [4], **settings)
        assert difference(a, b) < 10 * TOLERANCE  # eight steps of a trained model, guided, enlarge what differs
        pipe.scheduler = SCHEDULERS[name]()
        with torch.no_grad():
            drawn = pipe(**settings, generator=torch.Generator().manual_seed(4)).images[0]
        picture = sd.generate(prompt, "a tree", steps=8, seed=4, sampler=name)
        assert picture.size == drawn.size
        apart = np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn, dtype=int))
        assert apart.max() <= 1 and apart.mean() < 0.01


# Batches, seeds, sizes.


@pytest.mark.parametrize("name", NAMES)
def test_an_item_of_a_batch_is_the_single_picture(sd, name):
    prompts, seeds = ["a red boat", "a blue house", "a tree"], [5, 99, 5]
    batch = latents(sd, prompt=prompts, steps=4, seed=seeds, sampler=name)
    for k in range(3):
        single = latents(sd, prompt=prompts[k], steps=4, seed=seeds[k], sampler=name)
        assert difference(batch[k : k + 1], single) < TOLERANCE
    following = latents(sd, prompt=prompts, steps=4, seed=98, sampler=name)
    assert difference(following[1:2], batch[1:2]) < TOLERANCE


def test_what_is_a_list_gives_a_list(sd, boat):
    options = {"steps": 1, "height": 16, "width": 24, "seed": 0}
    one = sd.generate("a boat", **options)
    assert isinstance(one, Image.Image) and one.mode == "RGB" and one.size == (24, 16)
    several = sd.generate(["a boat"], **options)
    assert isinstance(several, list) and len(several) == 1 and several[0].tobytes() == one.tobytes()
    assert len(sd.generate("a boat", **{**options, "seed": [1, 2, 3]})) == 3
    assert len(sd.generate("a boat", image=[boat, boat], steps=2, seed=0)) == 2


def test_without_a_seed_every_picture_is_another(sd):
    options = {"prompt": "a boat", "steps": 1, "height": 16, "width": 16}
    assert sd.generate(**options).tobytes() != sd.generate(**options).tobytes()


@pytest.mark.parametrize("height, width", [(24, 56), (40, 24), (72, 136)])
def test_any_size_that_is_a_multiple_of_eight(sd, theirs, height, width):
    a = latents(sd, prompt="a boat", steps=2, seed=1, sampler="ddim", height=height, width=width)
    settings = {"prompt": "a boat", "num_inference_steps": 2, "height": height, "width": width}
    assert difference(a, expected(StableDiffusionPipeline, theirs, "ddim", [1], **settings)) < TOLERANCE


def test_nothing_changes_at_strength_zero(sd, boat):
    drawn = sd.generate("a boat", image=boat, strength=0, seed=7)
    with torch.no_grad():
        assert (
            drawn.tobytes() == sd.decode(sd.encode_image(boat, 40, 56, torch.Generator().manual_seed(7)))[0].tobytes()
        )


def test_pixels_are_rounded():
    values = torch.tensor([-2.0, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 0.9999, 3.0]).expand(3, 1, 6)
    assert np.asarray(from_scratch.pipeline.to_image(values))[0, :, 0].tolist() == [0, 0, 1, 0, 255, 255]
    with pytest.raises(FloatingPointError, match="not finite"):
        from_scratch.pipeline.to_image(values * float("nan"))


# Unusual pictures.


def test_pictures_of_any_mode(sd, boat):
    options = {"prompt": "a boat", "steps": 2, "strength": 0.5, "seed": 0}
    clear = boat.convert("RGBA")
    clear.putalpha(Image.new("L", boat.size, 0))
    with pytest.warns(UserWarning, match="The image is 56x40, RGBA: it is made 56x40, RGB, transparent parts in white"):
        assert (
            sd.generate(image=clear, **options).tobytes()
            == sd.generate(image=Image.new("RGB", boat.size, "white"), **options).tobytes()
        )
    with pytest.warns(UserWarning, match="The image is 56x40, L: it is made 56x40, RGB."):
        sd.generate(image=boat.convert("L"), **options)
    with pytest.warns(UserWarning, match="The image is 45x27, RGB: it is made 40x24"):
        assert sd.generate(image=boat.resize((45, 27)), **options).size == (40, 24)
    with pytest.warns(UserWarning, match="it is made 16x32"):
        assert sd.generate(image=boat, height=32, width=16, **options).size == (16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.generate(image=boat, **options)


# What cannot be drawn: one clear sentence each, and the next picture comes out as before.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strength": 1.5}, "strength is 1.5: give a number from 0"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"sampler": "plms"}, "There is no sampler 'plms': choose one of ddpm, ddim, euler"),
        ({"steps": 0}, "steps is 0: give a whole number from 1 to 999"),
        ({"height": 20}, "The height is 20: give a positive multiple of 8 pixels"),
        ({"width": 0}, "The width is 0"),
        ({"width": 16.0}, "The width is 16.0"),
        ({"guidance": float("inf")}, "guidance is inf: give a number"),
        ({"prompt": None}, "not text"),
        ({"prompt": []}, "There are 0 of prompt for 0 pictures"),
        ({"prompt": ["a", 3]}, "not text"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "There are 3 of seed for 2 pictures"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "There are 1 of negative_prompt for 2 pictures"),
        ({"seed": "seven"}, "seed is 'seven': give a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"mask": Image.new("L", (16, 16))}, "a mask but no image"),
        ({"image": "boat.png"}, "The image is of type str: give a PIL image"),
        ({"image": Image.new("RGB", (16, 16)), "mask": [[1]]}, "The mask is of type list"),
    ],
)
def test_what_cannot_be_drawn(sd, settings, message):
    options = {"prompt": "a boat", "steps": 1, "height": 16, "width": 16, "seed": 0}
    before = sd.generate(**options).tobytes()
    with pytest.raises(ValueError, match=message) as error:
        sd.generate(**{**options, **settings})
    assert "\n" not in str(error.value)
    assert sd.generate(**options).tobytes() == before


def test_prompts_that_are_empty_or_too_long(sd):
    options = {"steps": 1, "height": 16, "width": 16, "seed": 0}
    sd.generate("", **options)
    with pytest.warns(UserWarning, match=r"The prompt has 90 tokens, 75 fit; .* cut off its end: 'boat( a boat){7}'"):
        drawn = sd.generate(" ".join(["a boat"] * 45), **options)
    assert drawn.size == (16, 16)


def test_an_error_in_a_callback_leaves_the_model_as_it_was(sd):
    options = {"prompt": "a boat", "steps": 2, "height": 16, "width": 16, "seed": 0}
    before = sd.generate(**options).tobytes()
    with pytest.raises(KeyError):
        sd.generate(**options, on_step=lambda *_: {}["missing"])
    assert sd.generate(**options).tobytes() == before
    assert torch.is_grad_enabled()
