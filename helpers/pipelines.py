"""The models that the notebooks draw with, and how to load them. A new model is one entry in MODELS."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import errors, hf_hub_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from packaging.version import Version
from safetensors import SafetensorError, safe_open

from helpers.login import HUB_ERRORS, AccessError, check_access, check_token, explain
from helpers.memory import Budget

ROOT = Path(__file__).resolve().parent.parent
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD1.5's own; a single-file checkpoint holds weights only


# What each part of a pipeline is described by, by a word in its class; everything else is a network with weights.
CONFIG_FILES = {
    "Tokenizer": "tokenizer_config.json",
    "Scheduler": "scheduler_config.json",
    "Processor": "preprocessor_config.json",
}


class LoadError(RuntimeError):
    """The model could not be loaded; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Model:
    """One model: where it is and how it likes to be used. It has a `hub_id` or a `folder`."""

    name: str
    pipeline: str  # class in diffusers
    size: int | None  # pixels; None: the folder says, see `generate.own_size`
    steps: int
    guidance: float
    examples: tuple[str, ...]
    hub_id: str | None = None
    variant: str | None = None  # which of several sets of weights to download
    mirror: str | None = None  # where to look if hub_id is gone
    mirror_file: str | None = None  # the mirror is this one file in the original layout, not a diffusers folder
    mirror_config: str | None = None  # folder with the configs that such a file lacks, relative to the repository
    folder: str | None = None  # relative to the repository
    without: tuple[str, ...] = ()  # optional parts that are neither downloaded nor loaded
    twin: str | None = None  # the bundled model to use where this one cannot run
    download_gb: float = 0.0  # 10**9 bytes
    vram_gib: float = 0.0  # what it needs to draw one picture, resident


MODELS = {
    model.name: model
    for model in (
        Model(
            name="sd15",
            pipeline="StableDiffusionPipeline",
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
            variant="fp16",
            mirror="Comfy-Org/stable-diffusion-v1-5-archive",
            mirror_file="v1-5-pruned-emaonly-fp16.safetensors",
            mirror_config="helpers/sd15_config",
            without=("safety_checker", "feature_extractor"),
            size=512,
            steps=25,
            guidance=7.5,
            examples=(
                "a lighthouse on a cliff at sunset, oil painting",
                "a red fox in the snow, wildlife photograph",
                "a cosy reading corner with plants, watercolour",
            ),
            twin="storybook-sd",
            download_gb=2.2,
            vram_gib=3.5,
        ),
        Model(
            name="storybook-sd",
            pipeline="StableDiffusionPipeline",
            folder="models/storybook-sd",
            size=None,
            steps=25,
            guidance=4.0,
            examples=(
                "a red boat by the sea",
                "a small yellow star under a starry night sky",
                "a blue house in the snow",
            ),
        ),
    )
}


def choose(name: str) -> Model:
    """The model of that name where it can run, else its bundled twin; prints one line that says which and why.

    DIFFUSION_MODEL in the environment overrides both. Raises ValueError with the names if there is no such model.
    """
    forced = os.environ.get("DIFFUSION_MODEL", "").strip()
    model = _find(forced or name)
    budget = Budget.detect()
    if forced:
        print(f"{model.name}: because DIFFUSION_MODEL says so.")
    elif model.twin is None:
        print(f"{model.name}: bundled, runs on any machine.")
    elif budget.device == "cpu":
        print(f"{model.twin}: there is no GPU here, and {model.name} would take minutes a picture without one.")
        return _find(model.twin)
    elif budget.vram_gib < model.vram_gib:
        print(f"{model.twin}: {model.name} needs {model.vram_gib} GiB of GPU memory, there are {budget.vram_gib:.1f}.")
        return _find(model.twin)
    else:
        print(
            f"{model.name}: on {budget.device} with {budget.vram_gib:.1f} GiB; downloads {model.download_gb} GB once."
        )
    return model


def load(model: Model | str, plan: None = None) -> diffusers.DiffusionPipeline:
    """The model's pipeline on the best device: float16 on a GPU, float32 on a CPU; safetensors only, no remote code.

    The first call downloads, later calls need no network. If `hub_id` is gone from the Hub the mirror is used. SD1.5
    comes without its safety checker, which costs 1.2 GB more: show what it draws to others only after a look of your
    own. The pipeline gets an attribute `model`, from which `generate` takes defaults. `plan` is for larger models and
    must be None so far. Raises ValueError for an unknown name, LoadError (one sentence) for everything that can go
    wrong with network, access or files; nothing then needs cleaning up, and calling again keeps complete files.
    """
    model = _find(model) if isinstance(model, str) else model
    if plan is not None:
        raise ValueError("Loading plans are not here yet: leave plan out.")
    device = Budget.detect().device
    dtype = torch.float32 if device == "cpu" else torch.float16
    with _unworried():
        cls = getattr(diffusers, model.pipeline)
    if model.folder is not None:
        pipe = _from_folder(cls, model, ROOT / model.folder, dtype)
    else:
        pipe = _from_hub(cls, model, dtype)
    pipe.set_progress_bar_config(disable=True)  # generate has its own
    pipe.model = model
    return pipe.to(device)


