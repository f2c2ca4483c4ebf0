"""What chapter 05 draws: the dynamic map, where real scales fall on it, losses, and bits against error."""

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from qlora_edu import blockwise, models, second_level
from qlora_edu.plots.figures import BLUE, CARD, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION

FIRST, SECOND, BITS = (32, 64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024, 4096), range(2, 9)
SAMPLE = "encoder.layer.3.intermediate.dense.weight"  # of MiniLM, (1536, 384): float32, never rounded before
GRIDS = ("dynamic", "uniform", "min-max")  # that come in 2 to 8 bits, with the mean and without
SHADES = plt.get_cmap("viridis")(np.linspace(0.0, 0.82, 7))  # decade 0 to 6


def dynamic_map() -> Figure:
    """The eight bits of the dynamic map, a row for each decade, and the levels that they stand for."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), width_ratios=(1, 1.55), sharey=True)
    for decade in range(7):
        bits = ["s", *"0" * (6 - decade), "1", *"f" * decade]
        for place, bit in enumerate(bits):
            ground = {"s": ORANGE, "f": SKY}.get(bit, CARD)
            left.add_patch(
                Rectangle((place + 0.05, decade - 0.36), 0.9, 0.72, facecolor=ground, edgecolor=INK, lw=0.7)
            )
            left.text(place + 0.5, decade, bit, ha="center", va="center", fontsize=9)
        levels = _decade(decade)
        right.vlines(levels, decade - 0.36, decade + 0.36, color=SHADES[decade], linewidth=0.9)
    left.set(xlim=(0, 8), ylim=(-0.6, 6.6), xticks=[], yticks=range(7), ylabel="decade")
    left.set_title("sign, zeros, 1, fraction", fontsize=10)
    right.set(xscale="log", xlim=(8e-8, 1.3), xlabel="magnitude of the level")
    right.set_title("levels with either sign", fontsize=10)
    for ax in (left, right):
        ax.grid(visible=False)
        ax.tick_params(axis="y", length=0)
    return figure


def _decade(decade: int) -> Tensor:
    levels = second_level.levels("dynamic")
    low = 10.0 ** (decade - 7)
    return levels[(levels > low) & (levels < 10 * low) & (levels < 1)]


def against_levels(without: Tensor, centred: Tensor) -> Figure:
    """Where scales fall, divided by the largest of their block, and how far apart the levels are there.

    Args:
        without: scale / largest, (n,). centred: (scale - mean) / largest magnitude, (n,).
    """
    figure, axes = plt.subplots(
        2, 2, figsize=(7, 4.3), height_ratios=(1.2, 1), sharex="col", sharey="row", width_ratios=(1, 2)
    )
    grids = {"dynamic map": ("dynamic", BLUE), "255 even levels": ("uniform", VERMILLION)}
    for column, (x, low, title) in enumerate(
        ((without, 0, "scale / largest"), (centred, -1, "(scale - mean) / largest"))
    ):
        above, below = axes[:, column]
        above.hist(x.numpy(), bins=np.arange(low, 1.0001, 0.025), density=True, color=SKY)
        above.set_title(title, fontsize=10)
        for name, (grid, color) in grids.items():
            levels = second_level.levels(grid).double()
            keep = levels >= low - 1e-9
            ends, gaps = levels[keep], levels.diff()[keep[:-1]]
            below.stairs(100 * gaps, ends, baseline=None, color=color, linewidth=1.8, label=name)
        below.set(yscale="log", ylim=(0.005, 3), xlim=(low - 0.02, 1.02), xlabel="quotient")
    axes[0][0].set_ylabel("density")
    axes[1][0].set_ylabel("gap of levels, %")
    handles, labels = axes[1][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def losses(rows: dict[str, tuple[float, float]], xlabel: str) -> Figure:
    """A dot and a 95% interval for each way. rows: {name: (difference, standard error over 12 passages)}."""
    if not rows:
        raise ValueError("rows: expected one way or more; got none. Measure one first.")
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.33 * len(rows)))
    for y, (mean, deviation) in enumerate(rows.values()):
        color = VERMILLION if abs(mean) > 2.2 * deviation else BLUE
        axes.errorbar(mean, y, xerr=2.2 * deviation, fmt="o", color=color, capsize=3)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set(xlabel=xlabel, yticks=range(len(rows)))
    axes.set_yticklabels(list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)  # from the top
    axes.grid(axis="y", visible=False)
    return figure


@cache
def _sample(first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of MiniLM's matrix in NF4 blocks of `first`: its scales s, and Σw², Σwy, Σy² of each block, y the levels.

    The squared error of a block decoded with another scale t is Σ(w - y·t)² = Σw² - 2t·Σwy + t²·Σy².
    """
    weight = models.load_minilm(progress=False)[SAMPLE]
    stored = blockwise.quantize(weight, first)
    scales = stored.scales()
    w = weight.view(-1, first).double()
    y = blockwise.codebooks.nf4().double()[blockwise.unpack(stored.packed).int()].view(-1, first)
    return scales, w.square().sum(1), (w * y).sum(1), y.square().sum(1)


