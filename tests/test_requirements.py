"""requirements.txt suits Colab as it is; constraints.txt pins all that CI runs."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.badges import ROOT


def read(name: str) -> list[Requirement]:
    """Its requirements, and those of the files that it includes."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return found + [more for line in lines if line.startswith("-r ") for more in read(line.removeprefix("-r "))]


def pins(name: str) -> dict[str, str]:
    for pin in read(name):
        assert [bound.operator for bound in pin.specifier] == ["=="], f"{name} needs an exact version for {pin}"
        assert "+" not in str(pin.specifier), f"{name} names a build that PyPI lacks, cut it at the +: {pin}"
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in read(name)}


# Tests run on another torch than Colab's, and on the newer numpy of the two that Colab served in summer 2026.
COLAB = {**pins("constraints-colab.txt"), "torch": "2.11.0+cu128", "numpy": "2.0.2"}


@pytest.mark.parametrize("requirement", read("requirements.txt"), ids=lambda requirement: requirement.name)
def test_colab_keeps_what_it_has(requirement):
    bounds = [bound.operator for bound in requirement.specifier]
    assert bounds == [">="], f"{requirement.name}: one lower bound and nothing else, or Colab has to replace it"
    assert requirement.name in COLAB, (
        f"Colab lacks {requirement.name}: do without it, or add it to constraints-colab.txt"
    )
    assert COLAB[requirement.name] in requirement.specifier, (
        f"{requirement}: Colab has {COLAB[requirement.name]}; lower the bound"
    )


@pytest.mark.parametrize(
    "constraints, wanted",
    [("constraints.txt", "requirements-dev.txt"), ("constraints-colab.txt", "requirements-test.txt")],
)
def test_constraints_pin_everything(constraints, wanted):
    pinned = pins(constraints)
    for requirement in read("requirements.txt") + read(wanted):
        assert canonicalize_name(requirement.name) in pinned, f"add {requirement.name} to {constraints}"
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{constraints} has {version}, which is below {requirement}"


def test_both_sets_of_versions_have_one_torch():
    assert pins("constraints.txt")["torch"] == pins("constraints-colab.txt")["torch"]
