"""Chapter 01: where the bytes of a training step are, in pictures. Every function returns a figure."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import PARTS, WEIGHTS, Timeline, predict
from qlora_edu.plots.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, legend

GB = 1e9
COLORS = {
    "weights": BLUE,
    "adapter": SKY,
    "gradients": VERMILLION,
    "optimizer": ORANGE,
    "activations": GREEN,
    "buffers": PURPLE,
}
CARDS = (24, 48)  # GB of a large consumer card, and of a professional one
TARGETS = {
    "all seven": LLAMA_LINEARS,
    "attention": LLAMA_LINEARS[:4],
    "q and v": ("q_proj", "v_proj"),
}


def grouped(parts: Mapping[str, float], unit: float = 1) -> dict[str, float]:
    """Bytes by part with all weights as one, in units of `unit` bytes, in the order of COLORS."""
    sums = {"weights": sum(parts[name] for name in WEIGHTS)} | {
        name: parts[name] for name in PARTS if name in COLORS
    }
    return {name: sums[name] / unit for name in COLORS}


def stacks(
    rows: Mapping[str, Mapping[str, float]],
    unit: str = "GB",
    lines: tuple[float, ...] = (),
    colors: Mapping[str, str] = COLORS,
) -> Figure:
    """A bar for each row, cut into the parts that `colors` names, with vertical lines at some sizes.

    Args:
        rows: {"QLoRA": {"weights": 3.9, "adapter": 0.3, ...}}, in units of `unit`.
    """
    figure, axes = plt.subplots(figsize=(7, 1.25 + 0.5 * len(rows)))
    totals = [sum(sizes.values()) for sizes in rows.values()]
    width = 1.18 * max(totals)
    for row, (sizes, total) in enumerate(zip(rows.values(), totals, strict=True)):
        _bar(axes, row, sizes, colors)
        at = max(
            [line for line in lines if total < line < total + 0.15 * width], default=total
        )  # not on a line
        text = f"{total:,.0f} {unit}" if total >= 100 else f"{total:.1f} {unit}"
        axes.annotate(text, (at, row), (7, 0), textcoords="offset points", va="center")
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=unit)
    axes.set_xlim(0, max(width, *[1.16 * line for line in lines], 0))
    axes.set_ylim(len(rows) - 0.4, -0.6 - 0.35 * bool(lines))
    axes.grid(axis="y", visible=False)
    _lines(axes, lines, unit)
    legend(figure, {name: c for name, c in colors.items() if any(name in sizes for sizes in rows.values())})
    return figure


def calculator(
    model: str = "llama-7b",
    method: str = "qlora",
    length: int = 512,
    batch: int = 1,
    rank: int = 64,
    targets: str = "all seven",
    block_size: int = 64,
    checkpointing: bool = True,
) -> Figure:
    """The fullest moment of a training step: above all of it, below part by part. Prints one line.

    Args:
        model: a name of `memory.NAMED`. targets: one of TARGETS. The others as in `memory.predict`.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets: expected one of {', '.join(TARGETS)}; got {targets!r}")
    found = predict(
        model,
        method,
        length=int(length),
        batch=int(batch),
        rank=int(rank),
        targets=TARGETS[targets],
        block_size=block_size,
        checkpointing=checkpointing,
        adapter_dtype=torch.bfloat16,
    )
    sizes = grouped(found.at_peak, GB)
    print(f"{model}, {method}: {found.peak / GB:.3f} GB at the fullest moment, which is: {found.peak_moment}")
    figure, (top, bottom) = plt.subplots(
        2, figsize=(7, 3.7), gridspec_kw={"height_ratios": [1, 3.2]}, sharex=True
    )
    _bar(top, 0, sizes, COLORS)
    top.set(yticks=[], ylim=(-0.5, 0.9), title=f"{found.peak / GB:,.2f} GB")
    _lines(top, CARDS, "GB", found.peak / GB)
    for row, (name, size) in enumerate(sizes.items()):
        bottom.barh(row, size, color=COLORS[name])
        bottom.text(size, row, f"  {size:,.3f}", va="center")
    bottom.set(yticks=range(len(sizes)), yticklabels=list(sizes), xlabel="GB")
    bottom.set_xlim(0, 1.16 * found.peak / GB)
    bottom.invert_yaxis()
    for axes in (top, bottom):
        axes.grid(axis="y", visible=False)
    return figure


def over_time(timelines: Mapping[str, Timeline]) -> Figure:
    """Bytes that live in the allocator during one step, one panel for each timeline, its stages marked."""
    figure, panels = plt.subplots(
        1, len(timelines), figsize=(7, 3.0), sharey=True, squeeze=False, layout="constrained"
    )
    top = max(timeline.peak for timeline in timelines.values()) / 1e6
    for axes, (name, timeline) in zip(panels[0], timelines.items(), strict=True):
        end = timeline.seconds[-1]
        x = [100 * second / end for second in timeline.seconds]
        axes.fill_between(x, [size / 1e6 for size in timeline.bytes], step="post", color=GREEN, linewidth=0)
        starts = [100 * at / end for _, at in timeline.marks] + [100]
        for (stage, _), start, stop in zip(timeline.marks, starts, starts[1:], strict=False):
            axes.axvline(start, color=INK, linewidth=0.8, linestyle=":")
            if stop - start > 12:
                axes.text((start + stop) / 2, 1.06 * top, stage, ha="center", fontsize=9)
        axes.set(title=name, xlabel="time, % of the step", xlim=(0, 100), ylim=(0, 1.15 * top))
    panels[0][0].set_ylabel("MB, beyond what stands still")
    return figure


def compared(rows: Mapping[str, tuple[float, float]], unit: str = "MB") -> Figure:
    """Pairs of bars, predicted above measured. rows: {"QLoRA": (predicted, measured)}."""
    figure, axes = plt.subplots(figsize=(7, 1.15 + 0.62 * len(rows)))
    for row, pair in enumerate(rows.values()):
        for offset, size, color in zip((-0.2, 0.2), pair, (SKY, BLUE), strict=True):
            axes.barh(row + offset, size, height=0.36, color=color)
            axes.text(size, row + offset, f"  {size:,.0f}", va="center", fontsize=9.5)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=unit)
    axes.set_xlim(0, 1.12 * max(max(pair) for pair in rows.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (SKY, BLUE)]
    figure.legend(handles, ["predicted", "measured"], loc="outside upper right", ncols=2)
    return figure


def _bar(axes: Axes, row: int, sizes: Mapping[str, float], colors: Mapping[str, str]) -> None:
    left = 0.0
    for name, size in sizes.items():
        axes.barh(row, size, left=left, color=colors[name], height=0.62)
        left += size


def _lines(axes: Axes, sizes: tuple[float, ...], unit: str, longest: float | None = None) -> None:
    for size in sizes:
        if longest is None or size < 1.1 * longest:
            axes.axvline(size, color=INK, linewidth=1.2, linestyle="--")
            where = axes.get_xaxis_transform()
            axes.text(size, 0.98, f" {size} {unit}", va="top", fontsize=9, transform=where)
