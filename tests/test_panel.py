import sys
import threading
import types

import ipywidgets
import pytest
import tiny

from helpers import images, preview
from helpers.generate import Settings, generate
from helpers.panel import prompt_panel
from helpers.pipelines import Model, load

PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 3, 4.0, (PROMPT,), folder=str(folder)))


@pytest.fixture
def panel(pipe, tmp_path):
    return prompt_panel(pipe, folder=tmp_path)


def click_and_wait(panel):
    panel.go.click()
    panel.wait(60)
    assert not panel.go.disabled and panel.stop.disabled


def test_it_shows_a_picture_from_the_start(panel, pipe):
    assert panel.picture.tobytes() == generate(pipe, Settings(PROMPT))[0].tobytes()
    assert bytes(panel.image.value).startswith(b"\x89PNG") and panel.image.width == "256"
    assert "seed 0, 3 steps, guidance scale 4." in panel.message.value


@pytest.mark.parametrize("threaded", [True, False])
def test_generate_draws_what_the_controls_say(pipe, threaded):
    panel = prompt_panel(pipe, threaded=threaded)
    panel.prompt.value, panel.negative_prompt.value, panel.seed.value = "a blue house", "tree", " 11 "
    panel.steps.value, panel.guidance.value = 2, 6.5
    before = panel.image.value
    click_and_wait(panel)
    assert panel.picture.info["settings"] == Settings(
        "a blue house", "tree", steps=2, guidance=6.5, seed=11, height=64, width=64, scheduler="PNDMScheduler"
    )
    assert panel.image.value != before
    assert (panel.bar.value, panel.bar.max) == (panel.pipe.num_timesteps,) * 2


@pytest.mark.parametrize(
    "control, value, said",
    [
        ("prompt", "   ", "The prompt is empty"),
        ("seed", "abc", "The seed &#x27;abc&#x27; is not a whole number"),
        ("seed", "<script>alert(1)</script>", "&lt;script&gt;"),
        ("seed", "-1", "is not a whole number from 0"),
        ("seed", "", "is not a whole number"),
    ],
)
def test_wrong_input_is_one_sentence_and_the_panel_goes_on(panel, control, value, said):
    first, good = panel.picture, getattr(panel, control).value
    getattr(panel, control).value = value
    click_and_wait(panel)
    assert said in panel.message.value and panel.message.value.count(". ") == 0
    assert "<script" not in panel.message.value and "\n" not in panel.message.value
    assert panel.picture is first and isinstance(panel.error, ValueError)
    getattr(panel, control).value = good
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value and panel.error is None


@pytest.mark.parametrize(
    "settings, said",
    [
        (Settings(PROMPT, steps=0), "The steps &#x27;0&#x27;"),
        (Settings(PROMPT, guidance=-1), "The guidance"),
        (Settings(PROMPT, height=65), "not divisible by 8"),
    ],
)
def test_run_takes_settings_and_never_raises(panel, settings, said):
    assert panel.run(settings) is None
    assert said in panel.message.value
    assert panel.run() is panel.picture


def test_sliders_keep_to_what_can_be_drawn(panel):
    panel.steps.value, panel.guidance.value = 0, -3
    assert (panel.steps.value, panel.guidance.value) == (1, 0)


def test_unknown_words_are_named_and_escaped(panel, capsys):
    panel.prompt.value = "a red boat <script>alert(1)</script>"
    click_and_wait(panel)
    assert "never seen these words of the prompt: script, alert" in panel.message.value
    assert "<script" not in panel.message.value
    assert capsys.readouterr().out == ""  # a thread must not print: the page would show it anywhere


def test_a_strange_error_is_one_escaped_sentence(panel, pipe, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("<b>first</b> line\nsecond line")

    monkeypatch.setattr(type(pipe), "encode_prompt", broken)
    click_and_wait(panel)
    assert "&lt;b&gt;first&lt;/b&gt; line." in panel.message.value and "second" not in panel.message.value
    assert str(panel.error).endswith("second line")


def watch(pipe, monkeypatch, at_step):
    """Calls `at_step(n)` in the drawing thread as the denoiser is called for the n-th time; the count so far."""
    calls, forward = [], pipe.unet.forward

    def counted(*args, **more):
        calls.append(None)
        at_step(len(calls))
        return forward(*args, **more)

    monkeypatch.setattr(pipe.unet, "forward", counted)
    return calls


def test_stop_is_heard_within_one_step_and_a_second_click_is_ignored(pipe, monkeypatch):
    panel = prompt_panel(pipe, threaded=True)
    reached, go_on = threading.Event(), threading.Event()

    def at_step(n):
        if n == 4:
            reached.set()
            assert go_on.wait(60)

    calls = watch(pipe, monkeypatch, at_step)
    first = panel.picture
    panel.steps.value = 40
    panel.go.click()
    assert reached.wait(60)
    assert panel.go.disabled and not panel.stop.disabled
    running = panel._thread
    panel.go.click()
    assert panel._thread is running and panel.run() is None
    panel.stop.click()
    go_on.set()
    panel.wait(60)
    assert len(calls) == 4
    assert "Stopped" in panel.message.value and panel.picture is first
    panel.steps.value = 2
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


def test_an_interrupt_ends_a_run_without_threads(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    panel = prompt_panel(pipe)
    assert panel.stop.disabled and "Interrupt execution" in panel.stop.tooltip

    def at_step(n):
        if n == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch(pipe, patch, at_step)
        click_and_wait(panel)
    assert "Stopped" in panel.message.value
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


@pytest.mark.parametrize("interrupted", [False, True])
def test_previews_while_it_draws_then_the_latest_picture(pipe, monkeypatch, interrupted):
    panel = prompt_panel(pipe, threaded=False)
    monkeypatch.setattr(preview, "SHARE", 1e9)  # one at each step but the first, when no time has passed, and the last
    first, shown = bytes(panel.image.value), []
    panel.image.observe(lambda change: shown.append(bytes(change["new"])), "value")

    def at_step(n):
        if n == 3 and interrupted:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch(pipe, patch, at_step)
        panel.seed.value = "1"
        click_and_wait(panel)
    previews, last = shown[:-1], shown[-1]
    assert len(set(previews)) == (1 if interrupted else pipe.num_timesteps - 2)
    assert all(picture.startswith(b"\x89PNG") for picture in previews)
    assert (last == first) == interrupted
    assert panel.progress.value == "" and panel.image.width == "256"


def test_dice(panel):
    panel.dice.click()
    assert panel.seed.value != "0"
    click_and_wait(panel)
    assert panel.picture.info["settings"].seed == int(panel.seed.value)


def test_save_keeps_the_settings(panel, tmp_path):
    panel.seed.value = "3"  # not drawn yet, so not what is saved
    panel.save.click()
    (saved,) = tmp_path.glob("*.png")
    assert saved.name in panel.message.value
    assert images.settings(saved) == panel.picture.info["settings"] and images.settings(saved).seed == 0


def test_a_folder_that_cannot_be_written_is_one_sentence(pipe, tmp_path):
    (tmp_path / "file").touch()
    panel = prompt_panel(pipe, folder=tmp_path / "file")
    panel.save.click()
    assert "The picture was not saved" in panel.message.value and "Errno" not in panel.message.value
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


def test_it_uses_core_widgets_only(panel):
    def everything(widget):
        yield type(widget).__name__
        for child in getattr(widget, "children", ()):
            yield from everything(child)

    assert set(everything(panel.box)) <= set(
        "VBox HBox Text IntSlider FloatSlider Button Image HTML IntProgress".split()
    )
    assert isinstance(panel.box, ipywidgets.VBox)
