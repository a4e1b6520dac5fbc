"""Pictures of a model's insides: what is drawn is what was given, on one scale, and nothing is left open."""

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from helpers.anatomy import heatmaps, overlays, shares, two_streams, u_shape

SMALL_U = [
    ("conv_in", "convolution", (64, 16, 16)),
    ("down_blocks.0.resnets.0", "residual block", (64, 16, 16)),
    ("down_blocks.0.downsample", "half the size", (64, 8, 8)),
    ("down_blocks.1.resnets.0", "residual block", (128, 8, 8)),
    ("mid_block.resnets.0", "residual block", (128, 8, 8)),
    ("up_blocks.0.resnets.0", "residual block", (128, 8, 8)),
    ("up_blocks.0.resnets.1", "residual block", (128, 8, 8)),
    ("up_blocks.0.upsample", "double the size", (128, 16, 16)),
    ("up_blocks.1.resnets.0", "residual block", (64, 16, 16)),
    ("up_blocks.1.resnets.1", "residual block", (64, 16, 16)),
    ("conv_out", "convolution", (4, 16, 16)),
]


def images(figure):
    return [axes.images for axes in figure.axes if axes.images]


def bars(figure):
    """(left, bottom, width, height) of each bar, from left to right."""
    found = [bar for container in figure.axes[0].containers for bar in container]
    return sorted((bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in found)


def test_heatmaps_share_one_scale_and_keep_their_numbers():
    tables = [torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, float("nan")]])]
    figure = heatmaps(tables, ["one", "two"], "share", (0, 2), ["row"], ["left", "$right"], numbers=True)
    for (shown,), table in zip(images(figure)[:2], tables, strict=True):
        assert shown.get_clim() == (0, 2)
        assert torch.equal(torch.as_tensor(shown.get_array().filled(-1)), table.nan_to_num(-1))
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["left", "$right"]
    assert {text.get_text(): text.get_position() for text in first.texts} == {"0.00": (0, 0), "0.50": (1, 0)}
    assert figure.axes[1].get_title() == "two"


def test_word_maps_lie_over_the_picture_on_the_scale_of_the_largest():
    picture = Image.new("RGB", (32, 16), "red")
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[4:8, 4:12] = True
    figure = overlays(picture, {"costs $5": torch.full((2, 4), 0.1), "boat": torch.eye(4)}, "share", mask=mask)
    (first,), *rest = images(figure)[:3]
    assert first.get_array().shape == (16, 32, 3)  # the picture as it is
    for below, heat in rest:
        assert below.get_extent() == heat.get_extent()
        assert heat.get_clim() == (0, 1)
        assert heat.get_cmap()(0.0)[3] == 0 < heat.get_cmap()(1.0)[3]  # nothing hides the picture where the share is 0
    assert [axes.get_title() for axes in figure.axes[:3]] == ["the picture", "costs $5", "boat"]
    outline = figure.axes[1].collections[0].get_paths()[0].vertices
    assert [*outline.min(0), *outline.max(0)] == pytest.approx([3.5, 3.5, 11.5, 7.5])


def test_eight_panels_make_two_rows_of_four():
    figure = overlays(Image.new("RGB", (8, 8)), {f"word {n}": torch.eye(2) for n in range(7)}, "share")
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 4)


def test_the_u_has_a_bar_for_each_layer_with_its_shape():
    drawn = bars(u_shape(SMALL_U))
    assert len(drawn) == len(SMALL_U)
    floors = {}
    for (_, bottom, width, height), (_, _, (channels, size, _)) in zip(drawn, SMALL_U, strict=True):
        assert (width, height) == pytest.approx((channels**0.5, size**0.5))
        assert floors.setdefault(size, bottom) == bottom  # one row for each size
    assert floors[8] + 8**0.5 < floors[16]  # the deeper, the lower, and rows do not touch
    ends = [left + width for left, _, width, _ in drawn]
    assert all(end < following[0] for end, following in zip(ends, drawn[1:], strict=False))
    written = [text.get_text() for text in u_shape(SMALL_U).axes[0].texts]
    assert written.count("128") == 5 and written.count("4") == 1 and {"16 × 16", "8 × 8"} <= set(written)


