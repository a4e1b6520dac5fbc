"""Train storybook-sd3: a transformer that predicts the velocity from picture to noise (Esser et al., 2024).

A latent x moves to noise on a straight line, (1 - sigma) x + sigma noise, and the transformer learns
noise - x there. Sigmas are logit-normal, moved towards noise as Stable Diffusion 3 does it for more
pixels: the part of the line where it is decided what the picture shows comes more often than its
ends. The two CLIP encoders are frozen. T5 was far too large to learn along in the original; this one
is small and does. It is silenced in some examples, so that the pipeline draws without it too.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from storybook import world
from storybook.sample import glance
from storybook.train import clip, data
from storybook.train.sd import cached_latents
from training.loop import RUNS, Schedule, choose_attention_kernel, keep_log, make_accelerator, train

OUT = Path("models/storybook-sd3")
SECOND_CLIP = RUNS / "clip-2" / "model"
SHIFT = 2.0  # four times the numbers of the latents at 64 pixels, for which 1 was right: the square root of that
SILENT_T5 = 0.25  # share of examples
# The pipeline pads T5's tokens to 256 and masks none of them. A network that only ever saw 24, which is enough for
# every caption, would be lost among so many, and 256 in every step would take several times as long.
T5_LENGTHS = (*[24] * 18, 64, 256)


def new_transformer(latent_side: int, context_width: int, pooled_width: int) -> SD3Transformer2DModel:
    """Four joint blocks 128 wide, the first two with a second attention among the picture's tokens, as in SD3.5.

    Each position of the latents is a token, where Stable Diffusion 3 takes patches of 2x2: their 64 numbers, noise for
    the most part, which has to come out again, would fill half of a token that is only 128 wide.
    """
    transformer = SD3Transformer2DModel(
        sample_size=latent_side,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=context_width,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=20,  # some more than trained, so that other sizes can be tried
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    # Each block starts as the identity and the output as zero (Peebles & Xie, 2023, adaLN-Zero).
    gates = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*gates, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def new_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder of two layers and its tokenizer: the world's words are whole, others are spelled."""
    words = sorted(world.words() | {word.capitalize() for word in world.words()})  # CLIP's tokenizer lowers the case
    pieces = ["\u2581", *(f"\u2581{word}" for word in words), *map(chr, range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(pieces))]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)), tokenizer


class FlowMatching(nn.Module):
    """Mean squared error of the predicted velocity."""

    def __init__(
        self, transformer: SD3Transformer2DModel, clips: list[CLIPTextModelWithProjection], t5: T5EncoderModel
    ):
        super().__init__()
        self.learned = nn.ModuleList([transformer, t5])
        self.clips = nn.ModuleList(clips).requires_grad_(False)
        self.compiled = None  # the transformer's forward for texts of the usual length

    def context(self, clip_ids, t5_ids, keep_t5):
        """What the pipeline makes of a prompt: tokens (B, clip + t5, width) and one pooled vector (B, pooled width)."""
        with torch.no_grad():
            found = [encoder(clip_ids, output_hidden_states=True) for encoder in self.clips]
        tokens = torch.cat([out.hidden_states[-2] for out in found], -1)
        t5_tokens = self.learned[1](t5_ids)[0] * keep_t5[:, None, None]
        tokens = nn.functional.pad(tokens, (0, t5_tokens.shape[-1] - tokens.shape[-1]))
        return torch.cat([tokens, t5_tokens.to(tokens.dtype)], 1), torch.cat([out.text_embeds for out in found], -1)

    def forward(self, latents, noise, sigmas, clip_ids, t5_ids, keep_t5):
        """latents and noise (B, 16, h, w), latents of unit variance; sigmas (B,) in 0..1; keep_t5 (B,) of 0 and 1."""
        tokens, pooled = self.context(clip_ids, t5_ids, keep_t5)
        line = sigmas[:, None, None, None]
        noisy = (1 - line) * latents + line * noise
        usual = self.compiled is not None and t5_ids.shape[1] == T5_LENGTHS[0]
        transformer = self.compiled if usual else self.learned[0]
        velocity = transformer(noisy, tokens, pooled, sigmas * 1000, return_dict=False)[0].float()
        return {"loss": (velocity - (noise - latents)).square().mean()}


