import json
import shutil
import subprocess
import sys
from dataclasses import replace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from hub import Hub
from huggingface_hub import constants

import from_scratch
from helpers import pipelines
from helpers.generate import Settings, generate
from helpers.memory import Budget
from helpers.pipelines import CLIP_TOKENIZER, MODELS, LoadError, choose, files, load

SD15 = MODELS["sd15"]
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
TOKEN = "hf_" + "TotallySecretTokenForTests123456"  # in two pieces, so that nobody takes it for a real one


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A small folder with all that SD1.5's has on the Hub: weights twice, pickles, a safety checker, a single file."""
    folder = tiny.sd15(tmp_path_factory.mktemp("master"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.save_pretrained(folder, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    for name in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"):
        (folder / name).write_bytes(b"never to be downloaded")
    return folder


@pytest.fixture
def folder(master, tmp_path):
    return shutil.copytree(master, tmp_path / "repo")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    with Hub({SD15.hub_id: folder}) as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        yield hub


def draw(pipe):
    return np.asarray(generate(pipe, Settings("a red boat", steps=2))[0], dtype=int)


def fails(model=SD15) -> str:
    with pytest.raises(LoadError) as caught:
        load(model)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and ": " in message
    assert TOKEN not in message
    return message


def test_downloads_what_it_needs_and_draws(hub, folder, capfd):
    pipe = load("sd15")
    assert pipe.model is SD15 and pipe.safety_checker is None
    assert pipe.unet.dtype == (torch.float32 if pipe.device.type == "cpu" else torch.float16)
    assert draw(pipe).std() > 1
    fetched = {path.split("/", 5)[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    weights = {path for path in fetched if path.endswith((".safetensors", ".bin", ".ckpt"))}
    assert weights and all("fp16.safetensors" in path for path in weights)
    assert not any("safety_checker" in path or "feature_extractor" in path for path in fetched)
    assert not hub.tokens
    out, err = capfd.readouterr()
    assert out == "" and "safety" not in err


def test_draws_the_same_as_the_plain_library(hub, folder):
    plain = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, local_files_only=True
    )
    assert np.abs(draw(load("sd15")) - draw(plain)).max() <= 1


def test_cached_models_need_no_network(hub, monkeypatch):
    first = draw(load("sd15"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.__exit__()
    assert np.array_equal(draw(load("sd15")), first)


def test_offline_with_a_cold_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in fails()
    assert not hub.requests


def test_no_network_does_not_go_to_the_mirror(hub, capsys):
    hub.__exit__()
    assert "check the network" in fails()
    assert "mirror" not in capsys.readouterr().out


def test_gated(hub, monkeypatch, caplog, capfd):
    hub.gate, hub.known = "gated", {TOKEN}
    assert "settings/tokens" in fails()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert f"open https://huggingface.co/{SD15.hub_id} " in fails()
    hub.allowed = {TOKEN}
    assert draw(load("sd15")).std() > 1
    out, err = capfd.readouterr()
    assert TOKEN in hub.tokens and TOKEN not in caplog.text + out + err


def test_a_token_that_cannot_be_one_is_not_shown(hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} {TOKEN}")
    assert "spaces" in fails()
    assert TOKEN not in caplog.text and not hub.requests


def test_missing_files_on_the_hub(hub, folder):
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert f"weights of {SD15.hub_id} are not all there" in fails()
    (folder / "model_index.json").unlink()
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert f"model_index.json is missing from {SD15.hub_id}" in fails()


def fetched_from(hub) -> list[tuple[str, str | None]]:
    """(weight file, Range) of every download."""
    gets = [(path.split("/", 5)[-1], span) for method, path, span in hub.requests if method == "GET"]
    return [(name, span) for name, span in gets if name.endswith(".safetensors")]


def test_a_cut_connection_is_resumed_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client keeps whole chunks, of 10 MB by default
    hub.cut, hub.cuts = (UNET, 20_500), 1
    assert draw(load("sd15")).std() > 1
    assert [span for name, span in fetched_from(hub) if name == UNET] == [None, "bytes=20000-"]


def test_a_lost_connection_is_said_and_the_next_call_keeps_what_is_there(hub):
    hub.cut = (UNET, 1000)
    message = fails()
    assert "was cut while downloading" in message and "run this again, finished files are kept" in message
    hub.cut, hub.requests = None, []
    assert draw(load("sd15")).std() > 1
    assert [name for name, _ in fetched_from(hub)] == [UNET]  # and none of the others again


def test_mirror_as_one_file_where_the_first_is_gone(hub, folder, tmp_path, monkeypatch, capsys):
    whole = draw(load("sd15"))
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.ckpt"))
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    tiny.single_file(folder, mirror / SD15.mirror_file)
    hub.repositories = {SD15.mirror: mirror, CLIP_TOKENIZER: folder / "tokenizer"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cold"))
    model = replace(SD15, mirror_config=str(configs))
    capsys.readouterr()
    pipe = load(model)
    assert np.abs(draw(pipe) - whole).max() <= 1
    assert capsys.readouterr().out.startswith(f"{SD15.hub_id} is gone from the Hub, so the mirror {SD15.mirror} is")
    assert type(pipe.scheduler).__name__ == "PNDMScheduler" and pipe.safety_checker is None

    (mirror / SD15.mirror_file).unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "colder"))
    assert f"file {SD15.mirror_file} is missing from {SD15.mirror}" in fails(model)


def test_mirror_as_a_folder(hub, folder, capsys):
    hub.repositories = {"some/mirror": folder}
    assert draw(load(replace(SD15, mirror="some/mirror", mirror_file=None))).std() > 1
    assert "the mirror some/mirror is used" in capsys.readouterr().out
    hub.repositories = {}
    assert "no repository some/nothing on the Hub" in fails(replace(SD15, mirror="some/nothing", mirror_file=None))
    assert f"no repository {SD15.hub_id} on the Hub" in fails(replace(SD15, mirror=None))


def unet_output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 3, unet_width(unet)))]
    with torch.no_grad():
        found = unet(inputs[0], torch.tensor(500), inputs[1])
    return found if isinstance(found, torch.Tensor) else found.sample


def unet_width(unet) -> int:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features


def test_files_for_code_that_reads_them_itself(hub, folder, tmp_path, monkeypatch, capsys):
    """From the Hub, from the mirror's single file and from the repository: from_scratch loads what diffusers does."""
    path, config = files("sd15")
    assert config is None and (path / UNET).is_file() and not (path / "safety_checker").exists()
    pipe, mine = load("sd15").to("cpu", torch.float32), from_scratch.load(path, config)
    ids = pipe.tokenizer(["a red boat"], padding="max_length", max_length=77).input_ids
    assert mine.tokenizer.encode(["a red boat"]).tolist() == ids
    expected = unet_output(pipe.unet)
    assert torch.allclose(unet_output(mine.unet), expected, atol=1e-4)

    configs = tmp_path / "configs"
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin", "*.ckpt", "tokenizer")
    shutil.copytree(folder, configs, ignore=ignored)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    tiny.single_file(folder, mirror / SD15.mirror_file)
    hub.repositories = {SD15.mirror: mirror, CLIP_TOKENIZER: folder / "tokenizer"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cold"))
    monkeypatch.setattr(pipelines.tempfile, "tempdir", str(tmp_path))
    mine = from_scratch.load(*files(replace(SD15, mirror_config=str(configs))))
    assert mine.tokenizer.encode(["a red boat"]).tolist() == ids
    assert torch.allclose(unet_output(mine.unet), expected, atol=1e-4)
    assert "the mirror" in capsys.readouterr().out

    assert files("storybook-sd") == (pipelines.ROOT / "models" / "storybook-sd", None)
    with pytest.raises(LoadError, match="models/nowhere/model_index.json is missing"):
        files(replace(MODELS["storybook-sd"], folder="models/nowhere"))


def test_configs_for_the_mirror_are_those_of_sd15():
    """What the single file lacks, built on the meta device: the counts of parameters are those of SD1.5."""
    configs = pipelines.ROOT / SD15.mirror_config
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(diffusers.UNet2DConditionModel.load_config(configs / "unet"))
        vae = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(configs / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


@pytest.fixture
def local(folder):
    """The same folder as a bundled model."""
    for path in [*folder.rglob("*fp16*"), folder / "unet" / "diffusion_pytorch_model.bin"]:
        path.unlink()
    without = ("safety_checker", "feature_extractor")
    return replace(MODELS["storybook-sd"], folder=str(folder), without=without)


def test_a_bundled_folder_works_from_anywhere_and_says_nothing(local, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert draw(load(local)).std() > 1
    assert capfd.readouterr() == ("", "")
    assert not huggingface_hub.utils.are_progress_bars_disabled()


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_missing_file_is_named(local, folder, name):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    message = fails(local)
    assert (name if name.endswith("json") else str((folder / name).parent)) in message and "make train" in message
    (folder / name).write_bytes(content)
    assert draw(load(local)).std() > 1


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_truncated_file_is_named(local, folder, name, keep):
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    message = fails(local)
    assert f"{name} is truncated or damaged" in message and "git checkout" in message and "make train" in message


def test_a_truncated_download_says_what_to_delete(hub):
    load("sd15")
    blob = next(p for p in (pipelines.Path(constants.HF_HUB_CACHE)).rglob(UNET)).resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-10])
    message = fails()
    assert UNET in message and f"delete {blob} and run this again" in message
    blob.unlink()
    assert draw(load("sd15")).std() > 1


def test_files_of_another_model(local, folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
    assert "do not fit together" in fails(local)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in fails(local)


def test_a_bundled_model_that_is_not_there():
    message = fails(replace(MODELS["storybook-sd"], folder="models/nowhere"))
    assert "models/nowhere/model_index.json is missing" in message


def machine(monkeypatch, device, vram):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget(device, vram, 12.0, None, 50.0)))
    monkeypatch.delenv("DIFFUSION_MODEL", raising=False)


@pytest.mark.parametrize(
    ("device", "vram", "name", "why"),
    [
        ("cpu", 0.0, "storybook-sd", "there is no GPU here"),
        ("cuda", 2.0, "storybook-sd", "needs 3.5 GiB of GPU memory with sd15, there are 2.0"),
        ("cuda", 14.7, "sd15", "on cuda with 14.7 GiB"),
        ("mps", 10.0, "sd15", "on mps"),
    ],
)
def test_choose(monkeypatch, capsys, device, vram, name, why):
    machine(monkeypatch, device, vram)
    assert choose("sd15") is MODELS[name]
    line = capsys.readouterr().out
    assert line.startswith(f"{name}: ") and why in line and line.count("\n") == 1
    assert choose("storybook-sd") is MODELS["storybook-sd"]


def test_choose_says_whether_anything_is_downloaded(hub, monkeypatch, capsys):
    def said() -> str:
        with monkeypatch.context() as patch:
            machine(patch, "cuda", 14.7)
            choose("sd15")
        return capsys.readouterr().out

    assert said() == "sd15: on cuda with 14.7 GiB; the first load downloads 2.2 GB.\n"
    load("sd15")
    assert said() == "sd15: on cuda with 14.7 GiB; its files are here already.\n"
    next((pipelines.Path(constants.HF_HUB_CACHE)).rglob(UNET)).unlink()
    assert said().endswith("; the first load downloads 2.2 GB.\n")


def test_choose_the_flagship(monkeypatch, capsys):
    for device, vram, name in (
        ("cuda", 14.75, "sd35-medium"),
        ("cuda", 4.0, "storybook-sd3"),
        ("cpu", 0.0, "storybook-sd3"),
    ):
        machine(monkeypatch, device, vram)
        assert choose("sd35-medium") is MODELS[name]
    assert "needs 5.5 GiB of GPU memory with sd35-medium, there are 4.0" in capsys.readouterr().out


def test_the_environment_overrides(monkeypatch, capsys):
    machine(monkeypatch, "cpu", 0.0)
    monkeypatch.setenv("DIFFUSION_MODEL", "sd15")
    assert choose("storybook-sd") is SD15
    assert "DIFFUSION_MODEL" in capsys.readouterr().out
    monkeypatch.setenv("DIFFUSION_MODEL", "sd99")
    with pytest.raises(ValueError, match="no model 'sd99'.*: choose one of sd15, sd35-medium, storybook-sd"):
        choose("sd15")


def test_unknown_model():
    for ask in (choose, load):
        with pytest.raises(ValueError, match="no model 'sd16': choose one of"):
            ask("sd16")
    with pytest.raises(ValueError, match="no plan 'quick': choose one of resident, resident-nf4, staged"):
        load("storybook-sd", plan="quick")
    with pytest.raises(ValueError, match="storybook-sd cannot run under the plan staged: choose resident"):
        load("storybook-sd", plan="staged")


def test_importing_the_helpers_says_nothing():
    """diffusers' pipeline classes warn about torchvision when they are first imported: that waits for `load`."""
    code = "import helpers.pipelines, helpers.generate, helpers.panel"
    done = subprocess.run([sys.executable, "-c", code], cwd=pipelines.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
