"""Rows of numbers in coloured boxes."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from qlora_edu import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_every_number_stands_in_a_box_of_its_colour():
    axes = plots.boxes({"w": [0.5, -1.0], "code": ["0xb", "0x0"]}, {"code": ["#e69f00", None]}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.50", "-1.00", "0xb", "0x0"]
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    grounds = [to_hex(patch.get_facecolor()) for patch in found]
    assert grounds == [plots.CARD.lower(), plots.CARD.lower(), "#e69f00", plots.CARD.lower()]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["w", "code"]


def test_a_shorter_row_has_wider_boxes():
    axes = plots.boxes({"blocks": [1, 2], "w": list(range(8))}).axes[0]
    widths = [patch.get_width() for patch in axes.patches]
    assert widths[:2] == pytest.approx([3.92, 3.92]) and widths[2:] == pytest.approx([0.92] * 8)


@pytest.mark.parametrize("rows", [{}, {"w": []}, {"w": [1.0], "code": []}])
def test_nothing_to_draw_is_refused(rows):
    with pytest.raises(ValueError, match="at least one"):
        plots.boxes(rows)


@pytest.mark.parametrize("colors", [{"v": [None]}, {"w": [None]}])
def test_colors_belong_to_boxes(colors):
    with pytest.raises(ValueError, match="one for each box"):
        plots.boxes({"w": [1.0, 2.0]}, colors)
