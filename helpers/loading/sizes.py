"""How large the parts of a model are, read from the headers of its safetensors files, without reading the weights.

A header maps the name of each tensor to its dtype and shape, so that the sizes of 16 GB are known after a few hundred
kilobytes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from helpers.loading.machine import HUB
from helpers.loading.registry import ROOT, Model
from helpers.login import HUB_ERRORS, AccessError, check_token

NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")

FROM_FILES = "read from the files"

POSITION_TABLE = "pos_embed.pos_embed"

Tensors = Iterable[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape) of each tensor


@dataclass(frozen=True)
class Part:
    """One network of a pipeline. All but `dtype` and `width` are numbers of weights."""

    weights: int  # all of them
    dtype: str = "F16"  # in the files: "F32", "F16" or "BF16"
    fp32: int = 0  # of T5's `wo`, which transformers keeps in float32 when float16 is asked for
    linear: int = 0  # of the layers of T5 that NF4 stores in four bits; `wo` and the embeddings are not among them
    table: int = 0  # of SD3's position table, which is no parameter but a buffer
    block: int = 0  # of the largest repeated block
    blocks: int = 0  # of all repeated blocks together
    leaf: int = 0  # of the largest single tensor but the position table
    width: int = 0  # channels at full resolution, for a VAE


# Stable Diffusion 1.5 and 3.5 Medium as counted from their configs: the fallback for when nothing can be read.
KNOWN = {
    "sd15": {
        "text_encoder": Part(123_060_480, leaf=37_945_344),
        "unet": Part(859_520_964, leaf=29_491_200),
        "vae": Part(83_653_863, leaf=2_359_296, width=128),
    },
    "sd35-medium": {
        "text_encoder": Part(123_650_304, block=7_087_872, blocks=85_054_464, leaf=37_945_344),
        "text_encoder_2": Part(694_659_840, block=19_677_440, blocks=629_678_080, leaf=63_242_240),
        "text_encoder_3": Part(
            4_762_310_656,
            fp32=1_006_632_960,
            linear=3_623_878_656,
            block=192_948_224,
            blocks=4_630_710_272,
            leaf=131_596_288,
        ),
        "transformer": Part(
            2_469_663_936,
            table=226_492_416,
            block=101_506_944,
            blocks=2_223_694_976,
            leaf=21_233_664,
        ),
        "vae": Part(83_819_683, block=16_524_800, blocks=83_589_632, leaf=2_359_296, width=128),
    },
}


def parts(model: Model) -> tuple[dict[str, Part], str]:
    """The networks of `model` by name, and where the sizes are from, as "read from ..." or the stated fallback.

    Looked for in the model's folder or the Hub client's cache, then on the Hub, then in KNOWN. Raises ValueError, one
    sentence, if the model is in none of them.
    """
    if found := _here(model):
        return found, FROM_FILES
    if model.hub_id is not None and HUB.answers():
        try:
            return dict(_on_hub(model.hub_id, model.variant)), f"read from {model.hub_id}"
        except (*HUB_ERRORS, AccessError, SafetensorsParsingError):  # no access: a plan can yet be made
            pass
    if model.name not in KNOWN:
        raise ValueError(f"The sizes of {model.name} are not known: its files are not here and cannot be asked for.")
    return KNOWN[model.name], "taken from a table, since the files are not here and the Hub could not be asked"


def is_here(model: Model) -> bool:
    """Whether the weights are in the repository or in the Hub client's cache, so that loading downloads nothing."""
    return bool(_here(model))


