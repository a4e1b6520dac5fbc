"""Reads a folder of pictures and captions, and encodes it once.

FOLDER/captions.json    {"boat.png": "a red boat by the sea", ...}
FOLDER/images/boat.png  pictures of any size and format that Pillow reads
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from training.loop import precision
from training.mini import embed


def read(folder: str | Path) -> tuple[list[Path], list[str]]:
    """The pictures that captions.json names and their captions, in its order; every picture is opened once to see.

    Raises FileNotFoundError for a missing captions.json or picture, ValueError for a captions.json that is not a JSON
    object of sentences, for an empty caption and for a picture that cannot be read. Warns of pictures without
    captions, which are left out, and of a single picture: a model can only learn it by heart, but to see it do that is
    a good first check of one's training.
    """
    folder = Path(folder)
    if not (folder / "captions.json").is_file():
        raise FileNotFoundError(
            f"There is no captions.json in {folder}: write one as "
            '{"boat.png": "a red boat by the sea"}, beside a folder `images` that holds boat.png.'
        )
    try:
        captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'captions.json'} is not JSON ({error}): mend it there.") from error
    if not isinstance(captions, dict) or not captions:
        raise ValueError(
            f'{folder / "captions.json"} has to be an object that names pictures: {{"boat.png": "a red boat"}}.'
        )
    paths = [folder / "images" / name for name in captions]
    for path, caption in zip(paths, captions.values(), strict=True):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"The caption of {path.name} is empty: say in captions.json what the picture shows.")
        if not path.is_file():
            raise FileNotFoundError(f"{path.name} has a caption, but {path} is missing: add it or drop its caption.")
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as a picture: replace it or drop its caption.") from error
    unnamed = {path.name for path in (folder / "images").iterdir()} - captions.keys()
    if unnamed:
        warnings.warn(f"{len(unnamed)} files in {folder / 'images'} have no caption and are left out.", stacklevel=2)
    if len(paths) == 1:
        warnings.warn(f"{folder} has one picture only: a model can learn it by heart, and nothing else.", stacklevel=2)
    return paths, list(captions.values())


def to_square(path: Path, size: int) -> Image.Image:
    """A picture of any size as RGB of size x size pixels: scaled until it just covers the square, the middle kept."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def encode(
    folder: str | Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> dict[str, torch.Tensor]:
    """What training needs of a folder, in float16 and kept in FOLDER/.encoded until a file of it or a model changes.

    "latents" (N, 2, C, h, w): posterior mean and standard deviation, scaled to unit variance; "text" (N, T, width);
    "empty" (1, T, width), the text of an empty caption. Raises what `read` raises.
    """
    paths, captions = read(folder)
    size = vae.config.sample_size
    key = hashlib.sha256(json.dumps([size, [path.name for path in paths], captions]).encode())
    for path in paths:
        key.update(hashlib.sha256(path.read_bytes()).digest())
    for part in (vae.encoder, text_encoder):
        for weight in part.parameters():
            key.update(weight.detach().float().cpu().numpy().tobytes())
    kept = Path(folder) / ".encoded" / f"{key.hexdigest()[:24]}.safetensors"
    if not kept.exists():
        parts = {"latents": [], "text": [], "empty": [embed([""], text_encoder, tokenizer)]}
        for start in range(0, len(paths), 32):
            pixels = to_tensor([to_square(path, size) for path in paths[start : start + 32]])
            with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16, enabled=precision() == "bf16"):
                posterior = vae.encode(pixels.to(vae.device)).latent_dist
            parts["latents"].append(torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor)
            parts["text"].append(embed(captions[start : start + 32], text_encoder, tokenizer))
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        save_file({name: torch.cat(found).half().cpu().contiguous() for name, found in parts.items()}, partial)
        partial.replace(kept)
    return load_file(kept)
