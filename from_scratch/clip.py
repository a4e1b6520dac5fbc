"""The text encoder of CLIP (Radford et al. 2021): token ids in, one vector a token out.

Shapes: B prompts, M tokens, C channels.
"""

import torch
from torch import Tensor, nn

from from_scratch.attention import attention


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of GELU that CLIP was trained with. Any shape."""
    return x * torch.sigmoid(1.702 * x)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it: (B, M, C) -> (B, M, C)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class Layer(nn.Module):
    """Attention and a two-layer network, each on normalised input and added to it: (B, M, C) -> (B, M, C)."""

    def __init__(self, channels: int, hidden_channels: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(channels)
        self.self_attn = CausalSelfAttention(channels, heads)
        self.layer_norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.fc2(quick_gelu(self.fc1(self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """Token ids (B, M) -> embeddings (B, M, C): the last layer's output after the final norm, which the UNet reads.

    M is at most `positions`. There is no padding mask: the padding after a prompt is read too, as in training.
    """

    def __init__(self, vocabulary: int, positions: int, channels: int, hidden_channels: int, layers: int, heads: int):
        super().__init__()
        # Without the random numbers that nn.Embedding draws, for which PyTorch would load its compiler: half a second.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(vocabulary, channels), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(torch.zeros(positions, channels), freeze=False)
        self.layers = nn.ModuleList([Layer(channels, hidden_channels, heads) for _ in range(layers)])
        self.final_layer_norm = nn.LayerNorm(channels)

    @property
    def positions(self) -> int:
        """The most tokens it can read: 77 in Stable Diffusion 1.5."""
        return self.position_embedding.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
