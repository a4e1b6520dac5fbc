import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import helpers.generate
from helpers.generate import (
    FLOW_SCHEDULERS,
    Settings,
    cut_off,
    decode,
    generate,
    notes,
    resolve,
    schedulers,
    unknown_words,
)
from helpers.pipelines import MODELS, Model, load

PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def pipe(folder):
    return load(Model("tiny", "StableDiffusionPipeline", None, 4, 4.0, (PROMPT,), folder=str(folder)))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("sd3"))


def pixels(image):
    return np.asarray(image, dtype=int)


def test_draws_what_the_library_draws(pipe):
    mine = generate(pipe, Settings(PROMPT, "house", steps=3, guidance=3.0, seed=5))[0]
    generator = torch.Generator().manual_seed(5)
    theirs = pipe(PROMPT, negative_prompt="house", num_inference_steps=3, guidance_scale=3.0, generator=generator)
    assert np.array_equal(pixels(mine), pixels(theirs.images[0]))
    assert pixels(mine).std() > 1


def test_defaults_come_from_the_model(pipe):
    image = generate(pipe, Settings(PROMPT))[0]
    assert image.info["settings"] == Settings(PROMPT, "", 4, 4.0, 0, 64, 64, "PNDMScheduler", 1)
    assert image.info["model"] == "tiny"


def test_the_registry_may_ask_for_less_than_the_size_of_training(pipe):
    pipe.model = Model("tiny", "StableDiffusionPipeline", 32, 4, 4.0, (PROMPT,), folder="none")
    assert (resolve(pipe, Settings(PROMPT)).height, resolve(pipe, Settings(PROMPT, width=72)).width) == (32, 72)
    pipe.model = Model("tiny", "StableDiffusionPipeline", 512, 4, 4.0, (PROMPT,), folder="none")
    assert resolve(pipe, Settings(PROMPT)).width == 64


def test_a_batch_is_the_single_pictures(pipe):
    batch = generate(pipe, Settings(PROMPT, steps=3, seed=7, count=3, scheduler="EulerAncestralDiscreteScheduler"))
    assert [image.info["settings"].seed for image in batch] == [7, 8, 9]
    for image in batch:
        alone = generate(pipe, image.info["settings"])[0]
        assert np.abs(pixels(alone) - pixels(image)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).mean() > 1


@pytest.mark.parametrize("steps", [1, 4])
def test_every_scheduler_draws_and_the_own_one_comes_back(pipe, sd3, steps):
    for one in (pipe, sd3):
        own, state = one.scheduler, dict(vars(one.scheduler))
        for name in schedulers(one):
            assert len(generate(one, Settings(PROMPT, steps=steps, guidance=3.0, scheduler=name))) == 1
        assert one.scheduler is own
        assert vars(own).keys() == state.keys() and all(vars(own)[key] is state[key] for key in state)
    assert schedulers(sd3) == FLOW_SCHEDULERS


