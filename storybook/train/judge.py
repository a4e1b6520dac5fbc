"""Train the judge on renders, softened and shifted in tone so that it also reads generated pictures.

It sees every pair of colour and thing, the `HELD_OUT` ones too: it must recognise them.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from storybook.judge import ARRANGEMENTS, COLOUR_NAMES, HEADS, KIND_NAMES, SIDE, WEIGHTS, Judge, in_bytes, judge, slots
from storybook.train import data
from storybook.world import COLOURS, SETTINGS, Scene, caption, complete, random_scene, render
from training.loop import Schedule, keep_log, train


def judged_scene(index: int, split: str = "judge") -> tuple[Scene, random.Random]:
    """Scene number `index` with everything said and colours of any kind, and the state to draw it."""
    rng = data.numbered_rng(split, index)
    scene = complete(random_scene(rng), rng)
    things = [replace(thing, colour=rng.choice(tuple(COLOURS))) for thing in scene.things]
    return replace(scene, things=tuple(things)), rng


def labels(scene: Scene) -> list[int]:
    """The right answer for each of `HEADS`; -100 (ignored by the loss) where there is no second thing."""
    arrangement, things = slots(scene)
    answer = [ARRANGEMENTS.index(arrangement), SETTINGS.index(scene.setting)]
    for thing in things:
        answer += [KIND_NAMES.index(thing.kind), COLOUR_NAMES.index(thing.colour)]
    return answer + [-100] * (len(HEADS) - len(answer))


def draw(job) -> np.ndarray:
    """One picture of a split, for `data.pictures`."""
    split, index, size = job
    scene, rng = judged_scene(index, split)
    return np.asarray(render(scene, rng, size))


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, tone and noise at random: what sets generated pictures apart from clean renders."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count = len(images)
    soft = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, uniform(-0.3, 1, count, 1, 1, 1))
    images = images * uniform(0.92, 1.08, count, 1, 1, 1) + uniform(-0.06, 0.06, count, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    return (images + noise * uniform(0, 0.1, count, 1, 1, 1)).clamp(-1, 1)


class JudgeObjective(nn.Module):
    """Cross-entropy, summed over the heads."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def forward(self, images, targets):
        """images (B, 3, 64, 64) in [-1, 1]; targets (B, heads), -100 where a head has no answer."""
        logits = self.judge(images)
        losses = [
            nn.functional.cross_entropy(logits[name].float(), targets[:, i], reduction="sum")
            for i, name in enumerate(HEADS)
        ]
        return {"loss": torch.stack(losses).sum() / len(targets)}  # a mean would be 0 / 0 without second things


def fresh_table(count: int = 2000) -> list[dict]:
    """The judge's rows for `count` renders that it never saw, held-out pairs among them, against the whole truth."""
    drawn = [judged_scene(index, "judge-test") for index in range(count)]
    return judge([render(scene, rng) for scene, rng in drawn], [caption(scene) for scene, _ in drawn])


def fit(name: str, pictures: int, steps: int, batch_size: int = 128, seed: int = 0) -> tuple[Judge, Path]:
    """A judge trained on the renders of the split `name`, and the folder of its run."""
    torch.manual_seed(seed)
    images = data.pictures(name, pictures, SIDE, draw)
    targets = torch.tensor([labels(judged_scene(index, name)[0]) for index in range(pictures)])
    network = Judge().to(memory_format=torch.channels_last)

    def make_batch(indices, generator):
        return roughen(data.to_tensor(images[indices.numpy()]), generator), targets[indices]

    schedule = Schedule(steps, batch_size, 2e-3, weight_decay=0.02, seed=seed)
    return network, train(name, JudgeObjective(network), network, make_batch, pictures, schedule)


def main(argv=None) -> None:
    """Train and write models/storybook-judge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args(argv)
    network, run = fit("judge", args.pictures, args.steps, args.batch_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(in_bytes(network.state_dict()), args.out)
    keep_log(run, args.out.parent)


if __name__ == "__main__":
    main()
