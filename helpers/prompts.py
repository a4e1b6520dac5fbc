"""What a model will not see of a prompt: the words that are cut off, the words that it never learned."""

import re

import diffusers

from helpers.settings import Settings

SMALL_VOCABULARY = 5000  # entries; CLIP's has 49,408 and can spell any word, a small one cannot
T5_TOKENS = 256  # what StableDiffusion3Pipeline lets its T5 encoder read


def notes(pipe: diffusers.DiffusionPipeline, settings: Settings) -> list[str]:
    """Sentences on what the model will not see of the two prompts: the words cut off, the words it never learned."""
    t5 = getattr(pipe, "tokenizer_3", None)
    tokenizer, limit = (t5, T5_TOKENS) if t5 is not None else (pipe.tokenizer, pipe.tokenizer.model_max_length)
    sentences = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        cut = cut_off(tokenizer, text, limit)
        if cut:
            sentences.append(f"The {name} is too long for the model, which does not see its end: {cut!r}.")
        unknown = unknown_words(pipe.tokenizer, text)
        if unknown:
            sentences.append(f"The model has never seen these words of the {name}: {', '.join(unknown)}.")
    return sentences


def cut_off(tokenizer, text: str, limit: int | None = None) -> str:
    """The end of `text` beyond `limit` tokens (default: the tokenizer's own limit); "" if all of it fits."""
    limit = limit or tokenizer.model_max_length
    room = limit - tokenizer.num_special_tokens_to_add()
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets = tokens["offset_mapping"]
    return text[offsets[room][0] :].strip() if len(offsets) > room else ""


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words of `text`, in order and once each, that a small tokenizer does not hold as a whole.

    A tokenizer made for one small world knows exactly the words of its captions, each as one token `word</w>`; any
    other word falls apart into letters that the model has never learned from. A large vocabulary gives [].
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) >= SMALL_VOCABULARY:
        return []
    words = re.findall(r"[^\W\d_]+|\d", text.lower())
    return list(dict.fromkeys(word for word in words if f"{word}</w>" not in vocabulary))
