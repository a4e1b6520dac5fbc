"""Stable Diffusion 1.x from its files, a diffusers folder or an original single file, and what reads other models too.

Every part is first read as a table of names and shapes. Rules make the names those of this package's modules, shapes
give widths and depths, and modules that hold no memory yet are filled tensor by tensor.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from from_scratch.clip import CLIPTextEncoder
from from_scratch.files import CheckpointError, Entries, part_entries, read_json
from from_scratch.pipeline import StableDiffusion
from from_scratch.tokenizer import Tokenizer
from from_scratch.unet import UNet
from from_scratch.vae import VAE

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}
# In a single file but in none of the parts: the averaged weights, the noise schedule, which `samplers` computes, and
# what only the training of CLIP needs.
IGNORED = re.compile(
    r"^(model_ema\.|alphas_|betas$|sqrt_|log_|posterior_|lvlb_weights$|logvar$)|position_ids$|logit_scale$"
)

# How ComfyUI marks weights in eight bits that mean nothing without scales of their own: t5xxl_fp8_e4m3fn_scaled.
SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant)$")

# What the configuration files must say, since the libraries would otherwise take another value or another model, ...
REQUIRED = {
    "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "unet": {"_class_name": "UNet2DConditionModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "text_encoder": {"architectures": ["CLIPTextModel"]},
}
# ... and what they may, where this package knows one way only.
EXPECTED = {
    "scheduler": {"prediction_type": "epsilon", "num_train_timesteps": 1000, "trained_betas": None},
    "unet": {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1},
    "vae": {"act_fn": "silu", "shift_factor": None},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}

Rules = list[tuple[str, str]]  # old name, new name; each stands for whole words between dots


def rules(text: str) -> Rules:
    """Rules from a table of "old > new", with commas between."""
    return [tuple(rule.strip().split(" > ")) for rule in text.split(",")]


# From diffusers and transformers to here. Older folders call the VAE's attention query, key, value and proj_attn.
RENAMES = rules("""
    downsamplers.0 > downsample, upsamplers.0 > upsample, to_out.0 > to_out,
    ff.net.0.proj > ff.proj_in, ff.net.2 > ff.proj_out,
    time_embedding.linear_1 > time_embedding.0, time_embedding.linear_2 > time_embedding.1,
    query > to_q, key > to_k, value > to_v, proj_attn > to_out,
    text_model.embeddings > embeddings, text_model.encoder > encoder, text_model.final_layer_norm > final_layer_norm,
    embeddings.token_embedding > token_embedding, embeddings.position_embedding > position_embedding,
    encoder.layers > layers, mlp.fc1 > fc1, mlp.fc2 > fc2,
    q_proj > to_q, k_proj > to_k, v_proj > to_v, self_attn.out_proj > self_attn.to_out
""")
# From the original files to diffusers, for what does not depend on the place in the model.
UNET_RENAMES = rules("""
    in_layers.0 > norm1, in_layers.2 > conv1, emb_layers.1 > time_emb_proj, out_layers.0 > norm2, out_layers.3 > conv2,
    skip_connection > conv_shortcut, time_embed.0 > time_embedding.0, time_embed.2 > time_embedding.1,
    middle_block.0 > mid_block.resnets.0, middle_block.1 > mid_block.attentions.0,
    middle_block.2 > mid_block.resnets.1, out.0 > conv_norm_out, out.2 > conv_out
""")
VAE_RENAMES = rules("""
    mid.block_1 > mid_block.resnets.0, mid.attn_1 > mid_block.attentions.0, mid.block_2 > mid_block.resnets.1,
    attentions.0.norm > attentions.0.group_norm, attentions.0.q > attentions.0.to_q,
    attentions.0.k > attentions.0.to_k, attentions.0.v > attentions.0.to_v,
    attentions.0.proj_out > attentions.0.to_out, nin_shortcut > conv_shortcut, norm_out > conv_norm_out
