"""Tells apart what the judge has no names for: a linear probe on its inner features (Alain & Bengio, 2016).

The judge learned them for other things, so a probe is worth what it gets right on renders that it was not fitted on.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from storybook.judge import bundled_network, to_input

LATE = (4, 5, 6)  # blocks of the judge: earlier ones see edges, its end only what it has names for
DECAY = 1e-3  # of the weights' squares: a few hundred pictures of as many features could be learned by heart


class Probe(NamedTuple):
    """Softmax regression on `features`, which are shifted and scaled to mean 0 and spread 1."""

    names: tuple[str, ...]
    layer: nn.Linear
    mean: torch.Tensor  # (D,)
    spread: torch.Tensor  # (D,)


@torch.no_grad()
def features(images: Sequence[Image.Image]) -> torch.Tensor:
    """What the judge makes of pictures of any size, (n, 640): the strongest answer of each late channel, the end.

    Strongest wherever it is, since a thing may stand anywhere.
    """
    x, found = torch.from_numpy(np.stack([to_input(image) for image in images])), []
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    for number, block in enumerate(bundled_network().body):
        x = block(x)
        if number in LATE:
            found.append(x.amax((2, 3)))
    return torch.cat([*found, x], 1)


def fit(groups: Mapping[str, Sequence[Image.Image]]) -> Probe:
    """A probe that tells the groups apart, each with pictures of its own. It always learns the same from the same.

    Raises ValueError, one sentence, if there are fewer than two groups or one of them is empty.
    """
    if len(groups) < 2 or not all(groups.values()):
        raise ValueError("A probe tells two or more groups of pictures apart: give at least one picture for each.")
    found = [features(pictures) for pictures in groups.values()]
    labels = torch.cat([torch.full((len(rows),), k) for k, rows in enumerate(found)])
    rows = torch.cat(found)
    mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-3)
    layer = nn.Linear(rows.shape[1], len(groups))
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    # each group counts the same, however many pictures it has
    weights = 1 / labels.bincount().float()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        wrong = nn.functional.cross_entropy(layer((rows - mean) / spread), labels, weights)
        total = wrong + DECAY * layer.weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return Probe(tuple(groups), layer.requires_grad_(False), mean, spread)


def read(probe: Probe, images: Sequence[Image.Image]) -> list[str]:
    """The name of the group that each picture looks most like."""
    scores = probe.layer((features(images) - probe.mean) / probe.spread)
    return [probe.names[k] for k in scores.argmax(1).tolist()]