def _find(name: str) -> Model:
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}: choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def _from_hub(cls, model: Model, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    try:
        check_access(model.hub_id)
    except AccessError as error:
        reason = error.__cause__
        gone = isinstance(reason, errors.RepositoryNotFoundError) and not isinstance(reason, errors.GatedRepoError)
        if not gone or model.mirror is None:
            raise LoadError(str(error)) from error
    else:
        return _from_folder(cls, model, _download(cls, model, model.hub_id), dtype)
    print(f"{model.hub_id} is gone from the Hub, so the mirror {model.mirror} is used.")
    return _from_mirror(cls, model, dtype)


def _download(cls, model: Model, repo_id: str) -> Path:
    """Fetch what a pipeline needs of a repository in the diffusers layout; the folder it is in afterwards."""
    without = dict.fromkeys(model.without)  # a part that is passed, even as None, is not downloaded
    try:
        return Path(cls.download(repo_id, variant=model.variant, use_safetensors=True, **without))
    except HUB_ERRORS as error:
        if type(error) is OSError and error.errno is None and error.__cause__ is None and "safetensors" in str(error):
            raise LoadError(
                f"The weights of {repo_id} are not all there as .safetensors files: "
                f"look at https://huggingface.co/{repo_id}/tree/main, or choose another model."
            ) from error
        raise LoadError(explain(error, repo_id)) from error


def _from_mirror(cls, model: Model, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    if model.mirror_file is None:
        return _from_folder(cls, model, _download(cls, model, model.mirror), dtype)
    try:
        check_token()
        repo_id = model.mirror
        weights = Path(hf_hub_download(repo_id, model.mirror_file))
        repo_id = CLIP_TOKENIZER
        for part in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            tokenizer_folder = Path(hf_hub_download(repo_id, part)).parent
    except AccessError as error:
        raise LoadError(str(error)) from error
    except HUB_ERRORS as error:
        raise LoadError(explain(error, repo_id)) from error
    _check_weights(model, weights)
    with _no_bars():
        return cls.from_single_file(
            str(weights),
            config=str(ROOT / model.mirror_config),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77),
            local_files_only=True,
            **_dtype(dtype),
            **dict.fromkeys(model.without),
        )


def _from_folder(cls, model: Model, folder: Path, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    variant = model.variant if any(folder.glob(f"*/*.{model.variant}.safetensors")) else None
    _check_folder(model, folder)
    parts = dict.fromkeys(model.without)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False  # else diffusers warns that it is missing
    try:
        with _no_bars():
            return cls.from_pretrained(
                folder, variant=variant, use_safetensors=True, local_files_only=True, **_dtype(dtype), **parts
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"The files in {_name(folder)} do not fit together: {_repair(model, folder)}.") from error


def _check_folder(model: Model, folder: Path) -> None:
    """Look at every file before the libraries do, so that an error can name the one that is wrong."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError as error:
        raise LoadError(
            f"The file {_name(folder / 'model_index.json')} is missing: {_repair(model, folder)}."
        ) from error
    except json.JSONDecodeError as error:
        raise LoadError(
            f"The file {_name(folder / 'model_index.json')} is damaged: {_repair(model, folder)}."
        ) from error
    for part, kind in index.items():
        if part.startswith("_") or part in model.without or not isinstance(kind, list) or kind[0] is None:
            continue
        config = next((file for word, file in CONFIG_FILES.items() if word in kind[1]), "config.json")
        if not (folder / part / config).is_file():
            raise LoadError(f"The file {_name(folder / part / config)} is missing: {_repair(model, folder)}.")
        weights = sorted((folder / part).glob("*.safetensors"))
        if config == "config.json" and not weights:
            raise LoadError(f"There is no .safetensors file in {_name(folder / part)}: {_repair(model, folder)}.")
        for file in weights:
            _check_weights(model, file)


def _check_weights(model: Model, file: Path) -> None:
    """Opening reads the header and compares it with the length, without reading the weights."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoadError(f"The file {_name(file)} is truncated or damaged: {_repair(model, file)}.") from error


def _repair(model: Model, path: Path) -> str:
    if model.folder is not None:
        return f"restore it with `git checkout -- {model.folder}` or rebuild it with `make train`"
    target = path.resolve() if path.is_file() else path  # the cache links to the real file, which is the one to delete
    return f"delete {target} and run this again to download it anew"


def _name(path: Path) -> str:
    """A path as a reader of the repository knows it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword was renamed in diffusers 0.40; the old release ignores the new one and loads float32."""
    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


@contextmanager
def _no_bars() -> Iterator[None]:
    """No "Loading weights" bars on the page. Downloads are outside and keep theirs."""
    hub_quiet = are_progress_bars_disabled()
    restore = [
        module.enable_progress_bar
        for module in (diffusers.utils.logging, transformers.utils.logging)
        if module.is_progress_bar_enabled()
    ]
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for enable in restore:
            enable()
        (disable_progress_bars if hub_quiet else enable_progress_bars)()


@contextmanager
def _unworried() -> Iterator[None]:
    """The first import of a pipeline warns about packages that it can do without; the page need not."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