""")


def count(names: Iterable[str], prefix: str) -> int:
    """How many different things follow the prefix: count(names, "down_blocks.") is the number of levels."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def rename(entries: Entries, rules: Rules) -> Entries:
    """The entries under new names, by the rules in their order, without what is IGNORED."""
    renamed = {}
    for name, entry in entries.items():
        if not IGNORED.search(name):
            name = f".{name}."
            for old, new in rules:
                name = name.replace(f".{old}.", f".{new}.")
            renamed[name[1:-1]] = entry
    return renamed


def unet_places(names: Iterable[str]) -> Rules:
    """Rules for a CompVis UNet, which numbers its blocks through. A change of size is a block of its own on the way
    down, and on the way up a part of the level's last block, after its attention if there is one.
    """
    names, places = set(names), [("input_blocks.0.0", "conv_in")]
    downs, ups = count(names, "input_blocks."), count(names, "output_blocks.")
    each = next((i for i in range(1, downs) if f"input_blocks.{i}.0.op.weight" in names), downs)  # layers + 1
    for side, first, blocks in (("input", 1, downs), ("output", 0, ups)):
        for i in range(first, blocks):
            level, layer = divmod(i - first, each)
            old, new = f"{side}_blocks.{i}", f"{'down' if side == 'input' else 'up'}_blocks.{level}"
            places += [(f"{old}.0.op", f"{new}.downsample.conv")]
            places += [(f"{old}.{place}.conv", f"{new}.upsample.conv") for place in (1, 2)]
            places += [(f"{old}.0", f"{new}.resnets.{layer}"), (f"{old}.1", f"{new}.attentions.{layer}")]
    return places


def vae_places(names: Iterable[str]) -> Rules:
    """Rules for the levels of a CompVis VAE. Its decoder counts them from the picture's size down, ours up to it."""
    last = count(names, "decoder.up.") - 1
    return [
        (f"{old}.{kind}", f"{new}.{'resnets' if kind == 'block' else kind}")
        for i in range(last + 1)
        for old, new in ((f"encoder.down.{i}", f"encoder.down_blocks.{i}"), (f"up.{i}", f"up_blocks.{last - i}"))
        for kind in ("block", "downsample", "upsample")
    ]


