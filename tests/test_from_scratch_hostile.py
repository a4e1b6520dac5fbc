"""What from_scratch is given and cannot use: one sentence for each row, nothing changed, never a wrong picture.

A new case that was found is a new row.
"""

import json
import pickle
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import random_sd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import from_scratch
from from_scratch import CheckpointError

DRAW = {"prompt": "a boat", "steps": 1, "height": 16, "width": 16, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two levels, the first without attention, as small as it gets."""
    path = tmp_path_factory.mktemp("sd")
    pipe = random_sd.pipeline(path / "words")
    pipe.unet = random_sd.unet((32, 32), 1, 0, context=32, heads=4, groups=8)
    pipe.vae = random_sd.vae((8, 8), 1, groups=4)
    pipe.text_encoder = random_sd.text_encoder(len(pipe.tokenizer), channels=32, heads=2, layers=1)
    pipe.save_pretrained(path / "sd")
    return path / "sd"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def sd(folder):
    return from_scratch.load(folder)


def refused(path, match: str | None = None, **options) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        from_scratch.load(path, **options)
    check_sentence(error.value)


def check_sentence(error: Exception) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 600 and "weights_only" not in text


# Configuration files: (file, what it holds, what is said). None: the file is missing; a dict: these names are changed.
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
CONFIGS = [
    *((file, None, "There is no .*json: fetch the folder again") for file in (UNET, VAE, TEXT, SCHEDULER)),
    *((file, b"{}", "says .* = None; here it can only be") for file in (UNET, VAE, TEXT, SCHEDULER)),
    *(
        (file, content, "holds no JSON object")
        for file in (UNET, TEXT, SCHEDULER, TOKENIZER)
        for content in (b"[]", b"null", b"3", b"", b"{", b"\xff\xfe{}", b"[" * 100_000)
    ),
    *((UNET, {"attention_head_dim": v}, "attention_head_dim is") for v in (0, -4, 5, "8", 4.0, [4], [4, 3])),
    *((UNET, {"norm_num_groups": v}, "norm_num_groups is") for v in (0, -1, 7, "x")),
    *((UNET, {"sample_size": v}, "sample_size is") for v in (-8, 2.5, "64", [8], [8, 8, 8], [8, "8"], 10**9)),
    (UNET, {"norm_eps": 1e-6}, "norm_eps = 1e-06"),
    (UNET, {"block_out_channels": [32, 64]}, r"block_out_channels is \[32, 64\], not \[32, 32\]"),
    (UNET, {"_class_name": "UNet2DModel"}, "_class_name = 'UNet2DModel'"),
    *((VAE, {"norm_num_groups": v}, "norm_num_groups is") for v in (0, 3, [])),
    *((VAE, {"scaling_factor": v}, "scaling_factor is") for v in (0, -1, "0.18", None, float("nan"), float("inf"))),
    (VAE, {"shift_factor": 0.1}, "shift_factor = 0.1; here it can only be None"),
    *((TEXT, {"num_attention_heads": v}, "num_attention_heads is") for v in (0, 3, "2", [2])),
    (SCHEDULER, {"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
    (SCHEDULER, {"beta_end": "0.012"}, "beta_end = '0.012'"),
    *((TOKENIZER, {"pad_token": v}, "is not CLIP's: it lacks") for v in ("no such piece", ["!"], {"content": 3})),
    (TOKENIZER, {"pad_token": "\ud800"}, "is damaged, fetch it again"),
]


@pytest.mark.parametrize("file, content, message", CONFIGS)
def test_configurations(copy, file, content, message):
    if content is None:
        (copy / file).unlink()
    elif isinstance(content, bytes):
        (copy / file).write_bytes(content)
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | content))
    if (file, content) == (UNET, {"attention_head_dim": [4]}):
        message = "The unet in"  # one number for two levels
    refused(copy, message)


def test_a_configuration_that_is_a_folder(copy):
    (copy / UNET).unlink()
    (copy / UNET).mkdir()
    refused(copy, "holds no JSON object, or cannot be read")


# Tokenizer files.


def edited(text: bytes, **changes) -> bytes:
    return json.dumps(json.loads(text) | changes).encode()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: b"", "is damaged, fetch it again"),
        (lambda text: text[: len(text) // 2], "is damaged, fetch it again"),
        (lambda text: b"[]", "is damaged, fetch it again"),
        (lambda text: b"\xff" + text, "is damaged, fetch it again"),
        (lambda text: text.replace(b"<|startoftext|>", b"<|begin|>"), r"lacks <\|startoftext\|>"),
        (lambda text: edited(text, model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), "lacks"),
        (lambda text: edited(text, model=None), "is damaged, fetch it again"),
        (lambda text: text.replace(b'"unk_token": "', b'"unk_token": "no such '), "is damaged, fetch it again"),
        (lambda text: text.replace(b'"a</w>": ', b'"a</w>": 99'), "knows more tokens than the text encoder"),
    ],
)
def test_tokenizers(copy, change, message):
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_bytes(change(file.read_bytes()))
    refused(copy, message)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_in_two_files(copy, name):
    model = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)
    from_scratch.load(copy)
    content = (copy / "tokenizer" / name).read_bytes()
    for damaged in (content[: len(content) // 2] + b'"', b"\xff\xfe" + content):
        (copy / "tokenizer" / name).write_bytes(damaged)
        refused(copy, "tokenizer")
    (copy / "tokenizer" / name).unlink()
    refused(copy, "has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")


def test_mutated_files_load_or_are_one_sentence(copy):
    """A byte or a stretch of every small file overwritten, always with the same dice."""
    dice = random.Random(0)
    files = [copy / name for name in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER, "tokenizer/tokenizer.json")]
    refusals = 0
    for _ in range(8):
        for file in files:
            content = file.read_bytes()
            start, length = dice.randrange(len(content)), dice.choice((1, 1, 2, 30))
            with_bytes = dice.choice((bytes(dice.randrange(256) for _ in range(length)), b"", b"0", b"[", b'"', b"-1"))
            file.write_bytes(content[:start] + with_bytes + content[start + length :])
            try:
                from_scratch.load(copy, device="meta")
            except CheckpointError as error:
                check_sentence(error)
                refusals += 1
            file.write_bytes(content)
    assert refusals > 8


# Weights.


class Sneaky:
    """Not a tensor."""


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        3,
        "text",
        torch.zeros(3),
        {"state_dict": None},
        {"state_dict": [torch.zeros(1)]},
        {1: torch.zeros(1), None: 2, ("a",): 3},
        {"model.diffusion_model.conv_in.weight": 5},
        {"state_dict": {"model.diffusion_model.x": torch.zeros(1), 5: torch.zeros(1)}},
        {"state_dict": {"state_dict": {}}},
        {prefix + "x": torch.zeros(1).to_sparse() for prefix in from_scratch.checkpoint.PARTS.values()},
        {prefix + "x": torch.zeros(()) for prefix in from_scratch.checkpoint.PARTS.values()},
        Sneaky(),
        {"state_dict": {}, "more": Sneaky()},
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_odd_ckpt_files(tmp_path, content, new):
    torch.save(content, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=new)
    refused(tmp_path / "sd.ckpt")


def test_files_that_are_no_ckpt(tmp_path):
    for content in (b"", b"PK\x03\x04", b"\x80\x02}", pickle.dumps({}), b"<html>404</html>", bytes(1000)):
        (tmp_path / "sd.ckpt").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused(tmp_path / "sd.ckpt")


def test_a_mutated_ckpt_is_one_sentence_or_whole(folder, tmp_path):
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    dice, file = random.Random(1), tmp_path / "sd.ckpt"
    for new in (True, False):
        torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=new)
        content = file.read_bytes()
        for _ in range(20):
            at = dice.choice((dice.randrange(len(content)), dice.randrange(3000)))
            file.write_bytes(content[:at] + bytes(dice.randrange(256) for _ in range(4)) + content[at + 4 :])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                refused(file)  # a VAE alone is none either


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("conv_in.bias", torch.zeros(32, dtype=torch.int8), "conv_in.bias holds torch.int8 numbers"),
        ("conv_in.weight", torch.zeros(()), "The unet in .*copy"),
        ("conv_in.weight", torch.zeros(0, 4, 3, 3), "The unet in .*copy"),
        ("conv_in.weight", torch.zeros(32, 5, 3, 3), "reads latents of 5 channels"),
        ("conv_out.weight", torch.zeros(8, 32, 3, 3), "conv_out.bias is"),
        ("down_blocks.0.resnets.0.conv1.weight", torch.zeros(3), "The unet in .*copy"),
        ("down_blocks.0.resnets.0.conv1.weight", torch.zeros(1, 32, 3, 3), "The unet in .*copy"),
        ("down_blocks.7.resnets.0.conv1.weight", torch.zeros(32, 32, 3, 3), "The unet in .*copy"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", torch.zeros(32), "The unet in .*copy"),
        ("conv_in.bias", None, "conv_in.bias is missing"),
    ],
)
def test_odd_weights(copy, name, tensor, message):
    weights = load_file(copy / WEIGHTS)
    weights[name] = tensor
    save_file({name: weight for name, weight in weights.items() if weight is not None}, copy / WEIGHTS)
    refused(copy, message)


def test_parts_of_different_models(copy, folder):
    weights = load_file(copy / WEIGHTS)
    for name in [name for name in weights if ".attn2.to_k" in name or ".attn2.to_v" in name]:
        weights[name] = torch.zeros(len(weights[name]), 48)
    save_file(weights, copy / WEIGHTS)
    refused(copy, "reads latents of 4 channels and tokens of 48, not of 4 and 32")


@pytest.mark.parametrize("path", ["no such folder", "", "x\0y", Path("/dev/null")])
def test_odd_paths(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        from_scratch.load(path)
    assert "\n" not in str(error.value)


def test_a_config_that_is_no_folder(folder, tmp_path):
    pipe = random_sd.pipeline(tmp_path / "words")
    save_file(random_sd.compvis(pipe), tmp_path / "sd.safetensors")
    refused(tmp_path / "sd.safetensors", "There is no .*nowhere", config=tmp_path / "nowhere")
    refused(
        tmp_path / "sd.safetensors", r"The vae .* block_out_channels is \[8, 8\], not \[32, 32, 64, 64\]", config=folder
    )


# What is asked of generate: (arguments, what is said).

TEXT_ERROR = "prompt and negative_prompt are not text"
PICTURE = Image.new("RGB", (16, 16), "red")
ARGUMENTS = [
    ({"prompt": b"a boat"}, TEXT_ERROR),
    ({"prompt": 7}, TEXT_ERROR),
    ({"prompt": ("a", "b")}, TEXT_ERROR),
    ({"prompt": "a \ud800 boat"}, TEXT_ERROR),
    ({"negative_prompt": None}, TEXT_ERROR),
    ({"prompt": []}, "There are 0 of prompt"),
    ({"image": []}, "There are 0 of image"),
    ({"mask": []}, "There are 0 of mask"),
    ({"seed": []}, "There are 0 of seed"),
    ({"height": 10**9}, "16x1000000000 pixels are too many"),
    ({"height": 10**40 * 8}, "pixels are too many"),
    ({"height": 2048, "width": 2056}, "2056x2048 pixels are too many"),
    ({"height": -8}, "The height is -8"),
    ({"height": np.float64(16)}, "The height is"),
    ({"height": "16"}, "The height is '16'"),
    ({"width": True}, "The width is True"),
    ({"guidance": 10**400}, "guidance is"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"guidance": "7"}, "guidance is '7'"),
    ({"guidance": None}, "guidance is None"),
    ({"strength": None}, "strength is None"),
    ({"strength": 10**400}, "strength is"),
    ({"steps": 1e3}, "steps is 1000.0"),
    ({"steps": 10**30}, "steps is"),
    ({"steps": "5"}, "steps is '5'"),
    ({"seed": 2**63}, "seed is"),
    ({"seed": [0.5]}, "seed is"),
    ({"sampler": None}, "There is no sampler None"),
    ({"sampler": ["ddim"]}, r"There is no sampler \['ddim'\]"),
    ({"image": [None]}, "The image is of type NoneType"),
    ({"image": np.zeros((16, 16, 3))}, "The image is of type ndarray"),
    ({"image": Image.new("F", (16, 16))}, "The image is 16x16, F: give one of 8 bits"),
    ({"image": Image.new("I", (16, 16))}, "The image is 16x16, I: give one of 8 bits"),
    ({"image": Image.new("RGB", (0, 5))}, "The image is 0x5"),
    ({"image": Image.new("L", (4096, 4096)), "height": None, "width": None}, "4096x4096 pixels are too many"),
    ({"image": PICTURE, "mask": Image.new("F", (16, 16))}, "The mask is 16x16, F"),
    ({"image": PICTURE, "mask": 3}, "The mask is of type int"),
]


@pytest.mark.parametrize("arguments, message", ARGUMENTS)
def test_arguments(sd, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        sd.generate(**(DRAW | arguments))
    check_sentence(error.value)
    sd.generate(**DRAW)


@pytest.mark.parametrize(
    "arguments",
    [
        {"height": np.int64(16), "width": np.int32(16)},
        {"steps": np.int64(1), "seed": np.int64(0)},
        {"guidance": np.float32(7.5), "strength": np.float64(0.8)},
        {"prompt": np.str_("a boat")},
        {"seed": [0], "prompt": ["a boat"]},
        {"seed": False, "negative_prompt": ""},
    ],
)
def test_numbers_of_numpy_and_the_like(sd, arguments):
    drawn = sd.generate(**(DRAW | arguments))
    drawn = drawn[0] if isinstance(drawn, list) else drawn
    assert drawn.tobytes() == sd.generate(**DRAW).tobytes()


def test_the_largest_seed_in_a_batch(sd):
    assert len(sd.generate(**(DRAW | {"prompt": ["a boat"] * 2, "seed": 2**63 - 1}))) == 2


# Pictures that are not what they seem.


def picture_of(sd, image, **more) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sd.generate("a boat", image=image, steps=2, strength=0.5, seed=0, **more).tobytes()


def test_sixteen_bits_of_grey_are_not_cut_off(sd, tmp_path):
    grey = np.linspace(0, 255, 16 * 16).astype(np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as read:
        assert read.mode == "I;16"
        assert picture_of(sd, read) == picture_of(sd, Image.fromarray(grey))
    mask = Image.fromarray(np.where(grey > 99, 30000, 0).astype(np.uint16))  # dark grey: below half, so all is kept
    options = {"image": PICTURE, "steps": 2, "strength": 1.0, "seed": 0}
    kept = sd.generate("a boat", mask=mask, **options)
    assert kept.tobytes() == sd.generate("a boat", mask=Image.new("L", (16, 16), 0), **options).tobytes()


def test_a_picture_is_turned_as_its_camera_says(sd, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert turned.size == (24, 16)
        drawn = sd.generate("a boat", image=turned, steps=2, strength=0.5, seed=0)
        assert drawn.size == (16, 24)
        assert drawn.tobytes() == picture_of(sd, Image.fromarray(np.rot90(pixels, -1)))


def test_a_picture_that_is_cut_off(sd, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ValueError, match="The image cannot be read") as error:
        sd.generate("a boat", image=cut, steps=2, seed=0)
    check_sentence(error.value)


@pytest.mark.parametrize(
    "dtype, advice", [(torch.float32, "its weights may be damaged"), (torch.float16, "try float32")]
)
def test_weights_that_are_no_numbers(dtype, advice):
    with pytest.raises(FloatingPointError, match=advice):
        from_scratch.pipeline.to_image(torch.full((3, 2, 2), float("nan"), dtype=dtype))
