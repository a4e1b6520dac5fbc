"""The text encoder of CLIP (Radford et al. 2021): token ids in, one vector a token out.

Shapes: B prompts, M tokens, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from from_scratch.attention import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of GELU that CLIP was trained with. Any shape."""
    return x * torch.sigmoid(1.702 * x)


class Layer(nn.Module):
    """Causal attention and a two-layer network, each on normalised input and added to it: (B, M, C) -> (B, M, C)."""

    def __init__(self, channels: int, hidden_channels: int, heads: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.layer_norm1 = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, channels, heads, bias=True, causal=True)
        self.layer_norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        x = x + self.self_attn(h, h)
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """Token ids (B, M) -> embeddings (B, M, C): the last layer's output after the final norm, which the UNet reads.

    M is at most `positions`. There is no padding mask: the padding after a prompt is read too, as in training.
    """

    def __init__(self, vocabulary, positions, channels, hidden_channels, layers, heads, activation=quick_gelu):
        super().__init__()
        self.positions = positions  # the most tokens it can read: 77 in Stable Diffusion 1.5
        # Without the random numbers that nn.Embedding draws, for which PyTorch would load its compiler: half a second.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(vocabulary, channels), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(torch.zeros(positions, channels), freeze=False)
        self.layers = nn.ModuleList(Layer(channels, hidden_channels, heads, activation) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(channels)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, M) -> a vector for each token and its place, (B, M, C), which the first layer reads."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPWithProjection(CLIPTextEncoder):
    """Token ids (B, M) -> embeddings (B, M, C) and one vector (B, P) for the whole prompt, as Stable Diffusion 3 reads.

    The embeddings are the last but one layer's, without the final norm. The vector is the last layer's at the token
    that ends the prompt, projected to where texts and pictures can be compared. `end`: that token's id; None: the
    largest one in the prompt, which it is in CLIP's own vocabulary.
    """

    def __init__(self, *sizes, activation: Callable[[Tensor], Tensor], projected: int, end: int | None):
        super().__init__(*sizes, activation)
        self.end = end
        self.text_projection = nn.Linear(self.final_layer_norm.weight.shape[0], projected, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        for layer in self.layers[:-1]:
            x = layer(x)
        last = self.final_layer_norm(self.layers[-1](x))
        ends = tokens.argmax(dim=1) if self.end is None else (tokens == self.end).int().argmax(dim=1)
        return x, self.text_projection(last[torch.arange(len(tokens), device=tokens.device), ends])
