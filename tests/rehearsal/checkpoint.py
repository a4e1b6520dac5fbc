"""Writes a checkpoint with the shapes, file names and shards of stabilityai/stable-diffusion-3.5-medium, and no sense.

    python tests/rehearsal/checkpoint.py build/sd35            # 16.3 GB, a few minutes
    python tests/rehearsal/checkpoint.py build/tiny --tiny     # the same layout, 2 MB

The weights are random and in float16, written tensor by tensor, so that RAM stays below 1 GiB. Left out are the files
that the Hub has a second time (`*.fp16.*`, the single file), and the tokenizers know a few words only: the embeddings
that they index are as large as the real ones.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import tiny as small  # noqa: E402
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel  # noqa: E402

SHARD_BYTES = 5 * 10**9  # above which transformers starts another file; T5 has two
BLOCK = 2**20  # random numbers that are drawn once and repeated
TABLE = "pos_embed.pos_embed"

CLIP = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408}
TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def configs(tiny: bool) -> dict[str, dict]:
    """What decides the shapes of each network, as in the repository; or a shrunken one of each."""
    t5 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if tiny:
        clip = CLIP | {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_attention_heads": 2}
        return {
            "text_encoder": clip | {"num_hidden_layers": 2},
            "text_encoder_2": clip | {"num_hidden_layers": 3},
            "text_encoder_3": t5
            | {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            "transformer": TRANSFORMER
            | {
                "sample_size": 32,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 64,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 64,
                "pos_embed_max_size": 64,
                "dual_attention_layers": (0,),
            },
            "vae": VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 256},
        }
    return {
        "text_encoder": CLIP
        | {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "text_encoder_2": CLIP
        | {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32}
        | {"num_attention_heads": 20, "hidden_act": "gelu"},
        "text_encoder_3": t5
        | {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
        "transformer": TRANSFORMER,
        "vae": VAE,
    }


def on_meta(tiny: bool) -> dict[str, torch.nn.Module]:
    """The networks without memory for their weights. The transformer's position table is 16 x 16 in them."""
    of = configs(tiny)
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**of["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**of["text_encoder_2"])),
            "text_encoder_3": T5EncoderModel(T5Config(**of["text_encoder_3"])),
            "transformer": SD3Transformer2DModel(**of["transformer"] | {"pos_embed_max_size": 16}),
            "vae": AutoencoderKL(**of["vae"]),
        }


def write(folder: Path, tiny: bool) -> Path:
    """Write the whole pipeline's folder and return it. Files that have their full length already are kept."""
    noise = (np.random.default_rng(0).standard_normal(BLOCK) * 0.02).astype(np.float16)
    index = {"_class_name": "StableDiffusion3Pipeline"}
    for name, network in on_meta(tiny).items():
        library = "diffusers" if name in ("transformer", "vae") else "transformers"
        index[name] = [library, type(network).__name__]
        (folder / name).mkdir(parents=True, exist_ok=True)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # is `shared.weight`
        config = json.loads(network.config.to_json_string() if library == "transformers" else network.to_json_string())
        if name == "transformer":
            config["pos_embed_max_size"] = configs(tiny)[name]["pos_embed_max_size"]
            shapes[TABLE] = (1, config["pos_embed_max_size"] ** 2, shapes[TABLE][2])
        if library == "transformers":
            config.setdefault("architectures", [type(network).__name__])
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
        _write_shards(folder / name, "model" if library == "transformers" else "diffusion_pytorch_model", shapes, noise)
    for name in ("tokenizer", "tokenizer_2"):
        small.tokenizer(folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    small.t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_shards(folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], noise: np.ndarray) -> None:
    shards, room = [{}], SHARD_BYTES
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = shape
        room -= size
    names = [f"{stem}-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, noise)


def _write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], noise: np.ndarray) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if file.exists() and file.stat().st_size == 8 + len(text) + end:
        return
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            left = int(np.prod(shape))
            while left > 0:
                stream.write(_values(key, shape, noise)[:left].tobytes())
                left -= len(noise)


def _values(key: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """Values with which numbers stay small: scales of norms are 1, offsets 0, all else a little noise."""
    if len(shape) == 1 and key.endswith("weight"):
        return np.ones_like(noise)
    return np.zeros_like(noise) if key.endswith("bias") else noise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a shrunken one, to try the script itself")
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.tiny))
