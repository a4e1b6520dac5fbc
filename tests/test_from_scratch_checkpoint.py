"""Loading: folders, original single files, and what cannot be loaded."""

import json
import os
import pickle
import shutil
import warnings

import pytest
import random_sd
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import from_scratch
from benchmarks.parity_full import difference
from from_scratch import CheckpointError
from from_scratch.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return random_sd.pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "sd"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def state(theirs):
    return random_sd.compvis(theirs)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def outputs(sd) -> list[torch.Tensor]:
    """What every part makes of the same input."""
    torch.manual_seed(0)
    x, context, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), torch.randint(0, 200, (2, 77))
    with torch.no_grad():
        mean, deviation = sd.vae.distribution(torch.randn(1, 3, 32, 32))
        return [sd.unet(x, 261, context), sd.text_encoder(tokens), mean, deviation, sd.vae.decode(x)]


def same(a, b, tolerance=1e-5) -> bool:
    return all(difference(x, y) <= tolerance for x, y in zip(outputs(a), outputs(b), strict=True))


def test_a_single_file_is_the_folder(folder, state, tmp_path):
    save_file(state, tmp_path / "sd.safetensors")
    torch.save({"state_dict": state, "global_step": 470000}, tmp_path / "sd.ckpt")
    expected = from_scratch.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("sd.safetensors", "sd.ckpt"):
            made = from_scratch.load(tmp_path / name)
            assert same(made, expected)
            assert made.size == (512, 512) and made.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer.*config=FOLDER"):
        made.generate("a boat", steps=1, height=16, width=16)
    made = from_scratch.load(tmp_path / "sd.safetensors", config=folder)
    assert made.size == expected.size == (64, 64)
    picture = made.generate("a boat", steps=2, seed=1)
    assert picture.tobytes() == expected.generate("a boat", steps=2, seed=1).tobytes()


def test_a_config_gives_a_single_file_its_heads_and_groups(tmp_path):
    pipe = random_sd.pipeline(tmp_path)
    pipe.unet = random_sd.unet((32, 64), 1, 0, heads=4, groups=16)
    pipe.vae = random_sd.vae((16, 24, 32), 1, groups=8, scaling_factor=0.9)
    pipe.text_encoder = random_sd.text_encoder(len(pipe.tokenizer), heads=4)
    pipe.save_pretrained(tmp_path / "sd")
    save_file(random_sd.compvis(pipe), tmp_path / "sd.safetensors")
    made = from_scratch.load(tmp_path / "sd.safetensors", config=tmp_path / "sd")
    assert same(made, from_scratch.load(tmp_path / "sd"))


@pytest.mark.parametrize("variant", ["old attention names", "prefix of old transformers", "bin", "fp16 variant"])
def test_other_forms_of_a_folder(folder, copy, variant):
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    text = copy / "text_encoder" / "model.safetensors"
    if variant == "old attention names":
        weights = load_file(vae)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
        save_file(weights, vae)
    elif variant == "prefix of old transformers":
        weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in load_file(text).items()}
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(weights, text)
    elif variant == "bin":
        torch.save(load_file(text), text.with_name("pytorch_model.bin"))
        text.unlink()
    else:
        vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(from_scratch.load(copy), from_scratch.load(folder))


def test_half_precision_on_disk_and_in_memory(theirs, folder, copy):
    for name in ("unet", "vae"):
        file = copy / name / "diffusion_pytorch_model.safetensors"
        save_file({k: w.half() for k, w in load_file(file).items()}, file)
    made = from_scratch.load(copy)
    assert made.dtype == torch.float32
    assert same(made, from_scratch.load(folder), 0.02)
    for dtype in (torch.bfloat16, torch.float16):
        made = from_scratch.load(copy, dtype=dtype)
        assert {w.dtype for part in (made.unet, made.vae, made.text_encoder) for w in part.parameters()} == {dtype}
    assert made.generate("a boat", steps=2, seed=0).size == (64, 64)


# What cannot be loaded: one clear sentence each.


def refused(path, match: str, **options) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        from_scratch.load(path, **options)
    assert "\n" not in str(error.value)


def test_there_is_nothing(tmp_path):
    refused(tmp_path / "sd", "There is no .*sd")
    refused(tmp_path, "no Stable Diffusion folder: there is no unet")


def test_a_folder_without_a_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    refused(copy, "has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")


def test_missing_and_unexpected_names(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["extra.weight"] = weights.pop("mid_block.resnets.1.conv2.weight")
    save_file(weights, file)
    refused(copy, r"The unet .*: mid_block.resnets.1.conv2.weight is missing, extra.weight is unexpected")


def test_wrong_shapes(copy):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.mid_block.resnets.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    save_file(weights, file)
    refused(copy, r"The vae .*decoder.mid_block.resnets.0.conv1.weight is \(64, 32, 3, 3\), not \(64, 64, 3, 3\)")


@pytest.mark.parametrize("bytes_left", [0, 5, 2000, -1000])
def test_a_truncated_folder_and_file(copy, state, tmp_path, bytes_left):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    refused(copy, "diffusion_pytorch_model.safetensors is cut off or damaged")
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "sd.ckpt").read_bytes()[:bytes_left])
    refused(tmp_path / "cut.ckpt", "cut.ckpt is cut off or damaged")


