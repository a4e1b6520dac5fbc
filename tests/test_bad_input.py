"""Bad input and damaged files: one sentence each, never a wrong picture in silence, and afterwards all works as before.

A new case is a row in one of the tables.
"""

import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import constants
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from helpers import images
from helpers.generate import Settings, generate
from helpers.loading import machine, sizes
from helpers.loading.registry import MODELS, Model
from helpers.login import AccessError, check_access
from helpers.memory import Budget, DoesNotFit, plan, plans
from helpers.pipelines import LoadError, choose, load, parts
from helpers.runner import sentence

PROMPT = "a red boat by the sea"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    tiny.sd15(place / "sd15")
    tiny.sd3_folder(place / "sd3")
    return place


def model(folder: Path) -> Model:
    cls = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return Model("tiny", cls, None, 2, 4.0, (PROMPT,), folder=str(folder))


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: load(model(folders / name)) for name in ("sd15", "sd3")}


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 400, text
    return text


def lose(*names: str):
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return damage


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def lose_tensor(part: str, ending: str):
    def damage(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        weights = load_file(file)
        name = next(name for name in weights if name.endswith(ending))
        save_file({key: value for key, value in weights.items() if key != name}, file)

    return damage


def scale(part: str):
    """Weights in eight bits with scales of their own, as ComfyUI writes them."""

    def damage(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        weights = load_file(file)
        eight = {name: one.to(torch.float8_e4m3fn) if one.ndim == 2 else one for name, one in weights.items()}
        scales = {
            name.replace(".weight", ".scale_weight"): torch.ones(()) for name in weights if name.endswith(".weight")
        }
        save_file(eight | scales | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)

    return damage


VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
DAMAGE = [
    ("sd3", lose(*(f"tokenizer/{name}" for name in VOCABULARY)), "tokenizer/tokenizer.json is missing"),
    ("sd3", lose(*(f"tokenizer_2/{name}" for name in VOCABULARY)), "tokenizer_2/tokenizer.json is missing"),
    ("sd3", lose(*(f"tokenizer_3/{name}" for name in VOCABULARY)), "tokenizer_3/tokenizer.json is missing"),
    ("sd15", lose(*(f"tokenizer/{name}" for name in VOCABULARY)), "tokenizer/tokenizer.json is missing"),
    ("sd3", lose_tensor("vae", "decoder.conv_out.bias"), "vae do not fit together"),
    ("sd3", lose_tensor("text_encoder", "q_proj.weight"), "text_encoder do not fit together"),
    ("sd3", lose_tensor("text_encoder_3", "wo.weight"), "text_encoder_3 do not fit together"),
    ("sd3", lose_tensor("transformer", "proj_out.weight"), "transformer do not fit together"),
    ("sd15", lose_tensor("vae", "decoder.conv_out.bias"), "vae do not fit together"),
    ("sd15", lose_tensor("text_encoder", "q_proj.weight"), "text_encoder do not fit together"),
    ("sd15", lose_tensor("unet", "conv_in.weight"), "unet do not fit together"),
    ("sd3", scale("text_encoder_3"), "text_encoder_3 are scaled fp8, not float16"),
    ("sd15", scale("text_encoder"), "text_encoder are scaled fp8, not float16"),
    ("sd15", write("model_index.json", b"[]"), "model_index.json is damaged"),
    ("sd15", write("model_index.json", b"null"), "model_index.json is damaged"),
    ("sd15", write("model_index.json", b"\xff\xfe"), "model_index.json is damaged"),
    ("sd15", write("model_index.json", b"[" * 100_000), "model_index.json is damaged"),
    ("sd15", write("model_index.json", b"{}"), "do not fit together"),
    ("sd3", write("model_index.json", b"{}"), "do not fit together|not known"),
    ("sd3", write("vae/config.json", b"[]"), "vae/config.json is damaged"),
    ("sd3", write("transformer/config.json", b"\xff"), "transformer/config.json is damaged"),
    ("sd15", write("unet/config.json", b'{"_class_name": "UNet2DConditionModel", "sample_size": "x"}'), "unet"),
    ("sd15", write("unet/config.json", b"{}"), "unet do not fit together"),
    ("sd15", write("scheduler/scheduler_config.json", b"nonsense"), "scheduler_config.json is damaged"),
    ("sd15", write("unet/diffusion_pytorch_model.safetensors", b"\xff" * 100), "truncated or damaged"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE, ids=[row[2] for row in DAMAGE])
def test_damaged_files(folders, tmp_path, name, damage, said):
    copy = shutil.copytree(folders / name, tmp_path / "copy")
    broken = replace(model(folders / name), folder=str(copy))
    damage(copy)
    with pytest.raises((LoadError, ValueError), match=said) as caught:
        load(broken)
    one_sentence(caught.value)


HALF = "\ud800"
MANY = 10**400
DRAW = [
    ("sd15", {"prompt": f"a boat {HALF}"}, {}, "prompt has half a character"),
    ("sd15", {"negative_prompt": HALF}, {}, "negative prompt has half a character"),
    ("sd15", {"seed": 2**63 - 1, "count": 2}, {}, "seed .* is not a whole number from 0"),
    ("sd15", {"seed": MANY}, {}, "seed 'with its many digits' is not"),
    ("sd15", {"guidance": MANY}, {}, "guidance is not a number"),
    ("sd15", {}, {"image": []}, "image is not a picture"),
    ("sd15", {}, {"image": np.zeros((64, 64, 3))}, "image is not a picture"),
    ("sd15", {}, {"mask": Image.new("L", (64, 64))}, "mask and no image"),
    ("sd15", {}, {"image": Image.new("RGB", (64, 64)), "mask": "white"}, "mask is not a picture"),
    ("sd15", {"strength": 0}, {"image": Image.new("RGB", (64, 64))}, "strength is not a number above 0"),
    ("sd15", {"strength": 1.01}, {"image": Image.new("RGB", (64, 64))}, "strength is not a number above 0"),
    ("sd15", {"strength": "much"}, {"image": Image.new("RGB", (64, 64))}, "strength is not a number above 0"),
    ("sd15", {"strength": float("nan")}, {"image": Image.new("RGB", (64, 64))}, "strength is not a number above 0"),
    ("sd3", {"strength": 0.1, "steps": 4}, {"image": Image.new("RGB", (64, 64))}, "leaves none of 4 steps"),
    ("sd3", {"height": 320}, {}, "from 16 to 256"),
]


@pytest.mark.parametrize(
    ("name", "settings", "more", "said"), DRAW, ids=[f"{n} {row[3]}" for n, row in enumerate(DRAW)]
)
def test_settings_that_cannot_be_drawn(pipes, name, settings, more, said):
    with pytest.raises(ValueError, match=said) as caught:
        generate(pipes[name], Settings(**{"prompt": PROMPT, "steps": 2, **settings}), **more)
    one_sentence(caught.value)
    assert len(generate(pipes[name], Settings(PROMPT, steps=1))) == 1


def test_a_transformer_knows_so_many_positions(pipes):
    config = pipes["sd3"].transformer
    own = config.config.pos_embed_max_size
    config.register_to_config(pos_embed_max_size=5)
    try:
        with pytest.raises(ValueError, match="width '96' is not a whole number from 16 to 80"):
            generate(pipes["sd3"], Settings(PROMPT, width=96))
    finally:
        config.register_to_config(pos_embed_max_size=own)


def test_what_is_odd_and_can_be_drawn(pipes, capfd):
    settings = Settings(np.str_(PROMPT), np.str_("house"), steps=np.int64(3), height=np.int64(64), seed="3")
    drawn = generate(pipes["sd15"], settings)[0]
    assert type(drawn.info["settings"].prompt) is str and type(drawn.info["settings"].height) is int
    sideways = Image.new("L", (64, 128))
    sideways.getexif()[0x0112] = 6
    for odd in (sideways, Image.new("CMYK", (70, 90)), Image.new("F", (10, 10)), Image.new("P", (300, 20))):
        assert generate(pipes["sd15"], Settings(PROMPT, steps=2), odd)[0].size == (64, 64)
    assert len(generate(pipes["sd15"], Settings(PROMPT, steps=5, scheduler="DPMSolverSinglestepScheduler"))) == 1
    assert capfd.readouterr() == ("", "")


def png(folder: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("settings", text)
    Image.new("RGB", (8, 8)).save(folder / "odd.png", pnginfo=chunks)
    return folder / "odd.png"


READ = [
    (lambda folder: folder / "nowhere.png", "There is no file"),
    (lambda folder: folder, "is not a picture"),
    (lambda folder: png(folder, "[" * 100_000), "has no settings inside"),
    (
        lambda folder: png(folder, json.dumps({"settings": {"prompt": "x", "seed": 1}})[:-3] + "9" * 5000 + "}}"),
        "no settings",
    ),
    (lambda folder: png(folder, json.dumps({"settings": {"prompt": 3}})), "has no settings inside"),
    (lambda folder: png(folder, "null"), "has no settings inside"),
]


@pytest.mark.parametrize(("path", "said"), READ, ids=[f"{n} {row[1]}" for n, row in enumerate(READ)])
@pytest.mark.parametrize("read", [images.settings, images.record])
def test_files_without_settings(tmp_path, path, said, read):
    with pytest.raises(ValueError, match=said) as caught:
        read(path(tmp_path))
    one_sentence(caught.value)


def test_a_picture_too_large_to_be_one(tmp_path, monkeypatch):
    path = png(tmp_path, "{}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(ValueError, match="is not a picture"):
        images.settings(path)


def test_saving_what_is_odd(tmp_path, monkeypatch):
    given = Settings(f"a boat {HALF}", seed=3)
    for mode in ("CMYK", "F", "LAB", "I;16", "RGBA", "1"):
        path = images.save(Image.new(mode, (8, 8)), given, tmp_path)
        assert images.settings(path).seed == 3
    again = Image.open(path)
    assert images.settings(images.save(again, Settings("another"), tmp_path)).seed == 3  # the picture knows better
    again.info["settings"] = "nonsense"
    assert images.settings(images.save(again, Settings("another"), tmp_path)).prompt == "another"
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        path = images.save(again, given, "~/pictures")
        assert path.parent == tmp_path / "home" / "pictures" and images.settings("~/pictures/" + path.name).seed == 3


def test_a_relative_path_means_the_same_to_save_and_to_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    path = images.save(Image.new("RGB", (8, 8)), Settings("a boat", seed=7), "outputs")
    assert path == tmp_path / "repository" / "outputs" / "a-boat-7.png"
    assert images.settings("outputs/a-boat-7.png").seed == 7
    path.rename(tmp_path / "here.png")
    assert images.settings("here.png").seed == 7


@pytest.mark.parametrize("links", [True, False])
def test_an_interrupted_save_is_whole_or_nothing(tmp_path, monkeypatch, links):
    own = images._rename

    def slow(temporary, path):
        time.sleep(0.2)  # until the interrupt is there
        own(temporary, path)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_rename", slow)
    if not links:
        monkeypatch.setattr(images.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("concurrent.futures._base.Future.result", interrupted)
        images.save(Image.new("RGB", (8, 8)), Settings("a boat"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a-boat-0.png"]
    assert images.settings(tmp_path / "a-boat-0.png") == Settings("a boat")


def test_a_grid_with_labels_without_spaces_is_quick():
    start = time.perf_counter()
    images.grid([Image.new("RGB", (64, 64))], labels=["船" * 10_000])
    images.grid([Image.new("RGB", (64, 64))], labels=["x" * 10_000], title="y" * 10_000)
    assert time.process_time() and time.perf_counter() - start < 30  # it took minutes


SENTENCES = [
    (MemoryError(), "The RAM is full"),
    (KeyError("k"), "KeyError: 'k'."),
    (ZeroDivisionError(), "It ended with ZeroDivisionError."),
    (ValueError("The seed is odd: try another."), "The seed is odd: try another."),
]


@pytest.mark.parametrize(("error", "said"), SENTENCES, ids=[row[1] for row in SENTENCES])
def test_the_panel_says_what_went_wrong(error, said):
    assert sentence(error).startswith(said) and sentence(error).endswith(".")


def test_four_bits_without_the_package(monkeypatch, folders):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cuda", 14.75, 12.7, (7, 5), 50.0)))
    with pytest.raises(LoadError, match="needs bitsandbytes: run `pip install bitsandbytes`") as caught:
        load(model(folders / "sd3"), "resident-nf4")
    one_sentence(caught.value)


T4 = Budget("cuda", 14.75, 11.4, (7, 5), 78.0)
REFUSED = [
    ("sd35-medium", "resident", T4, "transformer 4.60 .* = 18.78 GiB on the GPU, which has 14.75"),
    ("sd35-medium", "model-offload", replace(T4, ram_gib=6.0), "of RAM, of which 6.00 are free"),
    ("sd35-medium", "group-offload", Budget("mps", 10.7, 12.0, None, 78.0), "the GPU shares the RAM here"),
    ("sd35-medium", "cpu", Budget("cpu", 0.0, 3.0, None, 78.0), "GiB of RAM, of which 3.00 are free"),
    ("sd35-medium", "staged", Budget("cpu", 0.0, 3.0, None, 78.0), "GiB of RAM, of which 3.00 are free"),
    ("sd15", "resident", replace(T4, vram_gib=2.4), "on the GPU, which has 2.40"),
]


@pytest.mark.parametrize(("name", "plan", "budget", "said"), REFUSED, ids=[f"{row[0]} {row[1]}" for row in REFUSED])
def test_a_plan_that_cannot_run_is_refused_before_anything_is_read(monkeypatch, name, plan, budget, said):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: budget))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DoesNotFit, match=f"^{name} cannot run under the plan {plan} here: .*{said}") as caught:
        load(name, plan)
    one_sentence(caught.value)


def test_a_plan_of_ones_own_is_tried_even_so(folders):
    """Its figures are sums; who has better ones makes the Plan and hands it over."""
    small = Budget("cpu", 0.0, 0.1, None, 50.0)
    found = plans(model(folders / "sd3"), small)["cpu"]
    assert found.refused and load(model(folders / "sd3"), found).plan is found


@pytest.fixture(params=["closed", "never answers"])
def no_network(request, monkeypatch, tmp_path):
    """An address where nobody is, or where somebody listens and says nothing; the requests that are made."""
    tries, own = [], machine._answers
    monkeypatch.setattr(machine, "_answers", lambda address: tries.append(address) or own(address))
    monkeypatch.setattr(machine, "ANSWER_S", 0.5)
    monkeypatch.setattr(machine.HUB, "_answered", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.delenv("DIFFUSION_MODEL", raising=False)
    sizes._on_hub.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "closed":
            server.close()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield tries


def test_without_a_network_nothing_is_said_and_one_try_is_made(no_network, capfd, folders):
    start = time.perf_counter()
    for _ in range(2):
        assert parts(MODELS["sd35-medium"])[0]
        plan("sd35-medium", Budget("cuda", 14.75, 12.7, (7, 5), 78.0))
    assert len(no_network) == 1 and time.perf_counter() - start < 10
    choose("storybook-sd3")
    load(model(folders / "sd15"))
    out, err = capfd.readouterr()
    assert len(no_network) == 1 and err == "" and out.count("\n") == 1 and "Hub" not in out


@pytest.mark.parametrize("name", ["sd15", "sd35-medium"])
def test_what_needs_the_network_says_so(no_network, name, monkeypatch):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cuda", 14.75, 12.7, (7, 5), 78.0)))
    with pytest.raises(LoadError, match="is not here yet and the Hub does not answer: check the network") as caught:
        load(name)
    one_sentence(caught.value)
    assert len(no_network) <= 2


def test_access_cannot_be_checked_without_a_network(no_network):
    """One try: the Hub client itself makes six, some with a wait."""
    with pytest.raises(AccessError, match="some/model is not here yet and the Hub does not answer") as caught:
        check_access("some/model")
    one_sentence(caught.value)
    assert len(no_network) == 1


def test_what_is_in_the_cache_needs_no_network(no_network, folders):
    commit, repo = "0" * 40, Path(constants.HF_HUB_CACHE, "models--some--model")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folders / "sd15", repo / "snapshots" / commit)
    assert check_access("some/model") is None
    assert len(no_network) == 1
