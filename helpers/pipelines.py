"""From a name in the registry to a pipeline that draws: which model can run here, and how it is loaded."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import errors, hf_hub_download
from safetensors import SafetensorError, safe_open

from helpers.login import HUB_ERRORS, AccessError, check_access, check_token, explain
from helpers.memory import GIB, Budget, Plan
from helpers.memory import plan as make_plan
from helpers.plan import T5, WITHOUT_T5, plans
from helpers.quiet import dtype_keyword, no_bars, unworried
from helpers.registry import MODELS as MODELS  # where notebooks look for it
from helpers.registry import ROOT, Model, find
from helpers.sizes import FROM_FILES, cached, parts

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # SD1.5's own; a single-file checkpoint holds weights only
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
T5_PARTS = (T5, "tokenizer_3")

# What each part of a pipeline is described by, by a word in its class; everything else is a network with weights.
CONFIG_FILES = {
    "Tokenizer": "tokenizer_config.json",
    "Scheduler": "scheduler_config.json",
    "Processor": "preprocessor_config.json",
}


class LoadError(RuntimeError):
    """The model could not be loaded; the message is one sentence that says what to do."""


def choose(name: str) -> Model:
    """The model of that name where it can run, else its bundled twin; prints one line that says which and why.

    DIFFUSION_MODEL in the environment overrides both. Raises ValueError with the names if there is no such model.
    """
    forced = os.environ.get("DIFFUSION_MODEL", "").strip()
    model = find(forced or name)
    budget = Budget.detect()
    if forced:
        print(f"{model.name}: because DIFFUSION_MODEL says so.")
    elif model.twin is None:
        print(f"{model.name}: bundled, runs on any machine.")
    elif budget.device == "cpu":
        print(f"{model.twin}: there is no GPU here, and {model.name} would take minutes a picture without one.")
        return find(model.twin)
    elif budget.vram_gib < model.vram_gib:
        print(f"{model.twin}: {model.name} needs {model.vram_gib} GiB of GPU memory, there are {budget.vram_gib:.1f}.")
        return find(model.twin)
    else:
        print(
            f"{model.name}: on {budget.device} with {budget.vram_gib:.1f} GiB; downloads {model.download_gb} GB once."
        )
    return model


def load(model: Model | str, plan: Plan | str | None = None) -> diffusers.DiffusionPipeline:
    """The model's pipeline, ready to draw: float16 on a GPU, float32 on a CPU; safetensors only, no remote code.

    `plan` says how it uses the memory: a Plan of `helpers.memory.plan`, or the name of one to have just that. None
    keeps a small model on the GPU, where there is one, and makes a plan for Stable Diffusion 3; if its memory turns
    out to be full, the next plan down takes over and one line says so.

    The first call downloads, later calls need no network. If `hub_id` is gone from the Hub the mirror is used. SD1.5
    comes without its safety checker, which costs 1.2 GB more: show what it draws to others only after a look of your
    own. The pipeline gets an attribute `model`, from which `generate` takes defaults, and Stable Diffusion 3 a `plan`.
    Raises ValueError for an unknown name or plan, DoesNotFit if no plan fits, LoadError (one sentence) for everything
    that can go wrong with network, access or files; nothing then needs cleaning up, and calling again keeps complete
    files.
    """
    model = find(model)
    budget = Budget.detect()
    with unworried():
        cls = getattr(diffusers, model.pipeline)
    if model.pipeline == "StableDiffusion3Pipeline":
        if model.folder is not None:
            _check_folder(model, ROOT / model.folder)  # a plan needs the sizes, and so whole files
        pipe = _load_planned(cls, model, _plan(model, plan, budget), budget)
    else:
        pipe = _load_whole(cls, model, _plan(model, plan, budget).name if plan is not None else None, budget.device)
    pipe.set_progress_bar_config(disable=True)  # generate has its own
    pipe.model = model
    return pipe


def files(model: Model | str) -> tuple[Path, Path | None]:
    """Where the model's files are, for code that reads them itself: `from_scratch.load(*files("sd15"))`.

    The folder in the layout of diffusers, after the same checks and the same download as in `load`, and None. If the
    Hub has only the mirror's single file left: that file, and a folder with the configurations and the tokenizer that
    it lacks. Raises ValueError for an unknown name and LoadError, one sentence, as `load` does.
    """
    model = find(model)
    with unworried():
        cls = getattr(diffusers, model.pipeline)
    folder = _folder(cls, model)
    if folder is None and model.mirror_file is not None:
        weights, tokenizer_folder = _mirror_files(model)
        config = Path(tempfile.mkdtemp(prefix=f"{model.name}-config-"))  # a megabyte or two
        shutil.copytree(ROOT / model.mirror_config, config, dirs_exist_ok=True)
        (config / "tokenizer").mkdir(exist_ok=True)
        for part in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / part, config / "tokenizer" / part)
        return weights, config
    folder = folder or _download(cls, model, model.mirror)
    _check_folder(model, folder)
    return folder, None


def _plan(model: Model, plan: Plan | str | None, budget: Budget) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if plan is None:
        return make_plan(model, budget)
    every = plans(model, budget)
    if plan not in every:
        raise ValueError(f"There is no plan {plan!r}: choose one of {', '.join(every)}.")
    return every[plan]


def _load_whole(cls, model: Model, plan: str | None, device: str) -> diffusers.DiffusionPipeline:
    """A pipeline of one text encoder, which is small enough to be loaded at once."""
    if plan not in (None, "resident", "model-offload", "cpu"):
        raise ValueError(f"{model.name} cannot run under the plan {plan}: choose resident, model-offload or cpu.")
    device = "cpu" if plan == "cpu" else device
    dtype = torch.float32 if device == "cpu" else torch.float16
    folder = _folder(cls, model)
    pipe = _from_mirror(cls, model, dtype) if folder is None else _from_folder(cls, model, folder, dtype)
    if plan == "model-offload" and device != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _load_planned(cls, model: Model, plan: Plan, budget: Budget) -> "diffusers.StableDiffusion3Pipeline":
    with unworried():
        from helpers.planned import open_pipeline  # seconds, which Stable Diffusion 1.5 need not wait for

    needed = replace(model, without=(*model.without, *T5_PARTS)) if plan.name in WITHOUT_T5 else model
    _require_disk(needed, budget)
    folder = _folder(cls, needed)
    if folder is None:
        raise LoadError(f"{model.hub_id} is gone from the Hub: choose another model.")
    _check_folder(needed, folder)
    device = "cpu" if plan.name == "cpu" else budget.device
    try:
        pipe = open_pipeline(model, folder, plan, device)
        while not _prepared(pipe):
            print(pipe.step_down() or _give_up(model))
    except LoadError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"The files in {_name(folder)} do not fit together: {_repair(model, folder)}.") from error
    return pipe


def _prepared(pipe) -> bool:
    """False if the memory was full. The error is gone when this returns, and with it what its traceback held on to."""
    try:
        pipe.prepare()
    except torch.OutOfMemoryError:
        return False
    return True


def _give_up(model: Model) -> None:
    raise LoadError(f"The memory is full and no smaller plan is left for {model.name}: close other programs first.")


def _require_disk(model: Model, budget: Budget) -> None:
    """Refuse before the download rather than after most of it."""
    if model.hub_id is None:
        return
    sizes, source = parts(model)
    needed = sum(part.weights * 2 for name, part in sizes.items() if name not in model.without) / GIB
    if source != FROM_FILES and needed > budget.disk_gib:
        raise LoadError(
            f"{model.name} needs {needed:.1f} GiB of disk and {budget.disk_gib:.1f} are free: "
            "free some space, or point HF_HOME to a larger disk before the first import."
        )


def _folder(cls, model: Model) -> Path | None:
    """Where the model's files are, after a download if need be; None if the Hub has the repository no more."""
    if model.folder is not None:
        return ROOT / model.folder
    try:
        check_access(model.hub_id)
    except AccessError as error:
        reason = error.__cause__
        gone = isinstance(reason, errors.RepositoryNotFoundError) and not isinstance(reason, errors.GatedRepoError)
        if not gone or model.mirror is None:
            raise LoadError(str(error)) from error
        print(f"{model.hub_id} is gone from the Hub, so the mirror {model.mirror} is used.")
        return None
    return _download(cls, model, model.hub_id)


