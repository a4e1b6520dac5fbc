"""Stable Diffusion 3 under every plan, on a pipeline of random weights; what needs a GPU is in test_gpu.py."""

import json
import shutil
import types
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from rehearsal.checkpoint import write
from safetensors.torch import load_file, save_file

from helpers.generate import Settings, decode, generate
from helpers.loading import sd3, sizes
from helpers.loading.plan import RELATIVE_TIME, WITHOUT_T5, plans
from helpers.loading.registry import MODELS, Model
from helpers.memory import Budget
from helpers.pipelines import LoadError, load
from helpers.preview import LiveMeter

PROMPT = "a red boat by the sea"
NETWORKS = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
SMALL = Budget("cpu", 0.0, 0.3, None, 50.0)  # so little RAM that the plans are in float16, and networks leave
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
    monkeypatch.setattr(sd3, "free", lambda: None)  # most of the time here, and there is nothing large


@pytest.fixture
def came(monkeypatch):
    """The names of the networks that come, in order."""
    seen, own = [], sd3.Network.come
    monkeypatch.setattr(sd3.Network, "come", lambda network, device: seen.append(network.name) or own(network, device))
    return seen


def small(model, name):
    """The plan in float16, in which networks come and go on a CPU too."""
    return plans(model, SMALL)[name]


def here(pipe):
    return [name for name in NETWORKS if name in pipe.stage.networks and pipe.stage.networks[name].here]


def draw(pipe, prompt=PROMPT, image=None, mask=None, **more):
    return np.asarray(generate(pipe, Settings(prompt, **more), image, mask, say=lambda _: None)[0], dtype=int)


def raises(error, times=1):
    """A forward that raises so many times; then it is not called any more."""
    left = [times]

    def forward(*_, **__):
        left[0] -= 1
        raise error

    return forward, left


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def picture(side=64):
    ramp = np.linspace(0, 255, side)
    return Image.fromarray(
        np.stack([ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, ramp[:, None] / 2 + ramp / 2], -1).astype(
            np.uint8
        )
    )


