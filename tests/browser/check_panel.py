"""The prompt panel as people meet it: a real JupyterLab, a real Chromium, notebook 00 (`make test-browser`).

The name keeps it out of `make test`, for it needs a browser. `SCREENSHOTS=docs make test-browser` makes the README's
pictures.
"""

import base64
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from helpers import images

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("helpers", "storybook", "training", "models", "requirements.txt")
TOKEN = "only-for-this-test"
START_S, DRAW_S = 300, 600  # a machine may be busy with other work
HOSTILE = 'a red boat <img src=x onerror="window.ran = true"><script>window.ran = true</script>'
GRID = "from helpers.panel import grid_panel\n\ngrid_panel(pipe, settings=Settings(prompt, steps=10))"
MASK = "from helpers.editing_mask import MaskControls\n\nMaskControls(panel.picture)"  # as page 08 has it
LARGEST = 150_000  # bytes of a screenshot
KERNEL_IS_READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

CELLS_NOT_RUN = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type === "code" && !cell.model.executionCount).length"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.exit("There is no Chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core", 1)
    return found[0]


def lab_command() -> tuple[dict[str, str], list[str]]:
    """The environment and the command of `make lab`, without the notebook that it opens."""
    lines = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in lines.splitlines() if " jupyterlab " in line)
    words = shlex.split(line)
    start = words.index("jupyterlab")
    options = (word for word in words[start + 1 :] if not word.endswith(".ipynb"))
    environment = dict(word.split("=", 1) for word in words[:start] if "=" in word)
    return environment, [sys.executable, "-m", "jupyterlab", *options]