def logit_normal(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` sigmas in 0..1: the sigmoid of a unit Gaussian, one from each of `count` slices of equal probability.

    They are then shifted (Esser et al., 2024, equation 23).
    """
    slices = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    middle = torch.sigmoid(torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4)))
    return SHIFT * middle / (1 + (SHIFT - 1) * middle)


def assemble(transformer, clips, t5, vae, tokenizer, t5_tokenizer) -> StableDiffusion3Pipeline:
    """The stock pipeline; both CLIPs share a tokenizer."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def export(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the folder in half precision."""
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.half()
    pipeline.save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        clip.save_half(getattr(pipeline, name), folder / name)


def go_on_from(folder: Path, transformer: SD3Transformer2DModel, t5: T5EncoderModel) -> None:
    """Start with the weights in `folder`: of such a model for any size of pictures, or of one with patches of 2x2.

    In the second case a position is read with twice the mean of a patch's four weights, so a patch that is all one
    number counts half, and each position gets the mean of what was predicted for the four.
    """
    weights = SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict()
    if weights["pos_embed.proj.weight"].shape[-1] == 2:
        weights["pos_embed.proj.weight"] = 2 * weights["pos_embed.proj.weight"].mean((2, 3), keepdim=True)
        for name in ("proj_out.weight", "proj_out.bias"):
            weights[name] = weights[name].unflatten(0, (4, -1)).mean(0)
    weights["pos_embed.pos_embed"] = transformer.pos_embed.pos_embed
    transformer.load_state_dict(weights)
    t5.load_state_dict(T5EncoderModel.from_pretrained(folder / "text_encoder_3").state_dict())


def main(argv=None) -> None:
    """Train and write models/storybook-sd3 (needs its vae folder, models/storybook-clip and a second CLIP)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--go-on-from", type=Path, help="a folder to start with, also with patches of 2x2")
    parser.add_argument("--compile", action="store_true", help="slower for some minutes, then faster")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    choose_attention_kernel()
    vae = AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip.OUT)
    clips = [
        CLIPTextModelWithProjection.from_pretrained(path, dtype=torch.float32).eval()
        for path in (clip.OUT, SECOND_CLIP)
    ]
    context_width = sum(encoder.config.hidden_size for encoder in clips)
    t5, t5_tokenizer = new_t5(context_width)
    size = vae.config.sample_size
    pooled_width = sum(encoder.config.projection_dim for encoder in clips)
    transformer = new_transformer(size // 8, context_width, pooled_width)
    if args.go_on_from:
        go_on_from(args.go_on_from, transformer, t5)
    scenes = data.scenes("train", args.pictures)
    by_things = data.by_things(scenes)
    latents = cached_latents(vae, data.pictures("train", args.pictures, size), make_accelerator())

    def make_batch(indices, generator):
        indices = [by_things[i] for i in indices]
        mean, std = latents[indices].float().unbind(1)
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
        texts = data.captions_for_guidance([scenes[i] for i in indices], generator)
        texts[::4] = [text.capitalize() for text in texts[::4]]
        noise = torch.randn(clean.shape, generator=generator)
        length = T5_LENGTHS[int(torch.randint(len(T5_LENGTHS), (), generator=generator))]
        t5_ids = t5_tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        keep_t5 = (torch.rand(len(indices), generator=generator) >= SILENT_T5).float()
        sigmas = logit_normal(len(indices), generator)
        return clean, noise, sigmas, clip.tokenize(tokenizer, texts), t5_ids.input_ids, keep_t5

    def pipeline():
        return assemble(transformer, clips, t5, vae, tokenizer, t5_tokenizer)

    def sample(step):
        glance(pipeline(), RUNS / "sd3" / f"samples-{step:06d}.png")

    schedule = Schedule(args.steps, args.batch_size, args.learning_rate, warmup=200, ema_decay=0.9995, save_every=1000)
    objective = FlowMatching(transformer, clips, t5)
    if args.compile:
        objective.compiled = torch.compile(transformer.forward, dynamic=False)
    run = train("sd3", objective, objective.learned, make_batch, len(by_things), schedule, sample)
    if make_accelerator().is_main_process:
        export(pipeline(), args.out)
        keep_log(run, args.out)


if __name__ == "__main__":
    main()