def split(path: Path, entries: Entries, prefixes: dict[str, str], needed: Iterable[str], model: str):
    """The parts of a single file, by the prefixes of their names, which are taken off. Warns of what is in none."""
    parts = {}
    for part, prefix in prefixes.items():
        parts[part] = {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
        if part in needed and not parts[part]:
            raise CheckpointError(f"{path} is no {model} checkpoint: nothing starts with {prefix!r}.")
    others = [name for name in entries if not name.startswith(tuple(prefixes.values())) and not IGNORED.search(name)]
    if others:
        warnings.warn(f"{path} also holds what is not used: {', '.join(others[:3])}.", stacklevel=5)
    return parts


def read_single_file(path: Path, entries: Entries) -> dict[str, Entries]:
    """The three parts of an original single file, with the names of this package's modules."""
    parts = split(path, entries, PARTS, PARTS, "Stable Diffusion 1.x")
    return {
        "unet": rename(parts["unet"], unet_places(parts["unet"]) + UNET_RENAMES + RENAMES),
        "vae": rename(parts["vae"], vae_places(parts["vae"]) + VAE_RENAMES + RENAMES),
        "text_encoder": rename(parts["text_encoder"], RENAMES),
    }


def read_folder(path: Path) -> dict[str, Entries]:
    """The three parts of a diffusers folder, with the names of this package's modules."""
    return {part: rename(part_entries(path, part), RENAMES) for part in PARTS}


def read_settings(folder: Path, required: dict[str, dict], expected: dict[str, dict]) -> dict[str, dict]:
    """The folder's configuration files. Raises CheckpointError if one is missing or describes another model."""
    settings = {}
    for part in expected:
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        settings[part] = found = read_json(file)
        for name, value in (required[part] | expected[part]).items():
            if found.get(name, None if name in required[part] else value) != value:
                raise CheckpointError(f"{file} says {name} = {found.get(name)!r}; here it can only be {value!r}.")
    return settings


def share(settings: dict, name: str, default: int, channels: int) -> int:
    """The number of heads or groups that share the channels. Raises ValueError if they cannot do so equally."""
    number = default if settings.get(name) is None else settings[name]
    if not isinstance(number, int) or number < 1 or channels % number:
        raise ValueError(f"{name} is {number!r}, and {channels} channels cannot be shared like that")
    return number


def level_widths(entries: Entries, prefix: str, settings: dict) -> list[int]:
    """The channels of each level. Raises ValueError if the settings are for others."""
    levels = count(entries, f"{prefix}down_blocks.")
    widths = [entries[f"{prefix}down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)]
    if list(settings.get("block_out_channels", widths)) != widths:
        raise ValueError(f"block_out_channels is {settings['block_out_channels']!r}, not {widths}")
    return widths


def make_unet(entries: Entries, settings: dict) -> UNet:
    """A UNet as the shapes say. Heads and groups leave no trace in them: 8 and 32, unless the settings know better."""
    widths = level_widths(entries, "", settings)
    # diffusers means the number of heads by attention_head_dim; it may be one number, or one for each level.
    name = "attention_head_dim" if settings.get("num_attention_heads") is None else "num_attention_heads"
    each = settings[name] if isinstance(settings.get(name), list) else [settings.get(name)] * len(widths)
    attend = [count(entries, f"down_blocks.{n}.attentions.") for n in range(len(widths))]
    return UNet(
        in_channels=entries["conv_in.weight"].shape[1],
        out_channels=entries["conv_out.weight"].shape[0],
        widths=widths,
        layers=count(entries, "down_blocks.0.resnets."),
        context_channels=entries["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        heads=[share({name: h}, name, 8, w) if a else None for h, w, a in zip(each, widths, attend, strict=True)],
        mid_heads=share({name: each[-1]}, name, 8, widths[-1]),
        groups=share(settings, "norm_num_groups", 32, math.gcd(*widths)),
    )


def make_vae(entries: Entries, settings: dict, quant: bool = True) -> VAE:
    """A VAE as the shapes say, with 32 groups and SD1.5's scaling factor unless the settings know better."""
    widths, factor = level_widths(entries, "encoder.", settings), settings.get("scaling_factor", 0.18215)
    if not isinstance(factor, Real) or not 0 < factor < math.inf:
        raise ValueError(f"scaling_factor is {factor!r}, not a number above 0")
    shift = settings.get("shift_factor") or 0.0
    if not isinstance(shift, Real) or not -math.inf < shift < math.inf:
        raise ValueError(f"shift_factor is {shift!r}, not a number")
    layers, groups = count(entries, "encoder.down_blocks.0.resnets."), math.gcd(*widths)
    latents = entries["post_quant_conv.weight" if quant else "decoder.conv_in.weight"].shape[0 if quant else 1]
    return VAE(widths, layers, latents, share(settings, "norm_num_groups", 32, groups), factor, shift, quant)


def clip_sizes(entries: Entries, settings: dict) -> tuple[int, ...]:
    """What CLIPTextEncoder takes, as the shapes say, with heads of 64 channels, as in every CLIP, or as many as set."""
    vocabulary, channels = entries["token_embedding.weight"].shape
    positions, hidden = (entries[f"{name}.weight"].shape[0] for name in ("position_embedding", "layers.0.fc1"))
    heads = share(settings, "num_attention_heads", max(channels // 64, 1), channels)
    return vocabulary, positions, channels, hidden, count(entries, "layers."), heads


def make_text_encoder(entries: Entries, settings: dict) -> CLIPTextEncoder:
    """The text encoder of SD1.5, as the shapes say."""
    return CLIPTextEncoder(*clip_sizes(entries, settings))


def fill(module: nn.Module, entries: Entries, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Read every tensor into a module on the meta device. Raises ValueError if names, shapes or numbers differ."""
    wanted = module.state_dict()
    if any(map(SCALED.search, entries)):
        raise ValueError("it is scaled fp8, which only its own program can read; use the file in float16")
    wrong = [f"{name} is missing" for name in wanted if name not in entries]
    wrong += [f"{name} is unexpected" for name in entries if name not in wanted]
    if wrong:
        raise ValueError(", ".join(wrong[:4]) + (f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    state = {}
    for name, tensor in wanted.items():
        # A 1x1 convolution and a linear layer are the same, and files differ in what they call them.
        if entries[name].shape not in (tensor.shape, (*tensor.shape, 1, 1)):
            raise ValueError(f"{name} is {entries[name].shape}, not {tuple(tensor.shape)}")
        read = entries[name].read()
        if not read.is_floating_point():
            raise ValueError(f"{name} holds {read.dtype} numbers, which only its own program can read")
        # A copy, since at the odd addresses of a mapped file sums of the same weights may differ by a bit.
        state[name] = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(read.reshape(tensor.shape))
    module.load_state_dict(state, assign=True)
    return module.eval()


def build(path: Path, part: str, make: Callable, entries: Entries, settings: dict, dtype, device) -> nn.Module:
    """One part, by its `make(entries, settings)`. Raises CheckpointError if it cannot be."""
    try:
        with torch.device("meta"):
            module = make(entries, settings)
        return fill(module, entries, dtype, device)
    except (LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = "there is no " * isinstance(error, KeyError) + str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(f"The {part} in {path} cannot be loaded: {reason}.") from None


def read_tokenizer(folder: Path, text_encoder: nn.Module, path: Path, length: int, *around: str | None) -> Tokenizer:
    """The tokenizer in `folder`. Raises CheckpointError if it has tokens that the text encoder from `path` has not."""
    tokenizer = Tokenizer(folder, length, *around)
    if max(tokenizer.pieces.get_vocab().values()) >= text_encoder.token_embedding.num_embeddings:
        raise CheckpointError(f"The tokenizer in {folder} knows more tokens than the text encoder in {path}.")
    return tokenizer


def own_size(folder: Path | None, settings: dict, default: int, factor: int) -> tuple[int, int]:
    """Height and width of the pictures of training, in pixels: `factor` times those of the latents in the settings."""
    size = settings.get("sample_size") or default
    size = size if isinstance(size, list) else [size] * 2
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= 1024 for side in size):
        raise CheckpointError(f"{folder} says that sample_size is {size!r}: give a whole number, or two.")
    return size[0] * factor, size[1] * factor


def load(path: Path, entries: Entries | None, folder: Path | None, dtype, device) -> StableDiffusion:
    """A StableDiffusion 1.x from the folder `path`, or from `entries` of a single file; `folder` has the settings."""
    parts = read_single_file(path, entries) if entries is not None else read_folder(path)
    settings = read_settings(folder, REQUIRED, EXPECTED) if folder else dict.fromkeys(PARTS, {})
    makers = {"text_encoder": make_text_encoder, "vae": make_vae, "unet": make_unet}
    made = {p: build(path, p, make, parts[p], settings[p], dtype, device) for p, make in makers.items()}
    text_encoder, vae, unet = made.values()
    latents, channels = vae.latent_channels, text_encoder.token_embedding.embedding_dim
    found = (unet.conv_in.in_channels, unet.conv_out.out_channels, unet.context_channels)
    if found != (latents, latents, channels):
        reads = f"The unet in {path} reads latents of {found[0]} channels and tokens of {found[2]}"
        raise CheckpointError(f"{reads}, not of {latents} and {channels}: it was made for another task.")
    tokenizer = None
    if folder and (path.is_dir() or (folder / "tokenizer").exists()):
        tokenizer = read_tokenizer(folder / "tokenizer", text_encoder, path, text_encoder.positions)
    return StableDiffusion(text_encoder, vae, unet, tokenizer, own_size(folder, settings["unet"], 64, vae.factor))
