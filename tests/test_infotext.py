import itertools

import pytest

from helpers import infotext
from helpers.generate import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS
from helpers.infotext import read, write
from helpers.settings import Settings

TEXTS = [
    "a red boat",
    'a "red" boat, (naïve:1.3), C:\\new\\table',
    "two\nlines, Seed: 7\n\nand a third",
    "  spaces around  ",
    "Steps: 9, Seed: 3",
    "船 🚀 <img src=x>",
    '"',
    "a sign that says Negative prompt: x",
]
WEB_UI = """masterpiece, (red fox:1.2) <lora:x:0.8>
in the snow
Negative prompt: blurry,
(worst quality:1.4)
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 7460a6fa, Model: x_v1, \
Denoising strength: 0.75, Clip skip: 2, Lora hashes: "x: b, c: d", Version: v1.6.0"""


@pytest.mark.parametrize(("prompt", "negative"), list(itertools.product(TEXTS, ["", *TEXTS])))
def test_what_is_written_is_read(prompt, negative):
    settings = Settings(prompt, negative, 25, 4.5, 2**63 - 1, 64, 96, "EulerAncestralDiscreteScheduler", 1, 0.6)
    for model in ('my "model", v: 2\\x', "", "storybook-sd", '"quoted"', "two\nlines"):
        found = read(write(settings, model, (96, 64)))
        assert found == (settings, model, {})


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS + FLOW_SCHEDULERS + ("SomeOtherScheduler",))
def test_samplers_have_names_that_other_tools_know(name):
    text = write(Settings("x", steps=1, scheduler=name), "", (8, 8))
    found = read(text)
    if name in infotext.SAMPLERS.values():
        assert name not in text and found.settings.scheduler == name
    else:
        assert found.settings.scheduler is None and found.others == {"Sampler": name}


def test_the_names_and_quotes_of_the_web_ui():
    text = write(Settings("x", steps=1, scheduler="PNDMScheduler"), "a: b", (8, 8))
    assert text == 'x\nSteps: 1, Sampler: PNDM, Seed: 0, Size: 8x8, Model: "a: b"'


def test_a_text_of_the_web_ui():
    settings, model, others = read(WEB_UI)
    assert settings == Settings(
        "masterpiece, (red fox:1.2) <lora:x:0.8>\nin the snow", "blurry,\n(worst quality:1.4)", 20, 7.0, 965400086,
        768, 512, "DPMSolverMultistepScheduler", 1, 0.75,
    )  # fmt: skip
    assert model == "x_v1"
    assert others == {"Clip skip": "2", "Lora hashes": "x: b, c: d", "Schedule type": "Karras"}
    assert read(WEB_UI.replace("\n", "\r\n") + "\r\n") == (settings, model, others)
    assert read("Steps: 20, Sampler: Euler a, Seed: 1").settings.prompt == ""
    assert read("a boat\nNegative prompt: \nSteps: 20").settings == Settings("a boat", steps=20)


@pytest.mark.parametrize(
    ("pair", "left"),
    [
        ("Size: 1000000x1000000", None),
        ("Size: 512", {"Size": "512"}),
        ("Size: axb", {"Size": "axb"}),
        ("Seed: seven", {"Seed": "seven"}),
        ("Seed: " + "9" * 5000, {"Seed": "9" * 5000}),
        ("CFG scale: {}", {"CFG scale": "{}"}),
        ('Note: "not closed', {"Note": '"not closed'}),
        ('Note: "bad \\q escape"', {"Note": '"bad \\q escape"'}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_odd_values_stay_text(pair, left):
    settings, _, others = read(f"a boat\nSteps: 5, {pair}")
    assert settings.steps == 5 and settings.prompt == "a boat" and settings.seed == 0
    assert others == (left or {}) and (settings.width == 1_000_000) == (left is None)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "a boat", "a boat\nSteps", "Steps: 1, but this is a sentence", "Seed: 1", None, 3, "[" * 100_000,
     "x" * 300_000 + "\nSteps: 1", "a: " * 60_000, 'a: "' * 50_000],
    ids=lambda text: str(text)[:12],
)  # fmt: skip
def test_other_texts_are_one_sentence(text):
    with pytest.raises(ValueError, match="^This is no text of settings: .*\\.$"):
        read(text)
