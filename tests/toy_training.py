"""Two training runs of a second or two: `python toy_training.py FOLDER PAUSE [DIES_AT]`.

PAUSE in seconds before each batch; the last of several processes kills itself once, at step DIES_AT of the second run.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from training.loop import Schedule, train


class Toy(nn.Module):
    """A small regression: `net` learns the sum of four numbers, `fixed` does not learn."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self.fixed = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, y):
        return {"loss": (self.net(x + 0.1 * self.fixed(x)) - y).square().mean()}


def run(folder: Path, name: str, dropout: float, before_batch=lambda: None, on_sample=None, **schedule) -> Toy:
    """40 steps, a checkpoint after every 10."""
    torch.manual_seed(0)
    toy, examples = Toy(dropout), torch.randn(100, 4)

    def make_batch(indices, generator):
        before_batch()
        x = examples[indices] + 0.1 * torch.randn(len(indices), 4, generator=generator)
        return x, x.sum(1, keepdim=True)

    settings = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "warmup": 5, "ema_decay": 0.9, "save_every": 10}
    train(name, toy, toy.net, make_batch, len(examples), Schedule(**{**settings, **schedule}), on_sample, folder)
    return toy


def main():
    folder, pause, dies_at = Path(sys.argv[1]), float(sys.argv[2]), [int(step) for step in sys.argv[3:]]
    rank, steps = int(os.environ.get("RANK", 0)), []

    def before_batch():
        time.sleep(pause)
        steps.append(len(steps))
        if steps[-1] - 40 in dies_at and rank == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, dropout in (("dropout", 0.1), ("plain", 0.0)):
        toy = run(folder, name, dropout, before_batch)
        torch.save(toy.state_dict(), folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