@pytest.fixture(scope="module")
def root(chromium, tmp_path_factory) -> Path:
    """A copy, so that neither the notebook nor `outputs/` of the repository changes; with a grid panel and a mask."""
    root = tmp_path_factory.mktemp("repository")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    (root / "notebooks").mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # what is there at the end was made here
    notebook.cells += [nbformat.v4.new_code_cell(GRID), nbformat.v4.new_code_cell(MASK)]
    nbformat.write(notebook, root / "notebooks" / "00_start_here.ipynb")
    return root


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    own = tmp_path_factory.mktemp("jupyter")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment, command = lab_command()
    environment = os.environ | environment | {name: str(own / name) for name in folders}
    environment["DIFFUSION_MODEL"] = "storybook-sd"
    # Menus are awkward to click, the registry of commands is not.
    options = ["--no-browser", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    options += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    with open(own / "log", "w") as log:
        server = subprocess.Popen([*command, *options], cwd=root, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_S
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < end, (own / "log").read_text()[-2000:]
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree/notebooks/00_start_here.ipynb?token={TOKEN}"
        finally:
            server.terminate()  # its kernels go with it
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module")
def page(chromium, address):
    """Notebook 00 after Run all."""
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=chromium, args=[*sandbox, "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1500})
        page.set_default_timeout(START_S * 1000)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(KERNEL_IS_READY)  # before that, cells that are run are forgotten
        page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area').then(() => null)")
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)")
        yield page
        browser.close()


@pytest.fixture
def panel(page: Page):
    return ready(page, 0)


def ready(page: Page, number: int):
    """The first panel on the page (0) or the second (1), when it has nothing to do."""
    generate = page.get_by_role("button", name="Generate")
    found = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=generate).nth(number)
    found.scroll_into_view_if_needed()
    expect(found.get_by_role("button", name="Generate")).to_be_enabled(timeout=DRAW_S * 1000)
    return found


def generate(panel, prompt: str, seed: int | str, steps: int, count: int = 1) -> None:
    """Type them all and press Generate."""
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    panel.get_by_label("Seed", exact=True).fill(str(seed))
    for name, value in (("Steps", steps), ("Pictures", count)):
        slide(panel, name).fill(str(value))
        slide(panel, name).press("Enter")
    panel.get_by_role("button", name="Generate").click()


def slide(panel, name: str):
    """The number beside a slider, in which people type."""
    return panel.locator(".widget-hslider").filter(has_text=name).locator(".widget-readout")


def progress(panel):
    return panel.locator(".widget-html").filter(has_text=re.compile(r"step \d+ of \d+.*s/it.*s left"))


def wait_for(panel, text: str) -> None:
    said = panel.locator("[role=status], [role=alert]").filter(has_text=text).first
    expect(said).to_be_visible(timeout=DRAW_S * 1000)


def thumbnails(panel):
    return panel.get_by_role("button", name=re.compile("^seed "))


def test_run_all_runs_all_without_pop_ups(page, panel):
    errors = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.all_text_contents() == []
    assert page.evaluate(CELLS_NOT_RUN) == 0
    assert page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts() == []
    expect(thumbnails(panel)).to_have_count(1)
    assert panel.locator("img.widget-image").last.bounding_box()["width"] >= 128


def test_progress_a_preview_and_the_picture(page, panel):
    panel.locator("img.widget-image").last.evaluate(
        """image => { window.shown = [];
            new MutationObserver(() => window.shown.push(image.src)).observe(image, {attributeFilter: ["src"]}); }"""
    )
    generate(panel, "a blue house in the snow", 7, 50)
    expect(progress(panel)).to_be_visible(timeout=DRAW_S * 1000)
    assert panel.get_by_role("button", name="Generate").is_disabled()
    wait_for(panel, "Drawn in")
    wait_for(panel, "seed 7, 50 steps")
    assert len(set(page.evaluate("window.shown"))) >= 2  # a preview at least, then the picture
    assert panel.get_by_text(re.compile(r"^6 of \d+ tokens")).count() == 1


def test_stop_is_heard_within_a_step(panel):
    """Of eight large pictures, so that a step takes longer than the way of a click to the kernel and of a bar back."""
    sides = [panel.get_by_label(name) for name in ("Width", "Height")]
    own = [side.input_value() for side in sides]
    for side, pixels in zip(sides, own, strict=True):
        side.select_option(str(2 * int(pixels)))
    generate(panel, "a red boat by the sea", 8, 50, count=8)
    expect(progress(panel)).to_be_visible(timeout=DRAW_S * 1000)
    steps = int(re.search(r"of (\d+)", progress(panel).inner_text())[1])
    panel.get_by_role("button", name="Stop").click()
    share = panel.locator(".progress-bar").evaluate("bar => parseFloat(bar.style.width) / 100")
    wait_for(panel, "Stopped after step")
    said = panel.locator("[role=status]").filter(has_text="Stopped after step").inner_text()
    assert int(re.search(r"step (\d+)", said)[1]) <= round(share * steps) + 1 < steps
    expect(panel.get_by_role("button", name="Generate")).to_be_enabled()
    for side, pixels in zip(sides, own, strict=True):
        side.select_option(pixels)


def test_an_interrupt_of_the_kernel_loses_nothing(page, panel):
    """It hits the kernel's own thread, which is idle; the run has one of its own."""
    generate(panel, "a yellow star under a starry night sky", 6, 50)
    expect(progress(panel)).to_be_visible(timeout=DRAW_S * 1000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel').then(() => null)")
    wait_for(panel, "seed 6, 50 steps")
    expect(thumbnails(panel)).to_have_count(4)


def test_a_thumbnail_brings_its_settings_back(panel):
    panel.get_by_label("Prompt", exact=True).fill("something else")
    panel.get_by_label("Examples").select_option(index=1)
    expect(panel.get_by_label("Examples")).to_have_value("choose one")  # again
    thumbnails(panel).nth(2).press("Enter")  # by keyboard
    wait_for(panel, "Back again: seed 7, 50 steps")
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value("a blue house in the snow")
    expect(panel.get_by_label("Seed", exact=True)).to_have_value("7")


def test_saved_and_downloaded_files_hold_the_settings(page, panel, root, tmp_path):
    panel.get_by_role("button", name="Save").click()
    wait_for(panel, "Saved as")
    said = panel.locator("[role=status]").filter(has_text="Saved as").inner_text()
    saved = images.settings(root / re.search(r"outputs/[\w.-]+\.png", said)[0])
    assert (saved.prompt, saved.seed, saved.steps) == ("a blue house in the snow", 7, 50)
    with page.expect_download() as download:
        panel.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "it.png")
    assert images.settings(tmp_path / "it.png") == saved

    panel.get_by_label("Prompt", exact=True).fill("something else")
    choose(page, panel, "Load settings", tmp_path / "it.png")
    wait_for(panel, "it.png has settings inside")
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value(saved.prompt)


def choose(page, panel, button: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name=button).click()
    chooser.value.set_files(path)


def test_files_that_are_no_pictures_are_one_sentence(page, panel, tmp_path):
    (tmp_path / "notes.png").write_text("<b>no picture</b>")
    choose(page, panel, "Load settings", tmp_path / "notes.png")
    wait_for(panel, "The file is not a picture")
    choose(page, panel, "Start from a picture", tmp_path / "notes.png")
    wait_for(panel, "The file is not a picture that can be opened")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    choose(page, panel, "Start from a picture", tmp_path / "red.png")
    expect(panel.get_by_text("Strength")).to_be_visible()
    panel.get_by_role("button", name="Start from noise").click()
    expect(panel.get_by_text("Strength")).to_be_hidden()


def test_a_hostile_prompt_runs_nothing(page, panel):
    generate(panel, HOSTILE, 9, 10)
    wait_for(panel, "seed 9, 10 steps")
    wait_for(panel, "never seen these words")
    generate(panel, "  ", 9, 1)
    wait_for(panel, "The prompt is empty")
    generate(panel, "a red boat", HOSTILE, 1)
    wait_for(panel, "is not a whole number")
    assert page.evaluate("window.ran") is None
    assert panel.locator('img[src="x"], script').count() == 0


def test_ten_fast_clicks_are_one_run(page, panel):
    """From the eleventh picture on the row is full, so the seeds say which runs there were."""
    generate(panel, "a red boat by the sea", 10, 20)
    panel.get_by_role("button", name="Generate").evaluate("button => { for (let k = 0; k < 9; k++) button.click() }")
    wait_for(panel, "seed 10, 20 steps")
    time.sleep(3)  # for a second run to begin
    expect(panel.get_by_role("button", name="Generate")).to_be_enabled()
    assert thumbnails(panel).all_inner_texts().count("seed 10") == 1


def test_letters_are_no_number_of_steps(panel):
    number = slide(panel, "Steps")
    before = number.inner_text()
    number.fill("many")
    number.press("Enter")
    expect(number).to_have_text(before)


def test_a_grid_from_two_lists(page, root):
    panel = ready(page, 1)
    expect(panel.get_by_text(re.compile(r"^3 pictures, \d+ evaluations"))).to_be_visible()
    panel.get_by_label("Column values").fill("1, many")
    expect(panel.get_by_text("'many' in the list for guidance is not a number")).to_be_visible()
    panel.get_by_label("Column values").fill("1, 4")
    panel.get_by_label("Rows", exact=True).select_option("steps")
    panel.get_by_label("Row values").fill("4, 20")
    expect(panel.get_by_text(re.compile(r"^4 pictures, \d+ evaluations"))).to_be_visible()
    panel.get_by_role("button", name="Generate").click()
    wait_for(panel, "Drawn in")
    said = panel.locator("[role=status]").filter(has_text="Drawn in").inner_text()
    files = re.findall(r"outputs/[\w.-]+\.(?:png|csv)", said)
    assert len(files) == 2 and all((root / name).stat().st_size > 100 for name in files)
    assert panel.locator("img.widget-image").bounding_box()["width"] > 256
    with page.expect_download() as download:
        panel.get_by_role("link", name="Download table").click()
    assert Path(download.value.path()).read_text().count("\n") == 5  # a line for each picture, below their names


def pixels(image) -> np.ndarray:
    """What an image on the page shows, (height, width, 3)."""
    file = image.evaluate("""async image => {
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png").split(",")[1];
    }""")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB"), int)


def test_controls_move_the_mask(page, panel, tmp_path):
    controls = page.locator(".jp-OutputArea-output .widget-vbox").filter(has_text="Across, %")
    image, shape = controls.locator("img.widget-image"), controls.get_by_label("Shape")

    def after(change) -> np.ndarray:
        before = image.get_attribute("src")
        change()
        expect(image).not_to_have_attribute("src", before)
        return pixels(image)

    def span(name: str, text: str) -> None:
        slide(controls, name).fill(text)
        slide(controls, name).press("Enter")

    def moved(one, other) -> tuple[list[float], list[float]]:
        """Where two pictures differ: from where to where of the height, and of the width."""
        places = np.argwhere(abs(one - other).sum(-1) > 30) / one.shape[:2]
        return tuple([side.min(), side.max()] for side in places.T)

    whole = after(lambda: span("Across, %", "0:100"))
    middle = after(lambda: span("Across, %", "50:100"))  # what was tinted on the left is no more
    down, across = moved(whole, middle)
    assert across == pytest.approx([0, 0.5], abs=0.02) and down == pytest.approx([0.25, 0.75], abs=0.02)
    round_one = after(lambda: shape.select_option("ellipse"))
    down, across = moved(middle, round_one)
    assert across == pytest.approx([0.5, 1], abs=0.02) and down == pytest.approx([0.25, 0.75], abs=0.02)
    at = tuple(int(share * side) for share, side in zip((0.5, 0.75), middle.shape[:2], strict=True))
    assert (middle[at] == round_one[at]).all()  # in its middle an ellipse is as tinted as a rectangle
    Image.new("L", (8, 8), "white").save(tmp_path / "all.png")
    given = after(lambda: choose(page, controls, "Mask from a picture", tmp_path / "all.png"))
    assert (given[at] == middle[at]).all() and abs(given[0, 0] - middle[0, 0]).sum() > 30
    (tmp_path / "notes.png").write_text("<b>no picture</b>")
    choose(page, controls, "Mask from a picture", tmp_path / "notes.png")
    expect(controls.get_by_role("alert")).to_contain_text("not a picture")
    assert (pixels(image) == given).all()


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
@pytest.mark.parametrize("width", [600, 1400])
@pytest.mark.parametrize("number", [0, 1], ids=["prompt", "grid"])
def test_it_fits_and_can_be_read(page, number, theme, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 1500})
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme}).then(() => null)", theme
    )
    page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
    time.sleep(1)
    panel = ready(page, number)
    assert panel.evaluate("box => box.scrollWidth - box.clientWidth") <= 1
    for control in panel.locator("button:visible, input:visible, textarea:visible, select:visible, img:visible").all():
        inside, outside = control.bounding_box(), panel.bounding_box()
        assert inside["x"] >= outside["x"] - 1
        assert inside["x"] + inside["width"] <= outside["x"] + outside["width"] + 1
    contrasts = panel.locator(".widget-label:visible, [role=status]:visible, .widget-readout:visible").evaluate_all(
        CONTRASTS
    )
    assert len(contrasts) > 5 and min(contrasts) >= 4.5  # WCAG 2.2, 1.4.3
    for_readme = (number, width) == (0, 1400)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path)) if for_readme else tmp_path
    path = folder / f"panel-{theme.split()[1].lower()}.png"
    panel.screenshot(path=path)
    assert len(Image.open(path).convert("RGB").getcolors(2**24)) > 100  # a picture among the controls
    assert not for_readme or path.stat().st_size < LARGEST


CONTRASTS = r"""elements => {
    const channels = text => text.match(/[\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = channels(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    return elements.map(element => {
        const [low, high] = [luminance(channels(getComputedStyle(element).color)), luminance(behind(element))]
            .sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    });
}"""
