"""Text to token ids: CLIP's byte-pair encoding (Sennrich et al. 2015), run by the `tokenizers` library.

A folder holds it either as one tokenizer.json or, as Stable Diffusion 1.5 does, as vocab.json and merges.txt.
"""

import json
import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
# What counts as one word before it is broken into pieces: a contraction's end, letters, one digit, other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_pair_encoding(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt: lower case, words, then pieces, the last one marked </w>."""
    model = models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([START, END])
    return made


def padding_token(folder: Path) -> str:
    """What fills the space after a prompt: the end token, unless the folder says otherwise."""
    file = folder / "tokenizer_config.json"
    token = json.loads(file.read_text("utf-8")).get("pad_token") if file.exists() else None
    return (token["content"] if isinstance(token, dict) else token) or END


class Tokenizer:
    """`encode` makes token ids of prompts, always `length` of them: 77 for Stable Diffusion 1.5.

    Raises FileNotFoundError if `folder` holds no tokenizer.
    """

    def __init__(self, folder: str | Path, length: int):
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            self.pieces = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.pieces.no_padding()
            self.pieces.no_truncation()
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            self.pieces = byte_pair_encoding(folder)
        else:
            raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt.")
        self.length = length
        self.start, self.end = self.pieces.token_to_id(START), self.pieces.token_to_id(END)
        self.pad = self.pieces.token_to_id(padding_token(folder))

    def tokens(self, text: str) -> list[str]:
        """The pieces that `text` falls into, without start, end and padding."""
        return self.pieces.encode(text, add_special_tokens=False).tokens

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Prompts -> token ids, (B, length): start, the prompt, end, padding. Warns of what did not fit and was cut."""
        rows = []
        for text in texts:
            encoding = self.pieces.encode(text, add_special_tokens=False)
            room = self.length - 2
            if len(encoding.ids) > room:
                cut = text[encoding.offsets[room][0] :].strip()
                message = f"The prompt has {len(encoding.ids)} tokens, {room} fit; this was cut off its end: {cut!r}."
                warnings.warn(message, stacklevel=3)
            row = [self.start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows)
