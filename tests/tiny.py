"""Pipelines of a few thousand random weights in the layout of the real ones: they draw noise, but they draw."""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = "a red blue boat house tree star small yellow by the sea in snow".split()
CONFIGS = Path(__file__).resolve().parent.parent / "helpers" / "sd15_config"


def tokenizer(folder: Path, words: list[str] = WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer that knows `words` whole and spells every other word letter by letter."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = letters + [f"{c}</w>" for c in letters]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:  # as BPE does, oldest merge first
            k = 0
            while k < len(pieces) - 1:
                if (pieces[k], pieces[k + 1]) == (left, right):
                    pieces[k : k + 2] = [left + right]
                k += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    made.save_pretrained(folder)
    return made


def text_encoder(words: CLIPTokenizer, cls=CLIPTextModel):
    return cls(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            projection_dim=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    ).eval()


def vae(channels: int = 4, **more) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=64,
        **more,
    ).eval()


def sd15(folder: Path) -> Path:
    """Write a StableDiffusionPipeline folder as SD1.5 has it, for pictures of 64x64, and return it."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=unet,
        scheduler=PNDMScheduler.from_pretrained(CONFIGS / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline in memory, without its T5, for 64x64; the tokenizer is written to `folder`."""
    torch.manual_seed(0)
    words = tokenizer(folder)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder(words, CLIPTextModelWithProjection),
        tokenizer=words,
        text_encoder_2=text_encoder(words, CLIPTextModelWithProjection),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that knows WORDS whole and spells every other word letter by letter."""
    pieces = ["\u2581", *(f"\u2581{word}" for word in WORDS), *map(chr, range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def sd3_folder(folder: Path) -> Path:
    """Write a StableDiffusion3Pipeline folder with all three encoders, for pictures of 64x64, and return it."""
    pipe = sd3(folder / "words")
    torch.manual_seed(1)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=160,
            d_model=64,  # the transformer's joint_attention_dim
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    pipe.register_modules(text_encoder_3=t5.eval(), tokenizer_3=t5_tokenizer())
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def single_file(folder: Path, path: Path) -> Path:
    """Write the weights of a `sd15` folder as one file with the names that CompVis gave them in 2022."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    weights = {}
    for key, value in pipe.unet.state_dict().items():
        weights["model.diffusion_model." + _unet_name(key)] = value
    for key, value in pipe.vae.state_dict().items():
        name = _vae_name(key)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[:, :, None, None]  # written as 1x1 convolutions then
        weights["first_stage_model." + name] = value
    for key, value in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        weights["cond_stage_model.transformer." + name] = value
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


def _unet_name(key: str) -> str:
    key = re.sub(r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}", key)
    key = re.sub(r"^conv_in", "input_blocks.0.0", key)
    key = re.sub(r"^conv_norm_out", "out.0", key)
    key = re.sub(r"^conv_out", "out.2", key)
    kind = {"resnets": 0, "attentions": 1}
    key = re.sub(
        r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{kind[m[2]]}",
        key,
    )
    key = re.sub(r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op", key)
    key = re.sub(
        r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{kind[m[2]]}",
        key,
    )
    # The upsampler follows the attention where there is one; our first up block has none.
    key = re.sub(
        r"^up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}.conv",
        key,
    )
    key = key.replace("mid_block.resnets.0", "middle_block.0").replace("mid_block.resnets.1", "middle_block.2")
    key = key.replace("mid_block.attentions.0", "middle_block.1")
    if re.match(r"(input_blocks\.\d+\.0|output_blocks\.\d+\.0|middle_block\.[02])\.", key):
        for new, old in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            key = key.replace(f".{new}.", f".{old}.")
    return key


def _vae_name(key: str) -> str:
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for new, old in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        key = key.replace(new, old)
    return key
