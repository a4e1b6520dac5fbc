"""Small Stable Diffusion 3 pipelines of random weights, made by diffusers, also in the original layout."""

import re
from pathlib import Path

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from random_sd import compvis_vae, randomise, substitute
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CLIP_L, CLIP_G, T5 = 64, 128, 208  # channels; T5's are more than the CLIPs' together, as in SD3


def transformer(heads=2, head_channels=64, patch=2, layers=3, dual=(0, 1), qk_norm="rms_norm", size=12, sample=8):
    model = SD3Transformer2DModel(
        sample_size=sample,
        patch_size=patch,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_channels,
        num_attention_heads=heads,
        joint_attention_dim=T5,
        caption_projection_dim=heads * head_channels,
        pooled_projection_dim=CLIP_L + CLIP_G,
        pos_embed_max_size=size,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    return randomise(model, 1)


def vae(shift_factor=0.0609, scaling_factor=1.5305) -> AutoencoderKL:
    widths = (32, 32, 64, 64)
    model = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift_factor,
        scaling_factor=scaling_factor,
    )
    return randomise(model, 2)


def clip(vocabulary: int, channels: int, activation: str, end: int = 2, layers=3) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=channels,
        intermediate_size=2 * channels,
        projection_dim=channels,
        num_hidden_layers=layers,
        num_attention_heads=channels // 64,
        hidden_act=activation,
        eos_token_id=end,
    )
    return randomise(CLIPTextModelWithProjection(config), channels)


def t5(layers=2, heads=3, buckets=32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=160,
        d_model=T5,
        d_kv=16,  # heads · 16 are not d_model, as in no T5 larger than "large"
        d_ff=96,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=buckets,
    )
    return randomise(T5EncoderModel(config), 4)


def pipeline(folder: Path, shift: float = 3.0, **options) -> StableDiffusion3Pipeline:
    """All three text encoders; CLIP G's prompts are padded with "!", as in SD3. `options` are the transformer's."""
    words = [tiny.tokenizer(folder / name) for name in ("words", "words_2")]
    words[1].pad_token = "!"
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(**options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(),
        text_encoder=clip(len(words[0]), CLIP_L, "quick_gelu"),
        tokenizer=words[0],
        text_encoder_2=clip(len(words[1]), CLIP_G, "gelu"),
        tokenizer_2=words[1],
        text_encoder_3=t5(),
        tokenizer_3=tiny.t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original_transformer(weights: dict) -> dict:
    """diffusers' names of an MMDiT -> the original ones; queries, keys and values become one, shift comes first."""
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    rules = [
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
        (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
        (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
        (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
        (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
        (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
        (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
        (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
        (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
        (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    ]
    made = {}
    for name, weight in weights.items():
        if found := re.match(r"transformer_blocks\.(\d+)\.(attn2?)\.(to|add)_(q|q_proj)\.(\w+)$", name):
            side = "x_block" if found[3] == "to" else "context_block"
            three = [weights[name.replace(found[4], letter + found[4][1:])] for letter in "qkv"]
            made[f"joint_blocks.{found[1]}.{side}.{found[2]}.qkv.{found[5]}"] = torch.cat(three)
        elif not re.search(r"\.(to|add)_[kv](_proj)?\.", name):
            if name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
                weight = torch.cat(weight.chunk(2)[::-1])
            made[substitute(name, rules)] = weight
    return made


def original(pipe: StableDiffusion3Pipeline, projection: bool = True) -> dict[str, torch.Tensor]:
    """All weights of a pipeline in the original single-file layout; `projection` False: without CLIP L's."""
    parts = {
        "model.diffusion_model.": original_transformer(pipe.transformer.state_dict()),
        "first_stage_model.": compvis_vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels)),
        "text_encoders.clip_l.transformer.": pipe.text_encoder.state_dict(),
        "text_encoders.clip_g.transformer.": pipe.text_encoder_2.state_dict(),
        "text_encoders.t5xxl.transformer.": pipe.text_encoder_3.state_dict(),
    }
    state = {prefix + name: w.contiguous().clone() for prefix, part in parts.items() for name, w in part.items()}
    if not projection:
        del state["text_encoders.clip_l.transformer.text_projection.weight"]
    state["text_encoders.clip_l.logit_scale"] = torch.zeros(())
    return state
