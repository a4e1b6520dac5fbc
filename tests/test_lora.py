"""Adapters on pipelines of random weights: by hand, in files of ours and of others, merged, removed, refused."""

import sys
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import lora
from helpers.generate import Settings, generate
from helpers.loading.download import LoadError
from helpers.pipelines import Model, load
from training.inversion import add_word, fit_word, save_word
from training.lora import Denoising, draw_levels, encode, fit

PROMPT = "a red boat by the sea"
KINDS = {"sd": "StableDiffusionPipeline", "sd3": "StableDiffusion3Pipeline"}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"sd": tiny.sd15, "sd3": tiny.sd3_folder}
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in made.items()}


def opened(folders, kind: str, stock: bool = False):
    """The pipeline of a kind, loaded by our loader or, for weights of its own, by diffusers."""
    if stock:
        pipe = getattr(diffusers, KINDS[kind]).from_pretrained(folders[kind])
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return load(Model("tiny", KINDS[kind], None, 2, 4.0, (PROMPT,), folder=str(folders[kind])))


@pytest.fixture
def make(folders):
    return partial(opened, folders)


def draw(pipe) -> np.ndarray:
    (image,) = generate(pipe, Settings(PROMPT, steps=2, guidance=3.0, seed=1, height=64, width=64), say=lambda _: None)
    return np.asarray(image, np.int16)


