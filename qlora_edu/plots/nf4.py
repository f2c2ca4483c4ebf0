"""What chapter 04 draws: quantiles, the two half grids, the levels of all formats, and the game of placing them."""

from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from qlora_edu import codebooks, formats, lloyd, normalised
from qlora_edu.plots.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION
from qlora_edu.stored import normals as stored_normals

NORMAL = NormalDist()
BLOCK_SIZES = (32, 64, 256, 1024, 4096)


def equal_bins(count: int = 16) -> Figure:
    """N(0, 1) cut into `count` pieces of equal probability, and the median of each."""
    figure, axes = plt.subplots(figsize=(7, 2.7))
    edges = [-3.2, *(NORMAL.inv_cdf(k / count) for k in range(1, count)), 3.2]
    for k in range(count):
        x = torch.linspace(edges[k], edges[k + 1], 60)
        axes.fill_between(x, normalised.phi(x), color=(BLUE, SKY)[k % 2], linewidth=0)
    medians = [NORMAL.inv_cdf((k + 0.5) / count) for k in range(count)]
    axes.plot(
        medians, [-0.02] * count, "|", color=VERMILLION, markersize=12, markeredgewidth=2, clip_on=False
    )
    axes.set(xlim=(-3.2, 3.2), ylim=(-0.04, 0.42), xlabel="weight, in standard deviations", ylabel="density")
    return figure


def half_grids() -> Figure:
    """Two equally spaced rows of probabilities, 8 above one half and 7 below, sent through the quantile function."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    p = torch.linspace(0.012, 0.988, 400, dtype=torch.float64)
    axes.plot(p, torch.special.ndtri(p), color=INK, linewidth=1.2)
    offset = codebooks.NF4_OFFSET
    for count, color, sign in ((8, VERMILLION, 1), (7, BLUE, -1)):
        grid = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
        values = sign * torch.special.ndtri(grid)
        grid = grid if sign > 0 else 1 - grid
        label = f"{count} {'positive' if sign > 0 else 'negative'}, step {(offset - 0.5) / count:.4f}"
        axes.vlines(grid, -2.3, values, color=color, linewidth=1)
        axes.hlines(values, 0, grid, color=color, linewidth=1)
        axes.plot(grid, values, "o", color=color, markersize=5, label=label)
    axes.plot([0.5], [0], "s", color=GREEN, markersize=7, label="zero, added once")
    axes.set(xlim=(0, 1), ylim=(-2.3, 2.3), xlabel="probability p", ylabel="quantile Q(p)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8.5)
    axes.grid(visible=False)
    return figure


def strips(rows: dict[str, Tensor], height: float = 0.36) -> Figure:
    """Levels in [-1, 1], a row for each format; a level that is exactly zero is a green square."""
    figure, axes = plt.subplots(figsize=(7, 0.9 + height * len(rows)))
    for row, levels in enumerate(rows.values()):
        axes.plot([-1, 1], [row, row], color=INK, linewidth=0.6, zorder=1)
        axes.plot(levels, [row] * len(levels), "o", color=BLUE, markersize=5, clip_on=False)
        if (levels == 0).any():
            axes.plot([0], [row], "s", color=GREEN, markersize=7)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlim=(-1.03, 1.03), ylim=(len(rows) - 0.5, -0.5), xlabel="level, in units of the block's absmax")
    axes.grid(axis="y", visible=False)
    return figure


def usage(block_size: int = 64, format: str = "nf4") -> Figure:
    """65,536 stored normal numbers divided by their block's absmax, and how often each level is the nearest."""
    blocks = stored_normals().view(-1, block_size)
    x = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
    levels = formats.levels(format)
    share = normalised.usage(levels, block_size)
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, height_ratios=(3, 2))
    counts = torch.histc(x, bins=81, min=-1.0125, max=1.0125)
    above.bar(
        torch.linspace(-1, 1, 81).tolist(),
        (counts / len(x) / 0.025).tolist(),
        width=0.025,
        color=SKY,
        label="stored numbers",
    )
    curve = torch.linspace(-0.999, 0.999, 400, dtype=torch.float64)
    above.plot(curve, normalised.density(curve, block_size), color=INK, linewidth=1.4, label="exact density")
    top = torch.special.ndtri(torch.tensor(codebooks.NF4_OFFSET, dtype=torch.float64))
    above.plot(
        curve, top * normalised.phi(top * curve), "--", color=VERMILLION, linewidth=1.4, label="NF4's normal"
    )
    above.set(ylabel="density", ylim=(0, None))
    above.legend(loc="upper right", fontsize=9)
    below.bar(levels.tolist(), (100 * share).tolist(), width=0.018, color=BLUE)
    below.axhline(100 / 16, color=VERMILLION, linestyle="--", linewidth=1.2)
    below.set(xlim=(-1.05, 1.05), ylabel="used, %", xlabel="weight / absmax")
    bits = normalised.entropy(share)
    print(
        f"{format}, blocks of {block_size}: the rarest level is used {100 * share.min():.1f}% of the time, the "
        f"commonest {100 * share.max():.1f}%; entropy {bits:.2f} bits"
    )
    return figure


