"""Draw the README's gallery anew: `python -m tools.gallery`. Each PNG holds the settings that drew it."""

from helpers import pipelines
from helpers.generate import Settings, generate
from helpers.images import ROOT, save

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
        (picture,) = generate(pipe, Settings(prompt, seed=1))
        print(save(picture, folder=FOLDER).relative_to(ROOT))


if __name__ == "__main__":
    main()
