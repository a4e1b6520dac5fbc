"""One training loop for every model: accelerate, EMA, checkpoints, a log, resume after a kill.

All randomness of step k comes from a generator seeded with (seed, k, process), so a run that was
killed and resumed goes through the same losses as one that was not.
"""

import csv
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
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
    """bf16 where the hardware multiplies it, fp16 on older GPUs, else no mixed precision."""
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
        rows = path.read_text().splitlines()
        kept = [rows[0], *(row for row in rows[1:] if int(row.split(",")[0]) < step)]
        path.write_text("\n".join(kept) + "\n")


def _save(accelerator: Accelerator, folder: Path) -> None:
    """Write a checkpoint beside the last one, then swap them: a kill in between loses neither."""
    fresh = folder.with_name("checkpoint.new")
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        old = folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _find_checkpoint(run: Path) -> Path | None:
    for name in ("checkpoint", "checkpoint.old"):
        if (run / name / "random_states_0.pkl").exists():
            return run / name
    return None


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

    objective(*batch) gives a dict of scalar losses, of which "loss" is minimised; make_batch(indices,
    generator) builds a batch from `indices` into `count` examples. At the end `learned` holds the
    averaged weights if the schedule asks for EMA. `on_sample(step)` is called at each checkpoint on
    the main process with those same weights in place. Run it again to resume; delete the folder to
    start afresh.
    """
    accelerator = make_accelerator()
    run = runs / name
    run.mkdir(parents=True, exist_ok=True)
    log_path = run / "log.csv"
    objective.to(accelerator.device)
    ema = (
        EMAModel(learned.parameters(), decay=schedule.ema_decay, use_ema_warmup=True, power=0.75)
        if schedule.ema_decay
        else None
    )
    optimizer = torch.optim.AdamW(
        [p for p in objective.parameters() if p.requires_grad],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    model, optimizer = accelerator.prepare(objective, optimizer)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress, *([ema] if ema else []))
    checkpoint = _find_checkpoint(run)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    if accelerator.is_main_process:
        _keep_log_until(log_path, progress.step)
        (run / "schedule.json").write_text(json.dumps(vars(schedule), indent=1))
    local_batch = schedule.batch_size // accelerator.num_processes

    def with_average(action):
        if ema:
            ema.store(learned.parameters())
            ema.copy_to(learned.parameters())
        objective.eval()
        action()
        objective.train()
        if ema:
            ema.restore(learned.parameters())

    objective.train()
    started = time.monotonic() - progress.seconds
    bar = tqdm(
        total=schedule.steps, initial=progress.step, desc=name, disable=not accelerator.is_main_process, mininterval=5
    )
    while progress.step < schedule.steps:
        step = progress.step
        generator = torch.Generator().manual_seed((schedule.seed * 1_000_003 + step) * 1009 + accelerator.process_index)
        indices = torch.randint(count, (local_batch,), generator=generator)
        batch = make_batch(indices, generator)
        batch = tuple(part.to(accelerator.device) if isinstance(part, torch.Tensor) else part for part in batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        losses = model(*batch)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(learned.parameters())
        shown = {key: accelerator.gather(value.detach().reshape(1)).mean().item() for key, value in losses.items()}
        if not math.isfinite(shown["loss"]):
            raise FloatingPointError(
                f"The loss of {name} is {shown['loss']} at step {step}; lower the learning rate and resume."
            )
        progress.step += 1
        progress.seconds = time.monotonic() - started
        if accelerator.is_main_process:
            row = {"step": step, **{k: f"{v:.6f}" for k, v in shown.items()}, "seconds": f"{progress.seconds:.1f}"}
            _append(log_path, row)
            bar.update()
            bar.set_postfix(loss=f"{shown['loss']:.4f}", refresh=False)
        if progress.step % schedule.save_every == 0 or progress.step == schedule.steps:
            _save(accelerator, run / "checkpoint")
            if on_sample and accelerator.is_main_process:
                with_average(lambda: on_sample(progress.step))
    bar.close()
    if ema:
        ema.copy_to(learned.parameters())
    objective.eval()
    return run


def _append(path: Path, row: dict) -> None:
    fresh = not path.exists()
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
