"""One training loop for every model: accelerate, EMA, checkpoints, a log, resume after a kill.

The examples of step k and their noise come from a generator seeded with (seed, k). So a run that was killed and
resumed goes through the same losses as one that was not, and so does one on several processes: each draws the
whole batch and takes its share.
"""

import csv
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm

RUNS = Path("outputs/train")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. `batch_size` is the total over all processes."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float | None = None
    save_every: int = 250
    seed: int = 0


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * min(progress, 1))) / 2)


def precision() -> str:
    """What `accelerate launch` was told; else bf16 where the hardware multiplies it, fp16 on older GPUs, else "no"."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return os.environ["ACCELERATE_MIXED_PRECISION"]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    # A processor without it only imitates it, slowly; PyTorch tells that under a private name alone.
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


def make_accelerator() -> Accelerator:
    """An Accelerator for the machine at hand; `torchrun` or `accelerate launch` decide how many processes."""
    return Accelerator(mixed_precision=precision(), cpu=not torch.cuda.is_available())


def choose_attention_kernel() -> None:
    """On a CPU, attention as plain matrix products: the fused kernel's backward pass takes three times as long."""
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)  # the switch for CPUs too, whatever its name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def _watched() -> bool:
    """Whether a person looks on, at a terminal or in a notebook that takes input: elsewhere a bar is litter."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    # what runs notebooks unattended says that it takes none; ipykernel keeps that in a private attribute only
    return sys.stderr.isatty() or bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


class _Progress:
    """The step counter, saved in each checkpoint."""

    def __init__(self):
        self.step = 0
        self.seconds = 0.0

    def state_dict(self):
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.step, self.seconds = state["step"], state["seconds"]


def _keep_log_until(path: Path, step: int) -> None:
    """Drop the log's rows from `step` on: the resumed run writes them again."""
    if path.exists():
        header, *rows = path.read_text().split("\n")[:-1] or [""]  # a kill may have cut the last row short
        kept = [header, *(row for row in rows if int(row.split(",")[0]) < step)]
        path.write_text("".join(f"{row}\n" for row in kept if row))


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint beside the last one, then swap them: a kill or a full disk in between loses neither.

    Raises OSError when it cannot be written; what was written of it is removed.
    """
    fresh, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)  # of a save that was killed
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(fresh))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of these, by who writes
        shutil.rmtree(fresh, ignore_errors=True)
        left = "the one before it is whole" if _find_checkpoint(folder.parent) else "there is none before it"
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder} ({str(error).splitlines()[0]}), {left}: "
            "make room on the disk and run again."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _find_checkpoint(run: Path) -> Path | None:
    for name in ("checkpoint", "checkpoint.old"):
        if (run / name / "random_states_0.pkl").exists():
            return run / name
    return None


def _keep_only_what_is_learned(accelerator: Accelerator, objective: nn.Module) -> None:
    """Checkpoints without frozen weights, under the same names for one process and for several.

    Loading raises ValueError where a checkpoint does not fit, before anything is overwritten.
    """
    parameters = {name for name, _ in objective.named_parameters(remove_duplicate=False)}
    kept = objective.state_dict().keys() - parameters  # the buffers
    kept |= {name for name, parameter in objective.named_parameters() if parameter.requires_grad}  # tied ones once

    def before_saving(models, states, folder):
        for state in states:
            for name in list(state):
                plain = name if name in kept else name.removeprefix("module.")  # which several processes add
                value = state.pop(name)
                if plain in kept:
                    state[plain] = value

    def before_loading(models, folder):
        if models:  # under FSDP and DeepSpeed accelerate has loaded them already
            models.clear()
            saved = load_file(Path(folder) / "model.safetensors")
            own = objective.state_dict()
            other = saved.keys() ^ kept or {name for name in kept if saved[name].shape != own[name].shape}
            if other:
                raise ValueError(
                    f"The checkpoint in {folder} is of another architecture ({len(other)} of its and your tensors "
                    f"differ, {min(other)} for one): delete {Path(folder).parent} or give the run another name."
                )
            objective.load_state_dict(saved, strict=False)

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(before_loading)


def _share(part, accelerator: Accelerator, step: int):
    """This process's share of one part of a batch, on its device: every n-th example, since batches may be sorted."""
    count, processes = len(part), accelerator.num_processes
    if count % processes:
        raise ValueError(
            f"The batch of step {step} has {count} examples, which {processes} processes cannot share evenly: "
            f"choose a batch size that makes it a multiple of {processes}."
        )
    part = part[accelerator.process_index :: processes]
    return part.to(accelerator.device) if isinstance(part, torch.Tensor) else part