@cache
def error(first: int, second: int, bits: int, offset: bool, grid: str) -> float:
    """‖w - ŵ‖ / ‖w‖ of the sample, NF4 codes in blocks of `first`; bits of 32 leaves the scales as they are."""
    scales, ww, wy, yy = _sample(first)
    t = scales if bits == 32 else second_level.store(scales, grid, bits, second, offset)
    t = t.double()
    return ((ww - 2 * t * wy + t * t * yy).sum() / ww.sum()).sqrt().item()


def trade(first: int, second: int, bits: int, offset: bool, grid: str) -> Figure:
    """Bits a weight against error of the weights, for a matrix of MiniLM; the chosen way is marked among the others.

    A line for each block size, with 2 to 8 bits for the scales; squares have scales of 32 bits. One line is printed.

    Args:
        first: weights in a block. second: scales in a second-level block.
        bits: of a scale. offset: subtract the mean. grid: one of GRIDS.
    """
    allowed = {"first": FIRST, "second": SECOND, "bits": tuple(BITS), "offset": (True, False), "grid": GRIDS}
    for name, value in zip(allowed, (first, second, bits, offset, grid), strict=True):
        if value not in allowed[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed[name]))}; got {value!r}.")
    chosen = second_level.bits_per_weight(first, bits, second, grid), error(first, second, bits, offset, grid)
    plain = 4 + 32 / first, error(first, second, 32, offset, grid)
    print(
        f"{chosen[0]:.3f} bits a weight, error {chosen[1]:.2%}; "
        f"with scales of 32 bits {plain[0]:.3f} and {plain[1]:.2%}"
    )
    figure, axes = plt.subplots(figsize=(7, 4.1))
    for color, size in zip((PURPLE, BLUE, SKY, GREEN, ORANGE, INK), FIRST, strict=True):
        x = [second_level.bits_per_weight(size, b, second, grid) - 4 for b in BITS]
        y = [100 * error(size, second, b, offset, grid) for b in BITS]
        axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.2, label=f"blocks of {size}")
        axes.plot(32 / size, 100 * error(size, second, 32, offset, grid), "s", color=color, markersize=6)
    x, y = (
        chosen[0] - 4,
        min(100 * chosen[1], 17.6),
    )  # what lies above the picture is marked at its upper edge
    axes.plot(
        x, y, "o", markersize=14, markerfacecolor="none", markeredgecolor=VERMILLION, markeredgewidth=2.5
    )
    axes.set(xscale="log", xlim=(0.002, 1.4), ylim=(8, 17.8))
    axes.set(xlabel="bits a weight for the scales, on top of 4", ylabel="error of the weights, %")
    ticks = (0.003, 0.01, 0.03, 0.1, 0.3, 1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(title="squares: 32-bit scales", fontsize=9)
    return figure
