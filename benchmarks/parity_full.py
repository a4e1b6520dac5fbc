"""from_scratch against diffusers at the full size of Stable Diffusion 1.5: `python -m benchmarks.parity_full`.

The weights are random. Takes some minutes on two cores and about 8 GB of memory. Prints the largest relative difference
of every part, plain and fast, as a Markdown table; ends with an error if one is above 1e-5. With --quick, at a
hundredth of the size.
"""

import argparse
import gc
import platform
import sys
from collections.abc import Callable

import diffusers
import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import parts
from from_scratch import checkpoint, fast_cpu
from from_scratch.files import Entry

TOLERANCE = 1e-5


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def ours(part: str, theirs: nn.Module) -> nn.Module:
    """The same weights in from_scratch."""
    make = {"unet": checkpoint.make_unet, "vae": checkpoint.make_vae, "text_encoder": checkpoint.make_text_encoder}
    entries = {name: Entry(tuple(w.shape), lambda w=w: w) for name, w in theirs.state_dict().items()}
    entries = checkpoint.rename(entries, checkpoint.RENAMES)
    with torch.device("meta"):
        module = make[part](entries, theirs.config.to_dict() if part == "text_encoder" else dict(theirs.config))
    return checkpoint.fill(module, entries, torch.float32, "cpu")


def compare_text_encoder(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 77))
    return {"CLIP text encoder, 2 prompts": difference(mine(tokens), theirs(tokens)[0])}


def compare_vae(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    size = 64 if quick else 512
    images, latents = torch.randn(1, 3, size, size).clamp(-1, 1), torch.randn(1, 4, size // 8, size // 8)
    mean, deviation = mine.distribution(images)
    expected = theirs.encode(images).latent_dist
    return {
        f"VAE encoder, {size}x{size}": max(difference(mean, expected.mean), difference(deviation, expected.std)),
        f"VAE decoder, {size}x{size}": difference(
            mine.decode(latents), theirs.decode(latents / theirs.config.scaling_factor).sample
        ),
    }


def compare_unet(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    found, size = {}, 8 if quick else 64
    context = torch.randn(1, 77, theirs.config.cross_attention_dim)
    for height, width, t in ((size, size, 981), (size // 2 + 1, size // 2 + 3, 1)):
        x = torch.randn(1, 4, height, width)
        expected = theirs(x, t, context).sample
        found[f"UNet, {height}x{width} latents, t = {t}"] = difference(mine(x, t, context), expected)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the widths")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    compare: dict[str, Callable] = {
        "text_encoder": compare_text_encoder,
        "vae": compare_vae,
        "unet": compare_unet,
    }
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32\n")
    print("| part | parameters | largest relative difference |\n|---|---|---|", flush=True)
    worst = 0.0
    with torch.no_grad():
        for part, function in compare.items():
            theirs = parts(quick, part)[part]
            parameters = sum(w.numel() for w in theirs.parameters())
            mine = ours(part, theirs)
            for form in ("plain", "fast"):
                mine = fast_cpu.speed_up(mine) if form == "fast" else mine
                for name, value in function(mine, theirs, quick).items():
                    print(f"| {name}, {form} | {parameters:,} | {value:.1e} |", flush=True)
                    worst = max(worst, value)
            del mine, theirs
            gc.collect()
    print(f"\nThe largest is {worst:.1e}; {TOLERANCE:.0e} is allowed.")
    return worst > TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
