"""Flow diagrams for the page: boxes at given places, arrows from box to box."""

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDE, HIGH = 1.5, 0.62  # of a box, in units of its place
INCHES = (1.25, 1.0)  # of a unit across and down


def flow(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Iterable[str],
    groups: Mapping[str, Iterable[str]] | None = None,
) -> Figure:
    """Draw `boxes`, {name: (x, y, text)} with y growing downwards, and `arrows` like "text > clip: says what".

    Boxes are 1.5 wide and 0.62 high, so that places 2 apart across and 1 apart down leave room for arrows. `groups`,
    {title: names}, frames boxes that belong together. Raises ValueError, one sentence, for an arrow or a group that
    names no box.
    """
    lines = [_ends(arrow, boxes) for arrow in arrows]
    if strangers := {name for names in (groups or {}).values() for name in names} - set(boxes):
        raise ValueError(f"There is no box {min(strangers)!r} for a group: choose among {', '.join(boxes)}.")
    xs, ys = ([box[k] for box in boxes.values()] for k in (0, 1))
    above, below = (0.5, 0.25) if groups else (0.1, 0.1)  # room for the frames
    x = min(xs) - WIDE / 2 - 0.25, max(xs) + WIDE / 2 + 0.25
    y = max(ys) + HIGH / 2 + below, min(ys) - HIGH / 2 - above
    figure, axes = plt.subplots(figsize=((x[1] - x[0]) * INCHES[0], (y[0] - y[1]) * INCHES[1]))
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()
    for title, names in (groups or {}).items():
        left, right = (pick(boxes[name][0] for name in names) for pick in (min, max))
        top, bottom = (pick(boxes[name][1] for name in names) for pick in (min, max))
        size = right - left + WIDE + 0.3, bottom - top + HIGH + 0.5
        corner = left - WIDE / 2 - 0.15, top - HIGH / 2 - 0.35
        axes.add_patch(FancyBboxPatch(corner, *size, "round,pad=0,rounding_size=0.1", fc="#f4f1ea", ec="#b8b0a0"))
        axes.text(corner[0] + 0.12, corner[1] + 0.06, title, va="top", fontsize=9, color="#6b6252")
    patches = {}
    for name, (x, y, text) in boxes.items():
        corner = x - WIDE / 2, y - HIGH / 2
        shape = FancyBboxPatch(
            corner, WIDE, HIGH, "round,pad=0,rounding_size=0.12", fc="#dbe9f6", ec="#27567b", zorder=3
        )
        patches[name] = axes.add_patch(shape)
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, zorder=4)
    for start, end, label in lines:
        (x1, y1, _), (x2, y2, _) = boxes[start], boxes[end]
        line = FancyArrowPatch(
            (x1, y1), (x2, y2), patchA=patches[start], patchB=patches[end],
            arrowstyle="-|>", mutation_scale=13, shrinkA=1, shrinkB=1, color="#444444", zorder=2,
        )  # fmt: skip
        axes.add_patch(line)
        if label:
            axes.text(
                (x1 + x2) / 2, (y1 + y2) / 2, label, ha="center", va="center", fontsize=8.5, style="italic",
                bbox={"fc": "white", "ec": "none", "pad": 1}, zorder=5,
            )  # fmt: skip
    figure.tight_layout(pad=0.3)
    plt.close(figure)  # else the cell shows it twice
    return figure


def _ends(arrow: str, boxes: Mapping[str, tuple]) -> tuple[str, str, str]:
    """Start, end and label of an arrow, "text > clip: says what"."""
    ends, _, label = arrow.partition(":")
    names = [name.strip() for name in ends.split(">")]
    if len(names) != 2 or not set(names) <= set(boxes):
        raise ValueError(
            f"The arrow {arrow.strip()!r} leads from no box to another: write 'one > other: label', "
            f"with names among {', '.join(boxes)}."
        )
    return names[0], names[1], label.strip()
