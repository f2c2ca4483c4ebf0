"""What chapter 07 draws of pages: where they are after each touch, the cliff, a run under a budget, a card of 24 GB."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from qlora_edu.paging import policies, scaled
from qlora_edu.paging.pages import Event
from qlora_edu.paging.runs import STATES, Result
from qlora_edu.plots.figures import BLUE, GREEN, INK, ORANGE, RULE, SKY, VERMILLION, legend

MB, GB = 1e6, 1e9
POLICY_COLORS = {"lru": VERMILLION, "mru": BLUE, "optimal": GREEN}


def page_map(pages: int, frames: Sequence[int], rounds: int = 3, policy: str = "lru") -> Figure:
    """A panel for each number of frames: which page is on the device after each touch of a sweep, and the faults."""
    figure, panels = plt.subplots(1, len(frames), figsize=(7, 2.55), sharey=True, squeeze=False)
    touches = policies.sweep(pages, rounds)
    for axes, places in zip(panels[0], frames, strict=True):
        grid = [[0] * len(touches) for _ in range(pages)]
        found = policies.trace(touches, places, policy)
        for at, (fault, present) in enumerate(found):
            for page in present:
                grid[page][at] = 1
            grid[touches[at]][at] = 3 if fault else 2
        colors = ListedColormap(["#FFFFFF", SKY, BLUE, VERMILLION])
        axes.pcolormesh(grid, cmap=colors, vmin=0, vmax=3, edgecolor=RULE, linewidth=0.5)
        axes.set_title(f"room for {places}: {sum(fault for fault, _ in found)} faults", fontsize=10.5)
        axes.set(xlabel="touch", xticks=[i + 0.5 for i in range(0, len(touches), pages)])
        axes.set_xticklabels(range(1, len(touches) + 1, pages))
        axes.set(yticks=[i + 0.5 for i in range(pages)], yticklabels=range(1, pages + 1))
        axes.grid(visible=False)
        axes.invert_yaxis()
    panels[0][0].set_ylabel("page")
    names = {"in RAM": "#FFFFFF", "on the device": SKY, "touched there": BLUE, "fault": VERMILLION}
    legend(figure, names)
    return figure


def cliff(pages: int = 64, rounds: int = 6) -> Figure:
    """Faults of a sweep, in percent of the touches once it has started, against the room on the device."""
    figure, axes = plt.subplots(figsize=(7, 3.1))
    touches = policies.sweep(pages, rounds)
    room = range(2, pages + 1)
    for policy, color in POLICY_COLORS.items():
        share = [
            100 * sum(policies.faults(touches, n, policy)[pages:]) / (len(touches) - pages) for n in room
        ]
        style = {
            "color": color,
            "linewidth": 5 if policy == "optimal" else 2,
            "zorder": 2 + (policy != "optimal"),
        }
        axes.plot([100 * n / pages for n in room], share, label=_label(policy), **style)
    axes.set(xlabel="room on the device, % of all pages", ylabel="touches that are faults, %", xlim=(0, 102))
    axes.legend(loc="lower left", fontsize=9)
    return figure


def _label(policy: str) -> str:
    return {
        "lru": "evict the least recently used (LRU)",
        "mru": "evict the most recently used",
        "optimal": "evict what is needed last (optimal)",
    }[policy]


def timelines(results: Mapping[str, Result]) -> Figure:
    """One panel for each run: states and activations on the device above the line, states in RAM below."""
    figure, panels = plt.subplots(
        len(results), figsize=(7, 0.5 + 1.22 * len(results)), sharex=True, squeeze=False
    )
    top = max(result.memory.budget for result in results.values()) / MB
    for axes, (name, result) in zip(panels[:, 0], results.items(), strict=True):
        memory = result.memory
        _areas(axes, memory.timeline, STATES, 0, MB)
        axes.axhline(memory.budget / MB, color=INK, linewidth=1.2, linestyle="--")
        moved = f"faults {memory.faults}, in {memory.bytes_in / MB:.1f}, out {memory.bytes_out / MB:.1f} MB"
        axes.set_title(f"{name}: {memory.budget / MB:.2f} MB", fontsize=9.5)
        axes.set_title(moved, fontsize=9, loc="right", fontweight="normal")
        axes.set(ylim=(-1.12 * STATES / MB, 1.1 * top), ylabel="MB")
        if result.failed:
            axes.text(result.failed + 0.2, 0.6 * top, "does not fit", color=VERMILLION, fontweight="bold")
    steps = range(1, 1 + max(result.memory.step for result in results.values()))
    panels[-1, 0].set(xlabel="step", xticks=[s + 0.5 for s in steps], xlim=(1, steps[-1] + 1))
    panels[-1, 0].set_xticklabels(steps)
    legend(figure, {"states on the device": ORANGE, "activations": GREEN, "states in RAM": SKY})
    return figure


def _areas(axes: Axes, events: Sequence[Event], states: float, base: float, unit: float) -> None:
    """Occupied bytes over the steps: forward and backward are the first half of a step, the update is the second."""
    x, managed, resident = [], [], []
    for step in sorted({event.step for event in events if event.step > 0}):
        own = [event for event in events if event.step == step]
        freed = next((i for i, e in enumerate(own) if (e.kind, e.name) == ("free", "activations")), len(own))
        for i, event in enumerate(own):
            early = 0.12 * (i + 1) / max(freed, 1)
            late = 0.5 + 0.48 * (i - freed) / max(len(own) - freed - 1, 1)
            x.append(step + (early if i < freed else late))
            managed.append(event.managed / unit)
            resident.append((event.resident - base) / unit)
    if not x:
        return
    x, managed, resident = [*x, int(x[-1]) + 1], [*managed, managed[-1]], [*resident, resident[-1]]
    low = base / unit
    with_states = [low + m for m in managed]
    on_top = [w + p for w, p in zip(with_states, resident, strict=True)]
    options = {"step": "post", "linewidth": 0}
    if base:
        axes.fill_between(x, low, color=BLUE, **options)
    axes.fill_between(x, low, with_states, color=ORANGE, **options)
    axes.fill_between(x, with_states, on_top, color=GREEN, **options)
    axes.fill_between(x, [min(0, m - states / unit) for m in managed], color=SKY, **options)
    axes.axhline(0, color=INK, linewidth=0.8)


def card(
    model: str = "llama-33b",
    card: float = 24.0,
    spike: int = 2048,
    page: int = 16,
    prefetch: bool = False,
) -> Figure:
    """A large model's steps on one card, with a long row in the fifth. Prints what happened; see `paging.scaled`."""
    out = scaled.simulate(model, card, spike, page, prefetch)
    plain = scaled.simulate(model, card, spike, page, paged=False)
    memory, scale = out.memory, scaled.SCALE
    ends = [f"fails in step {o.failed}" if o.failed is not None else "goes through" for o in (out, plain)]
    print(f"paged: {ends[0]}; not paged: {ends[1]}")
    figure, axes = plt.subplots(figsize=(7, 3.4))
    still = scaled.step_of(model, scaled.SHORT)
    standing = still.weights + still.parts["adapter"]
    # The weights are the first resident block, so the resident bytes of the first event are theirs.
    base = memory.timeline[0].resident if memory.timeline else standing // scale
    _areas(axes, memory.timeline, still.parts["optimizer"] / scale, base, GB / scale)
    budget = memory.budget * scale / GB
    axes.axhline(budget, color=INK, linewidth=1.2, linestyle="--")
    faults, into, back = out.after_first()
    cost = f"{(into + back) / scaled.BUS:.2f} s at {scaled.BUS:g} GB/s"
    title = f"After step 1: faults {faults:,}, in {into:.2f}, out {back:.2f} GB, {cost}"
    axes.set_title(title, fontsize=10)
    if out.failed is not None:
        axes.text(max(out.failed, 1) + 0.1, 0.5 * budget, "does not fit", color=VERMILLION, fontweight="bold")
    steps = range(1, scaled.STEPS + 1)
    axes.set(xlabel="step", xticks=[s + 0.5 for s in steps], xticklabels=steps, xlim=(1, len(steps) + 1))
    axes.set(ylabel="GB", ylim=(-1.15 * still.parts["optimizer"] / GB, 1.12 * budget))
    axes.text(1.05, budget, f"{card:g} GiB", va="bottom", fontsize=9)
    names = {"weights and adapter": BLUE, "states on the card": ORANGE}
    legend(figure, names | {"activations, gradients": GREEN, "states in RAM": SKY})
    return figure
