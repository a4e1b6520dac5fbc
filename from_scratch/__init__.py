"""Stable Diffusion 1.5 in plain PyTorch, one file a concept. `from_scratch.load(path)` is where to begin.

sd = from_scratch.load("models/storybook-sd")
sd.generate("a red boat by the sea", seed=0).save("boat.png")
"""

from from_scratch.checkpoint import CheckpointError, load
from from_scratch.pipeline import StableDiffusion

__all__ = ["CheckpointError", "StableDiffusion", "load"]
