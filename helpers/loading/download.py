"""Where a model's files are: in the repository, in the Hub client's cache or on the Hub; and whether they are whole."""

import json
import re
from collections import Counter
from math import prod
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import constants, errors, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from helpers.loading.machine import GIB, Budget
from helpers.loading.registry import ROOT, Model
from helpers.loading.sizes import FROM_FILES, NETWORKS, cached, parts, read_header, weight_files
from helpers.loading.versions import only_errors
from helpers.login import HUB_ERRORS, AccessError, check_access, check_token, explain, require_hub

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD1.5's own; a single-file checkpoint holds weights only
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")

# What each part of a pipeline is described by, by a word in its class; everything else is a network with weights.
CONFIG_FILES = {
    "Tokenizer": "tokenizer_config.json",
    "Scheduler": "scheduler_config.json",
    "Processor": "preprocessor_config.json",
}


# How ComfyUI marks weights in eight bits that mean nothing without scales of their own: t5xxl_fp8_e4m3fn_scaled.
SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant)$")

# A tokenizer's words are in one of these sets of files.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


class LoadError(RuntimeError):
    """The model could not be loaded; the message is one sentence that says what to do."""


def folder_of(cls: type, model: Model) -> Path | None:
    """Where the model's files are, after a download if need be; None if the Hub has the repository no more.

    `cls` is its pipeline in diffusers. What is in the cache as a whole is not asked for. Raises LoadError.
    """
    if model.folder is not None:
        return ROOT / model.folder
    kept = cached(model.hub_id)
    if kept is not None and _is_whole(model, kept):
        return kept
    try:
        check_token()
        require_hub(model.hub_id)  # parts of the repository may be here, which are enough for check_access
        check_access(model.hub_id)
    except AccessError as error:
        reason = error.__cause__
        gone = isinstance(reason, errors.RepositoryNotFoundError) and not isinstance(reason, errors.GatedRepoError)
        if not gone or model.mirror is None:
            raise LoadError(str(error)) from error
        print(f"{model.hub_id} is gone from the Hub, so the mirror {model.mirror} is used.")
        return None
    return download(cls, model, model.hub_id)


def download(cls, model: Model, repo_id: str) -> Path:
    """Fetch what a pipeline needs of a repository in the diffusers layout; the folder it is in afterwards."""
    without = dict.fromkeys(model.without)  # a part that is passed, even as None, is not downloaded
    try:
        return Path(cls.download(repo_id, variant=model.variant, use_safetensors=True, **without))
    except HUB_ERRORS as error:
        kept = cached(repo_id)
        if kept is not None and _is_whole(model, kept):
            # Without a network some releases of the client want every file of the repository, also those not needed.
            return kept
        if type(error) is OSError and error.errno is None and error.__cause__ is None and "safetensors" in str(error):
            raise LoadError(
                f"The weights of {repo_id} are not all there as .safetensors files: "
                f"look at https://huggingface.co/{repo_id}/tree/main, or choose another model."
            ) from error
        raise LoadError(explain(error, repo_id)) from error


def mirror_files(model: Model) -> tuple[Path, Path]:
    """The mirror's single file, which holds weights only, and a folder with the tokenizer, after a download."""
    repo_id = model.mirror
    try:
        check_token()
        require_hub(repo_id)
        weights = Path(hf_hub_download(repo_id, model.mirror_file))
        repo_id = CLIP_TOKENIZER
        for part in TOKENIZER_FILES:
            tokenizer_folder = Path(hf_hub_download(repo_id, part)).parent
    except AccessError as error:
        raise LoadError(str(error)) from error
    except HUB_ERRORS as error:
        raise LoadError(explain(error, repo_id)) from error
    _check_weights(model, weights)
    return weights, tokenizer_folder


def require_disk(model: Model, budget: Budget) -> None:
    """Refuse before the download rather than after most of it. What is there already, in parts too, counts."""
    if model.hub_id is None:
        return
    sizes, source = parts(model)
    needed = sum(part.weights * 2 for name, part in sizes.items() if name not in model.without) / GIB
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model.hub_id, repo_type="model"), "blobs")
    needed -= sum(file.stat().st_size for file in blobs.glob("*")) / GIB
    if source != FROM_FILES and needed > budget.disk_gib:
        raise LoadError(
            f"{model.name} needs {needed:.1f} GiB of disk and {budget.disk_gib:.1f} are free: "
            "free some space, or point HF_HOME to a larger disk before the first import."
        )