def train(
    name: str,
    objective: nn.Module,
    learned: nn.Module,
    make_batch: Callable[[torch.Tensor, torch.Generator], tuple],
    count: int,
    schedule: Schedule,
    on_sample: Callable[[int], None] | None = None,
    runs: Path = RUNS,
) -> Path:
    """Train `learned` (a part of `objective`) and return the run's folder.

    objective(*batch) gives a dict of scalar losses, of which "loss" is minimised; parameters that do not require
    gradients stay as they are. make_batch(indices, generator) builds a batch from `indices` into `count` examples:
    tensors or lists, all with one entry an example; several processes share them. At the end `learned` holds the
    averaged weights if the schedule asks for EMA. `on_sample(step)` is called at each checkpoint on the main process
    with those same weights in place. Run it again to resume; delete the folder to start afresh.

    Raises FloatingPointError when the loss or its gradient is no longer finite (the weights are then still those of
    the step before, and the checkpoint that of the last save), OSError when a checkpoint cannot be written (the one
    before stays whole), ValueError when the checkpoint is of another architecture or the processes cannot share a
    batch evenly.
    """
    accelerator = make_accelerator()
    if schedule.batch_size % accelerator.num_processes:
        raise ValueError(
            f"{accelerator.num_processes} processes cannot share a batch of {schedule.batch_size} evenly: "
            f"choose a multiple of {accelerator.num_processes}."
        )
    run = runs / name
    run.mkdir(parents=True, exist_ok=True)
    log_path = run / "log.csv"
    objective.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        [p for p in objective.parameters() if p.requires_grad],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    _keep_only_what_is_learned(accelerator, objective)
    model, optimizer = accelerator.prepare(objective, optimizer)
    averaged = [parameter for parameter in learned.parameters() if parameter.requires_grad]
    ema = EMAModel(averaged, decay=schedule.ema_decay, use_ema_warmup=True, power=0.75) if schedule.ema_decay else None
    progress = _Progress()
    accelerator.register_for_checkpointing(progress, *([ema] if ema else []))
    checkpoint = _find_checkpoint(run)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        if ema:
            ema.to(accelerator.device)  # it was loaded on the CPU
    if accelerator.is_main_process:
        _keep_log_until(log_path, progress.step)
        (run / "schedule.json").write_text(json.dumps(vars(schedule), indent=1))

    def with_average(action):
        if ema:
            ema.store(averaged)
            ema.copy_to(averaged)
        objective.eval()
        with torch.random.fork_rng():  # a resumed run draws no sample here, and goes on with the same numbers
            action()
        objective.train()
        if ema:
            ema.restore(averaged)

    objective.train()
    optimizer.zero_grad()  # of what was computed before, as by a run that stopped
    started = time.monotonic() - progress.seconds
    hidden = not (accelerator.is_main_process and _watched())
    bar = tqdm(total=schedule.steps, initial=progress.step, desc=name, disable=hidden, mininterval=5)
    while progress.step < schedule.steps:
        step = progress.step
        generator = torch.Generator().manual_seed((schedule.seed * 1_000_003 + step) * 1009)
        indices = torch.randint(count, (schedule.batch_size,), generator=generator)
        batch = [_share(part, accelerator, step) for part in make_batch(indices, generator)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        losses = model(*batch)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        means = accelerator.reduce(torch.stack([value.detach().float() for value in losses.values()]), "mean").tolist()
        shown = dict(zip(losses, means, strict=True))
        # a loss scaler, as half precision has, skips steps of infinite gradients by itself
        if not math.isfinite(shown["loss"]) or (accelerator.scaler is None and not torch.isfinite(norm)):
            raise FloatingPointError(
                f"The loss of {name} is {shown['loss']} at step {step}, its gradient's norm {float(norm)}: "
                "lower the learning rate and run again, which resumes from the last checkpoint."
            )
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(averaged)
        progress.step += 1
        progress.seconds = time.monotonic() - started
        if accelerator.is_main_process:
            row = {"step": step, **{k: f"{v:.6f}" for k, v in shown.items()}, "seconds": f"{progress.seconds:.1f}"}
            _append(log_path, row)
            bar.update()
            bar.set_postfix(loss=f"{shown['loss']:.4f}", refresh=False)
        if progress.step % schedule.save_every == 0 or progress.step == schedule.steps:
            _save(accelerator, run / "checkpoint", progress.step)
            if on_sample and accelerator.is_main_process:
                with_average(lambda: on_sample(progress.step))
    bar.close()
    if ema:
        ema.copy_to(averaged)
    objective.eval()
    return run


def _append(path: Path, row: dict) -> None:
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def keep_log(run: Path, folder: Path, name: str = "training_log.csv") -> None:
    """Put every tenth line of a run's log beside the weights it made, and what the judge said on the way."""
    header, *rows = (run / "log.csv").read_text().splitlines()
    (folder / name).write_text("\n".join([header, *rows[::10]]) + "\n")
    if (run / "progress.csv").exists():
        shutil.copy(run / "progress.csv", folder)