class Harmless:
    """Asks for os.mkdir when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not(state, tmp_path, old):
    proof = tmp_path / "it ran"
    torch.save(
        {"state_dict": state, "more": Harmless(proof)}, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=not old
    )
    refused(tmp_path / "sd.ckpt", "could run code; nothing was run: use a .safetensors file")
    assert not proof.exists()
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harmless(proof)))
    refused(tmp_path / "plain.ckpt", "could run code|cut off or damaged, or holds more than tensors")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Harmless(proof)))  # it would have
    assert proof.exists()


def test_files_that_are_something_else(state, tmp_path):
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "no Stable Diffusion 1.x checkpoint: nothing starts with 'model.diff")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "no Stable Diffusion 1.x checkpoint")
    part = "cond_stage_model."
    save_file({name: w for name, w in state.items() if not name.startswith(part)}, tmp_path / "sd2.safetensors")
    refused(tmp_path / "sd2.safetensors", "nothing starts with 'cond_stage_model.transformer.'")
    wide = {**state, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(wide, tmp_path / "inpainting.safetensors")
    refused(tmp_path / "inpainting.safetensors", "reads latents of 9 channels and tokens of 64, not of 4 and 64")
    del wide["first_stage_model.post_quant_conv.weight"]
    save_file(wide, tmp_path / "part.safetensors")
    refused(tmp_path / "part.safetensors", "The vae .* there is no 'post_quant_conv.weight'")


def test_what_else_a_file_holds_is_told(state, tmp_path):
    save_file({**state, "embedding_manager.embedder.weight": torch.zeros(2)}, tmp_path / "sd.safetensors")
    with pytest.warns(UserWarning, match="also holds what is not used: embedding_manager.embedder.weight"):
        from_scratch.load(tmp_path / "sd.safetensors")


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("text_encoder/config.json", "hidden_act", "gelu"),
        ("unet/config.json", "flip_sin_to_cos", False),
    ],
)
def test_configurations_of_another_model(copy, file, name, value):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**config, name: value}))
    refused(copy, f"{name} = {value!r}; here it can only be")
    (copy / file).write_text("{")
    refused(copy, "holds no JSON object")


# The tokenizer.

TEXTS = [
    "",
    "a red boat by the sea",
    "A  RED\tboat,   by the SEA!!",
    "it's 1980s-style: héllo wörld, naïve 船 🙂",
    "a<|endoftext|>b <|startoftext|>",
]


def test_tokens_are_those_of_transformers(folder, copy):
    expected = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    expected = expected(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert Tokenizer(folder / "tokenizer", 77).encode(TEXTS).tolist() == expected
    if (copy / "tokenizer" / "vocab.json").exists():
        (copy / "tokenizer" / "tokenizer.json").unlink()
    else:
        words = folder.parent  # transformers 5 saves one file; SD1.5's own folder has two
        words = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]
        (copy / "tokenizer" / "tokenizer.json").unlink()
        (copy / "tokenizer" / "vocab.json").write_text(json.dumps(words["vocab"]))
        merges = "".join(" ".join(pair) + "\n" for pair in words["merges"])
        (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)
    assert Tokenizer(copy / "tokenizer", 77).encode(TEXTS).tolist() == expected


def test_what_is_cut_off_a_prompt_is_told(folder):
    tokenizer = Tokenizer(folder / "tokenizer", 8)
    with pytest.warns(UserWarning, match="The prompt has 10 tokens, 6 fit; .* cut off its end: 'in SNOW the sea'"):
        rows = tokenizer.encode(["a red boat by the sea in SNOW the sea"])
    assert rows.shape == (1, 8) and rows[0, 0] == tokenizer.start and rows[0, -1] == tokenizer.end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["a red boat by the sea"])


def test_diffusers_reads_the_same_single_file(theirs, state, folder, tmp_path):
    """The test's own writer of the original layout, against diffusers' reader of it."""
    save_file(state, tmp_path / "sd.safetensors")
    try:
        read = StableDiffusionPipeline.from_single_file(str(tmp_path / "sd.safetensors"), config=str(folder))
    except Exception as error:  # some pairs of diffusers and transformers cannot read single files
        pytest.skip(f"diffusers cannot: {error}")
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    with torch.no_grad():
        assert difference(read.unet(x, 5, context).sample, theirs.unet(x, 5, context).sample) < 1e-5
        assert difference(read.vae.decode(x).sample, theirs.vae.decode(x).sample) < 1e-5