def network(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def stir(pipe, name: str, scale: float = 0.3) -> None:
    """Give the adapter weights as training would: B is no longer zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in network(pipe).named_parameters():
            if f"lora_B.{name}" in key:
                value.copy_(scale * torch.randn(value.shape, generator=generator))


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)) for _ in range(count)]


def predicted(pipe, seed: int = 0) -> torch.Tensor:
    """What the network answers to fixed noise and a fixed text, (1, C, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    net = network(pipe)
    x = torch.randn(1, net.config.in_channels, 8, 8, generator=generator)
    with torch.no_grad():
        if hasattr(pipe, "unet"):
            return net(x, torch.tensor([300]), pipe.encode_prompt([PROMPT], "cpu", 1, False)[0]).sample
        tokens, _, pooled, _ = pipe.encode_prompt([PROMPT], None, None, do_classifier_free_guidance=False)
        return net(x, tokens, pooled, torch.tensor([300.0])).sample


# By hand


@pytest.mark.parametrize("kind, scale, shift", [("sd", 0.18215, 0.0), ("sd3", 1.5, 0.06)])
def test_pictures_are_cut_at_their_centre_and_latents_scaled(make, kind, scale, shift):
    pipe, (picture,) = make(kind), pictures(1)  # 80 x 64 pixels
    assert (pipe.vae.config.scaling_factor, getattr(pipe.vae.config, "shift_factor", None) or 0.0) == (scale, shift)
    pixels = torch.from_numpy(np.asarray(picture)[:, 8:72].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = (pipe.vae.encode(pixels).latent_dist.mean - shift) * scale
    assert torch.allclose(encode(pipe, [picture], [PROMPT]).latents, wanted, atol=1e-4)


def test_levels_come_one_from_each_slice():
    generator = torch.Generator().manual_seed(0)
    pipe = SimpleNamespace(unet=None, scheduler=diffusers.DDIMScheduler())
    assert (draw_levels(pipe, 10, generator) // 100).tolist() == list(range(10))
    sigmas = draw_levels(SimpleNamespace(transformer=None), 4000, generator)
    normal = torch.logit(sigmas)
    assert abs(normal.mean()) < 0.01 and normal.std() == pytest.approx(1, abs=0.02) and sigmas.max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_has_r_times_in_plus_out_weights(make, kind):
    pipe = make(kind)
    before = draw(pipe)
    layers = {
        name: layer
        for name, layer in network(pipe).named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(lora.ATTENTION)
    }
    count = lora.attach(pipe, "mine", rank=3)
    assert count == 3 * sum(layer.in_features + layer.out_features for layer in layers.values()) > 0
    assert np.array_equal(draw(pipe), before)
    assert lora.attach(pipe, "more", rank=3, layers="all") > count and lora.names(pipe) == ["mine", "more"]


def test_the_product_is_added_to_the_layer(make):
    pipe = make("sd")
    lora.attach(pipe, "mine", rank=2, layers="all")
    stir(pipe, "mine")
    adapted = [m for m in pipe.unet.modules() if isinstance(m, torch.nn.Module) and "mine" in getattr(m, "lora_A", {})]
    assert {type(m.base_layer) for m in adapted} == {torch.nn.Linear, torch.nn.Conv2d}
    linear = next(m for m in adapted if isinstance(m.base_layer, torch.nn.Linear))
    down, up = linear.lora_A["mine"].weight, linear.lora_B["mine"].weight
    x = torch.randn(4, down.shape[1])
    assert torch.allclose(linear(x), linear.base_layer(x) + x @ down.T @ up.T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns_is_in_single_precision_also_beside_a_model_in_half(make, monkeypatch, kind):
    """As on a GPU: the loss scaler of mixed precision refuses gradients in float16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # a process keeps the precision that it began with
    pipe = make(kind, stock=True)
    examples = encode(pipe, pictures(), [PROMPT] * 3)
    examples = examples._replace(texts=tuple(text.half() for text in examples.texts))
    network(pipe).half()
    lora.attach(pipe, "first", rank=1)
    lora.attach(pipe, "mine", rank=2, layers="all")
    assert {value.dtype for key, value in network(pipe).named_parameters() if "lora_" in key} == {torch.float32}
    assert {value.dtype for key, value in network(pipe).named_parameters() if "lora_" not in key} == {torch.float16}
    assert all(np.isfinite(fit(pipe, examples, steps=2, batch_size=2)))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_the_network_learns_in_its_own_precision(make, kind):
    """Under the autocast that accelerate turns on, too, where frozen weights would be cast anew at every step."""
    pipe = make(kind)
    examples = encode(pipe, pictures(), [PROMPT] * 3)
    noise = torch.randn(examples.latents.shape, generator=torch.Generator().manual_seed(2))
    levels = torch.tensor([400, 600, 800]) if kind == "sd" else torch.tensor([0.4, 0.6, 0.8])
    losses = []
    for rough in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rough):
            losses.append(Denoising(pipe, [])(examples.latents, noise, levels, *examples.texts)["loss"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_learns_and_its_error_falls(make, kind):
    pipe = make(kind)
    examples = encode(pipe, pictures(), [PROMPT] * 3)
    lora.attach(pipe, "mine", rank=8, layers="all")
    learned = [value for value in network(pipe).parameters() if value.requires_grad]
    assert learned and all("lora_" in key for key, value in network(pipe).named_parameters() if value.requires_grad)
    frozen = {key: value.clone() for key, value in network(pipe).named_parameters() if not value.requires_grad}
    objective, generator = Denoising(pipe, learned), torch.Generator().manual_seed(2)
    noise = torch.randn(examples.latents.shape, generator=generator)
    levels = torch.tensor([400, 600, 800]) if kind == "sd" else torch.tensor([0.4, 0.6, 0.8])

    def error():
        with torch.no_grad():
            return objective(examples.latents, noise, levels, *examples.texts)["loss"].item()

    before = error()
    losses = fit(pipe, examples, steps=12, batch_size=3, learning_rate=2e-2)
    assert len(losses) == 12 and error() < 0.9 * before
    assert all(torch.equal(value, frozen[key]) for key, value in network(pipe).named_parameters() if key in frozen)


def test_the_same_seed_teaches_the_same(make):
    found = []
    for seed in (0, 0, 1):
        pipe = make("sd")
        lora.attach(pipe, "mine", rank=2)
        found.append(fit(pipe, encode(pipe, pictures(), [PROMPT] * 3), steps=4, batch_size=2, seed=seed))
    assert found[0] == found[1] != found[2]


def test_with_a_prior_each_batch_is_half_of_the_class(make):
    pipe, seen = make("sd"), []
    examples, prior = (encode(pipe, pictures(2), [text] * 2) for text in (PROMPT, "a blue house"))
    lora.attach(pipe, "mine", rank=2)
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    fit(pipe, examples, steps=2, prior=prior, batch_size=3)
    hook.remove()
    assert all(len(texts) == 6 for texts in seen) and len(seen) == 2
    for texts in seen:
        assert torch.equal(texts[:3], examples.texts[0][[0, 0, 0]]) and torch.equal(
            texts[3:], prior.texts[0][[0, 0, 0]]
        )


class Answers(torch.nn.Module):
    """A network that answers as it is told to."""

    dtype = torch.float32

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, noisy, *given):
        return SimpleNamespace(sample=self.answer(noisy, *given))


def test_what_is_to_be_predicted():
    """The noise for a UNet; for a flow the way from the picture to the noise, at 1000 times its sigma."""
    noise, picture = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DDIMScheduler()
    levels, sigmas, text = torch.tensor([10, 500, 900]), torch.tensor([0.2, 0.5, 0.9]), torch.zeros(3, 1)
    b = (1 - scheduler.alphas_cumprod[levels]).sqrt().view(-1, 1, 1, 1)
    unet = Answers(lambda noisy, t, text: noisy / b)
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler)
    assert Denoising(pipe, [])(0 * picture, noise, levels, text)["loss"] < 1e-8
    line, seen = sigmas.view(-1, 1, 1, 1), []
    pipe = SimpleNamespace(transformer=Answers(lambda noisy, text, pooled, t: seen.append(t) or noisy / line))
    assert Denoising(pipe, [])(0 * picture, noise, sigmas, text, text)["loss"] < 1e-8
    pipe = SimpleNamespace(transformer=Answers(lambda noisy, text, pooled, t: -noisy / (1 - line)))
    assert Denoising(pipe, [])(picture, 0 * noise, sigmas, text, text)["loss"] < 1e-8
    assert torch.equal(seen[0], 1000 * sigmas)


def test_a_loss_that_is_not_finite_leaves_the_adapter_as_it_was(make):
    pipe = make("sd")
    examples = encode(pipe, pictures(), [PROMPT] * 3)
    lora.attach(pipe, "mine", rank=2)
    before = {key: value.clone() for key, value in pipe.unet.named_parameters()}
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(pipe, examples, steps=8, learning_rate=1e30)
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.named_parameters())
    assert draw(pipe).std() > 1 and len(fit(pipe, examples, steps=2)) == 2


# Files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", lora.LAYERS)
def test_stock_diffusers_reads_the_file(make, tmp_path, kind, layers):
    pipe = make(kind)
    before = draw(pipe)
    lora.attach(pipe, "mine", rank=2, layers=layers)
    stir(pipe, "mine")
    mine = draw(pipe)
    path = lora.save(pipe, "mine", tmp_path / "new" / "mine.safetensors")
    assert np.abs(mine - before).mean() > 1 and [file.name for file in path.parent.iterdir()] == ["mine.safetensors"]
    stock = make(kind, stock=True)
    stock.load_lora_weights(path.parent, weight_name=path.name)
    assert np.abs(draw(stock) - mine).max() <= 1
    again = make(kind)
    lora.load(again, path, "again")
    assert np.abs(draw(again) - mine).max() <= 1


def test_an_adapter_of_another_program_is_what_its_numbers_say(make, tmp_path):
    """kohya's names, which have no dots, its up and down, and its alpha, which counts alpha / rank times."""
    pipe, other, weights, rank, alpha = make("sd"), make("sd"), {}, 2, 6.0
    generator = torch.Generator().manual_seed(3)
    parts = (("lora_unet", pipe.unet, ("to_q", "to_v", "to_out.0")), ("lora_te", pipe.text_encoder, ("q_proj", "fc1")))
    for prefix, part, ends in parts:
        for name, layer in part.named_modules():
            if not (isinstance(layer, torch.nn.Linear) and name.endswith(ends)):
                continue
            down = 0.2 * torch.randn(rank, layer.in_features, generator=generator)
            up = 0.2 * torch.randn(layer.out_features, rank, generator=generator)
            full = name if prefix == "lora_unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"{prefix}_{full.replace('.', '_')}"
            weights |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
            with torch.no_grad():
                layer.weight += alpha / rank * up @ down
    save_file(weights, tmp_path / "theirs.safetensors")
    before = predicted(other)
    lora.load(other, tmp_path / "theirs.safetensors", "theirs")
    assert torch.allclose(predicted(other), predicted(pipe), atol=1e-5)
    lora.save(other, "theirs", tmp_path / "ours.safetensors")  # alpha is inside, also for programs that ask for none
    again = make("sd", stock=True)
    again.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert torch.allclose(predicted(again), predicted(pipe), atol=1e-5)
    lora.remove(other, "theirs")
    assert torch.equal(predicted(other), before)


def test_peft_settings_in_a_files_header_count(make, tmp_path):
    """diffusers writes alpha there, not among the tensors; a pattern holds for some of the layers."""
    pipe = make("sd")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_v": 1})
    pipe.unet.add_adapter(config, "mine")
    stir(pipe, "mine")
    wanted = predicted(pipe)
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="mine")
    more = {"unet_lora_adapter_metadata": pipe.unet.peft_config["mine"].to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **more)
    other = make("sd")
    lora.load(other, tmp_path / "pytorch_lora_weights.safetensors", "theirs")
    assert torch.allclose(predicted(other), wanted, atol=1e-5)
    lora.save(pipe, "mine", tmp_path / "ours.safetensors")  # whose header says nothing
    again = make("sd", stock=True)
    again.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert torch.allclose(predicted(again), wanted, atol=1e-5)


def test_the_old_names_of_diffusers_are_read(make, tmp_path):
    pipe = make("sd")
    lora.attach(pipe, "mine", rank=2)
    stir(pipe, "mine")
    lora.save(pipe, "mine", tmp_path / "mine.safetensors")
    old = {}
    for key, value in load_file(tmp_path / "mine.safetensors").items():
        name = key.replace("lora_A", "down").replace("lora_B", "up").replace("to_out.0", "to_out")
        head, _, tail = name.rpartition(".to_")
        projection, end = tail.split(".", 1)
        old[f"{head}.processor.to_{projection}_lora.{end}"] = value
    save_file(old, tmp_path / "old.safetensors")
    other = make("sd")
    lora.load(other, tmp_path / "old.safetensors", "theirs")
    assert torch.allclose(predicted(other), predicted(pipe), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(make, kind):
    pipe = make(kind, stock=True)
    lora.attach(pipe, "mine", rank=2, layers="all")
    stir(pipe, "mine")
    pipe.set_adapters("mine", 0.5)
    apart = predicted(pipe)
    lora.merge(pipe)
    assert torch.allclose(predicted(pipe), apart, atol=1e-5) and lora.names(pipe) == []
    assert not any("lora" in key for key, _ in network(pipe).named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_removing_the_last_one_leaves_the_model_as_it_was(make, kind):
    pipe = make(kind)
    keys, before = list(network(pipe).state_dict()), predicted(pipe)
    for name in ("one", "two"):
        lora.attach(pipe, name, rank=2)
        stir(pipe, name)
    pipe.set_adapters(["one", "two"])
    both = predicted(pipe)
    lora.remove(pipe, "one")
    pipe.set_adapters("two")
    assert lora.names(pipe) == ["two"] and not torch.allclose(predicted(pipe), both)
    lora.remove(pipe, "two")
    assert list(network(pipe).state_dict()) == keys and torch.equal(predicted(pipe), before)


# A new word


def test_exactly_one_row_of_the_embedding_changes(make, tmp_path):
    pipe = make("sd")
    rows = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    others = {key: value.clone() for key, value in [*pipe.unet.state_dict().items(), *pipe.vae.state_dict().items()]}
    text = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items() if "token_embedding" not in k}
    number = add_word(pipe, "<mine>", "boat")
    start = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    boat = pipe.tokenizer.convert_tokens_to_ids("boat</w>")
    assert torch.equal(start[: len(rows)], rows) and torch.equal(start[number], rows[boat])
    fit_word(pipe, number, pictures(), ["a <mine> by the sea"] * 3, steps=3, batch_size=2)
    after = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert (after != start).any(dim=1).nonzero().flatten().tolist() == [number]
    now = [*pipe.unet.state_dict().items(), *pipe.vae.state_dict().items()]
    assert all(torch.equal(value, others[key]) for key, value in now)
    assert all(torch.equal(pipe.text_encoder.state_dict()[key], value) for key, value in text.items())
    save_word(pipe, "<mine>", tmp_path / "mine.safetensors")
    stock = make("sd", stock=True)
    stock.load_textual_inversion(tmp_path, weight_name="mine.safetensors")
    embeddings = [p.encode_prompt(["a <mine> in snow"], "cpu", 1, False)[0] for p in (pipe, stock)]
    assert torch.allclose(*embeddings, atol=1e-5)


def test_words_that_cannot_be_learned(make):
    pipe = make("sd")
    for word, like, sentence in (
        ("boat", "house", "has a token 'boat' already"),
        ("<new>", "lighthouse", "'lighthouse' is . tokens: start from a word that is one"),
    ):
        with pytest.raises(ValueError, match=sentence):
            add_word(pipe, word, like)
    number = add_word(pipe, "<new>", "boat")
    with pytest.raises(ValueError, match="A caption lacks the new word: 'a boat'"):
        fit_word(pipe, number, pictures(2), ["a <new>", "a boat"], steps=1)
    with pytest.raises(ValueError, match="no pictures to learn from"):
        fit_word(pipe, number, [], [], steps=1)


# Bad input


@pytest.mark.parametrize(
    "bad, sentence",
    [
        ({"rank": 0}, "The rank 0 is not a whole number from 1 to 1024"),
        ({"rank": 2.5}, "The rank 2.5 is not"),
        ({"rank": True}, "The rank True is not"),
        ({"layers": "every"}, "There is no choice of layers 'every': take one of attention, all"),
        ({"name": "a.b"}, "The name 'a.b' will not do for an adapter"),
        ({"name": "taken"}, "There is an adapter 'taken' already"),
    ],
)
def test_adapters_that_cannot_be_attached(make, bad, sentence):
    pipe = make("sd")
    lora.attach(pipe, "taken", rank=1)
    with pytest.raises(ValueError, match=sentence):
        lora.attach(pipe, **({"name": "new"} | bad))
    assert lora.names(pipe) == ["taken"]


def test_nothing_to_learn_from(make):
    pipe = make("sd")
    for given, captions, sentence in (
        ([], [], "There are no pictures to learn from"),
        (pictures(2), [PROMPT], "2 pictures came with 1 captions"),
    ):
        with pytest.raises(ValueError, match=sentence):
            encode(pipe, given, captions)
    examples = encode(pipe, pictures(1), [PROMPT])
    with pytest.raises(ValueError, match="There is no adapter to train: attach one first"):
        fit(pipe, examples, steps=1)
    lora.attach(pipe, "mine", rank=1)
    with pytest.raises(ValueError, match="0 steps of 4 pictures teach nothing"):
        fit(pipe, examples, steps=0)


def test_what_is_not_there_cannot_be_saved_merged_or_removed(make, tmp_path):
    pipe = make("sd")
    with pytest.raises(ValueError, match="There is no adapter to merge"):
        lora.merge(pipe)
    with pytest.raises(ValueError, match="There is no adapter 'new' here: attach or load one first"):
        lora.remove(pipe, "new")
    lora.attach(pipe, "mine", rank=1)
    with pytest.raises(ValueError, match="There is no adapter 'new' here, only mine"):
        lora.save(pipe, "new", tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match="call the file new.safetensors"):
        lora.save(pipe, "mine", tmp_path / "new.bin")
    assert list(tmp_path.iterdir()) == []
    planned = make("sd3")
    lora.attach(planned, "mine", rank=1)
    with pytest.raises(ValueError, match="leave the adapter attached"):
        lora.merge(planned)


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """Adapters that fit, one for each kind of pipeline, and many that do not."""
    tmp_path = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        pipe = opened(folders, kind)
        lora.attach(pipe, "mine", rank=2)
        lora.save(pipe, "mine", tmp_path / f"of_{kind}.safetensors")
    whole = (tmp_path / "of_sd.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "start.safetensors").write_bytes(whole[:5])
    torch.save({}, tmp_path / "pickle.ckpt")
    torch.save({}, tmp_path / "pickle.safetensors")
    save_file({"unet.conv_in.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "of_sd.safetensors")
    wide = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file(
        {f"{key.replace('attentions.0', 'attentions.7')}": v for key, v in weights.items()}, tmp_path / "xl.safetensors"
    )
    kohya = {f"lora_unet_down_blocks_0_{x}.weight": torch.zeros(2, 2) for x in ("lora_down", "lora_up")}
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file({key: v for key, v in weights.items() if "lora_A" in key}, tmp_path / "half.safetensors")
    first = min(weights).partition(".lora_")[0]
    save_file(weights | {f"{first}.lora_magnitude_vector.weight": torch.zeros(16)}, tmp_path / "dora.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "kind, name, sentence",
    [
        (
            "sd",
            "of_sd3",
            "of_sd3.safetensors is for another kind of model: it adapts 'transformer', here there is 'unet'.",
        ),
        ("sd3", "of_sd", "it adapts 'unet', here there is 'transformer'"),
        ("sd3", "kohya", "is for another kind of model: it adapts 'lora_unet_down_blocks_0"),
        ("sd", "cut", "cut.safetensors is damaged or not complete: get it again."),
        ("sd", "start", "is damaged or not complete"),
        ("sd", "pickle", "is damaged or not complete"),
        ("sd", "pickle.ckpt", "can run any code when they are opened: get the adapter as .safetensors"),
        ("sd", "nothing", "There is no file nothing.safetensors"),
        ("sd", "model", "holds no LoRA: its first tensor is 'unet.conv_in.weight'"),
        ("sd", "wide", "is for another model: its layer 'down_blocks.*' is 32 wide, here 16"),
        ("sd", "xl", "is for another model: this one has no layer 'down_blocks.*attentions.7"),
        ("sd", "half", "half.safetensors is not complete: the layer 'down_blocks.* has one matrix of two"),
        ("sd", "dora", "dora.safetensors is no plain LoRA: its layers have 'magnitude_vector'"),
    ],
)
def test_files_that_do_not_fit_leave_the_pipeline_as_it_was(make, files, kind, name, sentence):
    pipe = make(kind)
    keys, before = list(network(pipe).state_dict()), predicted(pipe)
    path = files / (name if "." in name else f"{name}.safetensors")
    with pytest.raises(LoadError, match=sentence) as found:
        lora.load(pipe, path, "other")
    assert "\n" not in str(found.value) and len(str(found.value)) < 220
    assert list(network(pipe).state_dict()) == keys and torch.equal(predicted(pipe), before)
    lora.load(pipe, files / f"of_{kind}.safetensors", "other")  # the name is free, the pipeline works
    assert lora.names(pipe) == ["other"]


def test_an_interrupt_while_loading_leaves_nothing_half_attached(make, files, monkeypatch):
    pipe = make("sd")
    keys, before = list(pipe.unet.state_dict()), predicted(pipe)

    def interrupt(*_, **__):
        assert "lora" in "".join(pipe.unet.state_dict())  # half of it is there
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe), "load_lora_into_text_encoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lora.load(pipe, files / "of_sd.safetensors", "mine")
    assert lora.names(pipe) == [] and list(pipe.unet.state_dict()) == keys and torch.equal(predicted(pipe), before)


def test_a_torchao_that_peft_refuses(make, tmp_path, monkeypatch):
    """As on Colab: the sentence says what to do, and once it is done it works without a restart."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").write_text("")
    info = tmp_path / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    pipe = make("sd")
    with monkeypatch.context() as there:
        there.syspath_prepend(tmp_path)
        lora.is_torchao_available.cache_clear()
        with pytest.raises(LoadError, match="run `pip uninstall -y torchao`, then this again"):
            lora.attach(pipe, "mine", rank=1)
        with pytest.raises(LoadError, match="too old for peft"):
            lora.load(pipe, tmp_path / "any.safetensors", "mine")
        assert lora.names(pipe) == []
    assert str(tmp_path) not in sys.path
    assert lora.attach(pipe, "mine", rank=1) > 0
