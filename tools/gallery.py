"""Draw the README's gallery anew: `python -m tools.gallery`. Each PNG holds the settings that drew it.

Shown is, for each prompt, the picture of the first seed from 0 on in which the judge finds everything as asked.
"""

from itertools import count

from helpers import pipelines
from helpers.generate import Settings, generate
from helpers.images import ROOT, save
from storybook.judge import judge

FOLDER = ROOT / "outputs/gallery"
PROMPTS = (
    "a red boat by the sea",
    "a small yellow star under a starry night sky",
    "a large purple mushroom in a green meadow",
    "a blue rocket at sunset",
    "a pink house in the snow",
    "an orange fish on the left in the desert",
    "a white balloon to the left of a red car in a meadow",
    "a yellow flower to the right of a blue cup on a plain background",
)


def main() -> None:
    """Replace every picture in outputs/gallery."""
    pipe = pipelines.load("storybook-sd")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.png"):
        old.unlink()
    for prompt in PROMPTS:
        for seed in count():
            (picture,) = generate(pipe, Settings(prompt, seed=seed))
            if judge([picture], [prompt])[0]["all"]:
                break
        print(save(picture, folder=FOLDER).relative_to(ROOT))


if __name__ == "__main__":
    main()
