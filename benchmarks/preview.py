"""What watching costs: `python -m benchmarks.preview [model ...]` (default: the bundled ones).

Draws the same picture with `LiveMeter` and with an `on_step` that does nothing, in turns, and prints the share of the
time between steps that the meter says it took, beside the ratio of the two whole runs, which also holds what it cannot
time itself. The meter runs as in a notebook: it makes PNG files, and a display that takes them.

Last run, 2026-11-22, one thread of two x86-64 cores that were busy with other work, torch 2.13: storybook-sd 3.7 % of
the steps' time (at most 3.9 % in seven runs; whole runs x 1.13; R2 0.81), storybook-sd3, then still of 64 pixels, 3.7 %
(at most 3.7 %; x 1.02; R2 0.80); an update takes 3 ms. A larger model has longer steps, and so room for more of
them. Not measured on a GPU.
"""

import platform
import statistics
import sys
import time

import torch

from helpers import preview
from helpers.generate import Settings, generate
from helpers.pipelines import load

ROUNDS = 7


class Handle:
    """Takes what is displayed, as a notebook's front end would."""

    def update(self, content, raw):
        pass


def seconds(pipe, on_step) -> float:
    """Of one picture."""
    start = time.perf_counter()
    generate(pipe, Settings(pipe.model.examples[0]), on_step=on_step)
    return time.perf_counter() - start


def main(names: list[str]) -> None:
    """Shares, ratios and milliseconds of an update, medians of seven rounds."""
    preview._in_notebook = lambda: True
    import IPython.display

    IPython.display.display = lambda *_, **__: Handle()
    for name in names:
        pipe = load(name)
        seconds(pipe, lambda *_: None)  # the first run is slower
        start = time.perf_counter()
        meter = preview.LiveMeter(pipe)
        fit = time.perf_counter() - start
        shares, ratios, updates = [], [], []
        for _ in range(ROUNDS):
            plain = seconds(pipe, lambda *_: None)
            ratios.append(seconds(pipe, meter) / plain)
            shares.append(meter.share)
            updates.append(1000 * meter._cost)
        share, ratio, update = map(statistics.median, (shares, ratios, updates))
        print(f"{name}: {share:.1%} of the steps' time, at most {max(shares):.1%}; whole runs x {ratio:.2f};", end=" ")
        print(f"fitted in {fit:.1f} s, R2 {meter.rgb.r2:.2f}, one update {update:.0f} ms")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["storybook-sd", "storybook-sd3"])
