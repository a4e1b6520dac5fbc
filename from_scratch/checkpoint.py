"""Weights from files: a diffusers folder, or an original single file. Names by rules, widths and depths from shapes.

Every part is first read as a table of names and shapes, renamed to the names of this package's modules, and only then
filled, tensor by tensor, into modules that hold no memory yet. Nothing is ever in memory twice.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from from_scratch.clip import CLIPTextEncoder
from from_scratch.pipeline import StableDiffusion, memory_layout
from from_scratch.tokenizer import Tokenizer
from from_scratch.unet import UNet
from from_scratch.vae import VAE

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}
# In a single file but in none of the parts: the averaged weights, and the noise schedule, which `samplers` computes.
IGNORED = re.compile(r"^(model_ema\.|alphas_|betas$|sqrt_|log_|posterior_|lvlb_weights$|logvar$)|position_ids$")

# What the configuration files may say, where this package knows one way only.
EXPECTED = {
    "scheduler": {
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    },
    "unet": {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1},
    "vae": {"act_fn": "silu"},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}

# Old name, new name, several a line; each stands for whole words between dots.
# From diffusers and transformers to here. Older folders call the VAE's attention query, key, value and proj_attn.
RENAMES = """
    downsamplers.0 downsample   upsamplers.0 upsample   to_out.0 to_out
    ff.net.0.proj ff.proj_in   ff.net.2 ff.proj_out
    time_embedding.linear_1 time_embedding.0   time_embedding.linear_2 time_embedding.1
    query to_q   key to_k   value to_v   proj_attn to_out
    text_model.embeddings embeddings   text_model.encoder encoder   text_model.final_layer_norm final_layer_norm
    embeddings.token_embedding token_embedding   embeddings.position_embedding position_embedding
    encoder.layers layers   mlp.fc1 fc1   mlp.fc2 fc2
"""
# From the original files to diffusers, for what does not depend on the place in the model.
COMPVIS_RENAMES = {
    "unet": """
        in_layers.0 norm1   in_layers.2 conv1   emb_layers.1 time_emb_proj   out_layers.0 norm2   out_layers.3 conv2
        skip_connection conv_shortcut   time_embed.0 time_embedding.0   time_embed.2 time_embedding.1
        middle_block.0 mid_block.resnets.0   middle_block.1 mid_block.attentions.0   middle_block.2 mid_block.resnets.1
        out.0 conv_norm_out   out.2 conv_out
    """,
    "vae": """
        mid.block_1 mid_block.resnets.0   mid.attn_1 mid_block.attentions.0   mid.block_2 mid_block.resnets.1
        attentions.0.norm attentions.0.group_norm   attentions.0.q attentions.0.to_q   attentions.0.k attentions.0.to_k
        attentions.0.v attentions.0.to_v   attentions.0.proj_out attentions.0.to_out
        nin_shortcut conv_shortcut   norm_out conv_norm_out
    """,
    "text_encoder": "",
}


class CheckpointError(ValueError):
    """The file or folder cannot be loaded; the message is one sentence that says why."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Entries = dict[str, Entry]


class SafetensorsFile:
    """A mapped file. What was read of it stays in memory as long as the mapping, so that is renewed now and then."""

    def __init__(self, path: Path):
        self.path, self.file, self.taken = path, safe_open(path, framework="pt"), 0

    def read(self, name: str) -> Tensor:
        if self.taken > 2**28:  # bytes
            self.file, self.taken = safe_open(self.path, framework="pt"), 0
        tensor = self.file.get_tensor(name)
        self.taken += tensor.nbytes
        return tensor


