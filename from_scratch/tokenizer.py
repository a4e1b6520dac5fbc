"""Text to token ids: CLIP's byte-pair encoding (Sennrich et al. 2015) and T5's unigrams (Kudo 2018).

Both are run by the `tokenizers` library. A folder holds one tokenizer.json or, as Stable Diffusion 1.5's does, CLIP's
as vocab.json and merges.txt.
"""

import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers

from from_scratch.files import CheckpointError, read_json

START, END = "<|startoftext|>", "<|endoftext|>"
# What counts as one word before it is broken into pieces: a contraction's end, letters, one digit, other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_pair_encoding(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt: lower case, words, then pieces, the last one marked </w>."""
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    model = models.BPE.from_file(*files, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    made = tokenizers.Tokenizer(model)
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens([START, END])
    return made


class Tokenizer:
    """`encode` makes token ids of prompts, always `length` of them: 77 for Stable Diffusion 1.5.

    `start` and `end` are the tokens around a prompt; T5's prompts have no start. Raises CheckpointError if `folder`
    holds no tokenizer, or one that is damaged.
    """

    def __init__(self, folder: str | Path, length: int, start: str | None = START, end: str = END):
        folder = Path(folder)
        whole, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"] if start else []
        if not whole.exists() and not (parts and all(part.exists() for part in parts)):
            names = "neither tokenizer.json nor vocab.json and merges.txt" if parts else "there is no tokenizer.json"
            raise CheckpointError(f"{folder} has no tokenizer: {names}.")
        settings = folder / "tokenizer_config.json"
        pad = (read_json(settings).get("pad_token") if settings.exists() else None) or end
        pad = pad.get("content") if isinstance(pad, dict) else pad
        wanted = [*([start] if start else []), end, pad]
        try:
            self.pieces = tokenizers.Tokenizer.from_file(str(whole)) if whole.exists() else byte_pair_encoding(folder)
            self.pieces.encode("a sign that few vocabularies have: \u8239")
            ids = [self.pieces.token_to_id(token) if isinstance(token, str) else None for token in wanted]
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"The tokenizer in {folder} is damaged, fetch it again: {reason}.") from None
        self.pieces.no_padding()
        self.pieces.no_truncation()
        self.length = length
        if None in ids:
            what = f"{'CLIP' if start else 'T5'}'s: it lacks {', '.join(wanted[:-1])} or {pad!r}"
            raise CheckpointError(f"The tokenizer in {folder} is not {what}.")
        self.start, self.end, self.pad = ids if start else (None, *ids)
        # As in transformers, the padding is a token by itself wherever it stands: CLIP G's is "!", in prompts too.
        self.pieces.add_special_tokens([pad])

    def tokens(self, text: str) -> list[str]:
        """The pieces that `text` falls into, without start, end and padding."""
        return self.pieces.encode(text, add_special_tokens=False).tokens

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Prompts -> token ids, (B, length): start, the prompt, end, padding. Warns of what did not fit and was cut."""
        start = [] if self.start is None else [self.start]
        rows, room = [], self.length - len(start) - 1
        for text in texts:
            encoding = self.pieces.encode(text, add_special_tokens=False)
            if len(encoding.ids) > room:
                cut = text[encoding.offsets[room][0] :].strip()
                what = f"The prompt has {len(encoding.ids)} tokens, {room} fit; this was cut off its end"
                warnings.warn(f"{what}: {cut!r}.", stacklevel=3)
            row = [*start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows)
