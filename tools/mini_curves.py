"""What the small UNet of `training/mini.py` learns and how fast: `python -m tools.mini_curves PART`, in this order.

    data          write the folder of pictures, outputs/train/mini-folder
    noise, flow   train with that objective, then keep the half-trained weights for the page
    judge         judge what both runs saved on their way: notebooks/data/mini_training.csv
    composition   train on fewer and fewer pairs of colour and thing: notebooks/data/mini_composition.csv

Runs that were interrupted are taken up again. It has not been run at this length yet: 800 steps on 1,200 pictures,
which took four minutes on two busy x86-64 cores, gave colours and settings but no shapes.
"""

import argparse
import csv
import random
import shutil

from helpers.images import ROOT
from helpers.metrics import interval
from storybook.judge import judge, share
from storybook.sample import held_out_prompts, seen_prompts
from storybook.world import COLOURS, HELD_OUT, KINDS, Scene, Thing, caption
from storybook.write_dataset import training_scenes, write
from training.loop import RUNS, Schedule
from training.mini import OBJECTIVES, generate_images_direct
from training.train_mini import train_mini

DATA = ROOT / "notebooks/data"
FOLDER = RUNS / "mini-folder"
PICTURES = 4000
TRAINING = Schedule(steps=6000, batch_size=32, learning_rate=2e-3, ema_decay=0.999, save_every=500)
HALFWAY = 2500  # the step whose weights the page goes on from
PROMPTS = 40
SHARES = (0.1, 0.4, 0.7, 0.85)  # of the 96 pairs, withheld
COMPOSITION = Schedule(steps=1000, batch_size=32, learning_rate=2e-3, ema_decay=0.99, save_every=1000)
RIGHT = ("object", "colour", "setting")


def draw(path, prompts: list[str]):
    """One picture a prompt, 20 steps at guidance 3, in batches of 24."""
    images = []
    for start in range(0, len(prompts), 24):
        images += generate_images_direct(path, prompts=prompts[start : start + 24], steps=20, seed=start)
    return images


def rows_of(path, prompts: dict[str, list[str]], *parts: str) -> dict:
    """For each sort of prompts the share of pictures with all `parts` right, and its 95 % interval."""
    row = {}
    for name, asked in prompts.items():
        right = share(judge(draw(path, asked), asked), *parts)
        low, high = interval(right, len(asked))
        row |= {name: f"{right:.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}
    return row


def write_table(name: str, rows: list[dict]) -> None:
    with (DATA / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def judge_runs() -> None:
    """Accuracy against the seconds of training, pairs of the training pictures and `HELD_OUT` ones."""
    prompts, rows = {"seen": seen_prompts(PROMPTS), "held_out": held_out_prompts(PROMPTS)}, []
    for objective in OBJECTIVES:
        run = RUNS / f"mini-{objective}"
        with (run / "log.csv").open() as file:
            log = list(csv.DictReader(file))
        for path in sorted(run.glob("weights-*.safetensors")):
            step = int(path.stem.split("-")[1])
            loss = sum(float(row["loss"]) for row in log[step - 100 : step]) / 100
            row = {"objective": objective, "step": step, "seconds": log[step - 1]["seconds"], "loss": f"{loss:.4f}"}
            rows.append(row | rows_of(path, prompts, *RIGHT) | {"n": PROMPTS})
            print(rows[-1], flush=True)
    write_table("mini_training.csv", rows)


def withheld(count: int) -> set[tuple[str, str]]:
    """`count` pairs of colour and kind, `HELD_OUT` among them; every colour and every kind stays in some pair."""
    rng, gone = random.Random("withheld"), set(HELD_OUT)
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    rest = [pair for pair in pairs if pair not in gone]
    rng.shuffle(rest)
    for colour, kind in rest:
        left = [pair for pair in pairs if pair not in gone and pair != (colour, kind)]
        if len(gone) < count and {c for c, _ in left} == set(COLOURS) and {k for _, k in left} == set(KINDS):
            gone.add((colour, kind))
    return gone


def plain_scenes(gone: set[tuple[str, str]]):
    """One large thing before a plain wall, of pairs that are not withheld, without end."""
    left = sorted({(colour, kind) for colour in COLOURS for kind in KINDS} - gone)
    rng = random.Random("plain scenes")
    while True:
        colour, kind = rng.choice(left)
        yield Scene((Thing(kind, colour, "large", "centre"),), "plain"), rng


def compose() -> None:
    """Train a model from nothing for each share of withheld pairs; all are asked for the pairs in `HELD_OUT`."""
    rows, rng = [], random.Random("composition prompts")
    for portion in SHARES:
        gone = withheld(round(portion * len(COLOURS) * len(KINDS)))
        name = f"mini-without-{len(gone)}"
        if not (RUNS / f"{name}-folder").exists():
            write(RUNS / f"{name}-folder", 480, plain_scenes(gone))
        train_mini(RUNS / f"{name}-folder", name, "noise", COMPOSITION)
        left = sorted({(colour, kind) for colour in COLOURS for kind in KINDS} - gone)
        pairs = {
            "seen": [rng.choice(left) for _ in range(PROMPTS)],
            "held_out": [sorted(HELD_OUT)[k % len(HELD_OUT)] for k in range(PROMPTS)],
        }
        prompts = {
            sort: [caption(Scene((Thing(kind, colour, "large", "centre"),), "plain")) for colour, kind in asked]
            for sort, asked in pairs.items()
        }
        path = RUNS / name / f"weights-{COMPOSITION.steps:06d}.safetensors"
        rows.append({"withheld": len(gone), "pairs": len(gone) + len(left), "n": PROMPTS})
        rows[-1] |= rows_of(path, prompts, "object", "colour")
        print(rows[-1], flush=True)
    write_table("mini_composition.csv", rows)


def main() -> None:
    """One part of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("data", *OBJECTIVES, "judge", "composition"))
    part = parser.parse_args().part
    if part == "data":
        write(FOLDER, PICTURES, training_scenes(single=True))
    elif part in OBJECTIVES:
        run = train_mini(FOLDER, f"mini-{part}", part, TRAINING)
        shutil.copy(run / f"weights-{HALFWAY:06d}.safetensors", DATA / f"mini_{part}.safetensors")
    elif part == "judge":
        judge_runs()
    else:
        compose()


if __name__ == "__main__":
    main()
