import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from hub import Hub
from huggingface_hub import constants
from rehearsal.checkpoint import write

from helpers import planned, sizes
from helpers.generate import Settings, decode, generate
from helpers.memory import Budget
from helpers.pipelines import LoadError, load
from helpers.plan import RELATIVE_TIME, plans
from helpers.registry import MODELS, Model

PROMPT = "a red boat by the sea"
OFFLOADS = ("model-offload", "group-offload", "sequential-offload")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sd3_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def model(folder):
    return Model("tiny3", "StableDiffusion3Pipeline", None, 2, 4.0, (PROMPT,), folder=str(folder))


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cpu", 0.0, 8.0, None, 50.0)))
    monkeypatch.setattr(planned, "free", lambda: None)  # most of the time here, and there is nothing large


@pytest.fixture
def loads(monkeypatch):
    """The names of the networks that are loaded, in order."""
    seen, own = [], planned.PlannedPipeline._load
    monkeypatch.setattr(
        planned.PlannedPipeline, "_load", lambda pipe, name, place: seen.append(name) or own(pipe, name, place)
    )
    return seen


def draw(pipe, prompt=PROMPT, **more):
    return np.asarray(generate(pipe, Settings(prompt, **more), say=lambda _: None)[0], dtype=int)


def full(times=1):
    """A forward that finds the GPU's memory full so many times; then it is not called any more."""
    left = [times]

    def forward(*_, **__):
        left[0] -= 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return forward, left


@pytest.mark.parametrize("name", ["resident", "staged", "sequential-offload", "cpu"])
def test_draws_what_the_library_draws(model, folder, name):
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    ask = {"prompt": PROMPT, "negative_prompt": "house", "num_inference_steps": 2, "guidance_scale": 4.0}
    theirs = plain(**ask, generator=torch.Generator().manual_seed(5), num_images_per_prompt=1).images[0]
    mine = draw(load(model, name), negative_prompt="house", seed=5)
    assert np.array_equal(mine, np.asarray(theirs)) and mine.std() > 1


@pytest.mark.parametrize("name", [n for n in RELATIVE_TIME if n != "resident-nf4"])
def test_every_plan_draws_and_a_batch_is_the_single_pictures(model, name):
    pipe = load(model, name)
    assert pipe.plan.name == name and pipe.model is model
    batch = generate(pipe, Settings(PROMPT, count=2, seed=3))
    alone = draw(pipe, seed=4)
    assert np.abs(np.asarray(batch[1], dtype=int) - alone).max() <= 1
    assert batch[0].info["model"] == "tiny3" and batch[0].size == (64, 64)


