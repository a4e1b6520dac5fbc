"""Stable Diffusion 1.5 and 3.5 in plain PyTorch, one file a concept. `from_scratch.load(path)` is where to begin.

sd = from_scratch.load("models/storybook-sd")
sd.generate("a red boat by the sea", seed=0).save("boat.png")
"""

from from_scratch.files import CheckpointError
from from_scratch.loading import load
from from_scratch.pipeline import StableDiffusion
from from_scratch.pipeline_sd3 import StableDiffusion3

__all__ = ["CheckpointError", "StableDiffusion", "StableDiffusion3", "load"]
