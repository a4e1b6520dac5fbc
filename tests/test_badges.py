"""The badges tool, and the setup cell that it spreads."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tools import badges

NEW = "someone/her-fork"
FOREIGN = "https://colab.research.google.com/github/huggingface/notebooks/blob/main/a.ipynb"


@pytest.fixture
def root(tmp_path):
    """A small copy of the repository: setup cell, README, one notebook."""
    old = badges.repository()
    (tmp_path / "tools").mkdir()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(badges.ROOT / "tools" / "setup_cell.py", tmp_path / "tools")
    text = f"{badges.badge('00_a.ipynb', old)}\n`git clone https://github.com/{old}`\n[more]({FOREIGN})"
    (tmp_path / "README.md").write_text(text)
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": [badges.badge("00_a.ipynb", "another/one")]},
        {"cell_type": "code", "metadata": {}, "source": ["# @title Setup\n", "old_text()"]},
        {"cell_type": "code", "metadata": {}, "source": ['print("näive")']},
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks" / "00_a.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def contents(root):
    return {path: path.read_text() for path in root.rglob("*") if path.is_file()}


def test_everything_points_at_the_new_repository(root):
    assert badges.main([NEW], root) == 0
    assert badges.repository(root) == NEW
    readme = (root / "README.md").read_text()
    assert badges.badge("00_a.ipynb", NEW) in readme and f"git clone https://github.com/{NEW}`" in readme
    assert FOREIGN in readme, "a link to somebody else's notebook is none of ours"
    cells = json.loads((root / "notebooks" / "00_a.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources == [badges.badge("00_a.ipynb", NEW), badges.setup_cell(root), 'print("näive")']


def test_a_second_run_changes_nothing_and_the_way_back_is_open(root):
    badges.main([badges.repository()], root)
    first = contents(root)
    assert badges.rewrite(root, badges.repository()) == []
    badges.main([NEW], root)
    badges.main([badges.repository()], root)
    assert contents(root) == first


BAD_NAMES = ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", "a/b.git", "a/..", "a/.", "../b", "a/b\n", "a/b;c"]


@pytest.mark.parametrize("repo", BAD_NAMES)
def test_a_bad_name_gets_one_sentence_and_changes_nothing(root, repo, capsys):
    before = contents(root)
    assert badges.main([repo], root) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(root) == before


def run_setup(monkeypatch, cell):
    """Runs the cell as a notebook would, and leaves sys.path as it was."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(cell, "setup", "exec"), {})
    return list(sys.path)


def test_setup_off_colab_finds_the_repository_and_may_run_twice(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.chdir(badges.ROOT / "tests")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != badges.ROOT])
    run_setup(monkeypatch, badges.setup_cell())
    assert run_setup(monkeypatch, badges.setup_cell()).count(str(badges.ROOT)) == 1


def test_setup_on_colab_clones_once_and_installs_what_is_missing(monkeypatch, tmp_path):
    name = badges.repository().split("/")[1]
    commands = []

    def run(command, check=False):
        """Stands in for git and pip: 'clones' a repository that needs one package nobody has."""
        commands.append(command)
        if command[0] == "git":
            Path(Path(command[-1]).name, "notebooks").mkdir(parents=True)
            Path(Path(command[-1]).name, "requirements.txt").write_text("# comment\nnumpy>=99\nno-such-thing>=1.2\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert str(tmp_path / name) in run_setup(monkeypatch, badges.setup_cell())
    run_setup(monkeypatch, badges.setup_cell())
    assert Path.cwd() == tmp_path / name / "notebooks"
    assert [command[0] for command in commands] == ["git", sys.executable]
    assert commands[1][-1] == "no-such-thing>=1.2"
    monkeypatch.chdir(tmp_path)  # what a restarted kernel does
    run_setup(monkeypatch, badges.setup_cell())
    assert [command[0] for command in commands] == ["git", sys.executable, sys.executable]


# The Makefile, with what it calls taken from a stand-in.

GIVEN = [
    "$(shell touch made)",
    "`touch made`",
    "$$(touch made)",
    '"; touch made; "',
    "'; touch made; '",
    "$(error x)",
    "a/..",
]


@pytest.fixture
def makefile(tmp_path):
    """The repository's Makefile alone, and a Python that only says how it was called."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", *(path.name for path in badges.ROOT.glob("*.txt"))):
        shutil.copy(badges.ROOT / name, tmp_path)
    (tmp_path / "python").write_text('#!/bin/sh\nfor word in "$@"; do printf "[%s]" "$word"; done\n')
    (tmp_path / "python").chmod(0o755)

    def run(*arguments, **environment):
        command = ["make", "PYTHON=./python", *arguments]
        # as called by hand, not from within the `make test` that may be running this
        outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**outside, **environment})

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("given", GIVEN)
def test_make_badges_runs_nothing_of_what_it_is_given(makefile, given):
    for done in (makefile("badges", f"REPO={given}"), makefile("badges", REPO=given)):
        assert done.returncode == 0 and done.stdout == f"[-m][tools.badges][{given}]", done.stderr
        assert not (makefile.folder / "made").exists()


def test_make_calls_no_script_that_names_a_path(makefile):
    """Such scripts break when the repository moves; `python -m` does not."""
    done = makefile("-n", "lab", "test", "test-colab", "test-gpu", "train", "evaluate")
    assert done.returncode == 0, done.stderr
    programs = set(re.findall(r"\.venv(?:-colab)?/bin/(\w+)", done.stdout))
    assert programs == {"python"}


def test_make_clean_leaves_what_was_made_with_effort(makefile):
    for name in (".venv", ".venv-colab", "models", "outputs", "build", ".pytest_cache", "tests/__pycache__"):
        (makefile.folder / name).mkdir(parents=True)
    assert makefile("clean").returncode == 0
    left = {path.name for path in makefile.folder.iterdir() if path.is_dir()}
    assert left == {".venv", ".venv-colab", "models", "outputs", "tests"}
    assert makefile("distclean").returncode == 0
    assert not (makefile.folder / ".venv").exists() and not (makefile.folder / ".venv-colab").exists()


def test_make_says_what_is_missing(makefile):
    done = makefile("lab", "PYTHON=./no-python")
    assert done.returncode != 0 and "There is no ./no-python: install Python 3.11 or newer" in done.stdout


def test_make_makes_an_environment_again_whose_python_is_gone(makefile):
    (makefile.folder / ".venv" / "bin").mkdir(parents=True)
    (makefile.folder / ".venv" / "bin" / "python").symlink_to("/no/such/python")
    (makefile.folder / ".venv" / "installed").touch()
    assert "Creating .venv" in makefile("train").stdout