def test_sd3_draws_what_the_library_draws(sd3):
    mine = generate(sd3, Settings(PROMPT, steps=2, guidance=3.0, seed=5))[0]
    generator = torch.Generator().manual_seed(5)
    theirs = sd3(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    assert np.array_equal(pixels(mine), pixels(theirs))
    with pytest.raises(ValueError, match="divisible by 16: try"):
        generate(sd3, Settings(PROMPT, height=72))


def test_another_size(pipe):
    assert generate(pipe, Settings(PROMPT, steps=1, height=72, width=40))[0].size == (40, 72)


def test_on_step_sees_every_step(pipe, capfd):
    seen = []
    generate(
        pipe, Settings(PROMPT, steps=3, count=2, scheduler="DDIMScheduler"), on_step=lambda *args: seen.append(args)
    )
    assert [(step, steps) for step, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0][2].shape == (2, 4, 8, 8) and not torch.equal(seen[0][2], seen[1][2])
    assert capfd.readouterr() == ("", "")


def test_the_own_bar_of_a_pipeline_is_hidden_for_the_run_alone(sd3, capfd):
    def broken(*_):
        raise ZeroDivisionError

    sd3.set_progress_bar_config(desc="its own")
    generate(sd3, Settings(PROMPT, steps=1), on_step=lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        generate(sd3, Settings(PROMPT, steps=1), on_step=broken)
    assert capfd.readouterr() == ("", "")
    sd3(PROMPT, num_inference_steps=1, output_type="latent")
    assert "its own" in capfd.readouterr().err
    sd3.set_progress_bar_config()


def test_stop_draws_nothing_and_the_next_run_is_whole(pipe):
    settings = Settings(PROMPT, steps=4, seed=3)
    before = generate(pipe, settings)[0]
    steps = []
    assert (
        generate(pipe, settings, on_step=lambda step, *_: steps.append(step), should_stop=lambda: len(steps) == 2) == []
    )
    assert steps == [1, 2]
    assert np.array_equal(pixels(generate(pipe, settings)[0]), pixels(before))


def test_an_error_in_a_callback_leaves_the_pipeline_as_it_was(pipe):
    own, before = pipe.scheduler, generate(pipe, Settings(PROMPT))[0]

    def broken(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(pipe, Settings(PROMPT, scheduler="HeunDiscreteScheduler"), on_step=broken)
    assert pipe.scheduler is own
    assert np.array_equal(pixels(generate(pipe, Settings(PROMPT))[0]), pixels(before))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": ["a", "b"]}, "prompt is not text"),
        ({"negative_prompt": None}, "negative prompt is not text"),
        ({"height": 60}, "height 60 is not divisible by 8: try 64"),
        ({"width": 65}, "width 65 is not divisible by 8: try 64"),
        ({"width": 8}, "width '8' is not a whole number from 16 to 256"),
        ({"height": 100_000}, "height '100000' is not a whole number from 16 to 256"),
        ({"steps": 0}, "steps '0' is not a whole number from 1"),
        ({"steps": 2.5}, "steps '2.5' is not"),
        ({"steps": True}, "steps 'True' is not"),
        ({"guidance": -1}, "guidance is not a number of 0 or more"),
        ({"guidance": "much"}, "guidance is not a number"),
        ({"guidance": float("nan")}, "guidance is not a number"),
        ({"guidance": float("inf")}, "guidance is not a number"),
        ({"seed": "abc"}, "seed 'abc' is not a whole number from 0"),
        ({"seed": -1}, "seed '-1' is not"),
        ({"seed": None}, "seed 'None' is not"),
        ({"count": 0}, "count '0' is not a whole number from 1"),
        ({"scheduler": "Nonsense"}, "no scheduler 'Nonsense' here: choose one of PNDMScheduler, DDIM"),
    ],
)
def test_bad_settings_get_one_sentence(pipe, change, sentence):
    with pytest.raises(ValueError) as caught:
        generate(pipe, Settings(**{"prompt": PROMPT, **change}))
    message = str(caught.value)
    assert sentence in message and ":" in message and message.endswith(".") and "\n" not in message
    assert len(generate(pipe, Settings(PROMPT, steps=1))) == 1


def test_numbers_typed_as_text_count(pipe):
    assert resolve(pipe, Settings(PROMPT, seed="42", guidance="3", steps="2")).seed == 42
    assert resolve(pipe, Settings(PROMPT, seed=np.int64(7))).seed == 7


def test_what_is_cut_off_a_long_prompt_is_said(pipe, capfd):
    long = " ".join(["red boat"] * 250)
    text = "the sea " * 38 + "a house in snow"  # 75 tokens fit: 76 of the sea, and ...
    assert cut_off(pipe.tokenizer, "red boat") == ""
    assert cut_off(pipe.tokenizer, text).split() == text.split()[75:]
    assert len(generate(pipe, Settings(long, steps=1))) == 1
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and "too long" in out and out.count("boat") + out.count("red") == 500 - 75
    assert "truncated" not in err and "longer than" not in err  # the libraries need not say it again


def test_unknown_words_are_named_and_it_still_draws(pipe, capsys):
    assert tiny.WORDS == [w for w in tiny.WORDS if not unknown_words(pipe.tokenizer, w)]
    assert len(generate(pipe, Settings("A red Zebra, zebra by the sea!", "pink", steps=1))) == 1
    assert capsys.readouterr().out == (
        "The model has never seen these words of the prompt: zebra.\n"
        "The model has never seen these words of the negative prompt: pink.\n"
    )
    assert notes(pipe, Settings("A RED boat, by the sea.")) == []


def test_a_large_vocabulary_can_spell_anything():
    class Large:
        def get_vocab(self):
            return dict.fromkeys(range(49_408))

    assert unknown_words(Large(), "zebra") == []


@pytest.mark.parametrize(
    ("part", "stage"), [("text_encoder", "text encoder"), ("unet", "step 1 of"), ("vae", "decoded picture")]
)
def test_numbers_that_are_not_finite_name_the_stage(pipe, part, stage):
    last = {"text_encoder": "final_layer_norm", "unet": "conv_out", "vae": "decoder.conv_out"}[part]
    module = next(m for name, m in getattr(pipe, part).named_modules() if name.endswith(last))
    with torch.no_grad():
        module.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=stage):
        generate(pipe, Settings(PROMPT, steps=2))


