"""from_scratch against diffusers at the full size of Stable Diffusion 1.5: `python -m benchmarks.parity_full`, or of
3.5 Medium: `python -m benchmarks.parity_full --sd35`.

The weights are random. 1.5 takes some minutes on two cores and about 8 GB of memory, 3.5 Medium a quarter of an hour
and 12 GB, since both sides share the weights of its MMDiT; less with --layers. Prints the largest relative
difference of every part as a Markdown table; ends with an error if one is above 1e-5. With --quick, at a hundredth of
the size.
"""

import argparse
import gc
import platform
import sys
from collections.abc import Callable
from functools import partial

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.models import mmdit, parts, randomise
from from_scratch import checkpoint, checkpoint_sd3
from from_scratch.files import Entry
from from_scratch.mmdit import position_table

TOLERANCE = 1e-5
# How each part is made, and from which names; first those of 1.5, then those of 3.5.
MAKERS = {
    "unet": (checkpoint.make_unet, checkpoint.RENAMES),
    "vae": (checkpoint.make_vae, checkpoint.RENAMES),
    "text_encoder": (checkpoint.make_text_encoder, checkpoint.RENAMES),
    "transformer": (checkpoint_sd3.make_transformer, checkpoint_sd3.MMDIT_RENAMES),
    "vae_16": (partial(checkpoint.make_vae, quant=False), checkpoint.RENAMES),
    "clip": (checkpoint_sd3.make_clip, checkpoint.RENAMES),
    "t5": (checkpoint_sd3.make_t5, checkpoint_sd3.T5_RENAMES),
}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs_().max() / theirs.abs().max()).item()  # in place: a table of places is 0.9 GB


def ours(part: str, theirs: nn.Module) -> nn.Module:
    """The same weights in from_scratch; in the same memory, where they stay as they are."""
    make, renames = MAKERS[part]
    entries = {name: Entry(tuple(w.shape), lambda w=w: w) for name, w in theirs.state_dict().items()}
    entries = checkpoint.rename(entries, renames)
    if part == "transformer":
        entries = checkpoint_sd3.shift_first(entries)
    with torch.device("meta"):
        config = theirs.config
        module = make(entries, config.to_dict() if hasattr(config, "to_dict") else dict(config))
    if part in ("transformer", "t5"):  # there would not be room for them twice
        module.load_state_dict({name: entry.read() for name, entry in entries.items()}, assign=True)
        return module.eval()
    return checkpoint.fill(module, entries, torch.float32, "cpu")


def compare_text_encoder(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 77))
    return {"CLIP text encoder, 2 prompts": difference(mine(tokens), theirs(tokens)[0])}


