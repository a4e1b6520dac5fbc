"""The setup cell as Colab runs it: by a kernel, in an empty folder, with google.colab loaded and git doing its work.

Only GitHub is elsewhere: git takes its address for that of a repository that holds the files as they stand here.
"""

import json
import os
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tools.badges import FIRST_LINE, ROOT, repository

NOTEBOOK = ROOT / "notebooks" / "00_start_here.ipynb"
URL = f"https://github.com/{repository()}"
COLAB = ROOT / "tests" / "colab"
CLOSED = "http://127.0.0.1:9/"  # nobody listens on that port

# Runs before the setup cell, and notes every program that is started from then on.
WATCH = """
import sys
started = []
sys.addaudithook(lambda event, details: started.append(details[1]) if event == "subprocess.Popen" else None)
"""
REPORT = """
import json, os, sys, helpers
places = sys.path.count(os.path.dirname(os.getcwd()))
print(json.dumps([os.getcwd(), helpers.__file__, started, missing, places]))
"""


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """A repository whose branch main has the working tree, committed or not; its default branch has another one.

    Neither this checkout's history nor its .git is needed, so a shallow one and a copy will do.
    """
    bare = tmp_path_factory.mktemp("github") / "repository.git"
    author = ["-c", "user.name=A test", "-c", "user.email=test@example.org"]

    def git(*command):
        subprocess.run(["git", *author, f"--git-dir={bare}", f"--work-tree={ROOT}", *command], check=True)

    git("init", "--quiet", "--initial-branch=other")
    git("config", "core.compression", "0")  # it is cloned once, and weights are not to be squeezed for that
    git("config", "pack.window", "0")
    git("commit", "--quiet", "--allow-empty", "--message=Something else")
    git("checkout", "--quiet", "--orphan=main")
    git("add", "--all")
    git("commit", "--quiet", "--message=The working tree")
    git("symbolic-ref", "HEAD", "refs/heads/other")
    return bare.as_uri()


@pytest.fixture(scope="module")
def setup_cell():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return next(cell.source for cell in cells if cell.source.startswith(FIRST_LINE))


def run(sources, folder, address):
    """Run the cells in a fresh Colab-like kernel that starts in `folder`; a list of outputs for each cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=120,
        startup_timeout=300,
        allow_errors=True,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    # Where pytest says that it is running, a kernel leaves alone what programs write; it is to go to the page.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    client.execute(
        env={
            **inherited,
            "PYTHONPATH": str(COLAB),
            "PYTHONSTARTUP": str(COLAB / "startup.py"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{address}.insteadOf",
            "GIT_CONFIG_VALUE_0": URL,
            "PIP_NO_INDEX": "1",  # should pip run after all, it finds nothing
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    )
    return [cell.outputs for cell in notebook.cells]


def test_it_clones_the_notebooks_own_version_and_installs_nothing(github, setup_cell, tmp_path):
    outputs = run([WATCH, setup_cell, REPORT, setup_cell, REPORT], tmp_path, github)
    assert outputs[1] == outputs[3] == [], "nothing to see on the page, the first time or the second"
    (first,), (second,) = outputs[2], outputs[4]
    assert second == first, "a second run changes nothing and starts nothing"

    folder = tmp_path / repository().split("/")[1]
    cwd, helpers, started, missing, places = json.loads(first["text"])
    assert Path(cwd) == folder / "notebooks"
    assert Path(helpers) == folder / "helpers" / "__init__.py" and places == 1
    assert [command[:2] for command in started] == [["git", "clone"]] and URL in started[0]
    assert missing == [], "requirements.txt names what this environment has not"
    assert (folder / "notebooks" / NOTEBOOK.name).read_bytes() == NOTEBOOK.read_bytes()
    depth = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=folder, capture_output=True, text=True)
    assert depth.stdout == "1\n"

    # Runtime, Restart session: a new kernel in the old folder, which has the repository already.
    outputs = run([WATCH, setup_cell, REPORT], tmp_path, CLOSED)
    assert json.loads(outputs[2][0]["text"]) == [cwd, helpers, [], [], 1]


def test_a_repository_out_of_reach_is_one_sentence_and_may_be_tried_again(setup_cell, tmp_path):
    _, outputs, after = run([WATCH, setup_cell, "print(len(started))"], tmp_path, CLOSED)
    said = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert said.startswith("fatal: unable to access") and said.count("\n") == 1
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    assert error["evalue"] == f"{URL} could not be fetched: check the network, then run this cell again."
    assert after[0]["text"] == "1\n", "pip has nothing to do where git has failed"
    assert not any(tmp_path.iterdir()), "what is left of a clone would pass for the repository"
