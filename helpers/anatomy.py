"""Pictures of what is inside a model: heat maps, maps of words over a picture, a UNet's U, two streams, shares.

Every function returns a closed figure, which a cell shows once by ending with it.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ("#d6e6f7", "#fbe0c3", "#d5edd0", "#f2cfd3", "#e3d9f2")  # of parts and kinds of layers, in their order
# Nothing where the share is 0, so that the picture below is seen; strong orange where it is largest.
OVERLAY = LinearSegmentedColormap.from_list("overlay", [(0.85, 0.25, 0, 0), (0.85, 0.25, 0, 0.95)])
RISE = 0.35  # how far a skip connection's line is above the next inner one, in units of a bar's height


def heatmaps(
    tables: Sequence[torch.Tensor],
    titles: Sequence[str],
    bar: str,
    limits: tuple[float, float],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    numbers: bool = False,
    colours: str = "viridis",
) -> Figure:
    """Tables (R, C) side by side on the one scale of `limits`, which the colour bar `bar` shows; NaN stays white.

    `rows` and `columns` name what they hold (none: no ticks), `numbers` writes each value into its place. Raises
    ValueError, one sentence, if titles or names are not as many as what they name.
    """
    tables = [table.detach().float().cpu().numpy() for table in tables]
    _require_one_each(tables, titles, "title")
    for table in tables:
        if rows and len(rows) != len(table) or columns and len(columns) != table.shape[1]:
            raise ValueError(f"A table of {len(table)} x {table.shape[1]} needs a name for each row and each column.")
    tall, wide = tables[0].shape
    side = 0.6 * wide + 2.2 if numbers else 2.6 * len(tables) * max(wide / tall, 1)
    size = side + 1.2, (0.42 * tall if numbers else 2.6) + (1.2 if columns else 0.3)
    figure, grid = plt.subplots(1, len(tables), figsize=size, layout="constrained", squeeze=False, dpi=80)
    for number, (axes, table, title) in enumerate(zip(grid[0], tables, titles, strict=True)):
        shown = axes.imshow(table, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto" if numbers else None)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if not numbers else 20, parse_math=False)
        axes.set_yticks(range(len(rows)), rows if number == 0 else [""] * len(rows), parse_math=False)
        if numbers:
            _write_numbers(axes, table, limits)
    figure.colorbar(shown, ax=list(grid[0]), label=bar, shrink=0.9)
    plt.close(figure)
    return figure


def overlays(
    picture: Image.Image,
    maps: Mapping[str, torch.Tensor],
    bar: str,
    mask: torch.Tensor | None = None,
    columns: int = 6,
) -> Figure:
    """The picture, then each of `maps`, {label: (h, w) of any size}, in orange over it, all on one scale from 0.

    At most `columns` in a row. `mask` (H, W), boolean and as large as the picture, is outlined in black. Raises
    ValueError for no maps.
    """
    if not maps:
        raise ValueError("There are no maps to lay over the picture: give at least one.")
    wide, tall = picture.size
    highest = max(heat.max().item() for heat in maps.values())
    number = len(maps) + 1
    rows = -(-number // columns)
    columns = -(-number // rows)  # rows of about the same length
    size = 1.75 * columns + 0.8, 2.05 * rows * tall / wide
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, dpi=58)
    places = list(grid.flat)
    grey = picture.convert("L")
    for axes in places:
        axes.set_axis_off()
    places[0].imshow(picture)
    places[0].set_title("the picture", fontsize=11)
    for axes, (label, heat) in zip(places[1:], maps.items(), strict=False):
        axes.imshow(grey, cmap="gray", vmin=-160, vmax=255)  # pale, so that the orange is seen on dark places too
        shown = axes.imshow(
            heat.detach().float().cpu().numpy(), cmap=OVERLAY, vmin=0, vmax=highest,
            extent=(-0.5, wide - 0.5, tall - 0.5, -0.5), interpolation="bilinear",
        )  # fmt: skip
        axes.set_title(label, fontsize=11, parse_math=False)
        if mask is not None:
            axes.contour(mask.float().cpu().numpy(), levels=[0.5], colors="black", linewidths=0.9)
    figure.colorbar(shown, ax=places, label=bar, shrink=0.9)
    plt.close(figure)
    return figure


def u_shape(layers: Sequence[tuple[str, str, tuple[int, int, int]]]) -> Figure:
    """The U of a UNet: `layers` in the order in which they run, each (name, kind, (C, H, W) of what it puts out).

    One row of bars for each H. A bar is as wide as the square root of C and as high as that of H; C stands below it.
    Names are those of `from_scratch.unet.UNet`: lines lead from conv_in and everything in down_blocks, the last one
    first, to the residual blocks of up_blocks, which read them. Raises ValueError if these are not equally many.
    """
    down = [name for name, _, _ in layers if name == "conv_in" or name.startswith("down_blocks")]
    up = [name for name, _, _ in layers if name.startswith("up_blocks") and "resnets" in name]
    if not down or len(down) != len(up):
        raise ValueError(f"{len(down)} layers on the way down do not fit {len(up)} that read them on the way up.")
    skips = list(zip(reversed(down), up, strict=True))
    shapes = {name: shape for name, _, shape in layers}
    palette = dict(zip(sorted({kind for _, kind, _ in layers}), COLOURS, strict=False))
    unit = max(h for _, h, _ in shapes.values()) ** 0.5
    floors, floor = {}, 0.0  # where each row stands; the smallest feature maps at the bottom
    for height in sorted({shape[1] for shape in shapes.values()}):
        lines = sum(shapes[start][1] == height for start, _ in skips)
        floors[height] = floor
        floor += height**0.5 + (RISE * lines + 1.1) * unit / 4
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained", dpi=80)
    axes.set_axis_off()
    edges, right = {}, 0.0
    gap = 0.015 * sum(shape[0] ** 0.5 for shape in shapes.values())
    for name, kind, (channels, height, _) in layers:
        label = kind if kind not in {bar.get_label() for bar in axes.containers} else None
        place = {"align": "edge", "bottom": floors[height], "color": palette[kind], "edgecolor": "0.4"}
        axes.bar(right, height**0.5, channels**0.5, label=label, **place)
        edges[name] = right, right + channels**0.5
        axes.text(sum(edges[name]) / 2, floors[height] - 0.05 * unit, channels, ha="center", va="top", fontsize=7)
        right = edges[name][1] + gap
    for height, floor in floors.items():
        axes.text(-2 * gap, floor + height**0.5 / 2, f"{height} × {height}", ha="right", va="center", fontsize=9)
        inside = [(start, end) for start, end in skips if shapes[start][1] == height]
        for number, (start, end) in enumerate(inside, start=1):  # the innermost first
            top, level = floor + height**0.5, floor + height**0.5 + RISE * number * unit / 4
            x = [sum(edges[start]) / 2] * 2 + [sum(edges[end]) / 2]
            axes.plot(x, [top, level, level], color="#b0413e", linewidth=0.9)
            arrow = {"arrowstyle": "-|>", "color": "#b0413e", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x[-1], top), (x[-1], level), arrowprops=arrow)
    axes.plot([], [], color="#b0413e", label="skip connection")
    axes.set(xlim=(-6 * gap, right), ylim=(-0.4 * unit, floor + height**0.5 + (RISE * len(inside) + 0.2) * unit / 4))
    figure.legend(loc="outside upper center", ncols=6, fontsize=9)
    plt.close(figure)
    return figure


def two_streams(blocks: Sequence[tuple[tuple[int, int], tuple[int, int] | None, bool]]) -> Figure:
    """An MMDiT from left to right: picture tokens above, text tokens below, a line between for each joint attention.

    `blocks` has for each block in order: (N, C) of the picture tokens that it puts out, (M, C) of the text tokens or
    None where the text ends, and whether the picture attends to itself once more. Raises ValueError for no blocks.
    """
    if not blocks:
        raise ValueError("There are no blocks to draw: give at least one.")
    figure, axes = plt.subplots(figsize=(11, 2.6), layout="constrained", dpi=80)
    axes.set_axis_off()
    seen = set()

    def bar(left: int, bottom: float, kind: str, colour: str) -> None:
        label = None if kind in seen else kind
        seen.add(kind)
        axes.bar(left, 0.8, 0.7, bottom=bottom, align="edge", color=colour, edgecolor="0.4", label=label)

    for n, (_, text, dual) in enumerate(blocks):
        axes.plot([n + 0.35] * 2, [0.8, 1.6], color="#b0413e", label=None if n else "joint attention")
        if dual:
            bar(n, 1.6, "picture, with an attention of its own", COLOURS[1])
        else:
            bar(n, 1.6, "picture", COLOURS[0])
        if text is None:
            bar(n, 0, "text, only read", COLOURS[3])
        else:
            bar(n, 0, "text", COLOURS[2])
        axes.text(n + 0.35, 1.2, n, ha="center", va="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1})
    ends = (2.0, blocks[0][0]), (0.4, next((text for _, text, _ in blocks if text), (0, 0)))
    for height, (tokens, channels) in ends:
        axes.text(-0.2, height, f"{tokens:,} tokens\nof {channels:,}", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-0.12 * len(blocks) - 0.6, len(blocks)), ylim=(-0.1, 2.5))
    figure.legend(loc="outside upper center", ncols=5, fontsize=9)
    plt.close(figure)
    return figure


def shares(amounts: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each entry of `amounts`, {bar: {part: amount}}, cut into its parts' shares of the whole.

    Raises ValueError if the bars are not of the same parts.
    """
    parts = list(next(iter(amounts.values()), {}))
    if not parts or any(list(bar) != parts for bar in amounts.values()):
        raise ValueError("The bars are not all of the same parts: give every bar an amount for each part.")
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(amounts) + 1.1), layout="constrained", dpi=80)
    left = np.zeros(len(amounts))
    for part, colour in zip(parts, COLOURS, strict=False):
        wide = np.array([bar[part] / sum(bar.values()) for bar in amounts.values()])
        axes.barh(list(amounts), wide, left=left, color=colour, edgecolor="0.4", label=part)
        left = left + wide
    axes.set(xlim=(0, 1), xlabel="share")
    axes.invert_yaxis()  # the first one on top
    figure.legend(loc="outside upper center", ncols=len(parts))
    plt.close(figure)
    return figure


def _require_one_each(things: Sequence, names: Sequence[str], what: str) -> None:
    if not things or len(things) != len(names):
        raise ValueError(f"There are {len(things)} tables and {len(names)} {what}s: give each table one.")


def _write_numbers(axes: plt.Axes, table: np.ndarray, limits: tuple[float, float]) -> None:
    """White on dark colours, black on light ones."""
    middle = sum(limits) / 2
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < middle else "k")
