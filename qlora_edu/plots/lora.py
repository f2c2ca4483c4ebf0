"""Chapter 02: the rank of an update, in pictures. Every function returns a figure."""

from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from qlora_edu import spectra
from qlora_edu.plots.figures import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILLION

COLORS = {"update": VERMILLION, "gradient": GREEN, "weight": BLUE, "random": PURPLE}
NAMES = {
    "update": "update by 8 steps of AdamW",
    "gradient": "gradient of the first step",
    "weight": "the weight itself",
    "random": "random numbers",
}
_stored = cache(spectra.stored)


def rank_k(source: str = "update", matrix: str = "q_proj", rank: int = 8) -> Figure:
    """A corner of a real matrix, its best approximation of a rank, what that leaves out, and the share held.

    Args:
        source: one of `spectra.SOURCES`. matrix: one of `spectra.MATRICES`, of layer 15.
        rank: from 1 to 64.

    Raises:
        ValueError: if one of them is something else.
    """
    if (source, matrix) not in _stored():
        known = f"{', '.join(spectra.SOURCES)}; {', '.join(spectra.MATRICES)}"
        raise ValueError(f"source, matrix: expected of each of these: {known}; got {source!r}, {matrix!r}")
    if not 1 <= rank <= spectra.RANKS or rank != int(rank):
        raise ValueError(f"rank: expected a whole number from 1 to {spectra.RANKS}; got {rank!r}")
    rank, piece = int(rank), _stored()[source, matrix]
    near = piece.approximation(rank)
    figure = plt.figure(figsize=(7, 4.6))
    grid = figure.add_gridspec(2, 3, height_ratios=[1.25, 1])
    limit = piece.corner.abs().max().item()
    titles = (f"{source}, a corner", f"its rank {rank}", "what is left out")
    for i, (values, title) in enumerate(zip((piece.corner, near, piece.corner - near), titles, strict=True)):
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    axes = figure.add_subplot(grid[1, :])
    ranks = range(1, spectra.RANKS + 1)
    for other in spectra.SOURCES:
        held = [_stored()[other, matrix].share(k) for k in ranks]
        chosen = other == source
        axes.plot(ranks, held, color=COLORS[other], lw=2.6 if chosen else 1.2, alpha=1 if chosen else 0.6)
        axes.annotate(other, (ranks[-1], held[-1]), xytext=(5, 0), textcoords="offset points", va="center")
    axes.plot([rank], [piece.share(rank)], "o", color=INK, markersize=8)
    axes.annotate(
        f"{piece.share(rank):.0%}", (rank, piece.share(rank)), xytext=(7, -14), textcoords="offset points"
    )
    axes.set_xticks([1, 8, 16, 32, 48, 64])
    axes.set(xlim=(0, 74), ylim=(0, 1.08), xlabel="rank kept", ylabel="share held")
    print(f"rank {rank} holds {piece.share(rank):.1%} of the squared norm of this {source} of {matrix}")
    return figure


def shares(curves: Mapping[str, Sequence[Tensor]], mark: int = 8) -> Figure:
    """Share of the squared norm against the rank kept: thin lines for the matrices, a thick one for their median.

    Args:
        curves: by one of `spectra.SOURCES`, the result of `spectra.share` for each of several matrices.
        mark: the rank at which a dotted line stands.

    Raises:
        ValueError: if there is no curve.
    """
    if not curves or not all(len(group) for group in curves.values()):
        raise ValueError("curves: expected at least one matrix for each source")
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for source, group in curves.items():
        length = min(map(len, group))
        for curve in group:
            axes.plot(range(1, len(curve) + 1), curve.tolist(), color=COLORS[source], lw=0.6, alpha=0.45)
        middle = [sorted(float(curve[k]) for curve in group)[len(group) // 2] for k in range(length)]
        axes.plot(range(1, length + 1), middle, color=COLORS[source], lw=2.6, label=NAMES[source])
    axes.axvline(mark, color=INK, lw=1, ls=":")
    axes.annotate(f"rank {mark}", (mark, 1.03), xytext=(0, 2), textcoords="offset points", ha="center")
    axes.set(xscale="log", ylim=(0, 1.03), xlabel="rank kept", ylabel="share of the squared norm")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    axes.minorticks_off()
    axes.legend(loc="lower right", fontsize=9)
    return figure


def against_rank(panels: Mapping[str, Mapping[str, Mapping[int, float]]], xlabel: str = "rank r") -> Figure:
    """Panels beside each other, in each a line for each way of scaling, both axes logarithmic.

    Args:
        panels: {title: {"α/r": {1: 0.3, 4: 0.2}, "α/√r": {...}}}.

    Raises:
        ValueError: if there is no panel, or a value is not positive, which a logarithmic axis cannot show.
    """
    values = [v for lines in panels.values() for line in lines.values() for v in line.values()]
    if not values or min(values) <= 0:
        raise ValueError("panels: expected positive numbers in at least one panel")
    figure, row = plt.subplots(1, len(panels), figsize=(7, 3.0), squeeze=False)
    styles = ((VERMILLION, "o-"), (BLUE, "s-"), (ORANGE, "^--"), (GREEN, "D:"))
    for axes, (title, lines) in zip(row[0], panels.items(), strict=True):
        for (name, line), (color, style) in zip(lines.items(), styles, strict=False):
            axes.plot(list(line), list(line.values()), style, color=color, label=name, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel=xlabel)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([1, 4, 16, 64, 256], [1, 4, 16, 64, 256])
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 40 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    row[0][0].legend(fontsize=9)
    return figure
