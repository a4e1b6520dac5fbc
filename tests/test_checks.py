"""Every check of tests/checks.py passes a good notebook and finds the fault in a bad one."""

import copy

import checks
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.badges import badge, repository, setup_cell

REPO = repository()
NAME = "00_start_here.ipynb"
OPENING = f"""# A first picture

{badge(NAME, REPO)}

You type a sentence and a small model draws it.

| | Download | RAM | VRAM | time |
|---|---|---|---|---|
| T4 | 0 GB | 1 GB | 1 GB | 1 min |
| CPU | 0 GB | 1 GB | none | 20 s |
"""


def picture(**metadata):
    return new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Image>"}, metadata=metadata)


@pytest.fixture
def good():
    cells = [
        new_markdown_cell(OPENING),
        new_code_cell(setup_cell(), execution_count=1),
        new_code_cell('prompt = "a red boat"  # @param', execution_count=2),
        new_code_cell("show(prompt)", execution_count=3, outputs=[picture()]),
        new_markdown_cell("A red boat. See [the paper](https://arxiv.org/abs/2112.10752) and $a[0](t)$."),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def problems(notebook, tmp_path):
    return checks.all_problems(notebook, tmp_path / NAME, REPO, setup_cell())


def test_a_good_notebook_passes(good, tmp_path):
    assert problems(good, tmp_path) == []


def append(source, **fields):
    """A fault: one more code cell, run in its turn."""

    def spoil(notebook):
        count = len(checks.code_cells(notebook)) + 1
        notebook.cells.append(new_code_cell(source, execution_count=count, **fields))

    return spoil


def write(text):
    """A fault: one more cell of prose."""
    return lambda notebook: notebook.cells.append(new_markdown_cell(text))


def edit(index, old, new):
    """A fault: other words in one cell."""

    def spoil(notebook):
        assert old in notebook.cells[index].source
        notebook.cells[index].source = notebook.cells[index].source.replace(old, new)

    return spoil


def widget():
    return new_output("display_data", {checks.WIDGET: {"model_id": "a"}})


FAULTS = {
    "no valid notebook": lambda n: n.cells[1].pop("outputs"),
    "kernel other than": lambda n: n.metadata.kernelspec.update(name="mine"),
    "not run once": lambda n: n.cells[3].update(execution_count=7),
    "stores no picture": lambda n: n.cells[3].update(outputs=[]),
    "stores the error ValueError": append("1 / 0", outputs=[new_output("error", ename="ValueError", evalue="")]),
    "stores widget state": lambda n: n.metadata.update(widgets={}),
    "shows a widget": append("panel", outputs=[widget()]),
    "Hugging Face token": append("login()", outputs=[new_output("stream", text="hf_" + 24 * "a")]),
    "path of one machine": append("print(path)", outputs=[new_output("stream", text="saved\nin /home/me/a.png")]),
    "the path of one machine": append('open("C:\\\\pictures")'),
    "bytes": append("show()", outputs=[new_output("display_data", {"image/png": "A" * checks.MAX_BYTES})]),
    "lacks its Colab badge": edit(0, REPO, "someone/else"),
    "no title": edit(0, "# A first", "A first"),
    "makes no promise": edit(0, "You type a sentence and a small model draws it.", ""),
    "names VRAM": edit(0, "VRAM", "memory"),
    "one setup cell": edit(1, "# @title Setup", "# Setup"),
    "setup cell of its own": edit(1, "--depth=1", "--depth=2"),
    "2 cells with # @param": append("steps = 25  # @param"),
    "13 lines": append("x = 1\n" * 13),
    "no code": append("# nothing"),
    "semicolon": append("plot(x);"),
    "without alt text": write("![](https://example.org/a.png)"),
    "<img src": write('<img src="https://example.org/a.png">'),
    "malformed link (a b.md)": write("[a](a b.md)"),
    "malformed link (ftp://a.org)": write("[a](ftp://a.org)"),
    "links to 99_gone.ipynb": write("[a](99_gone.ipynb)"),
    "nothing describes": append("show(prompt)", outputs=[picture()]),
}


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_is_found(good, tmp_path, message):
    bad = copy.deepcopy(good)
    FAULTS[message](bad)
    found = problems(bad, tmp_path)
    assert any(message in problem for problem in found), found


def test_a_picture_may_be_described_by_comment_or_metadata(good, tmp_path):
    append("# NBVAL_CHECK_OUTPUT\n# The same boat, at night\nshow()", outputs=[picture()])(good)
    append("show()", outputs=[picture(**{"image/png": {"alt": "a boat at night"}})])(good)
    assert problems(good, tmp_path) == []


def test_a_widget_may_be_followed_by_its_picture(good, tmp_path):
    append("panel", outputs=[widget()])(good)
    append("# The panel's default run\nshow()", outputs=[picture()])(good)
    assert problems(good, tmp_path) == []


def test_urls_and_relative_paths_are_no_absolute_paths(good, tmp_path):
    append('load("https://a.org/home/b", "../own/c", "models/tmp")')(good)
    assert problems(good, tmp_path) == []


def test_links_to_files_that_exist_pass(tmp_path):
    (tmp_path / "a.md").touch()
    assert checks.link_problems('[a](a.md#part) [b](#part) [c](https://a.org "title")', tmp_path) == []


def test_notebooks_survive_the_checks_unchanged(good, tmp_path):
    before = nbformat.writes(good)
    problems(good, tmp_path)
    assert nbformat.writes(good) == before
