"""Plot how right the denoisers drew while they trained: `python -m tools.curves` writes outputs/training/*.png.

The figures come from the logs beside the weights: `progress.csv` (what the judge read in 64 pictures,
25 steps at the stock guidance scale) and `training_log.csv` (the seconds that had passed).
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from helpers.images import ROOT

FOLDER = ROOT / "outputs/training"


def columns(path: Path) -> dict[str, np.ndarray]:
    """A CSV file of numbers as one array a column."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def plot(folder: Path, path: Path) -> None:
    """The shares against minutes of training, for the model in `folder`."""
    progress, log = columns(folder / "progress.csv"), columns(folder / "training_log.csv")
    minutes = np.interp(progress["step"], log["step"], log["seconds"]) / 60
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, label in (("single_things", "one thing, colour and setting"), ("pairs", "two things, own colours")):
        axes.plot(minutes, 100 * progress[name], marker="o", markersize=3, label=label)
    axes.set(
        title=f"{folder.name}: right in the judge's eyes, 32 prompts each",
        xlabel="minutes of training",
        ylabel="% right",
        ylim=(0, 101),
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """One picture for each model that has the logs."""
    for folder in sorted((ROOT / "models").glob("*/progress.csv")):
        plot(folder.parent, FOLDER / f"{folder.parent.name}.png")


if __name__ == "__main__":
    main()
