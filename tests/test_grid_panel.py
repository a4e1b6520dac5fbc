"""The X/Y grid panel: lists as people type them, one run at a time, and the sweep that comes of it."""

import csv
import threading
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from helpers import compare
from helpers.compare import sweep
from helpers.generate import Settings, generate
from helpers.grid_panel import values, written
from helpers.panel import grid_panel, prompt_panel
from helpers.pipelines import Model, load

PROMPT = "a red boat by the sea"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.sd15(tmp_path_factory.mktemp("sd15"))
    return load(Model("tiny", "StableDiffusionPipeline", None, 2, 4.0, (PROMPT,), folder=str(folder)))


@pytest.fixture
def panel(pipe, tmp_path):
    return grid_panel(pipe, ("guidance", [1, 4.5]), folder=tmp_path)


def click_and_wait(panel):
    panel._ended = 0.0  # as if some time had passed since the latest run
    panel.go.click()
    panel.wait(60)
    assert not panel.go.disabled and panel.stop.disabled and panel.progress.value == ""


@pytest.mark.parametrize(
    ("setting", "text", "found"),
    [
        ("guidance", "1, 3, 7.5", [1, 3, 7.5]),
        ("steps", " 5,10 ", [5, 10]),
        ("seed", "0", [0]),
        ("scheduler", "DDIMScheduler, PNDMScheduler", ["DDIMScheduler", "PNDMScheduler"]),
        ("prompt", "a boat, red; a house", ["a boat, red", "a house"]),
        ("negative_prompt", "; red", ["", "red"]),
    ],
)
def test_lists_as_people_type_them(setting, text, found):
    assert values(setting, text) == found
    assert values(setting, written(setting, found)) == found


@pytest.mark.parametrize(
    ("setting", "text", "said"),
    [
        ("guidance", "", "There is nothing in the list for guidance"),
        ("guidance", "1, , 3", "There is an empty place in the list for guidance"),
        ("guidance", "1; 3", "'1; 3' in the list for guidance is not a number: write values with commas"),
        ("steps", "5, 7.5", "'7.5' in the list for steps is not a whole number"),
        ("steps", "five" * 999, "is not a whole number"),
        ("seed", "9" * 5000, "is not a whole number"),
        ("prompt", "a boat;", "There is an empty place in the list for prompt: write values with semicolons"),
        ("scheduler", ",", "There is an empty place"),
    ],
)
def test_bad_lists_are_one_sentence(setting, text, said):
    with pytest.raises(ValueError, match="^[^\n]{1,160}$") as caught:
        values(setting, text)
    assert said in str(caught.value) and str(caught.value).endswith(".")


def test_nothing_is_drawn_before_generate_and_the_cost_is_there(panel, tmp_path):
    # in two steps PNDM asks thrice, and twice as often with guidance
    assert "2 pictures, 9 evaluations of the network" in panel.cost.value
    assert panel.found is None and not list(tmp_path.iterdir())
    panel.y.value = "scheduler"
    assert panel.y_values.value == "" and panel.y_values.placeholder.startswith("PNDMScheduler, ")
    assert "There is nothing in the list for scheduler" in panel.cost.value
    panel.y_values.value = "PNDMScheduler, HeunDiscreteScheduler"
    assert "4 pictures, 18 evaluations" in panel.cost.value
    panel.y.value = None
    assert "2 pictures, 9 evaluations" in panel.cost.value and panel.y_values.disabled
    panel.x.value = "steps"  # guidances are no steps
    assert panel.x_values.value == "" and "There is nothing in the list for steps" in panel.cost.value


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [
        ("x_values", "1, high", "&#x27;high&#x27; in the list for guidance is not a number"),
        ("x_values", "2, 2.0", "there twice"),
        ("x_values", "nan", "The guidance is not a number"),
        ("x_values", "<img src=x onerror=alert(1)>", "&lt;img"),
        ("seed", "<script>", "The seed &#x27;&lt;script&gt;&#x27; is not a whole number"),
        ("prompt", " ", "The prompt is empty"),
        ("y", "guidance", "There is nothing in the list for guidance"),
    ],
)
def test_what_is_wrong_is_said_while_typing_and_by_generate(panel, tmp_path, control, value, said):
    good = getattr(panel, control).value
    getattr(panel, control).value = value
    click_and_wait(panel)
    for shown in (panel.cost.value, panel.message.value):
        assert said in shown and "<script" not in shown and "<img" not in shown
    assert 'role="alert"' in panel.message.value and panel.found is None and not list(tmp_path.iterdir())
    getattr(panel, control).value = good
    assert "2 pictures" in panel.cost.value