def test_without_t5_as_the_library_without_t5(model, folder):
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe = load(model, "no-t5")
    assert pipe.tokenizer_3 is None
    theirs = plain(PROMPT, num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(draw(pipe), np.asarray(theirs.images[0]))
    assert not np.array_equal(draw(pipe), draw(load(model, "staged")))


def test_embeddings_are_the_librarys(model, folder):
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    ask = {"negative_prompt": "in snow", "num_images_per_prompt": 2, "clip_skip": 0, "max_sequence_length": 77}
    prompts = [PROMPT, "a tree"], ["a house", "red"], ["a star", "sea"]
    with torch.no_grad():
        theirs = plain.encode_prompt(*prompts, **ask)
    mine = load(model, "staged").encode_prompt(*prompts, **ask)
    assert mine[0].shape == (4, 77 + 77, 64) and mine[2].shape == (4, 64)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # they read the texts in a batch
    assert load(model, "staged").encode_prompt("a", None, None, do_classifier_free_guidance=False)[1] is None


def test_a_staged_plan_loads_an_encoder_only_for_a_text_that_is_new(model, loads):
    pipe = load(model, "staged")
    assert loads == [] and pipe.transformer is None
    first = draw(pipe)
    assert loads == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert pipe.text_encoder is None and pipe.text_encoder_3 is None
    assert np.array_equal(draw(pipe), first) and len(loads) == 5  # nothing is loaded for what is known
    draw(pipe, "a blue house")
    assert loads[5:] == loads[:5]  # the transformer makes room for T5 and comes back
    draw(pipe, PROMPT, negative_prompt="a blue house", steps=1)
    assert len(loads) == 10
    assert np.array_equal(draw(pipe), first)


def test_nothing_holds_an_encoder_when_the_next_network_is_loaded(model, monkeypatch):
    """What a live reference keeps on the GPU is missing there; Python's own counting must be enough."""
    alive, own = [], planned.PlannedPipeline._load

    def load_alone(pipe, name, place):
        assert not [one() for one in alive if one() is not None]
        network = own(pipe, name, place)
        if name.startswith("text_encoder"):
            alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(planned.PlannedPipeline, "_load", load_alone)
    monkeypatch.setattr(planned, "free", gc.collect)
    draw(load(model, "staged"))
    assert len(alive) == 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where a tensor is")
@pytest.mark.parametrize("name", ["cpu", "resident", "sequential-offload"])
def test_float16_weights_stay_in_their_files(tmp_path, name):
    """Only T5's `wo` and the VAE take RAM of their own, in float32: what is larger than the RAM is not read into it."""
    model = Model("tiny3", "StableDiffusion3Pipeline", 64, 2, 4.0, (PROMPT,), folder=str(write(tmp_path, tiny=True)))
    one = plans(model, Budget("cpu", 0.0, 0.3, None, 50.0))[name]
    assert one.dtype == "float16"
    pipe = load(model, one)
    for part in sizes.NETWORKS:
        if part in pipe.components:
            network = getattr(pipe, part) or pipe._load(part, pipe.home)
            places = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
            spans = [
                [int(x, 16) for x in place[0].split("-")] for place in places if place[-1].endswith(".safetensors")
            ]
            copied = {
                key
                for key, tensor in network.state_dict().items()
                if not any(start <= tensor.data_ptr() < end for start, end in spans)
            }
            assert copied == {
                key for key in network.state_dict() if part == "vae" or key.endswith("ReluDense.wo.weight")
            }
    assert draw(pipe, steps=1).shape == (64, 64, 3)


def test_no_t5_keeps_the_transformer_for_a_new_prompt(model, loads):
    pipe = load(model, "no-t5")
    draw(pipe)
    draw(pipe, "a blue house")
    assert loads == ["text_encoder", "text_encoder_2", "transformer", "vae", "text_encoder", "text_encoder_2"]


def test_embeddings_can_be_given(model, loads):
    pipe = load(model, "staged")
    given = dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
            pipe.encode_prompt(PROMPT),
            strict=True,
        )
    )
    loads.clear()
    pipe(**given, num_inference_steps=1, output_type="latent")
    assert loads == []


@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
def test_full_memory_takes_the_next_plan_down(model, monkeypatch, part):
    pipe, said = load(model, "staged"), []
    expected = draw(load(model, "resident"))
    own = planned.PlannedPipeline._load
    forward, left = full()

    def load_broken(pipe, name, place):
        network = own(pipe, name, place)
        if name == part and left[0] > 0:
            network.forward = forward
        return network

    monkeypatch.setattr(planned.PlannedPipeline, "_load", load_broken)
    drawn = generate(pipe, Settings(PROMPT), say=said.append)
    assert said == ["The memory is full under the plan staged, so cpu takes over."]
    assert pipe.plan.name == "cpu" and np.array_equal(np.asarray(drawn[0]), expected)


def test_full_memory_with_no_plan_left_is_one_sentence_and_the_next_run_works(model, monkeypatch):
    pipe = load(model, "cpu")
    expected = draw(pipe)
    own = pipe.transformer.forward
    pipe.transformer.forward, _ = full()
    with pytest.raises(
        RuntimeError, match=r"^The memory is full and no smaller plan is left: draw a smaller picture\.$"
    ):
        generate(pipe, Settings(PROMPT))
    pipe.transformer.forward = own
    assert np.array_equal(draw(pipe), expected)


def test_full_memory_while_loading(model, monkeypatch, capsys):
    own = planned.PlannedPipeline._load
    left = [1]

    def load_full(pipe, name, place):
        if name == "vae" and left[0]:
            left[0] = 0
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(pipe, name, place)

    monkeypatch.setattr(planned.PlannedPipeline, "_load", load_full)
    pipe = load(model, "resident")
    assert capsys.readouterr().out == "The memory is full under the plan resident, so cpu takes over.\n"
    assert draw(pipe).std() > 1
    left[0] = 1
    with pytest.raises(LoadError, match="no smaller plan is left for tiny3: close other programs first"):
        load(model, "cpu")