START = [-0.86, -0.71, -0.57, -0.43, -0.29, -0.14, 0.0, 0.12, 0.25, 0.38, 0.5, 0.62, 0.75, 0.88]


def place(block_size: int = 64, **moved: float) -> Figure:
    """Fourteen levels placed by hand between -1 and 1, on the density of block-normalised weights, against NF4.

    moved: level_1 to level_14; those left out stand where `START` has them.
    """
    free = [moved.get(f"level_{k}", START[k - 1]) for k in range(1, 15)]
    yours = torch.tensor([-1.0, *free, 1.0], dtype=torch.float64).unique()  # sorted
    best = lloyd.best_levels(block_size, pinned=(-1, 1))  # these two stay where they are for you, too
    figure, axes = plt.subplots(figsize=(7, 3.4))
    x = torch.linspace(-0.999, 0.999, 400, dtype=torch.float64)
    density = normalised.density(x, block_size)
    axes.fill_between(x, density, color=SKY, alpha=0.5, linewidth=0)
    top = density.max().item()
    rows = {
        "yours": (yours, VERMILLION),
        "NF4": (formats.levels("nf4"), BLUE),
        "least squares": (best, GREEN),
    }
    for k, (name, (levels, color)) in enumerate(rows.items()):
        y = -top * (0.12 + 0.16 * k)
        axes.plot(levels, [y] * len(levels), "o", color=color, markersize=6, clip_on=False)
        axes.text(1.06, y, name, color=INK, va="center")
    axes.vlines(yours, 0, top * 1.05, color=VERMILLION, linewidth=1)
    axes.set(xlim=(-1.02, 1.35), ylim=(-0.55 * top, 1.08 * top), xlabel="weight / absmax", yticks=[])
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    square, absolute = (
        [100 * normalised.error(levels, block_size, power) ** (1 / power) for levels, _ in rows.values()]
        for power in (2, 1)
    )
    print(
        f"root-mean-square error: yours {square[0]:.2f}%, NF4 {square[1]:.2f}%, "
        f"least possible with -1 and 1 {square[2]:.2f}%; "
        f"mean absolute error: yours {absolute[0]:.2f}%, NF4 {absolute[1]:.2f}%"
    )
    return figure


def error_and_loss(
    error: dict[str, float], loss: dict[str, float], bars: dict[str, float], no_zero: set[str]
) -> Figure:
    """A row for each format, the least error above: its error in the weights (%), and what it costs the model (nats).

    bars: the standard error of each loss; two of them are drawn to either side.
    no_zero: the formats in which zero is not a level.
    """
    names = sorted(error, key=error.get)
    colors = [VERMILLION if name in no_zero else BLUE for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 4.4), sharey=True, width_ratios=(2, 3))
    left.barh(names, [error[name] for name in names], color=colors, height=0.6)
    left.set(xlabel="error of the weights, %")
    for row, (name, color) in enumerate(zip(names, colors, strict=True)):
        right.errorbar(
            loss[name], row, xerr=2 * bars[name], fmt="o", color=color, markersize=6, elinewidth=1.5
        )
    right.set(xlabel="loss added, nats per token", xlim=(0, None))
    right.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, VERMILLION)]
    figure.legend(handles, ["zero is a level", "zero is not a level"], loc="outside upper center", ncols=2)
    return figure


def by_block_size(names: tuple[str, ...] = ("int4", "fp4", "e2m1", "nf4")) -> Figure:
    """The root-mean-square error on normal weights of each format by block size, and the least possible."""
    figure, axes = plt.subplots(figsize=(7, 3.3))
    sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
    for name, color in zip(names, (ORANGE, PURPLE, VERMILLION, BLUE), strict=False):
        errors = [100 * normalised.error(formats.levels(name), size) ** 0.5 for size in sizes]
        axes.plot(sizes, errors, "o-", color=color, markersize=4, label=name)
    least = [100 * normalised.error(lloyd.best_levels(size), size) ** 0.5 for size in sizes]
    axes.plot(sizes, least, "o--", color=GREEN, markersize=4, label="least possible")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set(xlabel="weights in a block", ylabel="error, % of the weights")
    axes.legend(loc="upper left")
    return figure
