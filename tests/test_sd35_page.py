"""Numbers that notebook 01 prints of Stable Diffusion 3.5 Medium, computed again from its sizes alone."""

import re

import checks
import nbformat
import pytest

from tools.badges import ROOT

PRINTED = checks.printed(nbformat.read(ROOT / "notebooks" / "01_sd35_medium_t4.ipynb", as_version=4))
C, HEAD, BLOCKS, DUAL, PLACES = 1536, 64, 24, 13, 384
TEXT, POOLED, TOKENS = 4096, 2048, 77 + 256  # the width of the text tokens, of the pooled embedding; their number


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def weights() -> int:
    """Of the transformer, with its table of places."""
    mlp, norms = linear(C, 4 * C) + linear(4 * C, C), 2 * HEAD
    side = linear(C, 6 * C) + 4 * linear(C, C) + norms + mlp
    second_attention = linear(C, 3 * C) + 4 * linear(C, C) + norms
    last_text = linear(C, 2 * C) + 3 * linear(C, C) + norms
    blocks = (2 * BLOCKS - 1) * side + DUAL * second_attention + last_text
    told = linear(256, C) + linear(POOLED, C) + 2 * linear(C, C)
    ends = linear(16 * 4, C) + linear(TEXT, C) + linear(C, 2 * C) + linear(C, 16 * 4)
    return blocks + told + ends + PLACES**2 * C


def operations(pixels: int) -> tuple[int, int]:
    """Of one answer, multiplications and additions: all of them, and those of the products inside attention."""
    patches = (pixels // 16) ** 2
    attention = BLOCKS * 2 * (patches + TOKENS) ** 2 * C + DUAL * 2 * patches**2 * C
    image = patches * (BLOCKS * 12 + DUAL * 4) * C**2
    text = TOKENS * ((BLOCKS - 1) * 12 + 3) * C**2
    told = (BLOCKS * 6 + DUAL * 3 + (BLOCKS - 1) * 6 + 2 + 2) * C**2 + (256 + C + POOLED + C) * C
    ends = 2 * patches * 16 * 4 * C + TOKENS * TEXT * C
    return 2 * (attention + image + text + told + ends), 2 * attention


def test_the_transformer_has_as_many_numbers_as_its_sizes_say():
    (printed,) = re.findall(r"transformer +([\d,]+) numbers", PRINTED)
    assert int(printed.replace(",", "")) == weights()


@pytest.mark.parametrize("pixels", [512, 768, 1024])
def test_the_work_of_one_answer(pixels):
    ((trillions, share),) = re.findall(rf"{pixels}: +([\d.]+) trillion operations, (\d+)% of them", PRINTED)
    every, attention = operations(pixels)
    assert float(trillions) == pytest.approx(every / 1e12, abs=0.006)
    assert int(share) == pytest.approx(100 * attention / every, abs=0.6)


def test_how_much_more_work_a_larger_picture_is():
    (printed,) = re.findall(r"1024 against 768: ([\d.]+) times the work", PRINTED)
    assert float(printed) == pytest.approx(operations(1024)[0] / operations(768)[0], abs=0.006)