def test_infinity_does_not_become_white(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(
        RuntimeError, match=r"infinite numbers in the decoded picture: lower the guidance, or load anew\.$"
    ):
        generate(pipe, Settings(PROMPT, steps=2))


def test_what_float16_cannot_hold_is_decoded_in_float32(pipe):
    pipe.vae.half()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(6e4)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    assert not torch.isfinite(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample).all()
    pixels = decode(pipe, latents)
    assert pixels.dtype == torch.float32 and torch.isfinite(pixels).all() and pipe.vae.dtype == torch.float16


def test_what_float16_cannot_hold_is_drawn_again_in_float32(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight.fill_(6e4)  # the norm after it makes small numbers of the sums, if they are finite
    ends, said = [], []

    def draw():
        generate(pipe, Settings(PROMPT, steps=2), on_step=lambda *seen: ends.append(seen[2]), say=said.append)

    draw()
    assert said == []
    pipe.to(torch.float16)
    draw()
    assert len(said) == 1 and "so the picture is drawn again in float32" in said[0]
    assert ends[-1].dtype == torch.float32 and torch.allclose(ends[-1], ends[len(ends) // 2 - 1], atol=0.01)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"the latents after step 1 of 3: lower the guidance, or load anew\.$"):
        draw()
    assert pipe.unet.dtype == torch.float16


def test_sd15_starts_from_a_picture_as_the_library_does(pipe):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    start = Image.fromarray(
        np.stack([ramp[None].repeat(64, 0), ramp[:, None].repeat(64, 1), 0 * ramp[None].repeat(64, 0)], -1)
    )
    mask = Image.fromarray(np.repeat([0, 255], 32).astype(np.uint8)[None].repeat(64, 0))
    ask = {"num_inference_steps": 6, "guidance_scale": 3.0, "strength": 0.5, "image": start}
    for cls, more in (("Img2Img", {}), ("Inpaint", {"mask_image": mask, "height": 64, "width": 64})):
        parts = {**pipe.components, "requires_safety_checker": False}
        theirs = getattr(diffusers, f"StableDiffusion{cls}Pipeline")(**parts)
        theirs.set_progress_bar_config(disable=True)
        drawn = theirs(PROMPT, **ask, **more, generator=torch.Generator().manual_seed(5)).images[0]
        settings = Settings(PROMPT, steps=6, guidance=3.0, strength=0.5, seed=5)
        mine = generate(pipe, settings, start, more.get("mask_image"))
        assert np.abs(pixels(mine[0]) - pixels(drawn)).max() <= 1
        assert mine[0].info["settings"].strength == 0.5
        batch = generate(pipe, replace(settings, seed=4, count=2), start, more.get("mask_image"))
        assert np.abs(pixels(batch[1]) - pixels(mine[0])).max() <= 1
        larger = generate(
            pipe, replace(settings, height=72, width=96), start.resize((300, 300)), more.get("mask_image")
        )
        assert larger[0].size == (96, 72)
    assert resolve(pipe, Settings(PROMPT), start).strength == 0.8 and resolve(pipe, Settings(PROMPT)).strength is None


def test_design_names():
    assert list(inspect.signature(Settings).parameters) == (
        "prompt negative_prompt steps guidance seed height width scheduler count strength".split()
    )
    assert (
        list(inspect.signature(helpers.generate.generate).parameters)[:6]
        == "pipe settings image mask on_step should_stop".split()
    )
    assert MODELS["sd15"].twin in MODELS