def _is_whole(model: Model, folder: Path) -> bool:
    try:
        check_folder(model, folder)
    except LoadError:
        return False
    return True


def check_folder(model: Model, folder: Path) -> None:
    """Look at every file before the libraries do, so that an error can name the one that is wrong."""
    for part, kind in _read_json(model, folder / "model_index.json").items():
        if part.startswith("_") or part in model.without or not isinstance(kind, list) or kind[0] is None:
            continue
        config = next((file for word, file in CONFIG_FILES.items() if word in kind[1]), "config.json")
        found = _read_json(model, folder / part / config)
        if "Tokenizer" in kind[1]:
            _check_tokenizer(model, folder / part)
        if config != "config.json":
            continue
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            raise LoadError(f"There is no .safetensors file in {name_of(folder / part)}: {repair(model, folder)}.")
        for file in [*weights, *_shards(model, folder / part)]:
            _check_weights(model, file)
        if part in NETWORKS:
            _check_tensors(model, folder, part, kind, found)


def _read_json(model: Model, file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"The file {name_of(file)} is missing: {repair(model, file)}.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise LoadError(f"The file {name_of(file)} is damaged: {repair(model, file)}.") from error
    if not isinstance(found, dict):
        raise LoadError(f"The file {name_of(file)} is damaged: {repair(model, file)}.")
    return found


def _check_tokenizer(model: Model, folder: Path) -> None:
    """Without its vocabulary a tokenizer is made all the same, and knows no word."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise LoadError(f"The file {name_of(folder / VOCABULARIES[0][0])} is missing: {repair(model, folder)}.")


def _check_tensors(model: Model, folder: Path, part: str, kind: list[str], config: dict) -> None:
    """Compare the tensors in the files with those that the configuration wants, by their numbers of weights.

    Names do not count, since old files have others. Without this, a missing tensor would be left as memory was.
    """
    names = [file.relative_to(folder).as_posix() for file in (folder / part).glob("*.safetensors")]
    files = weight_files(names, model.variant).get(part, [])
    tensors = {name: shape for file in files for name, _, shape in read_header(folder / file)}
    if any(map(SCALED.search, tensors)):  # else it would be drawn with, without the scales
        where = name_of(folder / part)
        raise LoadError(f"The weights in {where} are scaled fp8, not float16: {repair(model, folder)}.")
    there = Counter(prod(shape) for name, shape in tensors.items() if not name.endswith("position_ids"))
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[kind[0]], kind[1])
    try:
        wanted = Counter(map(torch.numel, shapes(cls, config)))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise LoadError(
            f"The file {name_of(folder / part / 'config.json')} is damaged: {repair(model, folder)}."
        ) from error
    if wanted - there:
        raise LoadError(f"The files in {name_of(folder / part)} do not fit together: {repair(model, folder)}.")


def shapes(cls: type, config: dict) -> list[torch.Tensor]:
    """The tensors that a network of this configuration keeps in its files, each once and without memory."""
    with only_errors(), torch.device("meta"):
        if issubclass(cls, diffusers.ModelMixin):
            network = cls.from_config(config)
        else:
            network = cls(cls.config_class.from_dict(config))
    kept = network.state_dict(keep_vars=True)
    return list({id(tensor): tensor for name, tensor in kept.items() if not name.endswith("position_ids")}.values())


def _shards(model: Model, folder: Path) -> list[Path]:
    """The files that weights too large for one are spread over; empty if they are in one."""
    ending = "safetensors.index.json" if model.variant is None else f"safetensors.index.{model.variant}.json"
    maps = [json.loads(file.read_text())["weight_map"] for file in folder.glob(f"*.{ending}")]
    return sorted({folder / name for one in maps for name in one.values()})


def _check_weights(model: Model, file: Path) -> None:
    """Opening reads the header and compares it with the length, without reading the weights."""
    try:
        with safe_open(file, "pt"):
            pass
    except FileNotFoundError as error:
        raise LoadError(f"The file {name_of(file)} is missing: {repair(model, file)}.") from error
    except (SafetensorError, OSError) as error:
        raise LoadError(f"The file {name_of(file)} is truncated or damaged: {repair(model, file)}.") from error


def repair(model: Model, path: Path) -> str:
    if model.folder is not None:
        return f"restore it with `git checkout -- {model.folder}` or rebuild it with `make train`"
    target = path.resolve() if path.is_file() else path  # the cache links to the real file, which is the one to delete
    return f"delete {target} and run this again to download it anew"


def name_of(path: Path) -> str:
    """A path as a reader of the repository knows it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
