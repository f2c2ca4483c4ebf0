"""Chapter 06: what a 4-bit layer keeps and how its gradients compare, in pictures. Every function returns a figure."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from qlora_edu.memory.activations import Work
from qlora_edu.memory.decoded import PARTS, kept
from qlora_edu.memory.parts import quantized
from qlora_edu.memory.shapes import NAMED, shape_of
from qlora_edu.plots.figures import BLUE, CARD, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, legend
from qlora_edu.plots.memory import stacks

MB = 1e6
COLORS = dict(zip(PARTS, (VERMILLION, GREEN, SKY, PURPLE, ORANGE), strict=True))
BARS = {
    "linear weights": BLUE,
    "decoded weights kept": VERMILLION,
    "activations kept": GREEN,
    "embedding and norms": ORANGE,
    "adapter": SKY,
}
_STORED, _BRIEF, _KEPT, _PASSING = "#BBD9EE", "#FBE3CF", "#C4E8DB", CARD


def data_flow() -> Figure:
    """The forward and the backward pass of a QLoRA layer: what has 4 bits, what 16, and what is kept between them."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    boxes = {
        # name: (x, y, width, text, ground)
        "packed": (1.9, 5.6, 2.3, "codes and scales\n4.127 bits a weight", _STORED),
        "W": (5.15, 5.6, 2.3, "W\n16 bits, for a moment", _BRIEF),
        "x": (0.75, 3.9, 1.3, "x", _KEPT),
        "xW": (5.15, 3.9, 1.5, "x Wᵀ", _PASSING),
        "h": (3.1, 2.75, 1.3, "x Aᵀ", _KEPT),
        "hB": (5.15, 2.75, 1.5, "s (x Aᵀ) Bᵀ", _PASSING),
        "y": (8.6, 3.9, 1.3, "y", _PASSING),
        "dy": (8.6, 1.1, 1.3, "dy", _PASSING),
        "dyW": (5.15, 1.1, 2.3, "dy W + s (dy B) A", _PASSING),
        "W2": (5.15, -0.35, 2.3, "W\ndecoded once more", _BRIEF),
        "dx": (0.75, 1.1, 1.3, "dx", _PASSING),
        "dAB": (8.6, -0.35, 1.9, "dA, dB\nfrom dy, x, x Aᵀ", _PASSING),
    }
    for x, y, width, text, ground in boxes.values():
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - 0.38),
                width,
                0.76,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=ground,
                edgecolor=INK,
                linewidth=0.9,
                linestyle="--" if ground == _BRIEF else "-",
            )
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    for start, stop in (
        *(("packed", "W"), ("W", "xW"), ("x", "xW"), ("x", "h"), ("h", "hB"), ("xW", "y"), ("hB", "y")),
        *(("dy", "dyW"), ("W2", "dyW"), ("dyW", "dx"), ("dy", "dAB")),
    ):
        _arrow(axes, boxes[start], boxes[stop])
    axes.plot([1.9, 1.9], [5.2, -0.35], color=BLUE, lw=1.2, ls=":", zorder=0)  # the codes are used again
    axes.annotate(
        "", (3.97, -0.35), (1.9, -0.35), arrowprops={"arrowstyle": "->", "color": BLUE, "ls": ":", "lw": 1.2}
    )
    axes.text(3.55, 5.72, "decode", ha="center", fontsize=8.5)
    axes.text(3.0, -0.23, "decode", ha="center", fontsize=8.5)
    axes.axhline(1.95, color=INK, lw=0.8, ls=":")
    axes.text(9.6, 2.05, "forward", ha="right", fontsize=9, style="italic")
    axes.text(9.6, 1.65, "backward", ha="right", fontsize=9, style="italic")
    names = {
        "stays: 4 bits": _STORED,
        "kept for backward: 16 bits": _KEPT,
        "for one product: 16 bits": _BRIEF,
    }
    legend(figure, names)
    axes.set(xlim=(0, 9.7), ylim=(-0.85, 6.1), xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _arrow(axes: Axes, start: tuple, stop: tuple) -> None:
    (x0, y0, w0), (x1, y1, w1) = start[:3], stop[:3]
    if abs(x1 - x0) < 0.5:
        y0, y1 = y0 + (0.4 if y1 > y0 else -0.4), y1 + (-0.4 if y1 > y0 else 0.4)
    else:
        x0, x1 = x0 + (w0 / 2 if x1 > x0 else -w0 / 2), x1 + (-w1 / 2 if x1 > x0 else w1 / 2)
    axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.1})


