"""The transformer that predicts the velocity of latents: MMDiT of Stable Diffusion 3 (Esser et al. 2024) and MMDiT-X of
3.5 Medium, which adds a second attention to its first blocks.

Image and text walk side by side, each with weights of its own, and meet in every block's attention. Shapes: B pictures,
N patches of the image and M tokens of text, both of C channels; C_in x H x W latents, in patches of P x P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from from_scratch.attention import attention
from from_scratch.unet import timestep_embedding

EPS = 1e-6  # of every norm in here
TIME_CHANNELS = 256


def position_table(channels: int, size: int, base: int) -> Tensor:
    """Sines and cosines of every place of a size x size grid: (1, size · size, channels), float32.

    The first half of the channels tells the column, the other the row: [sin(p ωᵢ), cos(p ωᵢ)] with
    ωᵢ = 10000^(-i/n), i < n = channels / 4. Places are counted in steps of base / size (Dosovitskiy et al. 2020).
    """
    places = torch.arange(size, dtype=torch.float32) / (size / base)
    quarter = channels // 4
    angles = torch.outer(places.double(), 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter))
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (size, channels / 2)
    columns, rows = line[None, :].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None]


class PatchEmbedding(nn.Module):
    """Latents (B, C_in, H, W) -> (B, N, C): a vector for each patch, and its place added to it.

    The table of places is for the largest picture, `size` patches a side; a smaller one gets its middle. Raises
    ValueError if H or W is no multiple of P, or too large.
    """

    def __init__(self, in_channels: int, channels: int, patch: int, size: int, base: int):
        super().__init__()
        self.patch, self.size = patch, size
        self.proj = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.register_buffer("table", position_table(channels, size, base))

    def crop(self, height: int, width: int) -> Tensor:
        """The middle of the table, for height x width patches: (1, N, C)."""
        top, left = (self.size - height) // 2, (self.size - width) // 2
        table = self.table.unflatten(1, (self.size, self.size))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch or max(height, width) > self.size * self.patch:
            most = f"multiples of {self.patch}, at most {self.size * self.patch}"
            raise ValueError(f"The latents are {height}x{width}: height and width must be {most}.")
        return self.proj(x).flatten(2).transpose(1, 2) + self.crop(height // self.patch, width // self.patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm, LN(x) (1 + scale) + shift (Peebles & Xie 2022): (B, N, C), twice (B, 1, C) -> (B, N, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Projections(nn.Module):
    """What attention reads, and its way out: (B, N, C) -> queries, keys, values, (B, N, C) each.

    `qk_norm`: each head's queries and keys are divided by their root mean square (Zhang & Sennrich 2019), without which
    the attention of large models grows until half precision overflows. `out`: whether anything comes back.
    """

    def __init__(self, channels: int, heads: int, qk_norm: bool, out: bool = True):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(channels // heads, EPS) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.Linear(channels, channels) if out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k))
        return self.norm_q(q).flatten(2), self.norm_k(k).flatten(2), self.to_v(x)


class FeedForward(nn.Module):
    """A linear layer, the tanh approximation of GELU (Hendrycks & Gimpel 2016), a linear layer: (B, N, C) both."""

    def __init__(self, channels: int, factor: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(channels, factor * channels)
        self.fc2 = nn.Linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Side(nn.Module):
    """What the image or the text has for itself in a block, which is everything but the attention they share.

    `dual`: it also attends to itself alone, as the image does in MMDiT-X. `last`: it is read and does not go on, as the
    text in the last block ("context pre-only").
    """

    def __init__(self, channels: int, heads: int, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.chunks = 2 if last else 9 if dual else 6
        self.modulation = nn.Linear(channels, self.chunks * channels)
        self.attn = Projections(channels, heads, qk_norm, out=not last)
        self.attn2 = Projections(channels, heads, qk_norm) if dual else None
        self.mlp = None if last else FeedForward(channels)

    def before(self, x: Tensor, condition: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x (B, N, C), condition (B, C) -> queries, keys and values; shifts, scales and gates, (B, 1, C) each."""
        modulation = self.modulation(condition)[:, None].chunk(self.chunks, dim=2)
        return self.attn(modulate(x, *modulation[:2])), modulation

    def after(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """x and what attention found for it -> x after attention and feed-forward, each let in by a gate."""
        gate, shift_mlp, scale_mlp, gate_mlp = modulation[2:6]
        h = x + gate * self.attn.to_out(attended)
        if self.attn2 is not None:
            shift, scale, gate = modulation[6:]
            h = h + gate * self.attn2.to_out(attention(*self.attn2(modulate(x, shift, scale)), self.attn2.heads))
        return h + gate_mlp * self.mlp(modulate(h, shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Joint attention: patches and tokens all look at one another. Image (B, N, C), text (B, M, C) -> both again.

    `last`: the text does not go on, None is in its place.
    """

    def __init__(self, channels: int, heads: int, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.heads = heads
        self.image = Side(channels, heads, qk_norm, dual=dual)
        self.text = Side(channels, heads, qk_norm, last=last)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        of_image, image_modulation = self.image.before(x, condition)
        of_text, text_modulation = self.text.before(context, condition)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(of_image, of_text, strict=True))
        to_image, to_text = attention(query, key, value, self.heads).split([x.shape[1], context.shape[1]], dim=1)
        x = self.image.after(x, to_image, image_modulation)
        return x, None if self.text.mlp is None else self.text.after(context, to_text, text_modulation)


class MMDiT(nn.Module):
    """v(x, t, prompt): latents (B, C_in, H, W) -> the velocity from picture to noise, of the same shape.

    `dual` lists the blocks whose image attends twice; `size` and `base` are the sides, in patches, of the table of
    places and of the pictures of training; `context_channels` and `pooled_channels` those of the text encoders.
    """

    def __init__(
        self, in_channels, patch, channels, heads, layers, qk_norm, dual, context_channels, pooled_channels, size, base
    ):
        super().__init__()
        self.patches = PatchEmbedding(in_channels, channels, patch, size, base)
        self.time_embedding = nn.ModuleList(nn.Linear(c, channels) for c in (TIME_CHANNELS, channels))
        self.pooled_embedding = nn.ModuleList(nn.Linear(c, channels) for c in (pooled_channels, channels))
        self.context_embedding = nn.Linear(context_channels, channels)
        blocks = (JointBlock(channels, heads, qk_norm, dual=n in dual, last=n == layers - 1) for n in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.modulation_out = nn.Linear(channels, 2 * channels)
        self.proj_out = nn.Linear(channels, patch * patch * in_channels)

    def condition(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """SiLU of what every block is told: the time (B,) or (1,) and the prompt as a whole (B, D) -> (B, C)."""
        time = timestep_embedding(timesteps, TIME_CHANNELS).to(pooled.dtype)
        pairs = ((self.time_embedding, time), (self.pooled_embedding, pooled))
        time, prompt = (second(F.silu(first(x))) for (first, second), x in pairs)
        return F.silu(time + prompt)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, P · P · C_in) -> (B, C_in, height, width), each patch put back in its place."""
        patch = self.patches.patch
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    def forward(self, x: Tensor, timesteps: Tensor | float, context: Tensor, pooled: Tensor, skip=()) -> Tensor:
        """x (B, C_in, H, W), context (B, M, D) and pooled (B, D') of the prompts, `timesteps` in 0..1000, one for all
        or (B,). The blocks whose numbers are in `skip` are left out. Raises ValueError for a size that x cannot have.
        """
        height, width = x.shape[2:]
        condition = self.condition(torch.as_tensor(timesteps, device=x.device).reshape(-1), pooled)
        x, context = self.patches(x), self.context_embedding(context)
        for n, block in enumerate(self.blocks):
            if n not in skip:
                x, context = block(x, context, condition)
        x = modulate(x, *self.modulation_out(condition)[:, None].chunk(2, dim=2))
        return self.unpatchify(self.proj_out(x), height, width)
