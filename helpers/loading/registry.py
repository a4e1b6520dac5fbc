"""The models that the notebooks draw with: where each one is and how it likes to be used. A new one is one entry."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository


@dataclass(frozen=True)
class Model:
    """One model: where it is and how it likes to be used. It has a `hub_id` or a `folder`."""

    name: str
    pipeline: str  # class in diffusers
    size: int | None  # pixels to draw, at most those of training; None: the folder says, see `generate.own_size`
    steps: int
    guidance: float
    examples: tuple[str, ...]
    hub_id: str | None = None
    variant: str | None = None  # which of several sets of weights to download
    mirror: str | None = None  # where to look if hub_id is gone
    mirror_file: str | None = None  # the mirror is this one file in the original layout, not a diffusers folder
    mirror_config: str | None = None  # folder with the configs that such a file lacks, relative to the repository
    folder: str | None = None  # relative to the repository
    without: tuple[str, ...] = ()  # optional parts that are neither downloaded nor loaded
    twin: str | None = None  # the bundled model to use where this one cannot run
    download_gb: float = 0.0  # 10**9 bytes
    vram_gib: float = 0.0  # with less than this `choose` takes the twin


MODELS = {
    model.name: model
    for model in (
        Model(
            name="sd15",
            pipeline="StableDiffusionPipeline",
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
            variant="fp16",
            mirror="Comfy-Org/stable-diffusion-v1-5-archive",
            mirror_file="v1-5-pruned-emaonly-fp16.safetensors",
            mirror_config="helpers/sd15_config",
            without=("safety_checker", "feature_extractor"),
            size=512,
            steps=25,
            guidance=7.5,
            examples=(
                "a lighthouse on a cliff at sunset, oil painting",
                "a red fox in the snow, wildlife photograph",
                "a cosy reading corner with plants, watercolour",
            ),
            twin="storybook-sd",
            download_gb=2.2,
            vram_gib=3.5,
        ),
        Model(
            name="sd35-medium",
            pipeline="StableDiffusion3Pipeline",
            hub_id="stabilityai/stable-diffusion-3.5-medium",  # gated: helpers.login
            size=768,  # the model can do 1024, in twice the time
            steps=28,
            guidance=7.0,
            examples=(
                "A steampunk robotic owl perched on a crystal branch, digital art, 8k",
                "a lighthouse on a cliff at sunset, oil painting",
                "a cosy reading corner with plants, watercolour",
            ),
            twin="storybook-sd3",
            download_gb=16.3,
            vram_gib=5.5,  # model-offload's, which is the last plan that is not many times slower
        ),
        Model(
            name="storybook-sd",
            pipeline="StableDiffusionPipeline",
            folder="models/storybook-sd",
            size=None,
            steps=25,
            guidance=4.0,
            examples=(
                "a red boat by the sea",
                "a small yellow star under a starry night sky",
                "a blue house in the snow",
            ),
        ),
        Model(
            name="storybook-sd3",
            pipeline="StableDiffusion3Pipeline",
            folder="models/storybook-sd3",
            size=None,
            steps=25,
            guidance=5.0,
            examples=(
                "a red boat by the sea",
                "a purple mushroom in a meadow",
                "a blue house in the snow",
            ),
        ),
    )
}


def find(model: Model | str) -> Model:
    """The model of that name. Raises ValueError, one sentence with the names, if there is none."""
    if isinstance(model, Model):
        return model
    if model not in MODELS:
        raise ValueError(f"There is no model {model!r}: choose one of {', '.join(MODELS)}.")
    return MODELS[model]
