"""Stable Diffusion 3 and 3.5 from their files: as `checkpoint` for 1.x, with other names, shapes and settings."""

import math
from functools import partial
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F

from from_scratch.checkpoint import (
    RENAMES,
    VAE_RENAMES,
    build,
    clip_sizes,
    count,
    make_vae,
    own_size,
    read_settings,
    read_tokenizer,
    rename,
    rules,
    share,
    split,
    vae_places,
)
from from_scratch.clip import CLIPWithProjection, quick_gelu
from from_scratch.files import CheckpointError, Entries, Entry, part_entries
from from_scratch.mmdit import MMDiT
from from_scratch.pipeline_sd3 import T5_TOKENS, StableDiffusion3
from from_scratch.t5 import T5Encoder

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
# What the configuration files must say, and what they may; see `checkpoint`.
REQUIRED = {
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "transformer": {"_class_name": "SD3Transformer2DModel"},
    "vae": {"_class_name": "AutoencoderKL", "use_quant_conv": False, "use_post_quant_conv": False},
    "text_encoder": {"architectures": ["CLIPTextModelWithProjection"]},
    "text_encoder_2": {"architectures": ["CLIPTextModelWithProjection"]},
    "text_encoder_3": {"architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu"},
}
SCHEDULES = ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling")
SCHEDULES += ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
EXPECTED = {
    "scheduler": {"num_train_timesteps": 1000, "shift_terminal": None} | dict.fromkeys(SCHEDULES, False),
    "transformer": {},
    "vae": {"act_fn": "silu"},
    "text_encoder": {"layer_norm_eps": 1e-5},
    "text_encoder_2": {"layer_norm_eps": 1e-5},
    "text_encoder_3": {"layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128},
}
# What they say for Stable Diffusion 3.5, in so far as shapes do not: a single file comes without them.
SETTINGS = {
    "scheduler": {"shift": 3.0},
    "transformer": {"sample_size": 128},
    "vae": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder_2": {"hidden_act": "gelu"},
    "text_encoder_3": {},
}

# From diffusers and transformers to here, ...
MMDIT_RENAMES = rules("""
    pos_embed.proj > patches.proj, pos_embed.pos_embed > patches.table, transformer_blocks > blocks,
    time_text_embed.timestep_embedder.linear_1 > time_embedding.0,
    time_text_embed.timestep_embedder.linear_2 > time_embedding.1,
    time_text_embed.text_embedder.linear_1 > pooled_embedding.0,
    time_text_embed.text_embedder.linear_2 > pooled_embedding.1,
    context_embedder > context_embedding, norm_out.linear > modulation_out,
    norm1.linear > image.modulation, norm1_context.linear > text.modulation,
    attn.to_q > image.attn.to_q, attn.to_k > image.attn.to_k, attn.to_v > image.attn.to_v,
    attn.norm_q > image.attn.norm_q, attn.norm_k > image.attn.norm_k, attn.to_out.0 > image.attn.to_out,
    attn.add_q_proj > text.attn.to_q, attn.add_k_proj > text.attn.to_k, attn.add_v_proj > text.attn.to_v,
    attn.norm_added_q > text.attn.norm_q, attn.norm_added_k > text.attn.norm_k, attn.to_add_out > text.attn.to_out,
    attn2 > image.attn2, to_out.0 > to_out, ff.net.0.proj > image.mlp.fc1, ff.net.2 > image.mlp.fc2,
    ff_context.net.0.proj > text.mlp.fc1, ff_context.net.2 > text.mlp.fc2
""")
T5_RENAMES = rules("""
    shared > token_embedding, encoder.embed_tokens > token_embedding, encoder.final_layer_norm > final_layer_norm,
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias > position_bias, encoder.block > blocks,
    layer.0.layer_norm > norm1, layer.0.SelfAttention.q > to_q, layer.0.SelfAttention.k > to_k,
    layer.0.SelfAttention.v > to_v, layer.0.SelfAttention.o > to_out, layer.1.layer_norm > norm2,
    layer.1.DenseReluDense.wi_0 > gate, layer.1.DenseReluDense.wi_1 > proj_in, layer.1.DenseReluDense.wo > proj_out
""")
# ... and from the original files.
ORIGINAL_RENAMES = rules("""
    x_embedder.proj > patches.proj, pos_embed > patches.table, joint_blocks > blocks,
    t_embedder.mlp.0 > time_embedding.0, t_embedder.mlp.2 > time_embedding.1,
    y_embedder.mlp.0 > pooled_embedding.0, y_embedder.mlp.2 > pooled_embedding.1,
    context_embedder > context_embedding, final_layer.adaLN_modulation.1 > modulation_out,
    final_layer.linear > proj_out, x_block > image, context_block > text, adaLN_modulation.1 > modulation,
    ln_q > norm_q, ln_k > norm_k, attn.proj > attn.to_out, attn2.proj > attn2.to_out
""")


def rows(entry: Entry, part: int, parts: int) -> Entry:
    """One of `parts` equal parts of the rows of a weight or bias."""
    size = entry.shape[0] // parts
    return Entry((size, *entry.shape[1:]), lambda: entry.read()[part * size : (part + 1) * size])


def split_qkv(entries: Entries) -> Entries:
    """Original files hold queries, keys and values one above the other."""
    made = {}
    for name, entry in entries.items():
        if ".qkv." in name:
            made |= {name.replace("qkv", f"to_{letter}"): rows(entry, n, 3) for n, letter in enumerate("qkv")}
        else:
            made[name] = entry
    return made


def shift_first(entries: Entries) -> Entries:
    """diffusers has scale before shift where nothing but them is modulated, which is where the text and the image end;
    everywhere else, and in the original files throughout, shift is first.
    """
    ends = ("modulation_out.", f"blocks.{count(entries, 'blocks.') - 1}.text.modulation.")
    made = dict(entries)
    for name, entry in entries.items():
        if name.startswith(ends):
            made[name] = Entry(entry.shape, lambda entry=entry: torch.cat(entry.read().chunk(2)[::-1]))
    return made


def identity_projection(entries: Entries) -> Entries:
    """Some files leave out CLIP L's projection, which then changes nothing."""
    channels = entries["token_embedding.weight"].shape[1] if "token_embedding.weight" in entries else 0
    return {"text_projection.weight": Entry((channels, channels), lambda: torch.eye(channels))} | entries


def read_folder(path: Path) -> dict[str, Entries]:
    """The parts of a diffusers folder, with the names of this package's modules. T5's may be empty."""
    renames = {"transformer": MMDIT_RENAMES, "text_encoder_3": T5_RENAMES}
    optional = {"text_encoder_3"} if not (path / "text_encoder_3").exists() else set()
    parts = {p: {} if p in optional else rename(part_entries(path, p), renames.get(p, RENAMES)) for p in PARTS}
    return parts | {"transformer": shift_first(parts["transformer"])}


def read_single_file(path: Path, entries: Entries, folder: Path | None) -> dict[str, Entries]:
    """The parts of an original single file. Text encoders that it has not are those of `folder`, or empty."""
    parts = split(path, entries, PARTS, ("transformer", "vae"), "Stable Diffusion 3")
    parts["transformer"] = rename(split_qkv(parts["transformer"]), ORIGINAL_RENAMES)
    parts["vae"] = rename(parts["vae"], vae_places(parts["vae"]) + VAE_RENAMES + RENAMES)
    for part in ENCODERS:
        renames = T5_RENAMES if part == "text_encoder_3" else RENAMES
        if not parts[part] and folder and (folder / part).exists():
            parts[part] = part_entries(folder, part)
        parts[part] = rename(parts[part], renames)
    if parts["text_encoder"]:
        parts["text_encoder"] = identity_projection(parts["text_encoder"])
    return parts


def make_transformer(entries: Entries, settings: dict) -> MMDiT:
    """An MMDiT as the shapes say, with heads of 64 channels unless the settings or the norms of the heads differ."""
    channels, in_channels, patch, _ = entries["patches.proj.weight"].shape
    norm, layers = entries.get("blocks.0.image.attn.norm_q.weight"), count(entries, "blocks.")
    heads = share(settings, "num_attention_heads", max(channels // (norm.shape[0] if norm else 64), 1), channels)
    if settings.get("attention_head_dim", channels // heads) != channels // heads:
        raise ValueError(f"attention_head_dim is {settings['attention_head_dim']!r}, not {channels // heads}")
    side = settings.get("sample_size", 128)
    if not isinstance(side, int) or not 0 < side <= 1024:
        raise ValueError(f"sample_size is {side!r}, not a whole number up to 1024")
    return MMDiT(
        in_channels=in_channels,
        patch=patch,
        channels=channels,
        heads=heads,
        layers=layers,
        qk_norm=norm is not None,
        dual={n for n in range(layers) if f"blocks.{n}.image.attn2.to_q.weight" in entries},
        context_channels=entries["context_embedding.weight"].shape[1],
        pooled_channels=entries["pooled_embedding.0.weight"].shape[1],
        size=math.isqrt(entries["patches.table"].shape[1]),
        base=side // patch,
    )


def make_clip(entries: Entries, settings: dict) -> CLIPWithProjection:
    """A CLIP with a projection, as the shapes say."""
    activations = {"quick_gelu": quick_gelu, "gelu": F.gelu}
    name, end = settings.get("hidden_act", "quick_gelu"), settings.get("eos_token_id", 2)
    if not isinstance(name, str) or name not in activations:
        raise ValueError(f"hidden_act is {name!r}, not quick_gelu or gelu")
    if not isinstance(end, int):
        raise ValueError(f"eos_token_id is {end!r}, not a whole number")
    return CLIPWithProjection(
        *clip_sizes(entries, settings),
        activation=activations[name],
        projected=entries["text_projection.weight"].shape[0],
        end=None if end == 2 else end,  # 2 stands in the settings of all old CLIPs, and is wrong
    )


def make_t5(entries: Entries, settings: dict) -> T5Encoder:
    """A T5 as the shapes say."""
    vocabulary, channels = entries["token_embedding.weight"].shape
    inner, hidden = (entries[f"blocks.0.{name}.weight"].shape[0] for name in ("to_q", "gate"))
    buckets, heads = entries["position_bias.weight"].shape
    if inner % heads:
        raise ValueError(f"{heads} heads cannot share {inner} channels")
    return T5Encoder(vocabulary, channels, inner, hidden, count(entries, "blocks."), heads, buckets)


def check_sizes(path: Path, transformer: MMDiT, latents: int, encoders: list) -> None:
    """Raises CheckpointError if the transformer was not made for these latents and text encoders."""
    found = transformer.patches.proj.in_channels
    if found != latents:
        raise CheckpointError(f"The transformer in {path} reads latents of {found} channels, not of {latents}.")
    clips, t5 = [clip for clip in encoders[:2] if clip is not None], encoders[2]
    context, pooled = transformer.context_embedding.in_features, transformer.pooled_embedding[0].in_features
    width = sum(clip.token_embedding.embedding_dim for clip in clips)
    projected = sum(clip.text_projection.out_features for clip in clips)
    t5_width = context if t5 is None else t5.token_embedding.embedding_dim
    if len(clips) == 2 and (width > context or projected != pooled) or t5_width != context:
        reads = f"The transformer in {path} reads tokens of {context} channels and prompts of {pooled}"
        raise CheckpointError(
            f"{reads}, not what these text encoders write: CLIP {width} and {projected}, T5 {t5_width}."
        )
    if len({clip.positions for clip in clips}) > 1:
        raise CheckpointError(f"The two CLIPs in {path} read different numbers of tokens.")


def load(path: Path, entries: Entries | None, folder: Path | None, dtype, device) -> StableDiffusion3:
    """A StableDiffusion3 from the folder `path`, or from `entries` of a single file; `folder` has the settings."""
    parts = read_folder(path) if entries is None else read_single_file(path, entries, folder)
    settings = SETTINGS
    if folder:
        needed = [p for p in EXPECTED if p not in ENCODERS or (folder / p).exists()]
        settings = SETTINGS | read_settings(folder, REQUIRED, {p: EXPECTED[p] for p in needed})
    makers = dict.fromkeys(ENCODERS[:2], make_clip) | {"text_encoder_3": make_t5}
    makers |= {"vae": partial(make_vae, quant=False), "transformer": make_transformer}
    made = dict.fromkeys(PARTS)
    for part, make in makers.items():
        if parts[part]:
            made[part] = build(path, part, make, parts[part], settings[part], dtype, device)
    encoders, vae, transformer = [made[part] for part in ENCODERS], made["vae"], made["transformer"]
    check_sizes(path, transformer, vae.latent_channels, encoders)
    tokenizers = [None, None, None]
    for n, (encoder, name) in enumerate(zip(encoders, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=True)):
        if encoder is not None and folder and (path.is_dir() or (folder / name).exists()):
            size = (T5_TOKENS, None, "</s>") if n == 2 else (encoder.positions,)
            tokenizers[n] = read_tokenizer(folder / name, encoder, path, *size)
    shift = settings["scheduler"].get("shift", 1.0)
    if not isinstance(shift, Real) or not 0 < shift < math.inf:
        raise CheckpointError(f"{folder} says that shift is {shift!r}: give a number above 0.")
    size = own_size(folder, settings["transformer"], 128, vae.factor)
    return StableDiffusion3(encoders, vae, transformer, tokenizers, size, shift)
