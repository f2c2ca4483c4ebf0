"""Chapter 03: what rounding to a grid does, in pictures. Every function returns a figure and computes what it shows."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from qlora_edu import rounding
from qlora_edu.plots.figures import BLUE, CARD, GREEN, INK, ORANGE, PALETTE, VERMILLION
from qlora_edu.stored import normals

ROWS, COLUMNS, BLOCK = 8, 64, 16  # the small tensor of `outlier`
FIRST = 61 * 512  # 512 of the normal numbers whose largest, 3.1, is no outlier
OUTLIER = (3, 21)  # where its outlier stands: row 3, column 21, the second block of that row


def shades(values: Sequence[float]) -> list[str]:
    """A colour for each number, for `plots.boxes`: blue below zero, orange above, the fuller the further from zero."""
    largest = max(map(abs, values)) or 1.0
    colors = []
    for value in values:
        share = 0.7 * abs(value) / largest
        ground, ink = np.array(to_rgb(CARD)), np.array(to_rgb(BLUE if value < 0 else ORANGE))
        colors.append(to_hex((1 - share) * ground + share * ink))
    return colors


def errors(bits: int, how: str) -> Figure:
    """The error of one weight as it moves along the grid, and the errors of 65,536 normal weights in blocks of 64.

    Args:
        bits: of the absmax grid, 2 to 8.
        how: "nearest", "truncate" or "stochastic".
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2.5, 2.5, 1001)  # in steps
    tooth = rounding.round_to_integer(x, how, generator) - x
    weights = normals()
    stored = rounding.quantize(weights, bits, rounding=how, generator=generator)
    error = (stored.dequantize().view(-1, 64) - weights.view(-1, 64)) / stored.step  # (1024, 64), in steps

    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1.35, 1))
    left.plot(x.numpy(), tooth.numpy(), ".", markersize=2, color=BLUE)
    left.set(
        xlabel="weight, in steps Δ", ylabel="error, in steps Δ", ylim=(-1.15, 1.15), title=f"rounding: {how}"
    )
    right.hist(error.flatten().numpy(), bins=np.linspace(-1.025, 1.025, 42), density=True, color=ORANGE)
    right.axvline(error.mean().item(), color=INK, linewidth=1.2)
    root = error.square().mean().sqrt().item()
    right.set(xlabel="error, in steps Δ", ylabel="density", title=f"{bits} bits: RMSE {root:.3f} Δ")
    return figure


def outlier(size: float, granularity: str, bits: int) -> Figure:
    """512 normal weights of size 1, one of them replaced by an outlier, rounded to an absmax grid.

    Above: the row that the outlier stands in, with the levels that each weight may take. Below: all errors. A line is
    printed with what happened to the other 511 weights.

    Args:
        size: of the outlier, in standard deviations of the others.
        granularity: "tensor", "row" (64 weights) or "block" (16 weights).
        bits: 2 to 8.
    """
    weight = normals()[FIRST : FIRST + ROWS * COLUMNS].view(ROWS, COLUMNS).clone()
    weight[OUTLIER] = size
    stored = rounding.quantize(weight, bits, granularity, BLOCK)
    back = stored.dequantize()
    error = (back - weight).abs()
    others = torch.ones_like(weight, dtype=torch.bool)
    others[OUTLIER] = False
    lost = rounding.relative_rmse(weight[others], back[others])
    zeros = (back[others] == 0).float().mean().item()
    print(f"error of the other 511 weights: {lost:.1%}; {zeros:.0%} of them came back as zero")

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.9), height_ratios=(1.5, 1))
    row, column = OUTLIER
    width = {"tensor": COLUMNS, "row": COLUMNS, "block": BLOCK}[granularity]
    largest = 2 ** (bits - 1) - 1
    steps = stored.step.expand(-1, stored.codes.shape[1]).reshape(ROWS, COLUMNS)  # (8, 64): Δ of each weight
    for start in range(0, COLUMNS, width):
        levels = np.arange(-largest, largest + 1) * steps[row, start].item()
        levels = levels[np.abs(levels) < 4.6]
        above.hlines(
            levels,
            start - 0.5,
            start + width - 0.5,
            color=GREEN,
            linewidth=0.7 if bits < 7 else 0.25,
            alpha=0.7,
        )
    positions = np.arange(COLUMNS)
    above.vlines(positions, weight[row].numpy(), back[row].numpy(), color=INK, linewidth=0.8)
    above.plot(positions, weight[row].numpy(), "o", markersize=4, color=BLUE, label="weight")
    above.plot(
        positions, back[row].numpy(), "x", markersize=5, mew=1.4, color=VERMILLION, label="as it comes back"
    )
    above.plot([], [], color=GREEN, linewidth=0.7, label="levels")
    above.set(xlim=(-1, COLUMNS), ylim=(-4.6, 4.6), ylabel=f"row {row}, values")
    above.grid(visible=False)
    if size > 4.5:
        above.annotate(
            f"{size:g}",
            (column, 4.55),
            (column, 3.1),
            ha="center",
            color=INK,
            arrowprops={"arrowstyle": "->", "color": INK},
        )
    figure.legend(loc="outside upper right", ncols=3)
    image = below.imshow(error.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    below.plot(column, row, "s", markersize=7, markerfacecolor="none", markeredgecolor=VERMILLION)
    below.set(xlabel="column", ylabel="row", yticks=range(ROWS))
    below.grid(visible=False)
    figure.colorbar(image, ax=below, label="|error|", pad=0.01, extend="max")
    return figure


def bits_against_error(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    names: Mapping[float, str] | None = None,
) -> Figure:
    """What a smaller block costs and what it brings.

    Args:
        panels: {title: {"INT4 absmax": [(bits per weight, relative RMSE), ...], ...}}.
        names: what to write beside the points of the first line, by their bits per weight.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(7, 3.8), sharey=True, squeeze=False)
    for ax, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for color, marker, (name, points) in zip(PALETTE, "osD^vP", curves.items(), strict=False):
            bits, error = zip(*sorted(points), strict=True)
            ax.plot(bits, 100 * np.array(error), marker=marker, markersize=5, color=color, label=name)
        first = next(iter(curves.values()))
        for bits, error in first:
            if text := (names or {}).get(bits):
                ax.annotate(text, (bits, 100 * error), xytext=(3, 5), textcoords="offset points", fontsize=8)
        ax.set(title=title, xlabel="bits per weight, scales included", ylim=(0, None))
    axes[0][0].set_ylabel("relative RMSE, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def snr_map(maps: Mapping[str, Tensor], kinds: Sequence[str]) -> Figure:
    """The signal-to-noise ratio of every linear layer, one map for each way of rounding, on one scale.

    Args:
        maps: {title: (kinds, layers) in dB}.
        kinds: names of the kinds of layers, from the top.
    """
    figure, axes = plt.subplots(len(maps), 1, figsize=(7, 0.7 + 1.75 * len(maps)), sharex=True, squeeze=False)
    low = min(values.min().item() for values in maps.values())
    high = max(values.max().item() for values in maps.values())
    for ax, (title, values) in zip(axes[:, 0], maps.items(), strict=True):
        image = ax.imshow(values.numpy(), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        ax.set_title(title)
        ax.set_yticks(range(len(kinds)), kinds, fontsize=8.5)
        ax.grid(visible=False)
    axes[-1, 0].set_xlabel("layer, from input to output")
    figure.colorbar(image, ax=axes[:, 0], label="signal-to-noise ratio, dB", pad=0.01)
    return figure
