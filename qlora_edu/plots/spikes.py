"""What chapter 07 draws of long batches: real steps over time, what makes them smaller, and how long a row may be."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from qlora_edu.memory import Timeline
from qlora_edu.paging import scaled
from qlora_edu.plots.figures import BLUE, GREEN, INK, ORANGE, VERMILLION, legend
from qlora_edu.plots.paging import GB, MB


def lengths(models: Mapping[str, float], up_to: int = 4096) -> Figure:
    """The fullest moment of a step against the tokens of its row, with the states on the card and without them.

    Args:
        models: GiB of the card by model, such as {"llama-33b": 24}.
    """
    figure, panels = plt.subplots(1, len(models), figsize=(7, 3.1), squeeze=False)
    tokens = range(256, up_to + 1, 128)
    for axes, (model, size) in zip(panels[0], models.items(), strict=True):
        found = [scaled.step_of(model, length) for length in tokens]
        peaks = [memory.peak / GB for memory in found]
        without = [(memory.peak - memory.parts["optimizer"]) / GB for memory in found]
        axes.plot(tokens, peaks, color=VERMILLION)
        axes.plot(tokens, without, color=BLUE)
        axes.axhline(size * scaled.GIB / GB, color=INK, linewidth=1.2, linestyle="--")
        axes.text(300, size * scaled.GIB / GB, f"{size:g} GiB", va="bottom", fontsize=9)
        axes.set_title(model, fontsize=10.5)
        axes.set(xlabel="tokens in the row", xlim=(256, up_to), xticks=range(512, up_to + 1, 1024))
    panels[0][0].set_ylabel("GB at the fullest moment")
    legend(figure, {"states on the card": VERMILLION, "states paged out": BLUE})
    return figure


def over_steps(line: Timeline, states: float, batches: Sequence[tuple[int, int]]) -> Figure:
    """Bytes in the allocator over several steps of the real model, drawn equally wide, above the optimizer's states."""
    figure, axes = plt.subplots(figsize=(7, 3.0))
    starts = [at for _, at in line.marks] + [line.seconds[-1] + 1e-9]
    x, step = [], 0
    for second in line.seconds:
        while step < len(batches) - 1 and second >= starts[step + 1]:
            step += 1
        x.append(1 + step + (second - starts[step]) / (starts[step + 1] - starts[step]))
    total = [(states + size) / MB for size in line.bytes]
    axes.fill_between(x, states / MB, total, step="post", color=GREEN, linewidth=0)
    axes.fill_between([1, 1 + len(batches)], states / MB, color=ORANGE, linewidth=0)
    top = max(total)
    for number, (rows, length) in enumerate(batches, start=1):
        axes.text(number + 0.5, 1.04 * top, f"{rows} × {length}", ha="center", fontsize=9)
    axes.set(xticks=[number + 0.5 for number in range(1, 1 + len(batches))])
    axes.set_xticklabels(range(1, 1 + len(batches)))
    axes.set(xlabel="step", ylabel="MB", xlim=(1, 1 + len(batches)), ylim=(0, 1.14 * top))
    legend(figure, {"AdamW's states": ORANGE, "what comes and goes": GREEN})
    return figure


def remedies(peaks: Mapping[str, float], states: float) -> Figure:
    """Bars in MB: what comes and goes at its fullest, with the states on top; in the last row the states are gone.

    Args:
        peaks: MB by name; the one named "paging" stands for the first without the states.
    """
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.5 * len(peaks)))
    for row, (name, peak) in enumerate(peaks.items()):
        kept = 0 if name.startswith("paging") else states
        axes.barh(row, kept, color=ORANGE, height=0.62)
        axes.barh(row, peak, left=kept, color=GREEN, height=0.62)
        axes.text(peak + kept, row, f"  {peak + kept:,.0f}", va="center")
    axes.set(yticks=range(len(peaks)), yticklabels=list(peaks), xlabel="MB at the fullest moment")
    axes.set_xlim(0, 1.12 * (max(peaks.values()) + states))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    legend(figure, {"AdamW's states": ORANGE, "activations, logits, gradients": GREEN})
    return figure
