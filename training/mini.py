"""A small text-to-image diffusion model in one piece.

A conditional UNet on the latents of a VAE (Rombach et al., 2022), two objectives to train it with (predict the noise:
Ho et al., 2020; rectified flow: Liu et al., 2023), and the reverse loops to draw with it.
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

MODELS = Path(__file__).parent.parent / "models"
OBJECTIVES = ("noise", "flow")
# Stable Diffusion's schedule: the roots of the betas grow evenly
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
# How often each timestep is trained: as min-SNR weighting (Hang et al., 2023, gamma 5) would weigh it, no less than
# 0.15 of the most. Drawn evenly, the nearly clean ones crowd out those that decide what the picture shows.
SHARES = (5 / SNR).clamp(0.15, 1) / (5 / SNR).clamp(0.15, 1).sum()


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """t (B,) in 0..1000 as cosines and sines of `width` / 2 frequencies: (B, width) (Vaswani et al., 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResidualBlock(nn.Module):
    """(B, inputs, H, W) and the embedded time (B, time_width) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, time_width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Each of x (B, N, width) asks all of `context` (B, T, context_width); the answer is (B, N, width)."""

    def __init__(self, width: int, context_width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        parts = (self.query(x), *self.key_value(context).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """(B, width, H, W) to the same: positions look at each other, then at the text, then each thinks alone."""

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.to_itself, self.to_text = Attention(width, width), Attention(width, text_width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, text):
        tokens = x.flatten(2).transpose(1, 2)  # (B, H * W, width)
        normed = self.norms[0](tokens)
        tokens = tokens + self.to_itself(normed, normed)
        tokens = tokens + self.to_text(self.norms[1](tokens), text)
        tokens = tokens + self.mlp(self.norms[2](tokens))
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


class UNet(nn.Module):
    """Latents (B, channels, H, W), times (B,) in 0..1000 and text (B, T, text_width) to a prediction like the latents.

    Two levels; H and W are even. The way down hands each level's result to the same level of the way up. The last
    row of the text, which has read all others, goes wherever the time goes (as in Podell et al., 2023).
    """

    def __init__(self, channels: int = 4, widths: tuple[int, int] = (40, 64), text_width: int = 128):
        super().__init__()
        fine, coarse = widths
        time = 2 * fine
        self.time = nn.Sequential(nn.Linear(fine, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.gist = nn.Linear(text_width, time)
        self.enter = nn.Conv2d(channels, fine, 3, padding=1)
        self.down = ResidualBlock(fine, fine, time)
        self.shrink = nn.Conv2d(fine, fine, 3, stride=2, padding=1)
        self.down2, self.look_down = ResidualBlock(fine, coarse, time), TransformerBlock(coarse, text_width)
        self.middle, self.look_middle = ResidualBlock(coarse, coarse, time), TransformerBlock(coarse, text_width)
        self.up2, self.look_up = ResidualBlock(2 * coarse, coarse, time), TransformerBlock(coarse, text_width)
        self.grow = nn.Conv2d(coarse, fine, 3, padding=1)
        self.up = ResidualBlock(2 * fine, fine, time)
        self.norm, self.leave = nn.GroupNorm(8, fine), nn.Conv2d(fine, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)  # it starts by predicting nothing, which is the mean
        nn.init.zeros_(self.leave.bias)

    def forward(self, x, t, text):
        time = self.time(timestep_embedding(t, self.enter.out_channels)) + self.gist(text[:, -1])
        large = self.down(self.enter(x), time)
        small = self.look_down(self.down2(self.shrink(large), time), text)
        h = self.look_middle(self.middle(small, time), text)
        h = self.look_up(self.up2(torch.cat([h, small], 1), time), text)
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        h = self.up(torch.cat([h, large], 1), time)
        return self.leave(F.silu(self.norm(h)))


def add_noise(latents, noise, u, objective: str):
    """(what the network sees, the time it is told, what it should answer) for u (B,) in 0..1, the share of the way.

    "noise": latents at timestep t of Stable Diffusion's schedule, answer the noise. "flow": the point u on the
    straight line from the latents to the noise, answer the line's direction.
    """
    u = u[:, None, None, None]
    if objective == "flow":
        return (1 - u) * latents + u * noise, 1000 * u.flatten(), noise - latents
    t = (1000 * u).long().clamp(max=999)
    kept = ALPHA_BAR.to(latents.device)[t]
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise, t.flatten(), noise


class Denoising(nn.Module):
    """The mean squared error of the UNet's answers, for `training.loop.train`."""

    def __init__(self, unet: UNet, objective: str = "noise"):
        super().__init__()
        self.unet, self.objective = unet, objective

    def forward(self, latents, noise, u, text):
        """latents and noise (B, C, H, W), latents of unit variance; u (B,) in 0..1; text (B, T, text_width)."""
        noisy, t, target = add_noise(latents, noise, u, self.objective)
        return {"loss": (self.unet(noisy, t, text).float() - target).square().mean()}


def batches(encoded: dict, objective: str = "noise", dropout: float = 0.1):
    """make_batch for `training.loop.train` from what `training.dataset.encode` returns.

    A share `dropout` of the captions is empty (Ho & Salimans, 2022). Times come by `SHARES` for "noise", logit-normal
    for "flow" (Esser et al., 2024), one from each of as many equally likely slices as there are examples.
    """
    reached = SHARES.cumsum(0)

    def make_batch(indices, generator):
        count = len(indices)
        mean, std = encoded["latents"][indices].float().unbind(1)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        if objective == "flow":
            u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        else:
            u = (torch.searchsorted(reached, u).clamp(max=999) + 0.5) / 1000
        dropped = torch.rand(count, generator=generator) < dropout
        text = torch.where(dropped[:, None, None], encoded["empty"], encoded["text"][indices])
        return latents, noise, u, text.float()

    return make_batch


def guided(unet: UNet, text: torch.Tensor, empty: torch.Tensor, guidance: float):
    """predict(x, t): the answer without the text, and `guidance` times the way from there to the answer with it.

    text (B, T, text_width); empty (1, T, text_width), the text of an empty caption.
    """
    both = torch.cat([empty.expand_as(text), text])

    def predict(x, t):
        times = torch.full((len(both),), float(t), device=x.device)
        without, wanted = unet(torch.cat([x, x]), times, both).chunk(2)
        return without + guidance * (wanted - without)

    return predict


@torch.no_grad()
def reverse(predict, x: torch.Tensor, steps: int = 25, eta: float = 0.0, generator=None) -> torch.Tensor:
    """From noise x (B, C, H, W) to latents by predicted noise: DDIM for eta 0, DDPM for eta 1 (Song et al., 2021)."""
    times = [round(1000 - 1000 * k / steps) - 1 for k in range(steps)]
    for t, after in zip(times, [*times[1:], None], strict=True):
        kept, goal = ALPHA_BAR[t].item(), 1.0 if after is None else ALPHA_BAR[after].item()
        noise = predict(x, t)
        clean = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
        fresh = eta**2 * (1 - goal) / (1 - kept) * (1 - kept / goal)  # the variance that is drawn anew
        x = goal**0.5 * clean + (1 - goal - fresh) ** 0.5 * noise
        if fresh:
            x = x + fresh**0.5 * torch.randn(x.shape, generator=generator).to(x.device)
    return x


@torch.no_grad()
def follow(predict, x: torch.Tensor, steps: int = 25) -> torch.Tensor:
    """From noise x (B, C, H, W) to latents along predicted directions, in `steps` straight steps of equal length."""
    for k in range(steps):
        x = x - predict(x, 1000 * (1 - k / steps)) / steps
    return x


def save(unet: UNet, path: Path, objective: str) -> None:
    """Write the weights as float16 safetensors, with all that `load` needs to rebuild the network."""
    widths = unet.enter.out_channels, unet.grow.in_channels
    text_width = unet.look_down.to_text.key_value.in_features
    about = {"objective": objective, "channels": unet.enter.in_channels, "text_width": text_width}
    about |= {"fine": widths[0], "coarse": widths[1]}
    state = {name: weight.detach().cpu().half().contiguous() for name, weight in unet.state_dict().items()}
    save_file(state, path, {key: str(value) for key, value in about.items()})


def load(path: str | Path) -> tuple[UNet, str]:
    """The UNet of a file that `save` wrote, float32 on the CPU, and its objective.

    Raises FileNotFoundError where there is none, ValueError for any other file. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: train one with `python -m training.train_mini FOLDER`.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file; others, such as .pt, can hold programs and are not opened."
        ) from error
    try:
        widths = int(about["fine"]), int(about["coarse"])
        unet = UNet(int(about["channels"]), widths, int(about["text_width"]))
        unet.load_state_dict({name: weight.float() for name, weight in state.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is of another architecture than training/mini.py: give a file from there.") from error
    return unet.eval(), about["objective"]


@cache
def bundled(device: str) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """The frozen VAE, text encoder and tokenizer that the UNet works with, float32 on `device`."""
    vae = AutoencoderKL.from_pretrained(MODELS / "storybook-sd/vae").float().requires_grad_(False).eval()
    text_encoder = CLIPTextModel.from_pretrained(MODELS / "storybook-sd/text_encoder").float().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "storybook-sd/tokenizer")
    return vae.to(device), text_encoder.eval().to(device), tokenizer


@torch.no_grad()
def embed(captions: list[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Captions to (B, T, text_width), padded and cut to the tokenizer's length as the pipelines do it."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Latents of unit variance (B, C, h, w) to RGB pictures, 8 h x 8 w pixels."""
    pixels = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    return [Image.fromarray(p.byte().cpu().numpy()) for p in ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1)]


def generate_images_direct(
    unet_path: str | Path,
    device: str = "cpu",
    prompts: list[str] = ("a red boat by the sea", "a blue house in the snow"),
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
) -> list[Image.Image]:
    """One picture a prompt with no pipeline: embed the text, draw noise, reverse it, decode. Picture k has seed + k.

    Raises what `load` raises, and ValueError for no prompts or a count of steps below 1, before any drawing.
    """
    if not prompts or steps < 1:
        raise ValueError("There is nothing to draw: give one prompt at least, and one step at least.")
    unet, objective = load(unet_path)
    vae, text_encoder, tokenizer = bundled(device)
    text, empty = (embed(texts, text_encoder, tokenizer) for texts in (list(prompts), [""]))
    side = vae.config.sample_size // 8
    seeds = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    noise = torch.stack([torch.randn(unet.enter.in_channels, side, side, generator=one) for one in seeds]).to(device)
    predict = guided(unet.to(device), text, empty, guidance)
    return decode(vae, follow(predict, noise, steps) if objective == "flow" else reverse(predict, noise, steps))
