"""Stable Diffusion 3 in from_scratch as a whole: loading, and pictures against the pipelines of diffusers."""

import copy as copying
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import random_sd3
import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import from_scratch
from benchmarks.parity_full import difference
from from_scratch import CheckpointError
from from_scratch.tokenizer import Tokenizer

STORYBOOK = Path(__file__).resolve().parent.parent / "models" / "storybook-sd3"
TOLERANCE = 1e-5
DRAW = {"prompt": "a red boat", "steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return random_sd3.pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "sd3"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sd(folder):
    return from_scratch.load(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def boat():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)


def latents(sd, **settings) -> torch.Tensor:
    """The latents after the last step."""
    steps = []
    sd.generate(**settings, on_step=lambda step, count, latents: steps.append((step, count, latents.clone())))
    assert [s[:2] for s in steps] == [(n + 1, len(steps)) for n in range(len(steps))]
    return steps[-1][2]


def expected(pipe, seeds: list[int], **settings) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(**settings, generator=generators, output_type="latent").images


# Pictures.

PROMPTS = {"prompt": ["a red boat by the sea", "a blue house"], "negative_prompt": ["a tree", ""]}


def without_t5(sd, pipe):
    """Both without their largest text encoder, for which they read zeros."""
    lighter = copying.copy(sd)
    lighter.text_encoders = [*sd.text_encoders[:2], None]
    return lighter, StableDiffusion3Pipeline(**(pipe.components | {"text_encoder_3": None}))


@pytest.mark.parametrize("guidance", [7.0, 1.0])
@pytest.mark.parametrize("t5", [True, False])
def test_text_to_image(sd, theirs, guidance, t5):
    mine, pipe = (sd, theirs) if t5 else without_t5(sd, theirs)
    a = latents(mine, **PROMPTS, steps=4, guidance=guidance, seed=[3, 8])
    b = expected(pipe, [3, 8], **PROMPTS, num_inference_steps=4, guidance_scale=guidance)
    assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("height, width", [(16, 64), (48, 32), (192, 176)])
def test_any_size_that_fits_the_table_of_places(sd, theirs, height, width):
    a = latents(sd, prompt="a boat", steps=1, seed=1, height=height, width=width)
    assert a.shape == (1, 16, height // 8, width // 8)
    b = expected(theirs, [1], prompt="a boat", num_inference_steps=1, height=height, width=width)
    assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("skip_range", [(0.01, 0.2), (0.5, 5 / 6)])
def test_skip_layer_guidance(sd, theirs, skip_range):
    a = latents(sd, **PROMPTS, steps=6, seed=[3, 8], skip=[0, 2], skip_guidance=2.0, skip_range=skip_range)
    more = {"skip_layer_guidance_start": skip_range[0], "skip_layer_guidance_stop": skip_range[1]}
    more |= {"skip_guidance_layers": [0, 2], "skip_layer_guidance_scale": 2.0}
    b = expected(theirs, [3, 8], **PROMPTS, num_inference_steps=6, guidance_scale=7.0, **more)
    assert difference(a, b) < TOLERANCE
    assert difference(a, latents(sd, **PROMPTS, steps=6, seed=[3, 8])) > 0.01


@pytest.mark.parametrize("strength", [0.9, 0.55, 1.0])
def test_image_to_image(sd, theirs, boat, strength):
    """With 10 steps, 0.9 and 0.55 show how the number of steps is rounded."""
    a = latents(sd, prompt="a boat", image=boat, steps=10, strength=strength, seed=2)
    pipe = StableDiffusion3Img2ImgPipeline(**theirs.components)
    settings = {"num_inference_steps": 10, "strength": strength, "guidance_scale": 7.0, "height": 48, "width": 64}
    assert difference(a, expected(pipe, [2], prompt="a boat", image=boat, **settings)) < TOLERANCE


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(sd, theirs, boat, strength):
    mask = Image.new("L", boat.size, 0)
    mask.paste(255, (0, 0, 24, 48))
    a = latents(sd, prompt="a boat", image=boat, mask=mask, steps=5, strength=strength, seed=2)
    pipe = StableDiffusion3InpaintPipeline(**theirs.components)
    settings = {"num_inference_steps": 5, "strength": strength, "guidance_scale": 7.0, "height": 48, "width": 64}
    b = expected(pipe, [2], prompt="a boat", image=boat, mask_image=mask, **settings)
    assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("t5", [True, False])
def test_the_bundled_model_draws_what_it_draws_in_diffusers(t5):
    sd = from_scratch.load(STORYBOOK)
    pipe = StableDiffusion3Pipeline.from_pretrained(STORYBOOK, torch_dtype=torch.float32)
    sd, pipe = (sd, pipe) if t5 else without_t5(sd, pipe)
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt": ["a red boat by the sea", "a blue house"], "negative_prompt": ["a tree", ""]}
    a = latents(sd, **prompts, steps=6, seed=[4, 5])
    b = expected(pipe, [4, 5], **prompts, num_inference_steps=6)
    assert difference(a, b) < 10 * TOLERANCE  # a trained model, guided, enlarges what differs
    prompts = {"prompt": "a large blue house in the snow", "height": sd.size[0] // 2, "width": sd.size[1]}
    drawn = pipe(**prompts, num_inference_steps=4, generator=torch.Generator().manual_seed(6)).images[0]
    picture = sd.generate(**prompts, steps=4, seed=6)
    assert picture.size == drawn.size
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_a_seed_is_the_same_picture_in_a_batch_and_alone(sd):
    batch = latents(sd, prompt=["a red boat", "a tree"], steps=2, seed=5)
    assert difference(batch[1:], latents(sd, prompt="a tree", steps=2, seed=6)) < TOLERANCE
    assert sd.generate(**DRAW).size == (64, 64)


# Loading.


def outputs(sd) -> list[torch.Tensor]:
    """What every part makes of the same input."""
    torch.manual_seed(0)
    x, context, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 9, 208), torch.randn(1, 192)
    tokens, images = torch.randint(0, 150, (2, 77)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        texts = [encoder(tokens) for encoder in sd.text_encoders]
        texts = [*texts[0], *texts[1], texts[2]]
        return [sd.transformer(x, 261.0, context, pooled), sd.vae.decode(x), sd.vae.encode(images), *texts]


def same(a, b) -> bool:
    return all(difference(x, y) <= TOLERANCE for x, y in zip(outputs(a), outputs(b), strict=True))


def test_a_single_file_is_the_folder(theirs, folder, sd, tmp_path):
    state = random_sd3.original(theirs)
    save_file(state, tmp_path / "sd3.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = from_scratch.load(tmp_path / "sd3.safetensors")
    assert same(made, sd)
    assert made.size == (1024, 1024) and made.shift == 3.0
    with pytest.raises(ValueError, match="no tokenizer.*config=FOLDER"):
        made.generate(**DRAW, height=32, width=32)
    made = from_scratch.load(tmp_path / "sd3.safetensors", config=folder)
    assert made.generate(**DRAW).tobytes() == sd.generate(**DRAW).tobytes()
    # Without text encoders, as 3.5's own file is, they are the folder's.
    save_file({n: w for n, w in state.items() if not n.startswith("text_")}, tmp_path / "less.safetensors")
    assert same(from_scratch.load(tmp_path / "less.safetensors", config=folder), sd)
    with pytest.raises(ValueError, match="no text encoders in this file: use load.path, config=FOLDER"):
        from_scratch.load(tmp_path / "less.safetensors").generate(**DRAW, height=32, width=32)


def test_clip_l_without_a_projection(theirs, sd, tmp_path):
    save_file(random_sd3.original(theirs, projection=False), tmp_path / "sd3.safetensors")
    made = from_scratch.load(tmp_path / "sd3.safetensors")
    assert torch.equal(made.text_encoders[0].text_projection.weight, torch.eye(random_sd3.CLIP_L))


def test_diffusers_reads_the_same_single_file(theirs):
    """The test's own writer of the original layout, against diffusers' reader of it."""
    weights = theirs.transformer.state_dict()
    read = convert_sd3_transformer_checkpoint_to_diffusers(random_sd3.original_transformer(weights))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("t5", ["its own", "in three files", "none"])
def test_forms_of_a_folder(copy, sd, t5):
    file = copy / "text_encoder_3" / "model.safetensors"
    if t5 == "in three files":
        weights = list(load_file(file).items())
        for n in range(3):
            save_file(dict(weights[n::3]), file.with_name(f"model-0000{n + 1}-of-00003.safetensors"))
        file.unlink()
    elif t5 == "none":
        shutil.rmtree(copy / "text_encoder_3")
        shutil.rmtree(copy / "tokenizer_3")
    made = from_scratch.load(copy)
    if t5 == "none":
        assert made.text_encoders[2] is None
        made.text_encoders[2] = sd.text_encoders[2]
    assert same(made, sd)


def eight_bits(weights: dict, prefix: str = "", scaled: bool = True) -> dict:
    """The T5 among the weights as ComfyUI's t5xxl_fp8_e4m3fn files have it, or t5xxl_fp8_e4m3fn_scaled."""
    names = [name for name, weight in weights.items() if name.startswith(prefix) and weight.ndim == 2]
    made = weights | {name: weights[name].to(torch.float8_e4m3fn) for name in names}
    if scaled:
        made |= {name.replace(".weight", ".scale_weight"): torch.ones(()) for name in names if ".layer." in name}
        made[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return made


def test_eight_bits_without_scales_are_numbers(copy, sd):
    file = copy / "text_encoder_3" / "model.safetensors"
    save_file(eight_bits(load_file(file), scaled=False), file)
    mine, theirs = (one.text_encoders[2].blocks[0].to_q.weight for one in (from_scratch.load(copy), sd))
    assert 0 < difference(mine, theirs) < 0.1


def test_eight_bits_with_scales_are_refused(theirs, copy, tmp_path):
    file, sentence = copy / "text_encoder_3" / "model.safetensors", "text_encoder_3 .* it is scaled fp8, .* in float16"
    save_file(eight_bits(load_file(file)), file)
    refused(copy, sentence)
    refused(file, "nothing starts with 'model.diffusion_model.'")
    save_file(eight_bits(random_sd3.original(theirs), "text_encoders.t5xxl.transformer."), tmp_path / "sd3.safetensors")
    refused(tmp_path / "sd3.safetensors", sentence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype):
    made = from_scratch.load(folder, dtype=dtype)
    parts = (made.transformer, made.vae, *made.text_encoders)
    assert {w.dtype for part in parts for w in part.state_dict().values()} == {dtype}
    assert made.generate(**DRAW, skip=[1], skip_range=(0, 1)).size == (64, 64)


TEXTS = [
    "",
    "a red boat by the sea",
    "A  RED\tboat,   by the SEA!!",
    "it's 1980s-style: héllo wörld 船",
    "a</s>b <pad> c",
]


def test_tokens_are_those_of_transformers(folder, sd):
    for n, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3")):
        for place in (folder, STORYBOOK):
            length, around = (256, (None, "</s>")) if n == 2 else (77, ())
            words = AutoTokenizer.from_pretrained(place / name)
            ids = words(TEXTS, padding="max_length", max_length=length, truncation=True).input_ids
            made = Tokenizer(place / name, length, *around)
            assert made.encode(TEXTS).tolist() == ids
            with pytest.warns(UserWarning, match="fit; this was cut off its end: 'sea"):
                row = made.encode([" ".join(["sea"] * 300)])
            row_of_theirs = words(" ".join(["sea"] * 300), max_length=length, truncation=True).input_ids
            assert row[0].tolist() == row_of_theirs


# What cannot be loaded or drawn: one clear sentence each.


def refused(path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        from_scratch.load(path, device="meta")
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600


TRANSFORMER, CLIP, T5 = "transformer/config.json", "text_encoder/config.json", "text_encoder_3/config.json"
CONFIGS = [
    (TRANSFORMER, None, "There is no .*transformer/config.json: fetch the folder again"),
    (
        TRANSFORMER,
        {"_class_name": "FluxTransformer2DModel"},
        "_class_name = 'FluxTransformer2DModel'; here it can only",
    ),
    (TRANSFORMER, {"num_attention_heads": 3}, "num_attention_heads is 3"),
    (TRANSFORMER, {"num_attention_heads": 4}, "attention_head_dim is 64, not 32"),
    (TRANSFORMER, {"sample_size": [8, 8]}, "sample_size is .*, not a whole number"),
    ("vae/config.json", {"use_quant_conv": True}, "use_quant_conv = True; here it can only be False"),
    ("vae/config.json", {"shift_factor": "0"}, "shift_factor is '0', not a number"),
    (CLIP, {"hidden_act": "relu"}, "hidden_act is 'relu', not quick_gelu or gelu"),
    (CLIP, {"eos_token_id": [2]}, "eos_token_id is .*, not a whole number"),
    (CLIP, {"architectures": ["CLIPTextModel"]}, "here it can only be .'CLIPTextModelWithProjection'"),
    (T5, {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'; here it can only be 'gated-gelu'"),
    ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True; here"),
    ("scheduler/scheduler_config.json", {"shift": 0}, "shift is 0: give a number above 0"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name = 'DDIMScheduler'"),
]


@pytest.mark.parametrize("file, change, message", CONFIGS)
def test_configurations(copy, file, change, message):
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    refused(copy, message)


WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model", "text_encoder_3": "model"}
BLOCK = "transformer_blocks.1.attn"


@pytest.mark.parametrize(
    "part, name, tensor, message",
    [
        (
            "transformer",
            f"{BLOCK}.to_add_out.bias",
            None,
            "The transformer .* blocks.1.text.attn.to_out.bias is missing",
        ),
        ("transformer", f"{BLOCK}.extra", torch.zeros(2), "blocks.1.attn.extra is unexpected"),
        (
            "transformer",
            f"{BLOCK}.to_q.weight",
            torch.zeros(128, 64),
            r"blocks.1.image.attn.to_q.weight is \(128, 64\)",
        ),
        ("transformer", "pos_embed.pos_embed", torch.zeros(1, 143, 128), r"patches.table is \(1, 143, 128\), not"),
        ("transformer", "pos_embed.proj.weight", None, "there is no 'patches.proj.weight'"),
        (
            "transformer",
            "pos_embed.proj.weight",
            torch.zeros(128, 8, 2, 2),
            "proj_out.weight is .64, 128., not .32, 128.",
        ),
        (
            "transformer",
            "context_embedder.weight",
            torch.zeros(128, 99),
            "reads tokens of 99 channels and prompts of 192",
        ),
        (
            "text_encoder_2",
            "text_projection.weight",
            torch.zeros(64, 128),
            "prompts of 192, .*: CLIP 192 and 128, T5 208",
        ),
        ("text_encoder_3", "shared.weight", None, "The text_encoder_3 .* there is no 'token_embedding.weight'"),
    ],
)
def test_odd_weights(copy, part, name, tensor, message):
    file = copy / part / f"{WEIGHTS[part]}.safetensors"
    weights = load_file(file)
    weights[name] = tensor
    save_file({name: weight for name, weight in weights.items() if weight is not None}, file)
    refused(copy, message)


@pytest.mark.parametrize(
    "lost, message",
    [
        ("transformer", "no Stable Diffusion folder: there is no transformer/diffusion_pytorch_model.safetensors"),
        ("text_encoder_2", "no Stable Diffusion folder: there is no text_encoder_2/model.safetensors"),
        ("vae", "there is no vae/diffusion_pytorch_model.safetensors"),
        ("tokenizer", "tokenizer has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"),
        ("tokenizer_3", "tokenizer_3 has no tokenizer: there is no tokenizer.json"),
    ],
)
def test_a_part_that_is_missing(copy, lost, message):
    shutil.rmtree(copy / lost)
    refused(copy, message)


def test_a_tokenizer_of_another_kind(copy):
    shutil.copytree(copy / "tokenizer", copy / "tokenizer_3", dirs_exist_ok=True)
    refused(copy, "The tokenizer in .*tokenizer_3 is not T5's: it lacks </s>")


def test_a_single_file_that_is_not_whole(theirs, tmp_path):
    state, file = random_sd3.original(theirs), tmp_path / "sd3.safetensors"
    save_file({n: w for n, w in state.items() if not n.startswith("first_")}, file)
    refused(file, "no Stable Diffusion 3 checkpoint: nothing starts with 'first_stage_model.'")
    del state["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"]
    save_file(state, file)
    refused(file, "blocks.0.text.attn.to_q.weight is missing")
    file.write_bytes(file.read_bytes()[:-1000])
    refused(file, "is cut off or damaged")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 24}, "The height is 24: give a positive multiple of 16 pixels"),
        ({"height": 208}, "64x208 pixels are too many: the model knows no places beyond 192x192"),
        ({"steps": 0}, "steps is 0: give a whole number from 1 to 1000"),
        ({"skip": [3]}, "skip is .3.: give a list of blocks, by their numbers from 0 to 2"),
        ({"skip": 1}, "skip is 1"),
        ({"skip": "1"}, "skip is '1'"),
        ({"skip": [1], "guidance": 1}, "skip needs guidance, and guidance is 1: give a number above 1"),
        ({"skip_guidance": None}, "skip_guidance is None: give a number"),
        ({"skip_range": 0.2}, "skip_range is 0.2: give two shares"),
        ({"skip_range": (0, "1")}, "skip_range is .*: give two shares"),
        ({"prompt": None}, "not text"),
        ({"guidance": float("nan")}, "guidance is nan: give a number"),
        ({"image": "boat.png"}, "The image is of type str: give a PIL image"),
    ],
)
def test_what_cannot_be_drawn(sd, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        sd.generate(**(DRAW | settings))
    assert "\n" not in str(error.value)
