"""One look for every figure, and one way to show it: as a small PNG with a caption and a text description.

    from qlora_edu import plots

    plots.use_style()
    figure, axes = plt.subplots()
    ...
    plots.show(figure, "The loss falls from 3.6 to 0.1 nats in 20 steps.", alt="A curve that ...")

The colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any common form of
colour blindness can tell apart, less the yellow, which is too faint on a light ground. Figures stand on a
light card of their own: on a transparent ground no ink is readable on both a white and a black page.
"""

import io
from collections.abc import Mapping

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from PIL import Image as Pixels

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, CARD, RULE = "#222222", "#FBFAF7", "#DDDDDD"

DOTS_PER_INCH = 144  # saved: sharp on dense screens
CSS_PIXELS_PER_INCH = 96  # shown: an inch of the figure is an inch of the page

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": CARD,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": CARD,
    "figure.figsize": (7.0, 3.25),
    "font.size": 10.5,
    "grid.color": RULE,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "savefig.facecolor": CARD,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use_style() -> None:
    """Give every figure made from now on the course's look, whatever the reader's own matplotlib settings."""
    plt.style.use(["default", STYLE])


def png(figure: Figure) -> bytes:
    """The figure as a PNG of at most 256 colours: a quarter of the bytes, no difference that can be seen.

    The same figure gives the same bytes on every run: no date and no version is stored.
    """
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    small = io.BytesIO()
    Pixels.open(raw).convert("RGB").quantize(256, dither=Pixels.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def show(figure: Figure, caption: str, alt: str | None = None) -> None:
    """Display a figure once, its caption below it, and close it.

    caption: one sentence (Markdown) that says what there is to see.
    alt: what someone who cannot see the picture should know; the caption where it is left out. It is kept
        in the notebook as the picture's ``alt`` metadata.

    Raises TypeError for anything but a matplotlib figure, ValueError for an empty caption.
    """
    if not isinstance(figure, Figure):
        kind = type(figure).__name__
        raise TypeError(f"figure must be a matplotlib Figure, got {kind}; that of an Axes is `axes.figure`")
    if not caption.strip():
        raise ValueError("caption is empty: say in one sentence what there is to see in the figure")
    width = round(figure.get_figwidth() * CSS_PIXELS_PER_INCH)
    display(Image(png(figure), format="png", width=width, alt=(alt or caption).strip()))
    display(Markdown(f"*{caption.strip()}*"))
    plt.close(figure)


def legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Boxes of a colour with their names, above the figure. colors: {name: colour}."""
    boxes = [plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor=INK, linewidth=0.4) for c in colors.values()]
    figure.legend(
        boxes, list(colors), loc="outside upper left", ncols=len(colors), fontsize=9, columnspacing=1.2
    )


def stacked_bars(rows: dict[str, dict[str, float]], xlabel: str, total: str = "{:,.0f}") -> Figure:
    """One horizontal bar for each row, cut into named parts, with its total at the end.

    rows: {"LoRA": {"weights": 212.3, "adapter": 9.8}, ...}, drawn from the top. A part has one colour in all rows.
    total: how the sum at the end of a bar is written.
    """
    parts = list(dict.fromkeys(part for sizes in rows.values() for part in sizes))
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.55 * len(rows)))
    for row, sizes in enumerate(rows.values()):
        left = 0.0
        for part, size in sizes.items():
            axes.barh(row, size, left=left, color=PALETTE[parts.index(part) % len(PALETTE)])
            left += size
        axes.annotate(total.format(left), (left, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=xlabel)
    axes.set_xlim(0, 1.13 * max(sum(sizes.values()) for sizes in rows.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=PALETTE[i % len(PALETTE)]) for i in range(len(parts))]
    figure.legend(handles, parts, loc="outside upper right", ncols=len(parts))
    return figure
