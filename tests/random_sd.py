"""Small Stable Diffusion pipelines of random weights, made by diffusers, also in the original layout."""

import re
from pathlib import Path

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(**SCHEDULE, clip_sample=False),
    "ddim": lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**SCHEDULE),
    "dpm++2m": lambda: DPMSolverMultistepScheduler(**SCHEDULE),
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh weights, norms and biases too: a mix-up of two of them shows, and so does a wrong epsilon."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(values / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.2 * values + (1 if name.endswith("weight") else 0))
    return module.eval()


def unet(widths=(32, 64, 96, 96), layers=2, plain_levels=1, context=64, heads=8, groups=32) -> UNet2DConditionModel:
    kinds = ["CrossAttn"] * (len(widths) - plain_levels) + [""] * plain_levels
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        cross_attention_dim=context,
        attention_head_dim=heads,
        norm_num_groups=groups,
    )
    return randomise(model, 1)


def vae(widths=(32, 32, 64, 64), layers=2, groups=32, scaling_factor=0.18215) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=4,
        norm_num_groups=groups,
        scaling_factor=scaling_factor,
    )
    return randomise(model, 2)


def text_encoder(vocabulary: int, channels=64, heads=1, layers=2, positions=77) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=channels,
        intermediate_size=4 * channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
    )
    return randomise(CLIPTextModel(config), 3)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """Four levels, as SD1.5 has them, a hundredth of its widths, and its numbers of heads and groups."""
    words = tiny.tokenizer(folder / "words")
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet(),
        scheduler=SCHEDULERS["ddim"](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compvis_unet(weights: dict, layers: int) -> dict:
    """diffusers' names of a UNet -> the original ones, by arithmetic; from_scratch goes by what is in the file."""
    levels = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("down_blocks."))
    attention_up = {name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d+\.attentions", name)}

    def place(match: re.Match) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            index = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else layer)
            return f"input_blocks.{index}." + {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
        index = level * (layers + 1) + (layers if kind == "upsamplers" else layer)
        after = "2." if match[2] in attention_up else "1."
        return f"output_blocks.{index}." + {"resnets": "0.", "attentions": "1.", "upsamplers": after + "conv."}[kind]

    assert levels > 1
    rules = [
        (r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(conv\.(?=\w+$))?", place),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"\.norm1\.(?=\w+$)(?<!blocks\.0\.norm1\.)", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.(?=\w+$)(?<!blocks\.0\.norm2\.)", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ]
    return {substitute(name, rules): weight for name, weight in weights.items()}


def compvis_vae(weights: dict, levels: int) -> dict:
    rules = [
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
    ]
    renamed = {}
    for name, weight in weights.items():
        convolution = "attentions" in name and name.endswith("weight") and weight.ndim == 2
        renamed[substitute(name, rules)] = weight[:, :, None, None] if convolution else weight
    return renamed


def substitute(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def compvis(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of a pipeline in the original single-file layout, with what else such files hold."""
    unet, vae = pipe.unet, pipe.vae
    parts = {
        "model.diffusion_model.": compvis_unet(unet.state_dict(), unet.config.layers_per_block),
        "first_stage_model.": compvis_vae(vae.state_dict(), len(vae.config.block_out_channels)),
        "cond_stage_model.transformer.text_model.": {
            name.removeprefix("text_model."): weight for name, weight in pipe.text_encoder.state_dict().items()
        },
    }
    state = {prefix + name: weight.contiguous() for prefix, part in parts.items() for name, weight in part.items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.ones(1000)
    state["sqrt_one_minus_alphas_cumprod"] = torch.ones(1000)
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
    return state