def compare_vae(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    size, channels, config = 64 if quick else 512, mine.latent_channels, theirs.config
    images, latents = torch.randn(1, 3, size, size).clamp(-1, 1), torch.randn(1, channels, size // 8, size // 8)
    mean, deviation = mine.distribution(images)
    expected = theirs.encode(images).latent_dist
    z = latents / config.scaling_factor + (config.shift_factor or 0)
    return {
        f"VAE encoder, {size}x{size}": max(difference(mean, expected.mean), difference(deviation, expected.std)),
        f"VAE decoder, {size}x{size}": difference(mine.decode(latents), theirs.decode(z).sample),
    }


def compare_unet(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    found, size = {}, 8 if quick else 64
    context = torch.randn(1, 77, theirs.config.cross_attention_dim)
    for height, width, t in ((size, size, 981), (size // 2 + 1, size // 2 + 3, 1)):
        x = torch.randn(1, 4, height, width)
        expected = theirs(x, t, context).sample
        found[f"UNet, {height}x{width} latents, t = {t}"] = difference(mine(x, t, context), expected)
    return found


def compare_clip(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 77))
    context, pooled = mine(tokens)
    expected = theirs(tokens, output_hidden_states=True)
    found = max(difference(context, expected.hidden_states[-2]), difference(pooled, expected.text_embeds))
    return {f"CLIP of {theirs.config.hidden_size} channels, 2 prompts": found}


def compare_t5(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 256))
    return {f"T5, {theirs.config.num_layers} blocks, 2 prompts": difference(mine(tokens), theirs(tokens)[0])}


def compare_transformer(mine: nn.Module, theirs: nn.Module, quick: bool) -> dict[str, float]:
    found, size, config = {}, 8 if quick else 64, theirs.config
    context, pooled = torch.randn(1, 333, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
    for height, width, t in ((size, size, 1000.0), (size // 2, size // 4 + 4, 8.9)):
        x, name = torch.randn(1, 16, height, width), f"MMDiT-X, {config.num_layers} blocks, {height}x{width} latents"
        expected = theirs(x, context, pooled, torch.tensor([t])).sample
        found[f"{name}, t = {t}"] = difference(mine(x, t, context, pooled), expected)
    skip = [7, 8, 9] if config.num_layers > 9 else [0]
    expected = theirs(x, context, pooled, torch.tensor([t]), skip_layers=skip).sample
    found[f"{name}, without blocks {skip}"] = difference(mine(x, t, context, pooled, skip), expected)
    side = config.pos_embed_max_size
    table = position_table(theirs.inner_dim, side, config.sample_size // config.patch_size)
    found[f"table of {side}x{side} places"] = difference(table, theirs.pos_embed.pos_embed)
    return found


def sd15(quick: bool) -> dict[str, tuple[str, Callable, Callable]]:
    """Parts of Stable Diffusion 1.5: which one it is, what makes diffusers', what compares."""
    compare = {"text_encoder": compare_text_encoder, "vae": compare_vae, "unet": compare_unet}
    return {part: (part, lambda part=part: parts(quick, part)[part], function) for part, function in compare.items()}


def sd35(quick: bool, layers: int) -> dict[str, tuple[str, Callable, Callable]]:
    """The same of 3.5 Medium, with so many of the MMDiT's 24 blocks and two of T5's, of which all would be 19 GB."""
    few, t5 = (2, 256) if quick else (None, 4096)

    def clip(channels: int, layers: int, activation: str):
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=channels,
            intermediate_size=4 * channels,
            projection_dim=channels,
            num_hidden_layers=few or layers,
            num_attention_heads=channels // 64,
            hidden_act=activation,
            eos_token_id=2,
        )
        return randomise(CLIPTextModelWithProjection(config))

    def make_t5():
        config = T5Config(
            vocab_size=32128,
            d_model=t5,
            d_kv=64,
            d_ff=5 * t5 // 2,
            num_layers=2,
            num_heads=t5 // 64,
            feed_forward_proj="gated-gelu",
        )
        return randomise(T5EncoderModel(config))

    def make_vae():
        widths = [32, 64, 128, 128] if quick else [128, 256, 512, 512]
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        quant = {"use_quant_conv": False, "use_post_quant_conv": False}
        numbers = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "layers_per_block": 2}
        return randomise(AutoencoderKL(block_out_channels=widths, **kinds, **quant, **numbers))

    return {
        "CLIP L": ("clip", lambda: clip(64 if quick else 768, 12, "quick_gelu"), compare_clip),
        "CLIP G": ("clip", lambda: clip(128 if quick else 1280, 32, "gelu"), compare_clip),
        "T5": ("t5", make_t5, compare_t5),
        "VAE": ("vae_16", make_vae, compare_vae),
        "MMDiT-X": ("transformer", lambda: mmdit(quick, few or layers), compare_transformer),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the widths")
    parser.add_argument("--sd35", action="store_true", help="Stable Diffusion 3.5 Medium")
    parser.add_argument("--layers", type=int, default=24, help="of the 24 blocks of 3.5's MMDiT only the first ones")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.manual_seed(0)
    compare = sd35(quick, arguments.layers) if arguments.sd35 else sd15(quick)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32\n")
    print("| part | parameters | largest relative difference |\n|---|---|---|", flush=True)
    worst = 0.0
    with torch.no_grad():
        for part, make, function in compare.values():
            theirs = make()
            parameters = sum(w.numel() for w in theirs.parameters())
            mine = ours(part, theirs)
            for name, value in function(mine, theirs, quick).items():
                print(f"| {name} | {parameters:,} | {value:.1e} |", flush=True)
                worst = max(worst, value)
            del mine, theirs
            gc.collect()
    print(f"\nThe largest is {worst:.1e}; {TOLERANCE:.0e} is allowed.")
    return worst > TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
