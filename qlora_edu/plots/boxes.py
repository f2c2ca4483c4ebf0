"""Small worked examples: numbers in coloured boxes, a row for each step of the computation."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_edu.plots.figures import CARD, INK

_INCHES_A_ROW = 0.55
_LIGHT, _DARK = "#FFFFFF", INK


def boxes(
    rows: Mapping[str, Sequence[float | str]],
    colors: Mapping[str, Sequence[str | None]] | None = None,
    format: str = "{:.2f}",
) -> Figure:
    """Draw rows of boxes under each other, each row with its name at the left.

    Args:
        rows: {"weights": [0.31, -1.2, ...], "codes": ["0x7", "0x1", ...]}. Rows may differ in length: the boxes of
            a shorter row are wider, so that a row of two stands above the two halves of a row of eight.
        colors: the ground of the boxes of some rows, one for each box; None, and rows not named, leave it plain.
        format: how a number is written. Strings are written as they are.

    Raises:
        ValueError: if there is no row, a row is empty, or the colors of a row are not as many as its boxes.

    >>> figure = boxes({"weights": [0.5, -1.0], "codes": ["0xb", "0x0"]}, colors={"codes": ["#E69F00", None]})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.50', '-1.00', '0xb', '0x0']
    """
    if not rows or not all(len(row) for row in rows.values()):
        raise ValueError("rows: expected at least one row, and at least one box in each")
    colors = dict(colors or {})
    for name, grounds in colors.items():
        if name not in rows or len(grounds) != len(rows[name]):
            raise ValueError(f"colors[{name!r}]: expected one for each box of the row of that name")
    width = max(map(len, rows.values()))
    figure, axes = plt.subplots(figsize=(7, 0.25 + _INCHES_A_ROW * len(rows)))
    for i, (name, row) in enumerate(rows.items()):
        step = width / len(row)
        for j, value in enumerate(row):
            ground = colors.get(name, [None] * len(row))[j] or CARD
            corner = (j * step + 0.04, i + 0.1)
            axes.add_patch(
                Rectangle(corner, step - 0.08, 0.8, facecolor=ground, edgecolor=INK, linewidth=0.8)
            )
            text = value if isinstance(value, str) else format.format(value)
            axes.text(
                (j + 0.5) * step, i + 0.5, text, ha="center", va="center", color=_ink_on(ground), fontsize=10
            )
    axes.set(xlim=(0, width), ylim=(len(rows), 0), xticks=[])
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(rows))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _ink_on(ground: str) -> str:
    """Dark or light ink, whichever stands out more from the ground (relative luminance, WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(ground)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _LIGHT if luminance < 0.2 else _DARK
