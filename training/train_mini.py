"""Train the small UNet on a folder of pictures: `python -m training.train_mini FOLDER`, or under `accelerate launch`.

The run lies in outputs/train/NAME: log.csv with the loss of every step, a checkpoint to resume from, and the averaged
weights at every save, as `training.mini.load` reads them.
"""

import argparse
from pathlib import Path

import torch

from training.dataset import encode
from training.loop import RUNS, Schedule, choose_attention_kernel, make_accelerator, train
from training.mini import OBJECTIVES, Denoising, UNet, batches, bundled, load, save


def train_mini(
    folder: Path, name: str, objective: str, schedule: Schedule, start: Path | None = None, runs: Path = RUNS
) -> Path:
    """Train on `folder`, from the weights in `start` or from nothing; the run's folder. Raises as its parts do."""
    torch.manual_seed(schedule.seed)
    accelerator = make_accelerator()
    choose_attention_kernel()
    with accelerator.main_process_first():  # the others find it encoded
        encoded = encode(folder, *bundled(str(accelerator.device)))
    unet = UNet(channels=encoded["latents"].shape[2], text_width=encoded["text"].shape[2])
    if start:
        unet, trained_for = load(start)
        if trained_for != objective:
            raise ValueError(f"{start} was trained for {trained_for}: choose --objective {trained_for} to go on.")

    def keep(step):
        save(unet, runs / name / f"weights-{step:06d}.safetensors", objective)

    count = len(encoded["latents"])
    return train(name, Denoising(unet, objective), unet, batches(encoded, objective), count, schedule, keep, runs)


def main() -> None:
    """The command line; errors of the folder, the checkpoint and the training in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="mini")
    parser.add_argument("--objective", choices=OBJECTIVES, default="noise")
    parser.add_argument("--start", type=Path, help="a .safetensors file to go on from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    schedule = Schedule(
        args.steps, args.batch_size, args.learning_rate, ema_decay=0.999, save_every=args.save_every, seed=args.seed
    )
    try:
        train_mini(args.folder, args.name, args.objective, schedule, args.start)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
