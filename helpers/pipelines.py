"""From a name in the registry to a pipeline that draws: which model can run here, and how it is loaded."""

import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from helpers.loading.download import CLIP_TOKENIZER as CLIP_TOKENIZER
from helpers.loading.download import (
    TOKENIZER_FILES,
    check_folder,
    download,
    folder_of,
    mirror_files,
    name_of,
    repair,
    require_disk,
)
from helpers.loading.download import LoadError as LoadError
from helpers.loading.machine import Budget, letting_go
from helpers.loading.plan import STRATEGIES, T5, DoesNotFit, Plan, plans
from helpers.loading.plan import plan as make_plan
from helpers.loading.registry import MODELS as MODELS
from helpers.loading.registry import ROOT, Model, find
from helpers.loading.sizes import is_here
from helpers.loading.sizes import parts as parts
from helpers.loading.versions import as_before, dtype_keyword, no_bars, only_errors

T5_PARTS = (T5, "tokenizer_3")
WITHOUT_STAGES = ("resident", "model-offload", "cpu")  # the plans of a model with one text encoder

_latest = lambda: None  # noqa: E731  # the pipeline with a plan that was loaded last, as a weak reference


def choose(name: str, vram_gib: float | None = None) -> Model:
    """The model of that name where it can run, else its bundled twin; prints one line that says which and why.

    `vram_gib` is what the page needs on a GPU, if that is more than the model does. DIFFUSION_MODEL in the environment
    overrides all of it. Raises ValueError with the names if there is no such model.
    """
    forced = os.environ.get("DIFFUSION_MODEL", "").strip()
    model = find(forced or name)
    budget, needed = Budget.detect(), max(vram_gib or 0.0, model.vram_gib)
    if forced:
        print(f"{model.name}: because DIFFUSION_MODEL says so.")
    elif model.twin is None:
        print(f"{model.name}: bundled, runs on any machine.")
    elif budget.device == "cpu":
        print(f"{model.twin}: there is no GPU here, and {model.name} would take minutes a picture without one.")
        return find(model.twin)
    elif budget.vram_gib < needed:
        print(
            f"{model.twin}: this needs {needed} GiB of GPU memory with {model.name}, there are {budget.vram_gib:.1f}."
        )
        return find(model.twin)
    else:
        files = "its files are here already" if is_here(model) else f"the first load downloads {model.download_gb} GB"
        print(f"{model.name}: on {budget.device} with {budget.vram_gib:.1f} GiB; {files}.")
    return model


def load(model: Model | str, plan: Plan | str | None = None) -> diffusers.DiffusionPipeline:
    """The model's pipeline, a stock one of diffusers, ready to draw: float16 on a GPU, float32 on a CPU.

    `plan` says how it uses the memory: the name of a plan that fits, or a Plan of `helpers.memory.plans`, which is
    tried even where it does not. None keeps a small model on the GPU, where there is one, and makes a plan for Stable
    Diffusion 3; if its memory turns out to be full, a smaller plan takes over and one line says so.

    Only safetensors, no remote code. The first call downloads, later calls need no network. If `hub_id` is gone from
    the Hub the mirror is used. SD1.5 comes without its safety checker, which costs 1.2 GB more: show what it draws to
    others only after a look of your own. The pipeline gets an attribute `model`, from which `generate` takes defaults.
    Stable Diffusion 3 also gets `plan` and `unload()`, which frees the memory until the next picture; loading it
    unloads the one before.

    Raises ValueError for an unknown name or plan, DoesNotFit if the plan that was named, or every plan, needs more than
    there is, LoadError (one sentence) for everything that can go wrong with network, access or files; nothing then
    needs cleaning up, and calling again keeps complete files.
    """
    model = find(model)
    budget = Budget.detect()
    with only_errors():
        cls = getattr(diffusers, model.pipeline)
    with as_before(), letting_go():
        if model.pipeline == "StableDiffusion3Pipeline":
            if model.folder is not None:
                check_folder(model, ROOT / model.folder)  # a plan needs the sizes, and so whole files
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
    with only_errors():
        cls = getattr(diffusers, model.pipeline)
    folder = folder_of(cls, model)
    if folder is None and model.mirror_file is not None:
        weights, tokenizer_folder = mirror_files(model)
        config = Path(tempfile.mkdtemp(prefix=f"{model.name}-config-"))  # a megabyte or two
        shutil.copytree(ROOT / model.mirror_config, config, dirs_exist_ok=True)
        (config / "tokenizer").mkdir(exist_ok=True)
        for part in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / part, config / "tokenizer" / part)
        return weights, config
    folder = folder or download(cls, model, model.mirror)
    check_folder(model, folder)
    return folder, None


