"""What the small UNet of `training/mini.py` learns and how fast: `python -m tools.mini_curves PART`, in this order.

    data          write the folder of pictures, outputs/train/mini-folder
    noise         train to predict the noise, and keep the weights for the page
    judge         judge what that run saved on its way: notebooks/data/mini_training.csv
    composition   train on fewer and fewer pairs of colour and thing: notebooks/data/mini_composition.csv

Runs that were interrupted are taken up again.
"""

import argparse
import csv
import hashlib
import random
import shutil

from helpers.images import ROOT
from helpers.metrics import interval
from storybook.judge import judge, share
from storybook.sample import close_up_prompts, held_out_prompts
from storybook.world import COLOURS, HELD_OUT, KINDS, Scene, Thing, caption
from storybook.write_dataset import close_ups, in_brief, write
from training.loop import RUNS, Schedule
from training.mini import MODELS, generate_images_direct
from training.train_mini import train_mini

DATA = ROOT / "notebooks/data"
WEIGHTS = MODELS / "storybook-mini/model.safetensors"
FOLDER, RUN = RUNS / "mini-folder", RUNS / "mini-noise"
PICTURES = 2400
TRAINING = Schedule(steps=2400, batch_size=32, learning_rate=2e-3, ema_decay=0.998, save_every=300)
JUDGED = (300, 600, 900, 1200, 1500, 2400)  # steps
PROMPTS = 48
SHARES = (0.1, 0.5, 0.85)  # of the 96 pairs, withheld
COMPOSITION = Schedule(steps=1200, batch_size=32, learning_rate=2e-3, ema_decay=0.995, save_every=1200)
RIGHT = ("object", "colour", "setting")


def draw(path, prompts: list[str]):
    """One picture a prompt, 20 steps at guidance 3, in batches of 24."""
    images = []
    for start in range(0, len(prompts), 24):
        images += generate_images_direct(path, prompts=prompts[start : start + 24], steps=20, seed=start)
    return images


def right_in(images, prompts: list[str], name: str, *parts: str) -> dict:
    """The share of pictures with all `parts` right, and its 95 % interval."""
    found = share(judge(images, prompts), *parts)
    low, high = interval(found, len(prompts))
    return {name: f"{found:.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}


def write_table(name: str, rows: list[dict]) -> None:
    with (DATA / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def judge_run() -> None:
    """Accuracy against the seconds of training, pairs of the training pictures and `HELD_OUT` ones.

    Weights that the table has already are not judged again.
    """
    prompts = {"seen": close_up_prompts(PROMPTS), "held_out": held_out_prompts(PROMPTS)}
    table = DATA / "mini_training.csv"
    known = {row["weights"]: row for row in csv.DictReader(table.open())} if table.exists() else {}
    rows, log = [], list(csv.DictReader((RUN / "log.csv").open()))
    for step in JUDGED:
        path = RUN / f"weights-{step:06d}.safetensors"
        weights = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        loss = sum(float(row["loss"]) for row in log[step - 100 : step]) / 100
        row = {"step": step, "seconds": log[step - 1]["seconds"], "loss": f"{loss:.4f}"}
        if weights not in known:
            for name, asked in prompts.items():
                row |= right_in(draw(path, asked), asked, name, *RIGHT)
        rows.append(known.get(weights) or row | {"n": PROMPTS, "weights": weights})
        print(rows[-1], flush=True)
        write_table(table.name, rows)


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


def compose() -> None:
    """Train a model from nothing for each share of withheld pairs; all are asked for the pairs in `HELD_OUT`."""
    rows, rng = [], random.Random("composition prompts")
    for portion in SHARES:
        gone = withheld(round(portion * len(COLOURS) * len(KINDS)))
        name = f"mini-without-{len(gone)}"
        if not (RUNS / f"{name}-folder").exists():
            write(RUNS / f"{name}-folder", 480, close_ups(gone, ("plain",)), say=in_brief)
        train_mini(RUNS / f"{name}-folder", name, "noise", COMPOSITION)
        left = sorted({(colour, kind) for colour in COLOURS for kind in KINDS} - gone)
        pairs = {
            "seen": [rng.choice(left) for _ in range(PROMPTS)],
            "held_out": [sorted(HELD_OUT)[k % len(HELD_OUT)] for k in range(PROMPTS)],
        }
        rows.append({"withheld": len(gone), "pairs": len(gone) + len(left), "n": PROMPTS})
        for sort, asked in pairs.items():
            prompts = [caption(Scene((Thing(kind, colour),), "plain")) for colour, kind in asked]
            path = RUNS / name / f"weights-{COMPOSITION.steps:06d}.safetensors"
            rows[-1] |= right_in(draw(path, prompts), prompts, sort, "object", "colour")
        print(rows[-1], flush=True)
    write_table("mini_composition.csv", rows)


def main() -> None:
    """One part of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("data", "noise", "judge", "composition"))
    part = parser.parse_args().part
    if part == "data":
        write(FOLDER, PICTURES, close_ups(), say=in_brief)
    elif part == "noise":
        run = train_mini(FOLDER, RUN.name, "noise", TRAINING)
        shutil.copy(run / f"weights-{TRAINING.steps:06d}.safetensors", WEIGHTS)
    elif part == "judge":
        judge_run()
    else:
        compose()


if __name__ == "__main__":
    main()