@pytest.mark.parametrize("threaded", [True, False])
def test_generate_is_the_sweep_that_the_controls_say(pipe, tmp_path, threaded):
    panel = grid_panel(pipe, settings=Settings("-", "house"), folder=tmp_path, threaded=threaded)
    panel.prompt.value, panel.seed.value, panel.x_values.value = PROMPT, " 7 ", "1, 4"
    panel.y.value, panel.y_values.value = "steps", "1, 2"
    click_and_wait(panel)
    expected = sweep(pipe, ("guidance", [1, 4]), ("steps", [1, 2]), settings=Settings(PROMPT, "house", seed=7),
                     folder=tmp_path / "again", say=lambda _: None)  # fmt: skip
    assert panel.found.rows == expected.rows
    assert all(a.tobytes() == b.tobytes() for a, b in zip(panel.found.images, expected.images, strict=True))
    assert panel.found.csv.name == expected.csv.name
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".csv", ".png"]
    with panel.found.csv.open() as file:
        assert [row["guidance"] for row in csv.DictReader(file)] == ["1", "4"] * 2
    for words in ("Drawn in", panel.found.png.name, panel.found.csv.name, "about"):
        assert words in panel.message.value
    assert (panel.bar.value, panel.bar.max) == (12, 12)  # PNDM asks once in one step, thrice in two
    assert Image.open(panel.found.png).size == panel.found.picture.size
    assert bytes(panel.image.value).startswith(b"\x89PNG") and panel.image.layout.display is None
    assert panel.image.width == str(panel.found.picture.width)
    links = [child.value for child in panel.downloads.children]
    assert [f'download="{path.name}"' in link for path, link in
            zip((panel.found.png, panel.found.csv), links, strict=True)] == [True, True]  # fmt: skip


def stopping(panel, monkeypatch, at, error=None):
    """Press Stop (or raise) as the sweep draws its n-th step; how many steps there were."""
    steps, own = [], panel._on_step

    def on_step(done, evaluations):
        if done:
            steps.append(panel.progress.value)
            if len(steps) == at:
                if error is not None:
                    raise error
                panel.stop.click()
        own(done, evaluations)

    monkeypatch.setattr(panel, "_on_step", on_step)
    return steps


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_stop_is_heard_within_a_step_and_finished_pictures_are_kept(pipe, tmp_path, monkeypatch, error):
    panel = grid_panel(pipe, ("guidance", [1, 4]), folder=tmp_path, threaded=error is None)
    with monkeypatch.context() as patch:
        steps = stopping(panel, patch, 4, error)  # the first step of the second picture
        click_and_wait(panel)
    assert len(steps) == 4 and "3 of 9 evaluations" in steps[3]
    assert "Generate goes on from there" in panel.message.value and panel.error is None and panel.found is None
    assert [path.name for path in tmp_path.glob("*.parts/*")] == ["0.png"]
    click_and_wait(panel)
    assert "1 of 2 pictures are there from before" in panel.message.value
    assert panel.found.images[1].tobytes() == generate(pipe, Settings(PROMPT, guidance=4))[0].tobytes()


def test_stop_is_heard_while_the_pace_is_measured(pipe, tmp_path, monkeypatch):
    panel = grid_panel(pipe, folder=tmp_path, threaded=True)
    calls, own = [], panel._on_step

    def on_step(done, evaluations):
        calls.append(done)
        panel.stop.click()
        own(done, evaluations)

    monkeypatch.setattr(panel, "_on_step", on_step)
    click_and_wait(panel)
    assert calls == [0] and "Stopped" in panel.message.value


def test_two_panels_draw_one_after_the_other(pipe, tmp_path, monkeypatch):
    """They share a pipeline, whose sampler a run swaps."""
    prompt = prompt_panel(pipe, folder=tmp_path, threaded=True)
    grid = grid_panel(pipe, ("seed", [0, 1]), folder=tmp_path, threaded=True)  # in one batch
    reached, go_on, own = threading.Event(), threading.Event(), grid._on_step

    def on_step(done, evaluations):
        if done:
            reached.set()
            assert go_on.wait(60)
        own(done, evaluations)

    monkeypatch.setattr(grid, "_on_step", on_step)
    grid.go.click()
    assert reached.wait(60)
    grid.go.click()  # ignored
    grid.x_values.value = "2, 3"  # counts, and changes nothing that is under way
    assert "2 pictures, 12 evaluations" in grid.cost.value
    prompt.scheduler.value = "DDIMScheduler"
    prompt.go.click()
    time.sleep(0.2)
    assert prompt.bar.value == 0
    go_on.set()
    grid.wait(60), prompt.wait(60)
    assert [row["seed"] for row in grid.found.rows] == [0, 1] and prompt.error is None
    expected = generate(pipe, Settings(PROMPT, scheduler="DDIMScheduler"))[0]
    assert prompt.picture.tobytes() == expected.tobytes()
    one, other = (
        np.asarray(image, int) for image in (grid.found.images[1], generate(pipe, Settings(PROMPT, seed=1))[0])
    )
    assert abs(one - other).max() <= 1


def test_settings_without_effect_are_told(panel, tmp_path):
    panel.x_values.value = "0, 1"
    click_and_wait(panel)
    assert "changed nothing" in panel.message.value and 'role="alert"' in panel.message.value and panel.found is None


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (("colour", ["red"]), "no setting 'colour'"),
        (("steps", [2, 2]), "there twice"),
        (
            ("prompt", ["a boat; a house", "a cup"]),
            "cannot be typed as a list for prompt: write values with semicolons",
        ),
        (("seed", "123"), "An axis is a name and its values"),
    ],
)
def test_axes_are_refused_as_the_panel_is_made(pipe, x, said):
    with pytest.raises(ValueError, match=said) as caught:
        grid_panel(pipe, x)
    assert "\n" not in str(caught.value)


def test_the_cost_of_a_large_grid_is_counted_quickly(pipe, monkeypatch):
    """One scheduler for each kind of run, not one for each picture."""
    made, own = [], compare.fresh
    monkeypatch.setattr(compare, "fresh", lambda *args: made.append(args) or own(*args))
    found = compare.cost(pipe, ("seed", range(50)), ("steps", [1, 2]), settings=Settings(PROMPT))
    assert found == (100, 50 * (2 * 1 + 2 * 3)) and len(made) == 2