def _download(cls, model: Model, repo_id: str) -> Path:
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


def _from_mirror(cls, model: Model, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    if model.mirror_file is None:
        return _from_folder(cls, model, _download(cls, model, model.mirror), dtype)
    weights, tokenizer_folder = _mirror_files(model)
    with no_bars():
        return cls.from_single_file(
            str(weights),
            config=str(ROOT / model.mirror_config),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77),
            local_files_only=True,
            **dtype_keyword(dtype),
            **dict.fromkeys(model.without),
        )


def _mirror_files(model: Model) -> tuple[Path, Path]:
    """The mirror's single file, which holds weights only, and a folder with the tokenizer, after a download."""
    try:
        check_token()
        repo_id = model.mirror
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


def _from_folder(cls, model: Model, folder: Path, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    variant = model.variant if any(folder.glob(f"*/*.{model.variant}.safetensors")) else None
    _check_folder(model, folder)
    parts = dict.fromkeys(model.without)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False  # else diffusers warns that it is missing
    try:
        with no_bars():
            return cls.from_pretrained(
                folder, variant=variant, use_safetensors=True, local_files_only=True, **dtype_keyword(dtype), **parts
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"The files in {_name(folder)} do not fit together: {_repair(model, folder)}.") from error


def _is_whole(model: Model, folder: Path) -> bool:
    try:
        _check_folder(model, folder)
    except LoadError:
        return False
    return True


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
        for file in [*weights, *_shards(model, folder / part)]:
            _check_weights(model, file)


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
        raise LoadError(f"The file {_name(file)} is missing: {_repair(model, file)}.") from error
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
