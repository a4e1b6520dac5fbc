"""Nothing survives an interrupt or an error: what the plan says is free is free while the traceback is still held."""

import gc
import threading
import weakref

import pytest
import tiny
import torch

from helpers.generate import Settings, generate
from helpers.loading import sd3, versions
from helpers.loading.machine import letting_go
from helpers.loading.plan import plans
from helpers.loading.registry import Model
from helpers.memory import Budget
from helpers.pipelines import LoadError, load

PROMPT = "a red boat by the sea"
SMALL = Budget("cpu", 0.0, 0.3, None, 50.0)  # so little RAM that the plans are in float16, and networks leave
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.sd3_folder(tmp_path_factory.mktemp("sd3"))
    return Model("tiny3", "StableDiffusion3Pipeline", None, 2, 4.0, (PROMPT,), folder=str(folder))


@pytest.fixture(autouse=True)
def no_collector():
    """What only Python's garbage collector would find counts as still there."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def staged(model):
    return load(model, plans(model, SMALL)["staged"])


def interrupted(error, made):
    """A forward that makes a tensor of its own and is interrupted; `made` gets a weak reference to it."""

    def forward(*given, **more):
        activations = torch.ones(1000)
        made.append(weakref.ref(activations))
        raise error

    return forward


def here(pipe):
    return {name for name, network in pipe.stage.networks.items() if network.here}


ERRORS = [KeyboardInterrupt(), RuntimeError("CUDA error: an illegal memory access was encountered")]


@pytest.mark.parametrize("error", ERRORS, ids=["interrupt", "error"])
@pytest.mark.parametrize("called", ["generate", "as diffusers documents it"])
@pytest.mark.parametrize("stage", ["text_encoder_2", "text_encoder_3"])
def test_while_encoding(staged, error, called, stage):
    made, network = [], getattr(staged, stage)
    own, network._old_forward = network._old_forward, interrupted(error, made)
    with pytest.raises(type(error)):
        if called == "generate":
            generate(staged, Settings(PROMPT))
        else:
            staged(PROMPT, num_inference_steps=1)
    assert here(staged) == set() and made[0]() is None
    network._old_forward = own
    assert len(generate(staged, Settings(PROMPT))) == 1


@pytest.mark.parametrize("error", ERRORS, ids=["interrupt", "error"])
@pytest.mark.parametrize("stage", ["text_encoder_3", "transformer", "vae"])
def test_while_a_network_comes(model, staged, monkeypatch, error, stage):
    """Half of its weights are copies by then."""
    own, copies = sd3.Network._dtype, []

    def dtype(network, key, tensor):
        if network.name == stage:
            if len(copies) == 3:
                raise error
            copies.append([one for name, one in network._tensors() if name == key][0])
        return own(network, key, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(sd3.Network, "_dtype", dtype)
        with pytest.raises(type(error)):
            generate(staged, Settings(PROMPT))
    network = staged.stage.networks[stage]
    assert len(copies) == 3 and stage not in here(staged)
    assert all(
        one.data_ptr() == network._files[key].data_ptr() for key, one in network._tensors() if key in network._files
    )
    assert len(generate(staged, Settings(PROMPT))) == 1


@pytest.mark.parametrize("error", ERRORS, ids=["interrupt", "error"])
@pytest.mark.parametrize("stage", ["step", "decode"])
def test_while_drawing(staged, error, stage):
    made, seen = [], []
    part = staged.transformer.proj_out if stage == "step" else staged.vae.decoder.conv_out
    own, part.forward = part.forward, interrupted(error, made)
    with pytest.raises(type(error)) as caught:
        generate(staged, Settings(PROMPT), on_step=lambda step, steps, latents: seen.append(weakref.ref(latents)))
    assert caught.tb is not None and made[0]() is None
    assert len(seen) == (0 if stage == "step" else 2)
    assert [one() is None for one in seen] == ([] if stage == "step" else [True, staged.kept_latents is None])
    part.forward = own
    assert len(generate(staged, Settings(PROMPT))) == 1


def test_an_error_in_a_callback(staged):
    seen = []

    def on_step(step, steps, latents):
        seen.append(weakref.ref(latents))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(staged, Settings(PROMPT), on_step=on_step)
    assert seen[0]() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")], ids=["interrupt", "error"])
def test_a_failed_load(model, monkeypatch, error):
    opened, own = [], sd3.open_network

    def open_network(cls, folder):
        if folder.name == "vae":
            raise error
        network, files = own(cls, folder)
        opened.append(weakref.ref(network))
        return network, files

    monkeypatch.setattr(sd3, "open_network", open_network)
    with pytest.raises((KeyboardInterrupt, LoadError)):
        load(model)
    gc.collect()  # networks have circles of their own; the traceback holds none of them
    assert len(opened) == 4 and not [one for one in opened if one() is not None]


def test_torchs_default_dtype_is_restored(model, monkeypatch, tmp_path):
    """diffusers sets it while it builds a network, and an interrupt then leaves it so."""

    def broken(*_, **__):
        torch.set_default_dtype(torch.float16)
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", broken)
    monkeypatch.setattr(sd3, "open_network", broken)
    small = Model("tiny", "StableDiffusionPipeline", None, 2, 4.0, (PROMPT,), folder=str(tiny.sd15(tmp_path)))
    for one in (small, model):
        with pytest.raises(KeyboardInterrupt):
            load(one)
        assert torch.get_default_dtype() == torch.float32


def test_frames_are_emptied_along_the_whole_chain():
    made = []

    def first():
        large = torch.ones(10)
        made.append(weakref.ref(large))
        raise ValueError

    def second():
        large = torch.ones(10)
        made.append(weakref.ref(large))
        try:
            first()
        except ValueError as error:
            raise KeyError from error

    with pytest.raises(KeyError) as caught, letting_go():
        second()
    assert caught.value.__cause__ is not None and [one() for one in made] == [None, None]


def test_reading_is_shown(model, monkeypatch, capsys):
    monkeypatch.setattr(sd3, "SLOW_BYTES", 0)
    monkeypatch.setattr(sd3, "watched", lambda: True)
    generate(load(model, plans(model, SMALL)["staged"]), Settings(PROMPT))
    shown = capsys.readouterr().err
    assert [f"reading {name}:" in shown for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")] == [
        True
    ] * 4
    monkeypatch.setattr(sd3, "watched", lambda: False)
    generate(load(model, plans(model, SMALL)["staged"]), Settings(PROMPT))
    assert "reading" not in capsys.readouterr().err


def test_a_bar_is_for_those_who_watch(monkeypatch):
    monkeypatch.setattr(versions, "can_ask", lambda: False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert not versions.watched()
    monkeypatch.setattr(versions, "can_ask", lambda: True)
    assert versions.watched()


@pytest.mark.parametrize("name", ["resident", "staged"])
def test_two_threads_draw_one_after_the_other(model, name):
    pipe, inside, most, done = load(model, name), [], [], []

    def on_step(*_):
        inside.append(None)
        most.append(len(inside))
        threading.Event().wait(0.05)  # time for the other one to come in
        inside.pop()

    def draw(seed):
        done.append((seed, generate(pipe, Settings(PROMPT, seed=seed), on_step=on_step)[0].tobytes()))

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(done) == 2
    assert all(generate(pipe, Settings(PROMPT, seed=seed))[0].tobytes() == drawn for seed, drawn in done)
