"""Where every model is loaded: finds out which one a file or folder holds."""

from pathlib import Path

import torch

from from_scratch import checkpoint, checkpoint_sd3
from from_scratch.files import CheckpointError, read_json, read_weights
from from_scratch.pipeline import StableDiffusion
from from_scratch.pipeline_sd3 import StableDiffusion3


def load(
    path: str | Path, config: str | Path | None = None, dtype=torch.float32, device="cpu"
) -> StableDiffusion | StableDiffusion3:
    """Stable Diffusion 1.x, 3 or 3.5 of any width and depth, from a diffusers folder or an original single file.

    A single file has neither tokenizers nor the numbers of heads and groups, and of 3 and 3.5 often no text encoders:
    `config` is a folder in the layout of diffusers to take them from; without, the numbers are SD1.5's and SD3.5's.
    `dtype` is what the weights become. Raises CheckpointError, one sentence.
    """
    path, device = Path(path), torch.empty(0, device=device).device
    if not path.exists():
        raise CheckpointError(f"There is no {path}.")
    if path.is_dir():
        entries, index = None, path / "model_index.json"
        is_sd3 = (path / "transformer").exists() or (index.exists() and "transformer" in read_json(index))
    else:
        entries = read_weights(path)
        is_sd3 = any(name.startswith(f"{checkpoint_sd3.PARTS['transformer']}joint_blocks.") for name in entries)
    folder = Path(config) if config else path if path.is_dir() else None
    return (checkpoint_sd3 if is_sd3 else checkpoint).load(path, entries, folder, dtype, device)
