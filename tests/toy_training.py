"""A training run of a second or two, for test_training.py: `python toy_training.py FOLDER PAUSE`."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from storybook.train.loop import Schedule, train


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, x, y):
        return {"loss": (self.net(x) - y).square().mean()}


def main():
    torch.manual_seed(0)
    toy = Toy()
    examples = torch.randn(100, 4)

    def make_batch(indices, generator):
        time.sleep(float(sys.argv[2]))
        x = examples[indices] + 0.1 * torch.randn(len(indices), 4, generator=generator)
        return x, x.sum(1, keepdim=True)

    schedule = Schedule(steps=40, batch_size=8, learning_rate=1e-2, warmup=5, ema_decay=0.9, save_every=10)
    train("toy", toy, toy.net, make_batch, len(examples), schedule, runs=Path(sys.argv[1]))
    torch.save(
        toy.state_dict(),
        Path(sys.argv[1]) / f"toy-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.pt",
    )


if __name__ == "__main__":
    main()
