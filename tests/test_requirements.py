"""requirements.txt suits Colab as it is; constraints.txt pins all that CI runs."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.badges import ROOT

# Colab's GPU runtime of 2026-08-19 (googlecolab/backend-info). tqdm and psutil are from an earlier
# 2026 listing, numpy is the older of the two that Colab served that summer.
COLAB = {
    "torch": "2.11.0+cu128",
    "diffusers": "0.39.0",
    "transformers": "5.15.0",
    "accelerate": "1.14.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.22.2",
    "huggingface-hub": "1.27.0",
    "numpy": "2.0.2",
    "pillow": "11.3.0",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "tqdm": "4.67.3",
    "psutil": "5.9.5",
}


def read(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("requirement", read("requirements.txt"), ids=lambda requirement: requirement.name)
def test_colab_keeps_what_it_has(requirement):
    bounds = [bound.operator for bound in requirement.specifier]
    assert bounds == [">="], f"{requirement.name}: one lower bound and nothing else, or Colab has to replace it"
    assert requirement.name in COLAB, f"Colab lacks {requirement.name}: do without it, or add its version to the table"
    assert COLAB[requirement.name] in requirement.specifier, (
        f"{requirement}: Colab has {COLAB[requirement.name]}; lower the bound"
    )


def test_constraints_pin_everything():
    pins = {canonicalize_name(pin.name): pin for pin in read("constraints.txt")}
    loose = [str(pin) for pin in pins.values() if [bound.operator for bound in pin.specifier] != ["=="]]
    assert not loose, f"constraints.txt needs exact versions for {loose}"
    local = [str(pin) for pin in pins.values() if "+" in str(pin.specifier)]
    assert not local, f"constraints.txt names builds that PyPI lacks, cut them at the +: {local}"
    for requirement in read("requirements.txt") + read("requirements-dev.txt"):
        assert canonicalize_name(requirement.name) in pins, f"add {requirement.name} to constraints.txt"
        version = next(iter(pins[canonicalize_name(requirement.name)].specifier)).version
        assert version in requirement.specifier, f"constraints.txt has {version}, which is below {requirement}"
