"""What holds the pages together: one reading order, needs that are the same in table and code, answers to questions."""

import re

import nbformat
import pytest

from helpers.loading.machine import Budget
from helpers.pipelines import MODELS, choose
from tools.badges import ROOT

ORDER = ("00", "03", "02", "04", "05", "06", "07", "08", "09")  # 01, for Stable Diffusion 3.5, stands beside it
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
BY_NUMBER = {name[:2]: name for name in PAGES}


def markdown(name: str) -> list[str]:
    return [cell.source for cell in PAGES[name].cells if cell.cell_type == "markdown"]


def links(text: str) -> list[str]:
    """The notebooks that a text links to."""
    return re.findall(r"\]\((?:notebooks/)?(\w+)\.ipynb\)", text)


def unanswered(cells: list[str]) -> list[str]:
    """The questions after which no answer stands before the next heading or the next question."""
    missing, asked = [], None
    for source in cells:
        if asked and "<summary>Answer</summary>" in source:
            asked = None
        if asked and (source.startswith("## ") or "**Predict" in source):
            missing.append(asked)
            asked = None
        if "**Predict" in source:
            asked = source[source.index("**Predict") :][:80]
    return [*missing, asked] if asked else missing


@pytest.mark.parametrize(("number", "following"), [("00", "03"), ("03", "02"), ("02", "04")])
def test_each_page_leads_to_the_next(number, following):
    (sentence,) = re.findall(r"Next page: .*", "\n".join(markdown(BY_NUMBER[number])))
    assert links(sentence)[:1] == [BY_NUMBER[following]]


def test_the_map_has_every_page_in_the_reading_order():
    (table,) = [source for source in markdown(BY_NUMBER["00"]) if source.startswith("## The map")]
    assert links(table) == [BY_NUMBER[number] for number in (*ORDER[1:], "01") if number in BY_NUMBER]
    assert len(PAGES) == len(links(table)) + 1  # 00 itself


def test_the_readme_has_every_page():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Notebooks")[1].split("\n## ")[0]
    assert set(links(table)) >= set(PAGES)


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "08"])
def test_headings_begin_their_cells(number):
    for source in markdown(BY_NUMBER[number])[1:]:  # the first has the badge above the title
        text = re.sub(r"(?ms)^```.*?^```", "", source)
        assert not re.search(r"(?m)(?<!\A)^#+ ", text), f"split this cell at its heading: {source[:60]}"


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "08"])
def test_every_prediction_has_its_answer(number):
    assert unanswered(markdown(BY_NUMBER[number])) == []


def test_what_counts_as_an_answer():
    question, answer = "**Predict, then run.** Which?", "<details><summary>Answer</summary>\n\nThis.\n\n</details>"
    assert unanswered([question, answer, "## 2. Next", question, "words", answer]) == []
    assert unanswered([question, "## 2. Next", answer]) == [question]
    assert unanswered([question, question, answer]) == [question]
    assert unanswered([answer, question]) == [question]


@pytest.mark.parametrize("number", ["00", "02", "03", "04", "05", "08"])
def test_what_a_page_needs_is_what_its_table_says(number):
    """`choose` decides with the number that the reader was told."""
    page = PAGES[BY_NUMBER[number]]
    (told,) = re.findall(r"\| VRAM \| about ([\d.]+) GiB", page.cells[0].source)
    (asked,) = [
        re.search(r"choose\(MODEL, vram_gib=([\d.]+)\)", c.source) for c in page.cells if "choose(MODEL" in c.source
    ]
    assert asked and float(asked[1]) == float(told) >= MODELS["sd15"].vram_gib


@pytest.mark.parametrize(
    ("there", "vram_gib", "name"),
    [
        (6.0, None, "sd15"),
        (6.0, 6.0, "sd15"),
        (6.0, 6.5, "storybook-sd"),
        (3.2, 3.0, "storybook-sd"),  # the model alone needs 3.5
    ],
)
def test_a_page_may_need_more_than_the_model(monkeypatch, capsys, there, vram_gib, name):
    monkeypatch.setattr(Budget, "detect", classmethod(lambda cls: Budget("cuda", there, 12.0, (7, 5), 50.0)))
    monkeypatch.delenv("DIFFUSION_MODEL", raising=False)
    assert choose("sd15", vram_gib) is MODELS[name]
    needed = max(vram_gib or 0, MODELS["sd15"].vram_gib)
    assert (f"needs {needed} GiB of GPU memory" in capsys.readouterr().out) == (name != "sd15")