def test_skip_connections_lead_from_the_last_layer_down_to_the_first_one_up():
    figure = u_shape(SMALL_U)
    drawn = dict(zip((name for name, _, _ in SMALL_U), bars(figure), strict=True))
    middle = {name: left + width / 2 for name, (left, _, width, _) in drawn.items()}
    lines = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata())]
    expected = [
        ("down_blocks.1.resnets.0", "up_blocks.0.resnets.0"),
        ("down_blocks.0.downsample", "up_blocks.0.resnets.1"),
        ("down_blocks.0.resnets.0", "up_blocks.1.resnets.0"),
        ("conv_in", "up_blocks.1.resnets.1"),
    ]
    assert len(lines) == 4
    for line, (start, end) in zip(lines, expected, strict=True):
        assert (line[0], line[-1]) == pytest.approx((middle[start], middle[end]))
    heights = sorted({line.get_ydata()[-1] for line in figure.axes[0].lines if len(line.get_xdata())})
    assert len(heights) == 4  # none lies on another


def test_shares_are_of_each_bar_s_own_whole():
    figure = shares({"parameters": {"a": 1, "b": 3}, "work": {"a": 50, "b": 50}})
    widths = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]
    assert widths == [pytest.approx([0.25, 0.5]), pytest.approx([0.75, 0.5])]
    starts = [bar.get_x() for bar in figure.axes[0].containers[1]]
    assert starts == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize(
    "draw, sentence",
    [
        (lambda: heatmaps([torch.eye(2)], [], "share", (0, 1)), "1 tables and 0 titles"),
        (lambda: heatmaps([], [], "share", (0, 1)), "0 tables"),
        (lambda: heatmaps([torch.eye(2)], ["one"], "share", (0, 1), rows=["a"]), "2 x 2 needs a name for each row"),
        (lambda: heatmaps([torch.eye(2)], ["one"], "share", (0, 1), columns=["a"]), "2 x 2 needs a name for each row"),
        (lambda: overlays(Image.new("RGB", (8, 8)), {}, "share"), "no maps to lay over the picture"),
        (lambda: u_shape(SMALL_U[:4]), "4 layers on the way down do not fit 0"),
        (lambda: u_shape([]), "0 layers on the way down"),
        (lambda: shares({"one": {"a": 1}, "other": {"b": 1}}), "not all of the same parts"),
        (lambda: shares({}), "not all of the same parts"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence_and_leaves_no_figure(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()
    assert plt.get_fignums() == []


def test_the_cell_shows_it_once():
    u_shape(SMALL_U), shares({"one": {"a": 1}}), heatmaps([torch.eye(2)], ["one"], "share", (0, 1))
    overlays(Image.new("RGB", (8, 8)), {"a": torch.eye(2)}, "share")
    assert plt.get_fignums() == []


STREAMS = [((64, 128), (30, 96), True), ((64, 128), (30, 96), False), ((64, 128), None, False)]


def test_two_streams_have_a_bar_each_in_every_block():
    axes = two_streams(STREAMS).axes[0]
    places = sorted((bar.get_x(), bar.get_y()) for container in axes.containers for bar in container)
    below, above = sorted({y for _, y in places})
    assert places == [(n, y) for n in range(3) for y in (below, above)]
    colours = {(b.get_x(), b.get_y()): b.get_facecolor() for container in axes.containers for b in container}
    legend = {container.get_label(): container[0].get_facecolor() for container in axes.containers}
    assert [colours[n, below] for n in range(3)] == [legend["text"]] * 2 + [legend["text, only read"]]
    first, *others = (colours[n, above] for n in range(3))
    assert first == legend["picture, with an attention of its own"] and others == [legend["picture"]] * 2
    assert len({legend[kind] for kind in legend if not kind.startswith("_")}) == 4
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0.35, 1.35, 2.35])
    assert {"64 tokens\nof 128", "30 tokens\nof 96"} <= {text.get_text() for text in axes.texts}


def test_two_streams_of_no_blocks():
    with pytest.raises(ValueError, match="no blocks to draw"):
        two_streams([])
    assert plt.get_fignums() == []
