"""The badges tool, and the setup cell that it spreads."""

import json
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


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", "a/b.git"])
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
