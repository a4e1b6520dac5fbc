"""Everything that decides a picture, besides the model: `Settings("a red boat", seed=3)`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that decides a picture, besides the model. None means "as the model likes it"."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    scheduler: str | None = None  # a class of diffusers, see `schedulers(pipe)`
    count: int = 1  # picture k of a batch has the seed `seed + k`
    strength: float | None = None  # with a picture to start from: the share of the noise levels that is drawn anew
