"""Files of weights and settings, none of which is trusted: whatever is wrong with one is a CheckpointError."""

import json
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """The file or folder cannot be loaded; the message is one sentence that says why."""


class Entry(NamedTuple):
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Entries = dict[str, Entry]


def read_safetensors(path: Path) -> Entries:
    """Names and shapes of a .safetensors file."""
    try:
        file, taken = safe_open(path, framework="pt"), 0
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is cut off or damaged, or no safetensors file: {error}.") from None

    def read(name: str) -> Tensor:
        nonlocal file, taken
        if taken > 2**28:  # bytes; what was read stays in memory as long as the file's mapping, so that is renewed
            file, taken = safe_open(path, framework="pt"), 0
        tensor = file.get_tensor(name)
        taken += tensor.nbytes
        return tensor

    return {name: Entry(shape, partial(read, name)) for name, shape in shapes.items()}


def read_weights(path: Path) -> Entries:
    """Every tensor of a file. Any but .safetensors is a pickle, which can run code: only tensors are let through."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise anything, and PyTorch's advice is to let it run code
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f"asks Python for {found and found[1]}, which could run code; nothing was run: use a .safetensors file"
        damage = "is cut off or damaged, or holds more than tensors"
        raise CheckpointError(f"{path} {code if found else damage}.") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in tensors if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: Entry(tuple(tensor.shape), partial(Tensor.detach, tensor)) for name, tensor in tensors.items()}


def part_entries(folder: Path, part: str) -> Entries:
    """The weights of one part of a diffusers folder: in one file, or in several that are numbered."""
    stem, old = ("model", "pytorch_model") if part.startswith("text_encoder") else ("diffusion_pytorch_model",) * 2
    names = [f"{stem}{kind}.safetensors" for kind in ("", ".fp16", "-*-of-*", ".fp16-*-of-*")]
    for pattern in (*names, f"{old}.bin"):
        if files := sorted((folder / part).glob(pattern)):
            return {name: entry for file in files for name, entry in read_weights(file).items()}
    raise CheckpointError(f"{folder} is no Stable Diffusion folder: there is no {part}/{names[0]}.")


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no {path}: fetch the folder again, with all of its files.") from None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object, or cannot be read: fetch it again.")
    return found
