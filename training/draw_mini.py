"""Draw a file of prompts with the small UNet: `python -m training.draw_mini UNET PROMPTS OUT`.

Under `accelerate launch` the processes share the batches: picture k is OUT/k.png whoever draws it, from the same seed
and in a batch of the same company. What is there already is not drawn again, so a killed run is resumed by running it
again.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

from PIL import Image, PngImagePlugin

from training.loop import make_accelerator
from training.mini import generate_images_direct, load

BATCH = 8


def draw(unet_path: Path, prompts: list[str], out: Path, steps: int = 25, guidance: float = 3.0, seed: int = 0) -> None:
    """Picture k of prompts[k] into out/k.png, the settings inside, from seed + k; this process's share of them.

    Raises ValueError where `out` holds pictures of other settings, and what `generate_images_direct` raises.
    """
    accelerator = make_accelerator()
    load(unet_path)  # raises its sentence before anything is written
    weights = hashlib.sha256(Path(unet_path).read_bytes()).hexdigest()
    about = [json.dumps([prompt, seed + k, steps, guidance, weights]) for k, prompt in enumerate(prompts)]
    paths = [out / f"{k:05d}.png" for k in range(len(prompts))]
    for path, settings in zip(paths, about, strict=True):
        if path.exists():
            with Image.open(path) as drawn:
                if drawn.info.get("settings") != settings:
                    raise ValueError(f"{path} was drawn with other settings: name another folder or empty this one.")
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(prompts), BATCH)[accelerator.process_index :: accelerator.num_processes]:
        chosen = range(start, min(start + BATCH, len(prompts)))
        if all(paths[k].exists() for k in chosen):
            continue
        texts = [prompts[k] for k in chosen]
        images = generate_images_direct(unet_path, str(accelerator.device), texts, steps, guidance, seed + start)
        for k, image in zip(chosen, images, strict=True):
            inside = PngImagePlugin.PngInfo()
            inside.add_text("settings", about[k])
            partial = paths[k].with_suffix(f".{os.getpid()}.partial")
            image.save(partial, "PNG", pnginfo=inside)
            partial.replace(paths[k])  # a killed run leaves no half-written picture


def main() -> None:
    """The command line of `draw`; PROMPTS is a text file with one prompt a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("unet", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        draw(args.unet, prompts, args.out, args.steps, args.guidance, args.seed)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
