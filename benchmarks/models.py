"""Stable Diffusion 1.5 with random weights, made by diffusers and transformers: in memory, or as a folder. And the
MMDiT-X of 3.5 Medium.
"""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE)


def randomise(module: nn.Module) -> nn.Module:
    """Norms and biases are made random too, so that a mix-up of two of them shows."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    return module.eval()


def parts(quick: bool = False, only: str | None = None) -> dict[str, nn.Module]:
    """UNet, VAE and text encoder (or one of them) at full size; `quick`: at a tenth of the widths, so a hundredth."""
    width, text, vae = (32, 64, 32) if quick else (320, 768, 128)
    made = {}
    if only in (None, "unet"):
        made["unet"] = UNet2DConditionModel(
            sample_size=8 if quick else 64,
            block_out_channels=[width, 2 * width, 4 * width, 4 * width],
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            cross_attention_dim=text,
            attention_head_dim=8,
        )
    if only in (None, "vae"):
        made["vae"] = AutoencoderKL(
            block_out_channels=[vae, 2 * vae, 4 * vae, 4 * vae],
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
        )
    if only in (None, "text_encoder"):
        made["text_encoder"] = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=text,
                intermediate_size=4 * text,
                num_hidden_layers=2 if quick else 12,
                num_attention_heads=text // 64,
            )
        )
    return {name: randomise(module) for name, module in made.items()}


def mmdit(quick: bool = False, layers: int = 24, dual: int = 13) -> SD3Transformer2DModel:
    """3.5 Medium's transformer, 2.2 billion weights, or some of its blocks, of which the first `dual` attend twice."""
    heads, context = (2, 256) if quick else (24, 4096)
    model = SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=context,
        pooled_projection_dim=context // 2,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )
    return randomise(model)


def save(folder: Path, quick: bool = False, dtype: torch.dtype = torch.float16) -> None:
    """A diffusers folder; half precision, as most downloads are. Its tokenizer only spells."""
    torch.manual_seed(0)
    words = folder / "words"
    words.mkdir(parents=True, exist_ok=True)
    letters = [*string.printable.strip(), *(f"{c}</w>" for c in string.printable.strip())]
    tokens = dict.fromkeys([*letters, "<|startoftext|>", "<|endoftext|>"])
    (words / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    pipe = StableDiffusionPipeline(
        **{name: module.to(dtype) for name, module in parts(quick).items()},
        tokenizer=CLIPTokenizer.from_pretrained(words, model_max_length=77),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