def kept_for_backward(
    model: str = "llama-7b",
    length: int = 512,
    rank: int = 64,
    naive: bool = True,
    checkpointing: bool = False,
) -> Figure:
    """What is kept for backward, above in one bar beside the 4-bit weights, below part by part. Prints one line.

    Args:
        model: a name of `memory.NAMED`. length: tokens, in one sequence. naive: keep the decoded weights too.
    """
    if model not in NAMED:
        raise ValueError(f"model: expected one of {', '.join(NAMED)}; got {model!r}")
    shape = shape_of(model)
    sizes = kept(shape, Work(1, int(length), rank=int(rank)), naive, checkpointing)
    stored, total = sum(quantized(shape).values()), sum(sizes.values())
    print(f"{model}: {stored / MB:,.0f} MB of 4-bit weights; {total / MB:,.0f} MB kept for backward")
    figure, (top, bottom) = plt.subplots(
        2, figsize=(7, 3.9), gridspec_kw={"height_ratios": [1.5, 3]}, sharex=True
    )
    top.barh(0, stored / MB, color=BLUE)
    top.text(stored / MB, 0, f"  {stored / MB:,.1f}", va="center", fontsize=9.5)
    left = 0.0
    for name, size in sizes.items():
        top.barh(1, size / MB, left=left, color=COLORS[name])
        left += size / MB
    top.text(left, 1, f"  {left:,.1f}", va="center", fontsize=9.5)
    top.set(yticks=[0, 1], yticklabels=["4-bit weights", "kept for backward"])
    for row, (name, size) in enumerate(sizes.items()):
        bottom.barh(row, size / MB, color=COLORS[name])
        bottom.text(size / MB, row, f"  {size / MB:,.1f}", va="center", fontsize=9.5)
    bottom.set(yticks=range(len(sizes)), yticklabels=list(sizes), xlabel="MB")
    bottom.set_xlim(0, 1.17 * max(stored, total) / MB)
    for axes in (top, bottom):
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


def kept_bars(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each row, cut into parts of BARS in MB: {"by hand": {"linear weights": 54.8, ...}, ...}.

    Raises:
        ValueError: if there is no row, a part is none of BARS, or a size is negative or not finite.
    """
    parts = [part for part in BARS if any(part in sizes for sizes in rows.values())]
    if not parts or any(part not in BARS for sizes in rows.values() for part in sizes):
        raise ValueError(f"rows: expected parts among {', '.join(BARS)}, in at least one row")
    if not all(0 <= size < float("inf") for sizes in rows.values() for size in sizes.values()):
        raise ValueError("rows: expected finite sizes in MB of at least 0")
    return stacks(rows, "MB", colors=BARS)


def agreements(sources: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Cosine (left) and ratio of lengths (right) against the block, a dot for each matrix, a line for the median.

    Args:
        sources: {"4-bit base": gradients.agreement(...), ...}; the names are those of a LLaMA's layers.

    Raises:
        ValueError: if there is no source, or more than 4.
    """
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    if not 1 <= len(sources) <= len(colors) or not all(sources.values()):
        raise ValueError(
            f"sources: expected 1 to {len(colors)}, with at least one matrix; got {len(sources)}"
        )
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), gridspec_kw={"width_ratios": [1.35, 1]})
    for pairs, color in zip(sources.values(), colors, strict=False):
        by_block: dict[int, list[tuple[float, float]]] = {}
        for name, pair in pairs.items():
            by_block.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(pair)
        for i, axes in enumerate(panels):
            for block, found in by_block.items():
                axes.plot(
                    [block] * len(found), [p[i] for p in found], ".", color=color, ms=4.5, alpha=0.5, mew=0
                )
            middle = [sorted(p[i] for p in by_block[b])[len(by_block[b]) // 2] for b in sorted(by_block)]
            axes.plot(sorted(by_block), middle, color=color, lw=1.8)
    lowest = min(cosine for pairs in sources.values() for cosine, _ in pairs.values())
    panels[0].set(xlabel="block", ylabel="cosine", ylim=(min(0.0, lowest) - 0.03, 1.05))
    panels[1].set(xlabel="block", ylabel="ratio of lengths", yscale="log", ylim=(0.5, 2.3))
    panels[1].set_yticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"])
    panels[1].minorticks_off()
    legend(figure, dict(zip(sources, colors, strict=False)))
    return figure
