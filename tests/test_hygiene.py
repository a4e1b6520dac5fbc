"""The checks that need no model: notebooks, README, files. They run in seconds and say what to do."""

import re
import subprocess
from pathlib import Path

import checks
import nbformat
import pytest

from tools.badges import ROOT, badge, repository, setup_cell

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = ROOT / "README.md"
MB = 1_000_000
MAX_FILE, MAX_WEIGHTS = 5 * MB, 40 * MB


def fail_with(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def committed() -> list[Path]:
    """Every file that is in git, or would be after `git add .`"""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("this copy is no git checkout, so nothing says which files belong to it")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path):
    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError:
        pytest.fail(f"{path.name} is cut off or no notebook: take it from git again", pytrace=False)
    found = checks.all_problems(notebook, path, repository(), setup_cell())
    fail_with([f"{path.name}: {problem}" for problem in found])


def test_the_readme_lists_every_notebook_with_its_badge():
    text = README.read_text()
    missing = [path.name for path in NOTEBOOKS if badge(path.name, repository()) not in text]
    named = set(re.findall(r"notebooks/(\w+\.ipynb)", text))
    gone = sorted(named - {path.name for path in NOTEBOOKS})
    fail_with(
        [f"README.md lacks a table row with {badge(name, repository())}" for name in missing]
        + [f"README.md names notebooks/{name}, which does not exist: take it out" for name in gone]
    )


def test_readme_links_and_pictures():
    text = README.read_text()
    problems = checks.link_problems(text, ROOT) + checks.alt_problems(text)
    fail_with([f"README.md {problem}" for problem in problems])


def test_files_are_small():
    large = [path for path in committed() if path.stat().st_size > MAX_FILE and path.suffix != ".safetensors"]
    fail_with([f"{path.relative_to(ROOT)} is over {MAX_FILE // MB} MB: shrink it or keep it out" for path in large])


def test_weights_are_small():
    weights = [path for path in committed() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in weights)
    stray = [path for path in weights if path.relative_to(ROOT).parts[0] != "models"]
    fail_with([f"{path.relative_to(ROOT)} holds weights: move it to models/, or keep it out" for path in stray])
    assert size <= MAX_WEIGHTS, (
        f"the bundled weights have {size / MB:.1f} MB, {MAX_WEIGHTS // MB} are allowed: halve them"
    )
