"""The house: arrows between our modules point one way, as the README draws them."""

import ast
import fnmatch
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "helpers": {"helpers"},
    "from_scratch": {"from_scratch"},
    "training": {"training"},
    "storybook": {"storybook", "training", "helpers"},
}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in MAY_IMPORT
    for file in (ROOT / package).rglob("*.py")
}


def imports(source: str) -> set[str]:
    """The modules that are imported anywhere in it, those inside functions too; ours by their full names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name of the package"
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else node.module for name in whole}
    return found


GRAPH = {name: imports(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def test_imports_are_found():
    source = "import a.b\ndef f():\n    from storybook.train import data, sd\n    from storybook.judge import look"
    assert imports(source) == {"a.b", "storybook.train.data", "storybook.train.sd", "storybook.judge"}
    assert "helpers.loading.plan" in GRAPH["helpers.pipelines"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_none_but_those_below_it(package):
    ours = {*MAY_IMPORT, "notebooks", "tests", "tools", "benchmarks"}
    for name, found in GRAPH.items():
        if name.split(".")[0] == package:
            strangers = {other for other in found if other.split(".")[0] in ours - MAY_IMPORT[package]}
            assert not strangers, f"{name} imports {', '.join(sorted(strangers))}"


def test_no_two_modules_need_each_other():
    try:
        TopologicalSorter({name: found & set(FILES) for name, found in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


ROOMS = {".".join(name.split(".")[:2]) for name in FILES if "." in name}  # modules and packages inside the wings


def floors() -> dict[str, int]:
    """The modules and packages that the README's picture names, each with the number of its line. "editing*" is all
    that begins so and has not been named before.
    """
    picture = (ROOT / "README.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    found, package = {}, None
    for number, line in enumerate(picture.splitlines()):
        if head := re.match(r" \+- (\w+)", line):
            package = head[1]
        elif names := re.match(r" \|    (\w+\*?(?:, \w+\*?)*)  ", line):
            for name in names[1].split(", "):
                matched = fnmatch.filter(ROOMS, f"{package}.{name}")
                assert matched, f"the README's picture names {package}.{name}, which is not there"
                found = dict.fromkeys(matched, number) | found
    return found


def test_no_line_of_the_readme_imports_from_one_above():
    def floor(module):
        parts = module.split(".")
        return places.get(".".join(parts[:2])) if parts[0] in MAY_IMPORT else None

    places = floors()
    assert set(places) == {room for room in ROOMS if not room.startswith("from_scratch.")}  # which has none to show
    for name, found in GRAPH.items():
        for other in found & set(FILES):
            if name.split(".")[0] == other.split(".")[0] and None not in (floor(name), floor(other)):
                assert floor(name) <= floor(other), f"{name} imports {other}, which the README draws above it"
