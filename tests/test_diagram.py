"""Flow diagrams: what is drawn is where the caller put it, and nothing is left open."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from helpers.diagram import HIGH, WIDE, flow

BOXES = {"a": (0, 0, "first"), "b": (2.4, 0, "second"), "c": (2.4, 1.5, "third")}


def drawn(**more):
    figure = flow(BOXES, ["a > b", " b > c: says"], **more)
    return figure, figure.axes[0]


def rectangles(axes):
    """(left, top, width, height) of each box and frame."""
    patches = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    return [(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in patches]


def test_boxes_are_centred_on_their_places_inside_the_picture():
    _, axes = drawn()
    for (left, top, width, height), (x, y, _) in zip(rectangles(axes), BOXES.values(), strict=True):
        assert (width, height) == (WIDE, HIGH)
        assert (left + width / 2, top + height / 2) == pytest.approx((x, y))
        assert axes.get_xlim()[0] < left and left + width < axes.get_xlim()[1]
        assert axes.get_ylim()[1] < top and top + height < axes.get_ylim()[0]  # y grows downwards
    written = {text.get_text(): text.get_position() for text in axes.texts}
    assert all(written[text] == (x, y) for x, y, text in BOXES.values())


def test_arrows_go_from_box_to_box_and_carry_their_labels():
    _, axes = drawn()
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    boxes = dict(zip(BOXES, (p for p in axes.patches if isinstance(p, FancyBboxPatch)), strict=True))
    assert [(arrow.patchA, arrow.patchB) for arrow in arrows] == [(boxes["a"], boxes["b"]), (boxes["b"], boxes["c"])]
    labels = [text for text in axes.texts if text.get_style() == "italic"]
    assert [(label.get_text(), label.get_position()) for label in labels] == [("says", (2.4, 0.75))]


def test_a_group_frames_its_boxes_and_no_other():
    _, axes = drawn(groups={"both": ["b", "c"]})
    (left, top, width, height), *boxes = rectangles(axes)
    inside = [left < x and x + w < left + width and top < y and y + h < top + height for x, y, w, h in boxes]
    assert inside == [False, True, True]
    assert axes.get_ylim()[1] < top and "both" in {text.get_text() for text in axes.texts}


def test_the_head_of_an_arrow_is_at_its_end():
    """Looked at in the picture: there is more ink beside the second box than beside the first."""
    figure = flow({"a": (0, 0, ""), "b": (3, 0, "")}, ["a > b"])
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    grey = np.asarray(Image.open(file).convert("L"))
    middle = grey[:, grey.shape[1] // 4 : -grey.shape[1] // 4] < 128
    left, right = np.array_split(middle, 2, axis=1)
    assert right.sum() > left.sum()


@pytest.mark.parametrize("arrow", ["a > nowhere", "nowhere > a", "a b", "a > b > c", ""])
def test_an_arrow_that_leads_nowhere_is_one_sentence_and_leaves_no_figure(arrow):
    with pytest.raises(ValueError, match=r"leads from no box to another.*among a, b, c\.$"):
        flow(BOXES, ["a > b", arrow])
    with pytest.raises(ValueError, match="no box 'x' for a group"):
        flow(BOXES, [], {"both": ["a", "x"]})
    assert plt.get_fignums() == []


def test_the_cell_shows_it_once():
    """pyplot would show an open figure by itself, beside the one that the cell returns."""
    drawn()
    assert plt.get_fignums() == []