@pytest.mark.parametrize("name", ["resident", "staged", "sequential-offload", "cpu"])
def test_draws_what_the_library_draws(model, folder, name):
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    ask = {"prompt": PROMPT, "negative_prompt": "house", "num_inference_steps": 2, "guidance_scale": 4.0}
    theirs = plain(**ask, generator=torch.Generator().manual_seed(5), num_images_per_prompt=1).images[0]
    pipe = load(model, name)
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    mine = draw(pipe, negative_prompt="house", seed=5)
    assert np.array_equal(mine, np.asarray(theirs)) and mine.std() > 1
    called = pipe(**ask, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(np.asarray(called), np.asarray(theirs))


@pytest.mark.parametrize("name", [n for n in RELATIVE_TIME if not n.endswith("nf4")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_plan_draws_and_a_batch_is_the_single_pictures(model, name, dtype):
    pipe = load(model, name if dtype == "float32" else small(model, name))
    assert pipe.plan.name == name and pipe.plan.dtype == dtype and pipe.model is model
    batch = generate(pipe, Settings(PROMPT, count=2, seed=3))
    alone = draw(pipe, seed=4)
    assert np.abs(np.asarray(batch[1], dtype=int) - alone).max() <= (1 if dtype == "float32" else 8)
    assert batch[0].info["model"] == "tiny3" and batch[0].size == (64, 64)


@pytest.mark.parametrize("name", ["resident", "staged", "no-t5", "cpu"])
def test_a_call_as_diffusers_documents_it_under_every_plan(model, name):
    for plan in (name, small(model, name)):
        pipe = load(model, plan)
        expected = draw(pipe, steps=2, guidance=3.0, seed=5)
        for _ in range(2):
            generator = torch.Generator().manual_seed(5)
            found = pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
            assert np.abs(np.asarray(found, dtype=int) - expected).max() <= 2


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
    pipe = load(model, small(model, "staged"))
    with torch.no_grad():
        theirs = plain.encode_prompt(*prompts, **ask)
        for _ in range(2):  # read, and remembered
            mine = pipe.encode_prompt(*prompts, **ask)
            assert mine[0].shape == (4, 77 + 77, 64) and mine[2].shape == (4, 64)
            for a, b in zip(mine, theirs, strict=True):
                assert torch.allclose(a.float(), b, atol=0.02)  # in float16


def test_embeddings_for_the_pipeline(model):
    """What `generate` hands to the classes of diffusers."""
    pipe = load(model, "staged")
    found = pipe.stage.encode(PROMPT, "house")
    with torch.no_grad():
        theirs = pipe.encode_prompt(PROMPT, None, None, negative_prompt="house")
    assert list(found) == (
        "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds".split()
    )
    for mine, one in zip(found.values(), theirs, strict=True):
        assert torch.equal(mine, one)
    assert not found["prompt_embeds"].requires_grad


@pytest.mark.parametrize("name", ["resident", "staged", "no-t5", "group-offload", "cpu"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_starts_from_a_picture_as_the_library_does(model, folder, name, task):
    more = {"text_encoder_3": None, "tokenizer_3": None} if name in WITHOUT_T5 else {}
    cls = getattr(diffusers, f"StableDiffusion3{task}Pipeline")
    plain = cls.from_pretrained(folder, local_files_only=True, **more)
    start, mask = picture(), Image.fromarray(np.repeat([0, 255], 32).astype(np.uint8)[None].repeat(64, 0))
    ask = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5, "image": start}
    ask |= {"mask_image": mask} if task == "Inpaint" else {}
    generator = torch.Generator().manual_seed(5)
    theirs = plain(PROMPT, **ask, height=64, width=64, generator=generator, output_type="latent").images
    theirs = plain.image_processor.pt_to_numpy(decode(plain, theirs))[0] * 255  # their inpainting forgets the shift
    pipe = load(model, name)
    mine = draw(pipe, PROMPT, start, mask if task == "Inpaint" else None, steps=4, guidance=3.0, strength=0.5, seed=5)
    assert np.abs(mine - theirs).max() <= 1
    assert np.array_equal(draw(pipe), draw(load(model, name)))  # the pipeline itself draws as before


def test_img2img_of_diffusers_runs_from_a_staged_pipeline(model):
    for plan in ("staged", small(model, "staged")):
        pipe = load(model, plan)
        for _ in range(2):  # before the first picture and after it
            dtype = {"torch_dtype": getattr(torch, pipe.plan.dtype)}
            other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe, **dtype)
            ask = {"image": picture(), "num_inference_steps": 4, "strength": 0.5}
            found = other(PROMPT, **ask, generator=torch.Generator().manual_seed(5), height=64, width=64).images[0]
            assert np.asarray(found).std() > 1
            mine = draw(pipe, PROMPT, picture(), steps=4, guidance=7.0, strength=0.5, seed=5)
            assert np.abs(mine - np.asarray(found)).max() <= 2


def adapter(pipe, folder, scale=30.0):
    """Write a LoRA of random weights for the transformer and for the first text encoder."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for prefix, network, layers in (
        ("transformer", pipe.transformer, ("to_q", "to_v", "to_out.0")),
        ("text_encoder", pipe.text_encoder, ("q_proj", "v_proj")),
    ):
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(layers):
                down = torch.randn(2, layer.in_features, generator=generator) * scale / 30
                up = torch.randn(layer.out_features, 2, generator=generator) * scale / 30
                weights |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers={
            key.removeprefix("transformer."): value for key, value in weights.items() if key.startswith("transformer.")
        },
        text_encoder_lora_layers={
            key.removeprefix("text_encoder."): value
            for key, value in weights.items()
            if key.startswith("text_encoder.")
        },
    )
    return folder


@pytest.mark.parametrize("name", ["resident", "staged", "no-t5", "cpu"])
@pytest.mark.parametrize("when", ["before the first picture", "after it"])
def test_an_adapter_stays_across_prompts_plans_and_unload(model, tmp_path, name, when):
    plain = load(model, small(model, name))
    prompts = [PROMPT, "a blue house", "a star in snow"]
    before = [draw(plain, text) for text in prompts]
    pipe = load(model, small(model, name))
    if when == "after it":
        draw(pipe)
    pipe.load_lora_weights(adapter(pipe, tmp_path), adapter_name="random")
    after = [draw(pipe, text) for text in prompts]
    assert all(np.abs(a - b).mean() > 1 for a, b in zip(before, after, strict=True))
    assert np.array_equal(draw(pipe, prompts[0]), after[0])
    pipe.unload()
    assert here(pipe) == [] and np.array_equal(draw(pipe, prompts[2]), after[2])
    assert draw(pipe, prompts[0], picture(), steps=4).std() > 1
    pipe.set_adapters("random", 0.0)
    assert all(np.array_equal(draw(pipe, text), old) for text, old in zip(prompts, before, strict=True))
    pipe.set_adapters("random", 1.0)
    assert np.array_equal(draw(pipe, prompts[1]), after[1])
    pipe.stage.step_down("denoise")  # to the plan cpu, or none
    assert np.abs(draw(pipe, prompts[1]) - before[1]).mean() > 1
    pipe.unload_lora_weights()
    if name == "cpu":
        assert np.array_equal(draw(pipe, prompts[1]), before[1])


def test_a_staged_plan_reads_an_encoder_only_for_a_text_that_is_new(model, came):
    pipe = load(model, small(model, "staged"))
    assert came == [] and here(pipe) == []
    first = draw(pipe)
    assert came == NETWORKS and here(pipe) == NETWORKS[3:]
    assert np.array_equal(draw(pipe), first) and len(came) == 5  # nothing is read for what is known
    draw(pipe, "a blue house")
    assert came[5:] == NETWORKS  # transformer and VAE make room for T5 and come back
    draw(pipe, PROMPT, negative_prompt="a blue house", steps=1)
    assert len(came) == 10
    assert np.array_equal(draw(pipe), first)


def test_the_memory_of_texts_is_bounded(model, monkeypatch):
    monkeypatch.setattr(sd3, "REMEMBERED", 3)
    pipe = load(model, small(model, "no-t5"))
    for text in ("a boat", "a tree", "a star", "a house"):
        draw(pipe, text, steps=1)
    assert {len(known) for known in pipe.stage.encode._known.values()} == {3}


def test_nothing_but_one_encoder_is_there_when_t5_comes(model, monkeypatch):
    own, seen = sd3.Network.come, []

    def come(network, device):
        seen.append((network.name, here(pipe)))
        own(network, device)

    monkeypatch.setattr(sd3.Network, "come", come)
    pipe = load(model, small(model, "staged"))
    draw(pipe)
    draw(pipe, "a blue house")
    at = [others for name, others in seen if name == "text_encoder_3"]
    assert at == [[], []]
    assert [others for name, others in seen if name == "text_encoder"] == [[], ["transformer", "vae"]]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where a tensor is")
@pytest.mark.parametrize("name", ["cpu", "resident", "sequential-offload"])
def test_float16_weights_stay_in_their_files(tmp_path, name):
    """Only T5's `wo` and the VAE take RAM of their own, in float32: what is larger than the RAM is not read into it."""
    model = Model("tiny3", "StableDiffusion3Pipeline", 64, 2, 4.0, (PROMPT,), folder=str(write(tmp_path, tiny=True)))
    pipe = load(model, small(model, name))
    assert pipe.plan.dtype == "float16"
    places = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(x, 16) for x in place[0].split("-")] for place in places if place[-1].endswith(".safetensors")]
    for part, network in pipe.stage.networks.items():
        for there in (False, True):
            if there:
                network.come(torch.device("cpu"))
            else:
                network.leave()
            copied = {
                key
                for key, tensor in network.module.named_parameters()
                if not any(start <= tensor.data_ptr() < end for start, end in spans)
            }
            large = {key for key, _ in network.module.named_parameters() if part == "vae" or "ReluDense.wo" in key}
            assert copied == (large if there else set())
    assert draw(pipe, steps=1).shape == (64, 64, 3)


def test_no_t5_keeps_the_transformer_for_a_new_prompt(model, came):
    pipe = load(model, small(model, "no-t5"))
    draw(pipe)
    draw(pipe, "a blue house")
    assert came == ["text_encoder", "text_encoder_2", "transformer", "vae", "text_encoder", "text_encoder_2"]


def test_embeddings_can_be_given(model, came):
    pipe = load(model, small(model, "staged"))
    given = pipe.stage.encode(PROMPT)
    came.clear()
    pipe(**given, num_inference_steps=1, output_type="latent")
    assert came == ["transformer"]


def test_loading_another_unloads_the_one_before(model):
    first, second = load(model, small(model, "resident")), None
    assert here(first) == NETWORKS
    second = load(model, small(model, "staged"))
    assert here(first) == []
    assert np.array_equal(draw(first), draw(second))


@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
def test_full_memory_takes_a_smaller_plan(model, part):
    expected = draw(load(model, small(model, "cpu")))
    pipe, said = load(model, small(model, "staged")), []
    forward, left = raises(FULL)
    network = getattr(pipe, part)
    own, network._old_forward = network._old_forward, forward
    take = pipe.stage.step_down

    def step_down(*given):
        network._old_forward = own
        said.append(given[0])
        return take(*given)

    pipe.stage.step_down = step_down
    drawn = generate(pipe, Settings(PROMPT), say=said.append)
    stage = "encode" if part == "text_encoder_3" else "denoise"
    assert said == [stage, "The memory is full under the plan staged, so cpu takes over."]
    assert pipe.plan.name == "cpu" and np.abs(np.asarray(drawn[0], dtype=int) - expected).max() <= 2


def test_full_memory_with_no_plan_left_is_one_sentence_and_the_next_run_works(model):
    pipe = load(model, "cpu")
    expected = draw(pipe)
    own = pipe.transformer.forward
    pipe.transformer.forward, _ = raises(FULL)
    with pytest.raises(
        RuntimeError, match=r"^The memory is full and no smaller plan is left: draw a smaller picture\.$"
    ):
        generate(pipe, Settings(PROMPT))
    pipe.transformer.forward = own
    assert np.array_equal(draw(pipe), expected)


def test_full_memory_while_loading(model, monkeypatch, capsys):
    own, left = sd3.Network.come, [1]

    def come(network, device):
        if network.name == "vae" and left[0]:
            left[0] = 0
            raise FULL
        own(network, device)

    monkeypatch.setattr(sd3.Network, "come", come)
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
            raise FULL
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
    pipe.vae.decoder.forward, _ = raises(FULL, 2)
    with pytest.raises(RuntimeError, match="free some, then decode"):
        generate(pipe, Settings(PROMPT), say=lambda _: None)
    pipe.vae.decoder.forward = own
    pixels = decode(pipe, pipe.kept_latents)
    again = pipe.image_processor.pt_to_numpy(pixels)[0]
    assert np.array_equal((again * 255).round().astype(int), expected)


def test_numbers_that_are_not_finite_name_the_stage(model):
    pipe = load(model, "cpu")
    draw(pipe)
    with torch.no_grad():
        pipe.text_encoder_3.encoder.final_layer_norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the text encoder's output"):
        draw(pipe)
    with torch.no_grad():
        pipe.text_encoder_3.encoder.final_layer_norm.weight.fill_(1.0)
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the latents after step 1 of 2"):
        draw(pipe)


@pytest.fixture
def beyond_float16(model, folder, tmp_path):
    """A model whose transformer adds and subtracts 6e4: the norm after it makes small numbers, if all are finite."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"pos_embed.proj.weight": 6e4 * weights["pos_embed.proj.weight"].sign()}, file)
    return replace(model, folder=str(copy))


@pytest.mark.parametrize("name", ["staged", "resident"])
def test_what_float16_cannot_hold_is_denoised_in_float32(beyond_float16, monkeypatch, name):
    expected, said = draw(load(beyond_float16, "staged")), []
    pipe = load(beyond_float16, small(beyond_float16, name))
    (drawn,) = generate(pipe, Settings(PROMPT), say=said.append)
    assert len(said) == 1 and "so the picture is drawn again in float32" in said[0]
    assert np.abs(np.asarray(drawn, dtype=int) - expected).max() <= 8
    assert pipe.stage.networks["transformer"].plan is pipe.plan and pipe.plan.dtype == "float16"
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cpu", 0.0, 1e-6, None, 50.0)))
    with pytest.raises(RuntimeError, match="latents after step 1 of 2: float16 ends at 65,504, the plan cpu"):
        draw(pipe)


def test_an_encoder_is_not_tried_again_in_float32(model):
    pipe, said = load(model, small(model, "resident")), []
    pipe.text_encoder.text_projection.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="the text encoder's output: float16 ends"):
        generate(pipe, Settings(PROMPT), say=said.append)
    assert said == []


def test_where_there_is_room_for_float32(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for gib, name, room in [(14.75, "staged", True), (8.0, "staged", False), (14.75, "model-offload", False)]:
        card = Budget("cuda", gib, 12.7, (7, 5), 50.0)
        monkeypatch.setattr(Budget, "detect", classmethod(lambda cls, card=card: card))
        found = plans("sd35-medium", card)[name]
        stage = types.SimpleNamespace(plan=found, offload=found.strategy.offload, device=torch.device("cuda"))
        stage.networks = {"transformer": types.SimpleNamespace(module=None)}
        assert sd3.Stage.has_room_for_float32(stage) == room


def test_stop_under_a_staged_plan(model):
    pipe = load(model, small(model, "staged"))
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
    blobs = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium" / "blobs"
    blobs.mkdir(parents=True)
    with open(blobs / "half.incomplete", "wb") as half:
        half.truncate(6 * 2**30)  # takes no room on the disk
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE is set"):  # what was downloaded before counts
        load("sd35-medium", "staged")


def test_without_a_name_a_plan_is_made(model):
    assert load(model).plan.name == "cpu"
    card = Budget("cuda", 14.75, 12.7, (7, 5), 50.0)
    assert load(model, replace(plans(model, card)["staged"], dtype="float32", t5="float32")).plan.name == "staged"


@pytest.fixture
def offloading(monkeypatch):
    """diffusers' own offloading, with the CPU in the GPU's place."""
    monkeypatch.setattr(sd3.Stage, "offload", property(lambda stage: stage.plan.strategy.offload))
    # diffusers 0.39 asks torch which accelerator there is, and does not expect none
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cpu"))


@pytest.mark.parametrize("name", ["model-offload", "group-offload"])
def test_offloading_of_diffusers_draws_the_same(model, offloading, name):
    expected = draw(load(model, "no-t5"))
    pipe = load(model, name)
    drawn = [draw(pipe), draw(pipe)]
    hooked = {
        "model-offload": hasattr(pipe.transformer, "_hf_hook") and len(getattr(pipe, "_all_hooks", [])) == 4,
        "group-offload": hasattr(pipe.transformer, "_diffusers_hook") and not hasattr(pipe.transformer, "_hf_hook"),
    }
    assert hooked[name]
    assert LiveMeter(pipe).rgb.weight.shape == (16, 3)
    pipe.unload()
    assert here(pipe) == []
    drawn.append(draw(pipe))
    assert all(np.abs(one - expected).max() <= 1 for one in drawn)
    assert draw(pipe, PROMPT, picture(), steps=4).std() > 1


def test_sequential_offloading_is_asked_of_diffusers(model, offloading, monkeypatch):
    """accelerate cannot copy from the CPU to the CPU, so that only the call is looked at here."""
    asked = []
    monkeypatch.setattr(
        diffusers.StableDiffusion3Pipeline,
        "enable_sequential_cpu_offload",
        lambda pipe, device: asked.append((device, here(pipe))),
    )
    pipe = load(model, "sequential-offload")
    assert asked == [(torch.device("cpu"), NETWORKS)] and not hasattr(pipe.transformer, "_hf_hook")
    pipe.unload()
    assert here(pipe) == []


def test_an_offloaded_pipeline_that_was_left_early_is_called_back(model, offloading, monkeypatch):
    pipe, calls = load(model, "model-offload"), []
    own = pipe.maybe_free_model_hooks
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: calls.append(None) or own())
    assert generate(pipe, Settings(PROMPT), should_stop=lambda: True) == []
    assert len(calls) == 1


def test_four_bits_are_asked_of_transformers(model, monkeypatch):
    """The call that a CPU cannot make: T5 alone, on the GPU, in bfloat16 where it is not in four bits."""
    asked, own = [], transformers.T5EncoderModel.from_pretrained

    def from_pretrained(folder, quantization_config=None, device_map=None, **more):
        asked.append((Path(folder).name, quantization_config, device_map, more["dtype"]))
        return own(folder, **more)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **how: how)
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cpu", 0.0, 8.0, None, 50.0, True)))
    card = plans(model, Budget("cuda", 14.75, 12.7, (7, 5), 50.0, True))
    for name in ("resident-nf4", "staged-nf4"):
        asked.clear()
        pipe = load(model, card[name])
        (found,) = asked
        assert found[0] == "text_encoder_3" and found[2:] == ({"": torch.device("cpu")}, torch.bfloat16)
        assert found[1] == {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16
        }  # fmt: skip
        assert draw(pipe).std() > 1 and ("text_encoder_3" in here(pipe)) == (name == "resident-nf4")
        pipe.unload()
        assert draw(pipe).std() > 1 and len(asked) == 1  # made once