def _plan(model: Model, plan: Plan | str | None, budget: Budget) -> Plan:
    if plan is None:
        return make_plan(model, budget)
    name = plan.name if isinstance(plan, Plan) else plan
    if name not in STRATEGIES:
        raise ValueError(f"There is no plan {name!r}: choose one of {', '.join(STRATEGIES)}.")
    if model.pipeline != "StableDiffusion3Pipeline" and name not in WITHOUT_STAGES:
        raise ValueError(f"{model.name} cannot run under the plan {name}: choose resident, model-offload or cpu.")
    if isinstance(plan, Plan):
        _require_package(plan, budget)
        return plan
    found = plans(model, budget)[name]
    _require_package(found, budget)
    reason = found.refused.get(name)
    if budget.device == "cpu":  # a plan for a GPU runs here too, as the plan cpu does, if there is RAM for it
        needed = f"it needs {found.peak_ram_gib:.2f} GiB of RAM, of which {budget.ram_gib:.2f} are free"
        reason = needed if found.peak_ram_gib > budget.ram_gib else None
    if reason is not None:
        raise DoesNotFit(f"{model.name} cannot run under the plan {name} here: {reason}.")
    return found


def _require_package(plan: Plan, budget: Budget) -> None:
    if plan.t5 == "nf4" and not budget.bitsandbytes:
        raise LoadError(
            f"The plan {plan.name} needs bitsandbytes: run `pip install bitsandbytes`, then this again; no restart."
        )


def _load_whole(cls: type, model: Model, plan: str | None, device: str) -> diffusers.DiffusionPipeline:
    """A pipeline of one text encoder, which is small enough to be loaded at once."""
    device = "cpu" if plan == "cpu" else device
    dtype = torch.float32 if device == "cpu" else torch.float16
    folder = folder_of(cls, model)
    if folder is None and model.mirror_file is not None:
        pipe = _from_mirror(cls, model, dtype)
    else:
        pipe = _from_folder(cls, model, folder or download(cls, model, model.mirror), dtype)
    if plan == "model-offload" and device != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _load_planned(cls: type, model: Model, plan: Plan, budget: Budget) -> diffusers.DiffusionPipeline:
    global _latest
    with only_errors():
        from helpers.loading.sd3 import open_pipeline  # seconds, which Stable Diffusion 1.5 need not wait for

    needed = replace(model, without=(*model.without, *T5_PARTS)) if plan.t5 is None else model
    require_disk(needed, budget)
    folder = folder_of(cls, needed)
    if folder is None:
        raise LoadError(f"{model.hub_id} is gone from the Hub: choose another model.")
    check_folder(needed, folder)
    device = "cpu" if plan.name == "cpu" else budget.device
    before = _latest()
    if before is not None:
        before.unload()  # there is room for one at a time
    try:
        pipe = open_pipeline(model, folder, plan, device)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(f"The files in {name_of(folder)} do not fit together: {repair(model, folder)}.") from error
    while not _prepared(pipe):
        sentence = pipe.stage.step_down("denoise")
        if sentence is None:
            raise LoadError(
                f"The memory is full and no smaller plan is left for {model.name}: close other programs first."
            )
        print(sentence)
    _latest = weakref.ref(pipe)
    return pipe


def _prepared(pipe) -> bool:
    """False if the memory was full. The error is gone when this returns, and with it what its traceback held on to."""
    try:
        pipe.stage.prepare()
    except torch.OutOfMemoryError:
        return False
    return True


def _from_mirror(cls: type, model: Model, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    weights, tokenizer_folder = mirror_files(model)
    with no_bars():
        return cls.from_single_file(
            str(weights),
            config=str(ROOT / model.mirror_config),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77),
            local_files_only=True,
            **dtype_keyword(dtype),
            **dict.fromkeys(model.without),
        )


def _from_folder(cls: type, model: Model, folder: Path, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    variant = model.variant if any(folder.glob(f"*/*.{model.variant}.safetensors")) else None
    check_folder(model, folder)
    parts = dict.fromkeys(model.without)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False  # else diffusers warns that it is missing
    try:
        with no_bars():
            return cls.from_pretrained(
                folder, variant=variant, use_safetensors=True, local_files_only=True, **dtype_keyword(dtype), **parts
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(f"The files in {name_of(folder)} do not fit together: {repair(model, folder)}.") from error
