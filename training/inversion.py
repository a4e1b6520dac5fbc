"""Textual inversion (Gal et al., 2022): a new word for what a model can draw. Nothing but its embedding learns."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from training.lora import Denoising, draw_levels, encode_pictures, run


def add_word(pipe: diffusers.StableDiffusionPipeline, word: str, like: str) -> int:
    """Give `word` a token of its own, whose embedding starts as that of `like`; its number.

    Raises ValueError, one sentence, if the model knows the word already, or `like` is more than one token.
    """
    start = pipe.tokenizer(like, add_special_tokens=False).input_ids
    if len(start) != 1:
        raise ValueError(f"{like!r} is {len(start)} tokens: start from a word that is one.")
    if word in pipe.tokenizer.get_vocab() or f"{word}</w>" in pipe.tokenizer.get_vocab():
        raise ValueError(
            f"The model has a token {word!r} already: choose another word, such as '<{word.strip('<>')}-1>'."
        )
    pipe.tokenizer.add_tokens(word)
    number = pipe.tokenizer.convert_tokens_to_ids(word)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    rows = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        rows[number] = rows[start[0]]
    return number


class Inversion(nn.Module):
    """The error of `Denoising` as a function of one token's embedding, (D,)."""

    def __init__(self, pipe: diffusers.StableDiffusionPipeline, number: int):
        super().__init__()
        self._pipe, self._number, self._denoising = (pipe,), number, Denoising(pipe, [])
        rows = pipe.text_encoder.get_input_embeddings().weight
        self.learned = nn.ParameterList([nn.Parameter(rows[number].detach().float().clone())])

    def forward(self, latents, noise, levels, token_ids):
        """As `Denoising.forward`, with token ids (B, T) in the place of what the text encoder makes of them."""
        (pipe,) = self._pipe

        def put_in(module, given, rows):
            return torch.where((given[0] == self._number)[..., None], self.learned[0].to(rows.dtype), rows)

        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(put_in)
        try:
            context = pipe.text_encoder(token_ids)[0]
        finally:
            hook.remove()
        return self._denoising(latents, noise, levels, context)


def fit_word(
    pipe: diffusers.StableDiffusionPipeline,
    number: int,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    steps: int,
    batch_size: int = 4,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Learn the embedding of token `number` (of `add_word`) from pictures whose captions use it; the losses.

    Raises ValueError, one sentence, if there are no pictures, not as many captions, or a caption lacks the word.
    """
    latents = encode_pictures(pipe, pictures, captions)
    ids = pipe.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    without = [caption for caption, row in zip(captions, ids, strict=True) if number not in row]
    if without:
        raise ValueError(f"A caption lacks the new word: {without[0][:80]!r}.")
    frozen = [p for part in (pipe.unet, pipe.text_encoder) for p in part.parameters() if p.requires_grad]
    objective = Inversion(pipe, number)

    def make_batch(indices, generator):
        noise = torch.randn(latents[indices].shape, generator=generator)
        return latents[indices], noise, draw_levels(pipe, len(indices), generator), ids[indices]

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)  # their gradients would be computed for nothing
        losses = run(objective, make_batch, len(latents), steps, batch_size, learning_rate, seed)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[number] = objective.learned[0].to(pipe.text_encoder.dtype)
    return losses


def save_word(pipe: diffusers.StableDiffusionPipeline, word: str, path: Path) -> None:
    """Write the word and its embedding as a file that the stock `pipe.load_textual_inversion` reads."""
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(word)]
    save_file({word: row.detach().float().cpu().clone()}, path)
