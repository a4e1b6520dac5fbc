import functools
import io
import json
import sys
import threading
import types
from base64 import b64decode
from datetime import UTC, datetime

import ipywidgets
import numpy as np
import pytest
import tiny
from PIL import Image, ImageChops, PngImagePlugin

from helpers import images, preview
from helpers.controls import tokens
from helpers.generate import Settings, generate, partial, resolve
from helpers.panel import prompt_panel
from helpers.pipelines import Model, load

PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 3, 4.0, (PROMPT,), folder=str(folder)))


@pytest.fixture(scope="module", autouse=True)
def one_fit():
    """Each panel fits its own preview otherwise, which takes longer than all it draws here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "fit_rgb", functools.cache(preview.fit_rgb))
        yield


@pytest.fixture
def panel(pipe, tmp_path):
    return prompt_panel(pipe, folder=tmp_path)


def click_and_wait(panel):
    later(panel)
    panel.go.click()
    panel.wait(60)
    assert not panel.go.disabled and panel.stop.disabled


def later(panel):
    """As if some time had passed since the latest run."""
    panel._ended = 0.0


def test_it_shows_a_picture_from_the_start(panel, pipe):
    assert panel.picture.tobytes() == generate(pipe, Settings(PROMPT))[0].tobytes()
    assert bytes(panel.image.value).startswith(b"\x89PNG") and panel.image.width == "256"
    assert "seed 0, 3 steps, guidance scale 4;" in panel.message.value


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
    assert "Stopped after step 4" in panel.message.value and panel.picture is not first
    assert panel.picture.info["stopped_after"] == 4
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

    first = panel.picture
    with monkeypatch.context() as patch:
        watch(pipe, patch, at_step)
        later(panel)
        panel.go.click()
    assert "Stopped after step 1" in panel.message.value and panel.picture is not first
    assert [run.pictures[0] for run in panel.history.runs] == [panel.picture, first]
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


def test_clicks_that_waited_for_a_run_without_threads_start_none(pipe):
    panel = prompt_panel(pipe, threaded=False)
    later(panel)
    for _ in range(10):  # the kernel hears nine of them when the first one's run is over
        panel.go.click()
    assert len(panel.history.runs) == 2


def test_an_interrupt_before_the_first_step_leaves_the_picture(pipe, monkeypatch):
    panel = prompt_panel(pipe, threaded=False)
    first, shown = panel.picture, panel.image.value
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "encode_prompt", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert panel.run() is None
    assert "the one from before" in panel.message.value
    assert panel.picture is first and panel.image.value == shown and len(panel.history.runs) == 1


def test_partial_is_what_the_run_was_heading_for(pipe):
    """Almost at the end the guess is almost the picture, which the settings inside draw whole."""
    settings = Settings(PROMPT, steps=20, seed=4, count=2, scheduler="DDIMScheduler")
    whole = generate(pipe, settings)
    assert partial(pipe) == []
    steps = iter(range(1, 21))
    assert generate(pipe, settings, should_stop=lambda: next(steps) == 19) == []
    stopped = partial(pipe)
    assert [one.info["stopped_after"] for one in stopped] == [19, 19]
    assert [one.info["settings"] for one in stopped] == [one.info["settings"] for one in whole]
    for one, other in zip(stopped, whole, strict=True):
        assert 0 < max(high for _, high in difference(one, other)) < 40
    generate(pipe, Settings(PROMPT))
    assert partial(pipe) == []


def difference(one, other):
    return ImageChops.difference(one, other).getextrema()


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
    for picture in previews:  # no blocks: hardly any pixel is as the one beside it
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        assert pixels.shape == (192, 192, 3) and (pixels[:, 1:] == pixels[:, :-1]).all(-1).mean() < 0.5
    assert last != first
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


def test_a_batch_is_one_run(pipe, tmp_path):
    panel = prompt_panel(pipe, folder=tmp_path)
    panel.count.value, panel.seed.value, panel.width.value = 3, "5", 96
    click_and_wait(panel)
    alone = Settings(PROMPT, steps=3, guidance=4.0, seed=7, width=96)
    assert [picture.info["settings"].seed for picture in panel.pictures] == [5, 6, 7]
    assert max(high for _, high in difference(panel.pictures[2], generate(pipe, alone)[0])) <= 1
    assert "seeds 5 to 7" in panel.message.value
    panel.save.click()
    assert sorted(images.settings(file).seed for file in tmp_path.iterdir()) == [5, 6, 7]
    sheet = downloaded(panel)
    assert images.settings(sheet) == panel.history.runs[0].settings and images.settings(sheet).count == 3
    assert Image.open(sheet).width > 3 * 96


def downloaded(panel, name="a-red-boat-by-the-sea-5"):
    """The file behind the link."""
    start, file = panel.download.value.split("base64,")
    assert start.startswith(f'<a download="{name}.png" ') and start.endswith(' href="data:image/png;')
    return io.BytesIO(b64decode(file.split('"')[0]))


def test_a_thumbnail_brings_everything_back(panel):
    first = panel.history.runs[0]
    panel.prompt.value, panel.negative_prompt.value, panel.seed.value = "a <b>blue</b> house", "tree", "9"
    panel.steps.value, panel.guidance.value, panel.count.value, panel.height.value = 2, 6.5, 2, 32
    panel.scheduler.value = "DDIMScheduler"
    panel.set_start(Image.new("RGB", (50, 80), "red"))
    panel.strength.value = 0.6
    click_and_wait(panel)
    second = panel.history.runs[0]
    controls = panel.settings()
    panel.history.box.children[2].click()
    assert panel.picture is first.pictures[0] and panel.start is None
    assert resolve(panel.pipe, panel.settings()) == first.settings
    panel.random.value = True
    panel.history.box.children[1].click()
    assert panel.settings() == controls and panel.start is second.start and not panel.random.value
    assert panel.pictures == list(second.pictures) and "seeds 9 to 10" in panel.message.value
    assert "<b>" not in panel.message.value + panel.history.box.children[0].value
    assert second.pictures[0].info["settings"].strength == 0.6


def test_the_last_twelve(panel):
    for seed in range(1, 14):
        panel.run(Settings(PROMPT, seed=seed, steps=1, scheduler="DDIMScheduler", height=32, width=32))
    buttons = panel.history.box.children[1:]
    assert [button.description for button in buttons] == [f"seed {seed}" for seed in range(13, 1, -1)]
    assert len(panel.history.runs) == 12 == panel.history.box.children[0].value.count("data:image/png")
    panel.random.value = True
    buttons[-1].click()
    assert panel.picture.info["settings"].seed == 2 and panel.seed.value == "2"


def test_during_a_run_a_thumbnail_gives_the_settings_alone(pipe, monkeypatch):
    panel = prompt_panel(pipe, threaded=True)
    reached, go_on = threading.Event(), threading.Event()

    def at_step(n):
        reached.set()
        assert go_on.wait(60)

    watch(pipe, monkeypatch, at_step)
    panel.seed.value = "3"
    panel.go.click()
    assert reached.wait(60)
    first = panel.picture
    panel.history.box.children[1].click()
    assert panel.seed.value == "0" and panel.picture is first and "Back again" not in panel.message.value
    panel.box.close()  # and the panel is closed
    go_on.set()
    panel.wait(60)
    assert panel.picture.info["settings"].seed == 3 and panel.error is None


def test_a_new_panel_stops_the_run_of_the_old_one(pipe, monkeypatch):
    """As its cell runs again: nothing could stop it any more."""
    old = prompt_panel(pipe, threaded=True)
    reached, go_on = threading.Event(), threading.Event()

    def at_step(n):
        reached.set()
        assert go_on.wait(60)

    with monkeypatch.context() as patch:
        calls = watch(pipe, patch, at_step)
        old.steps.value = 40
        old.go.click()
        assert reached.wait(60)
        threading.Timer(0.2, go_on.set).start()
        new = prompt_panel(pipe)
        old.wait(60)
    assert len(calls) < 20 and "Stopped" in old.message.value
    assert new.picture is not None and new.error is None


def test_seeds(panel, monkeypatch):
    numbers = iter([11, 12])
    monkeypatch.setattr("helpers.controls.random.randrange", lambda end: next(numbers))
    click_and_wait(panel)
    click_and_wait(panel)
    assert panel.seed.value == "0" and [run.settings.seed for run in panel.history.runs] == [0, 0, 0]
    panel.random.value = True
    click_and_wait(panel)
    click_and_wait(panel)
    assert [run.settings.seed for run in panel.history.runs[:2]] == [12, 11]
    assert panel.seed.value == "12" and "seed 12," in panel.message.value


def test_tokens_are_counted_as_they_are_typed(panel):
    assert "6 of 75 tokens" in panel.prompt_note.value and "0 of 75 tokens" in panel.negative_note.value
    panel.prompt.value = "a red <i>glorbix</i>" + " boat" * 80
    assert "of 75 tokens" in panel.prompt_note.value and "0 of 75" not in panel.prompt_note.value
    assert "does not see its end" in panel.prompt_note.value and "glorbix" in panel.prompt_note.value
    assert "<i>" not in panel.prompt_note.value
    panel.prompt.value, panel.negative_prompt.value = PROMPT, "a red glorbix"
    assert (
        "glorbix" not in panel.prompt_note.value
        and "words of the negative prompt: glorbix" in panel.negative_note.value
    )
    panel.prompt.value = "x" * 10_000
    assert len(panel.prompt_note.value) < 2000


def test_the_count_is_what_the_model_reads(pipe):
    read = pipe.tokenizer("a red boat" + " boat" * 100, truncation=True)["input_ids"]
    assert tokens(pipe, "a red boat" + " boat" * 100) == (103, len(read) - 2)
    assert tokens(pipe, "") == (0, 75)


def test_counting_leaves_the_tokenizer_of_the_pipeline_alone(panel):
    """A thread draws meanwhile, and a tokenizer that cuts off for one cuts off for all."""
    assert panel._reader.tokenizer is not panel.pipe.tokenizer


def test_examples_can_be_chosen_again(panel):
    panel.prompt.value = ""
    panel.examples.value = PROMPT
    assert panel.prompt.value == PROMPT and panel.examples.index == 0


def upload(control, name, content):
    """As a browser does it, which is not the same for ipywidgets 7 and 8."""
    if ipywidgets.__version__.startswith("7."):
        control.set_trait("value", {name: {"metadata": {"name": name}, "content": content}})
    else:
        about = {"name": name, "type": "", "size": len(content), "last_modified": datetime.now(UTC)}
        control.value = ({**about, "content": memoryview(content)},)


def png(picture, **texts):
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    picture.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def test_a_starting_picture(panel):
    picture = Image.new("RGB", (300, 200), "red")
    upload(panel.start_file, "red.png", png(picture))
    assert panel.start.size == (300, 200) and panel.settings().strength == 0.8
    panel.strength.value, panel.steps.value = 0.5, 6
    click_and_wait(panel)
    expected = generate(panel.pipe, Settings(PROMPT, steps=6, guidance=4.0, strength=0.5), panel.start)[0]
    assert panel.picture.tobytes() == expected.tobytes()
    panel.start_drop.click()
    assert panel.start is None and panel.settings().strength is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no picture", "The file is not a picture that can be opened"),
        (b"", "The file is not a picture that can be opened"),
        (png(Image.effect_noise((64, 64), 50))[:900], "The file is not a picture that can be opened"),
        (png(Image.new("1", (10_000, 10_000))), "10000 x 10000 pixels: make it smaller"),
    ],
    ids=["text", "nothing", "cut off", "100 megapixels"],
)
def test_uploads_that_cannot_be_started_from(panel, content, said):
    upload(panel.start_file, "a.png", content)
    assert said in panel.message.value and 'role="alert"' in panel.message.value and panel.start is None
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


WEB_UI = (
    "a blue house\nNegative prompt: tree\nSteps: 7, Sampler: DDIM, CFG scale: 3.5, Seed: 12, Size: 96x64, Clip skip: 2"
)


def test_settings_of_other_tools_and_of_our_own_files(panel):
    upload(panel.load_file, "web.png", png(Image.new("RGB", (8, 8)), parameters=WEB_UI))
    expected = Settings("a blue house", "tree", 7, 3.5, 12, 64, 96, "DDIMScheduler")
    assert resolve(panel.pipe, panel.settings()) == expected
    assert "web.png has settings inside" in panel.message.value and "Clip skip" in panel.message.value
    click_and_wait(panel)
    assert panel.picture.info["settings"] == expected
    panel.prompt.value, panel.seed.value = "x", "1"
    upload(panel.load_file, "own.png", downloaded(panel, "a-blue-house-12").getvalue())
    assert resolve(panel.pipe, panel.settings()) == expected


@pytest.mark.parametrize(
    ("texts", "said", "changed"),
    [
        ({}, "has no settings inside", {}),
        ({"parameters": "<b>x</b>"}, "has no settings inside", {}),
        ({"parameters": "a house\nSteps: 5, Size: 1000000x1000000"}, "The width &#x27;1000000&#x27;", {"steps": 5}),
        ({"settings": json.dumps({"settings": {"prompt": "a house", "steps": {"a": [1]}, "seed": 3, "what": 1}})},
         "Left out: The steps", {"seed": 3}),
        ({"settings": json.dumps({"settings": {"prompt": "a house", "count": 10**9, "scheduler": "<i>" * 999}})},
         "&lt;i&gt;", {}),
        ({"settings": json.dumps({"settings": {"prompt": "a house", "strength": 5, "guidance": "NaN"}})},
         "The strength is not", {}),
        ({"settings": '{"settings": {"prompt": "a", "x": ' + "[" * 50_000}, "has no settings inside", {}),
        ({"settings": json.dumps({"settings": {"prompt": " \n"}})}, "The prompt is empty", {}),
        ({"settings": json.dumps({"settings": {"prompt": "a house\0\x1b\u202e" + "x" * 10_000}})}, "has settings", {}),
    ],
    ids=["none", "text", "million", "types", "tags", "numbers", "nested", "empty", "control characters"],
)  # fmt: skip
def test_hostile_settings(panel, texts, said, changed):
    before = resolve(panel.pipe, panel.settings())
    upload(panel.load_file, "<u>x</u>.png", png(Image.new("RGB", (8, 8)), **texts))
    assert said in panel.message.value and "<i>" not in panel.message.value and "<u>" not in panel.message.value
    assert len(panel.message.value) < 4000
    after = resolve(panel.pipe, panel.settings())
    for name, value in vars(after).items():
        assert name == "prompt" or value == changed.get(name, getattr(before, name))
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value


def test_settings_of_another_model(panel):
    record = {"settings": {"prompt": "a house", "steps": 60}, "model": "<b>big</b>"}
    upload(panel.load_file, "a.png", png(Image.new("RGB", (8, 8)), settings=json.dumps(record)))
    assert "drawn with &lt;b&gt;big&lt;/b&gt;" in panel.message.value
    assert panel.steps.value == 60  # beyond the slider


@pytest.mark.parametrize("prompt", ["\0\x07\x1b[31m", "a boat\u202e\ufeff\u200b", "x" * 10_000, "🚀" * 500])
def test_strange_prompts_are_drawn(panel, prompt):
    panel.prompt.value = prompt
    click_and_wait(panel)
    assert "Drawn in" in panel.message.value and len(panel.message.value) < 2000
    assert images.settings(io.BytesIO(images.encoded(panel.picture))).prompt == prompt


def test_it_uses_core_widgets_only(panel):
    def everything(widget):
        yield type(widget).__name__
        for child in getattr(widget, "children", ()):
            yield from everything(child)

    assert set(everything(panel.box)) <= set(
        "VBox HBox Text Textarea IntSlider FloatSlider Dropdown Checkbox".split()
        + "Button FileUpload Image HTML IntProgress".split()
    )
    assert isinstance(panel.box, ipywidgets.VBox)


def test_the_preview_of_a_batch_shows_every_picture(pipe):
    shown = []
    meter = preview.LiveMeter(pipe, show=lambda line, picture, last: shown.append((line, picture)))
    generate(pipe, Settings(PROMPT, count=3), on_step=meter)
    line, picture = shown[-1]
    assert picture.size == (3 * 192 + 4 * 8, 192 + 2 * 8) and "RAM at most" in line
    parts = [np.asarray(picture)[8:200, x : x + 192] for x in (8, 208, 408)]
    assert all(part.std() > 5 for part in parts) and not np.array_equal(parts[0], parts[2])