def test_full_memory_while_decoding_takes_tiles(model):
    pipe, said = load(model, "staged"), []
    whole = draw(pipe)
    own, sizes = pipe.vae.decoder.forward, []

    def forward(latents):
        sizes.append(latents.shape[-1])
        if latents.shape[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(latents)

    pipe.vae.decoder.forward = forward
    tiled = np.asarray(generate(pipe, Settings(PROMPT), say=said.append)[0], dtype=int)
    assert len(said) == 1 and "decoded in tiles" in said[0]
    assert sizes[0] == 8 and max(sizes[1:]) == 4
    assert tiled.shape == whole.shape and not pipe.vae.use_tiling
    pipe.vae.decoder.forward = own
    assert np.array_equal(draw(pipe), whole)


def test_latents_are_kept_when_decoding_fails(model):
    pipe = load(model, "staged")
    expected = draw(pipe)
    assert pipe.kept_latents is None
    own = pipe.vae.decoder.forward
    pipe.vae.decoder.forward, _ = full(2)
    with pytest.raises(RuntimeError, match="free some, then decode"):
        generate(pipe, Settings(PROMPT), say=lambda _: None)
    pipe.vae.decoder.forward = own
    pixels = decode(pipe, pipe.kept_latents)
    again = pipe.image_processor.pt_to_numpy(pixels)[0]
    assert np.array_equal((again * 255).round().astype(int), expected)


def test_numbers_that_are_not_finite_name_the_stage(model):
    pipe = load(model, "staged")
    draw(pipe)
    key = (PROMPT, "text_encoder_3", 256)
    own = pipe.embeddings[key]
    pipe.embeddings[key] = (torch.full_like(own[0], float("nan")),)
    with pytest.raises(RuntimeError, match="the text encoder's output"):
        draw(pipe)
    pipe.embeddings[key] = own
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the latents after step 1 of 2"):
        draw(pipe)


@pytest.mark.parametrize("stage", ["text_encoder_2", "transformer", "vae"])
def test_an_interrupt_while_loading_leaves_nothing_half_done(model, monkeypatch, stage):
    pipe = load(model, "staged")
    own = planned.PlannedPipeline._load

    def interrupted(pipe, name, place):
        if name == stage:
            raise KeyboardInterrupt
        return own(pipe, name, place)

    with monkeypatch.context() as patch:
        patch.setattr(planned.PlannedPipeline, "_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
    assert pipe.transformer is None and pipe.vae is None
    assert np.array_equal(draw(pipe), draw(load(model, "resident")))


def test_stop_under_a_staged_plan(model):
    pipe = load(model, "staged")
    assert generate(pipe, Settings(PROMPT), should_stop=lambda: True) == []
    assert draw(pipe).std() > 1


def test_damaged_files_are_one_sentence(model, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken = replace(model, folder=str(copy))
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"attention_head_dim": 16}))
    with pytest.raises(LoadError, match="do not fit together"):
        load(broken, "resident")
    (copy / "text_encoder_3" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(LoadError, match="truncated or damaged"):
        load(broken, "staged")
    assert draw(load(model, "staged")).std() > 1


def test_a_gated_model_by_plan(model, folder, tmp_path, monkeypatch, capsys):
    sd35 = replace(MODELS["sd35-medium"], steps=2, size=None)
    with Hub({sd35.hub_id: folder}) as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        hub.gate, hub.known = "gated", {"hf_TestToken"}
        with pytest.raises(LoadError, match="accept the license on https://huggingface.co/stabilityai"):
            load(sd35, "no-t5")
        monkeypatch.setenv("HF_TOKEN", "hf_TestToken")
        hub.allowed = {"hf_TestToken"}
        pipe = load(sd35, "no-t5")
        assert np.array_equal(draw(pipe, guidance=4.0), draw(load(model, "no-t5")))
        fetched = {path.split("/", 5)[-1] for method, path, span in hub.requests if method == "GET" and not span}
        assert not any(name.startswith(("text_encoder_3", "tokenizer_3")) for name in fetched)
        load(sd35, "staged")
        assert any(path.endswith("text_encoder_3/model.safetensors") for _, path, _ in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert draw(load(sd35, "staged")).std() > 1
    assert "hf_TestToken" not in "".join(capsys.readouterr())


def test_too_little_disk_is_said_before_the_download(tmp_path, monkeypatch):
    sizes._on_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cpu", 0.0, 8.0, None, 10.0)))
    with pytest.raises(LoadError, match=r"^sd35-medium needs 15.2 GiB of disk and 10.0 are free: free some space"):
        load("sd35-medium", "staged")
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE is set"):  # without T5 it is 6.3 GiB
        load("sd35-medium", "no-t5")


def test_without_a_name_a_plan_is_made(model):
    assert load(model).plan.name == "cpu"
    card = Budget("cuda", 14.75, 12.7, (7, 5), 50.0)
    assert load(model, replace(plans(model, card)["staged"], dtype="float32")).plan.name == "staged"
