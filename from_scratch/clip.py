"""The text encoder of CLIP (Radford et al. 2021): token ids in, one vector a token out.

Shapes: B prompts, M tokens, C channels.
"""

import torch
from torch import Tensor, nn

from from_scratch.attention import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of GELU that CLIP was trained with. Any shape."""
    return x * torch.sigmoid(1.702 * x)


class Layer(nn.Module):
    """Causal attention and a two-layer network, each on normalised input and added to it: (B, M, C) -> (B, M, C)."""

    def __init__(self, channels: int, hidden_channels: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, channels, heads, bias=True, causal=True)
        self.layer_norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        x = x + self.self_attn(h, h)
        return x + self.fc2(quick_gelu(self.fc1(self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """Token ids (B, M) -> embeddings (B, M, C): the last layer's output after the final norm, which the UNet reads.

    M is at most `positions`. There is no padding mask: the padding after a prompt is read too, as in training.
    """

    def __init__(self, vocabulary: int, positions: int, channels: int, hidden_channels: int, layers: int, heads: int):
        super().__init__()
        self.positions = positions  # the most tokens it can read: 77 in Stable Diffusion 1.5
        # Without the random numbers that nn.Embedding draws, for which PyTorch would load its compiler: half a second.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(vocabulary, channels), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(torch.zeros(positions, channels), freeze=False)
        self.layers = nn.ModuleList(Layer(channels, hidden_channels, heads) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