def measure(tensors: Tensors) -> Part:
    """Add up one network. A tensor that is in the file under two names counts once."""
    sizes = {name: prod(shape) for name, dtype, shape in tensors}
    dtypes, shapes = Counter(), {}
    for name, dtype, shape in tensors:
        dtypes[dtype] += sizes[name]
        shapes[name] = shape
    if "shared.weight" in sizes:  # T5's embedding
        sizes.pop("encoder.embed_tokens.weight", None)
    blocks = Counter()
    for name, size in sizes.items():
        if match := re.match(r"(.*?\.\d+)\.", name):
            blocks[match[1]] += size
    t5 = [name for name in sizes if re.search(r"block\.\d+\.layer\.\d+\.", name)]
    wo = sum(sizes[name] for name in t5 if name.endswith("DenseReluDense.wo.weight"))
    four_bits = r"(SelfAttention\.[qkvo]|DenseReluDense\.wi(_\d)?)\.weight$"
    return Part(
        weights=sum(sizes.values()),
        dtype=dtypes.most_common(1)[0][0],
        fp32=wo,
        linear=sum(sizes[name] for name in t5 if re.search(four_bits, name)),
        table=sizes.get(POSITION_TABLE, 0),
        block=max(blocks.values(), default=0),
        blocks=sum(blocks.values()),
        leaf=max(size for name, size in sizes.items() if name != POSITION_TABLE),
        width=shapes.get("decoder.conv_out.weight", (0, 0))[1],
    )


def read_header(file: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor in a safetensors file. Raises OSError or SafetensorError for a bad one."""
    with safe_open(file, "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}
        return [(name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()]


def weight_files(names: Iterable[str], variant: str | None) -> dict[str, list[str]]:
    """Which of a repository's files hold the weights of each network: those of the variant, where there are any."""
    files = {}
    for part in NETWORKS:
        found = [name for name in names if re.fullmatch(rf"{part}/[^/]+\.safetensors", name)]
        of_variant = [name for name in found if variant is not None and re.search(rf"\.{variant}[.-]", name)]
        plain = [name for name in found if re.fullmatch(r"[^./]+\.safetensors", name.split("/")[1])]
        if of_variant or plain:
            files[part] = sorted(of_variant or plain)
    return files


def cached(repo_id: str) -> Path | None:
    """The folder in the Hub client's cache, which may hold some of the repository's files only, or None."""
    index = huggingface_hub.try_to_load_from_cache(repo_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _here(model: Model) -> dict[str, Part]:
    """The networks by name, if the files of all are on this machine; else {}."""
    folder = ROOT / model.folder if model.folder is not None else cached(model.hub_id)
    if folder is None:
        return {}
    found = _in_folder(folder, model.variant)
    return found if {name for name in _expected(folder) if name not in model.without} <= set(found) else {}


def _in_folder(folder: Path, variant: str | None) -> dict[str, Part]:
    names = [file.relative_to(folder).as_posix() for file in folder.glob("*/*.safetensors")]
    try:
        return {
            part: measure([tensor for name in files for tensor in read_header(folder / name)])
            for part, files in weight_files(names, variant).items()
            if len(files) == _shards(files[0])
        }
    except (OSError, SafetensorError):  # damaged: loading will say which file and what to do
        return {}


def _shards(name: str) -> int:
    """How many files the weights are spread over, as their names say: model-00001-of-00002.safetensors."""
    match = re.search(r"-of-(\d+)\.", name)
    return int(match[1]) if match else 1


def _expected(folder: Path) -> list[str]:
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return list(NETWORKS)
    return [name for name in NETWORKS if isinstance(index.get(name), list) and index[name][0] is not None]


@lru_cache
def _on_hub(repo_id: str, variant: str | None) -> tuple[tuple[str, Part], ...]:
    check_token()
    found = []
    for part, files in weight_files(huggingface_hub.list_repo_files(repo_id), variant).items():
        tensors = []
        for name in files:
            header = huggingface_hub.parse_safetensors_file_metadata(repo_id, name)
            tensors += [(key, info.dtype, tuple(info.shape)) for key, info in header.tensors.items()]
        found.append((part, measure(tensors)))
    if not found:
        raise ValueError(f"{repo_id} has no weights in the layout of diffusers.")
    return tuple(found)