def read_safetensors(path: Path) -> Entries:
    """Names and shapes of a .safetensors file; the numbers are read when they are asked for."""
    try:
        mapped = SafetensorsFile(path)
        shapes = {name: tuple(mapped.file.get_slice(name).get_shape()) for name in mapped.file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is cut off or damaged, or no safetensors file: {error}.") from None
    return {name: Entry(shape, lambda name=name: mapped.read(name)) for name, shape in shapes.items()}


def read_pickle(path: Path) -> Entries:
    """The same for a .ckpt or .bin file. These are pickles, which can run code: only tensors are let through."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise CheckpointError(
                f"{path} asks Python for {found[1]}, which could run code; nothing was run: use a .safetensors file."
            ) from None
        raise CheckpointError(f"{path} is cut off or damaged, or holds more than tensors.") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is cut off or damaged: {reason}.") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {k: Entry(tuple(v.shape), lambda v=v: v) for k, v in state.items() if isinstance(v, Tensor)}


def read_file(path: Path) -> Entries:
    """Every tensor of a file, by the file's ending. Raises CheckpointError if it cannot be read."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def count(names: Iterable[str], prefix: str) -> int:
    """How many different things follow the prefix: count(names, "down_blocks.") is the number of levels."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def rename(entries: Entries, rules: list[str]) -> Entries:
    """The entries under new names, without what is IGNORED; `rules` is old, new, old, new, ... and is run in order."""
    renamed = {}
    for name, entry in entries.items():
        if not IGNORED.search(name):
            name = "." + name
            for old, new in zip(rules[::2], rules[1::2], strict=True):
                name = name.replace(f".{old}.", f".{new}.")
            renamed[name[1:]] = entry
    return renamed


def unet_places(names: Iterable[str]) -> list[str]:
    """Rules for a CompVis UNet, which numbers its blocks through: it is walked down and up, and what a block holds
    (a convolution of its own: a change of size, so the end of a level) says where it belongs.
    """
    names = set(names)
    places = ["input_blocks.0.0", "conv_in"]
    level = layer = 0
    for i in range(1, count(names, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in names:
            places += [f"input_blocks.{i}.0.op", f"down_blocks.{level}.downsample.conv"]
            level, layer = level + 1, 0
        else:
            places += [f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}"]
            places += [f"input_blocks.{i}.1", f"down_blocks.{level}.attentions.{layer}"]
            layer += 1
    level = layer = 0
    for i in range(count(names, "output_blocks.")):
        places += [f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}"]
        grows = [j for j in (1, 2) if f"output_blocks.{i}.{j}.conv.weight" in names]
        for j in (1, 2):
            target = f"up_blocks.{level}.upsample" if j in grows else f"up_blocks.{level}.attentions.{layer}"
            places += [f"output_blocks.{i}.{j}", target]
        level, layer = (level + 1, 0) if grows else (level, layer + 1)
    return places


def vae_places(names: Iterable[str]) -> list[str]:
    """Rules for the levels of a CompVis VAE. Its decoder counts them from the picture's size down, ours up to it."""
    places = []
    last = count(names, "decoder.up.") - 1
    for i in range(last + 1):
        for old, new in ((f"encoder.down.{i}", f"encoder.down_blocks.{i}"), (f"up.{i}", f"up_blocks.{last - i}")):
            places += [f"{old}.block", f"{new}.resnets", f"{old}.downsample", f"{new}.downsample"]
            places += [f"{old}.upsample", f"{new}.upsample"]
    return places


def read_single_file(path: Path) -> dict[str, Entries]:
    """The three parts of an original single file, with the names of this package's modules."""
    entries = read_file(path)
    parts = {}
    for part, prefix in PARTS.items():
        found = {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
        if not found:
            raise CheckpointError(
                f"{path} is no Stable Diffusion 1.x checkpoint: nothing in it starts with {prefix!r}."
            )
        places = unet_places(found) if part == "unet" else vae_places(found) if part == "vae" else []
        parts[part] = rename(found, places + (COMPVIS_RENAMES[part] + RENAMES).split())
    prefixes = tuple(PARTS.values())
    others = [name for name in entries if not name.startswith(prefixes) and not IGNORED.search(name)]
    if others:
        warnings.warn(f"{path} also holds what is not used: {some(others)}.", stacklevel=3)
    return parts


def read_folder(path: Path) -> dict[str, Entries]:
    """The three parts of a diffusers folder, with the names of this package's modules."""
    parts = {}
    for part in PARTS:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        endings = (".safetensors", ".fp16.safetensors", ".bin")
        old = ["pytorch_model.bin"] if part == "text_encoder" else []
        files = [path / part / name for name in [stem + ending for ending in endings] + old]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise CheckpointError(f"{path} is no Stable Diffusion folder: there is no {files[0].relative_to(path)}.")
        parts[part] = rename(read_file(file), RENAMES.split())
    return parts


def read_settings(folder: Path | None) -> dict[str, dict]:
    """The folder's configuration files, {} where there is none. Raises CheckpointError if they describe another."""
    settings = {}
    for part, expected in EXPECTED.items():
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json") if folder else None
        try:
            settings[part] = json.loads(file.read_text("utf-8")) if file and file.exists() else {}
        except ValueError:
            raise CheckpointError(f"{file} is no valid JSON.") from None
        for name, value in expected.items():
            if settings[part].get(name, value) != value:
                raise CheckpointError(f"{file} says {name} = {settings[part][name]!r}; here it can only be {value!r}.")
    return settings


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return (", ".join(names[:3]) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def make_unet(entries: Entries, settings: dict) -> UNet:
    """A UNet as the shapes say. Heads and groups leave no trace in them: 8 and 32, unless the settings know better."""
    levels = count(entries, "down_blocks.")
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim", 8)  # it means the number of heads
    heads = heads if isinstance(heads, list) else [heads] * levels
    return UNet(
        in_channels=entries["conv_in.weight"].shape[1],
        out_channels=entries["conv_out.weight"].shape[0],
        widths=[entries[f"down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)],
        layers=count(entries, "down_blocks.0.resnets."),
        context_channels=entries["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        heads=[heads[n] if count(entries, f"down_blocks.{n}.attentions.") else None for n in range(levels)],
        mid_heads=heads[-1],
        groups=settings.get("norm_num_groups", 32),
    )


def make_vae(entries: Entries, settings: dict) -> VAE:
    """A VAE as the shapes say, with 32 groups and SD1.5's scaling factor unless the settings know better."""
    levels = count(entries, "encoder.down_blocks.")
    return VAE(
        widths=[entries[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)],
        layers=count(entries, "encoder.down_blocks.0.resnets."),
        latent_channels=entries["post_quant_conv.weight"].shape[0],
        groups=settings.get("norm_num_groups", 32),
        scaling_factor=settings.get("scaling_factor", 0.18215),
    )


def make_text_encoder(entries: Entries, settings: dict) -> CLIPTextEncoder:
    """A text encoder as the shapes say, with heads of 64 channels, as in every CLIP, or as many as set."""
    vocabulary, channels = entries["token_embedding.weight"].shape
    return CLIPTextEncoder(
        vocabulary=vocabulary,
        positions=entries["position_embedding.weight"].shape[0],
        channels=channels,
        hidden_channels=entries["layers.0.fc1.weight"].shape[0],
        layers=count(entries, "layers."),
        heads=settings.get("num_attention_heads") or max(channels // 64, 1),
    )


def fill(module: nn.Module, entries: Entries, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Read every tensor into a module on the meta device. Raises CheckpointError for names or shapes that differ."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in entries]
    unexpected = [name for name in entries if name not in wanted]
    if missing or unexpected:
        raise CheckpointError(f"missing: {some(missing)}; unexpected: {some(unexpected)}")
    for name, tensor in wanted.items():
        # A 1x1 convolution and a linear layer are the same, and files differ in what they call them.
        if entries[name].shape not in (tensor.shape, (*tensor.shape, 1, 1)):
            raise CheckpointError(f"{name} is {entries[name].shape}, not {tuple(tensor.shape)}")
    layout, state = memory_layout(device), {}
    for name, tensor in wanted.items():
        read = entries[name].read().reshape(tensor.shape)
        # A copy even where nothing changes: weights left in a mapped file lie at odd addresses, and sums come out
        # differently by a bit; the same weights from another file should draw the very same picture.
        order = layout if read.ndim == 4 else torch.contiguous_format
        state[name] = read.to(device, dtype, memory_format=order, copy=True)
    module.load_state_dict(state, assign=True)
    return module.eval()


def load(
    path: str | Path,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """Stable Diffusion 1.x of any width and depth, from a diffusers folder or an original single file.

    A single file is a .safetensors, or a .ckpt that holds tensors only. It carries neither tokenizer nor the numbers of
    heads and groups: `config` is a folder in the layout of diffusers to take them from; without, they are SD1.5's.
    Weights may be in half precision on disk; `dtype` is what they become. Raises CheckpointError, one sentence.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no {path}.")
    folder = Path(config) if config else path if path.is_dir() else None
    settings = read_settings(folder)
    parts = read_folder(path) if path.is_dir() else read_single_file(path)
    made = {}
    for part, make in (("unet", make_unet), ("vae", make_vae), ("text_encoder", make_text_encoder)):
        try:
            with torch.device("meta"):
                module = make(parts[part], settings[part])
            made[part] = fill(module, parts[part], dtype, device)
        except KeyError as error:
            raise CheckpointError(f"The {part} in {path} is not Stable Diffusion 1.x's: there is no {error}.") from None
        except (ValueError, TypeError, IndexError, SafetensorError) as error:
            raise CheckpointError(f"The {part} in {path} is not Stable Diffusion 1.x's: {error}.") from None
    unet, vae, text_encoder = made["unet"], made["vae"], made["text_encoder"]
    if unet.in_channels != vae.latent_channels:
        raise CheckpointError(
            f"The unet in {path} reads {unet.in_channels} channels, not the {vae.latent_channels} of the latents: "
            "it was made for another task."
        )
    tokenizer = None
    if folder is not None:
        try:
            tokenizer = Tokenizer(folder / "tokenizer", text_encoder.positions)
        except FileNotFoundError as error:
            if path.is_dir():
                raise CheckpointError(str(error)) from None
    sample_size = settings["unet"].get("sample_size", 64)
    sample_size = sample_size if isinstance(sample_size, list) else [sample_size] * 2
    size = (sample_size[0] * vae.factor, sample_size[1] * vae.factor)
    return StableDiffusion(text_encoder, vae, unet, tokenizer, size)
