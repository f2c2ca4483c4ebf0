"""What can be moved: a plot function and its controls.

    widgets.explore(
        draw,                                              # draw(rank=8, model="7B") returns a figure
        "What each part of the memory costs.",
        rank=widgets.Slider(8, 1, 64),
        model=widgets.Choice("7B", ["7B", "65B"]),
    )

In a notebook that somebody works with, the controls are ipywidgets, and moving one draws the figure again. In a batch
run (QLORA_STATIC=1) it is drawn once, as it starts, so that readers without a kernel see a picture and nothing waits
for a browser.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from qlora_edu import plots


@dataclass(frozen=True)
class Slider:
    """A number between `low` and `high`, in steps of `step`.

    Raises:
        ValueError: if `default` is not between them, or `step` is not positive.
    """

    default: float
    low: float
    high: float
    step: float = 1
    label: str | None = None
    format: str = ".0f"

    def __post_init__(self):
        if not self.low <= self.default <= self.high:
            raise ValueError(f"default: expected {self.low} <= default <= {self.high}; got {self.default}")
        if not self.step > 0:
            raise ValueError(f"step: expected a positive number; got {self.step}")

    def control(self, name: str):
        import ipywidgets

        whole = all(isinstance(n, int) for n in (self.default, self.low, self.high, self.step))
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        extra = {} if whole else {"readout_format": self.format}
        return kind(
            value=self.default,
            min=self.low,
            max=self.high,
            step=self.step,
            continuous_update=False,
            **_named(name, self.label),
            **extra,
        )


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Raises:
        ValueError: if `default` is none of the options.
    """

    default: object
    options: Sequence
    label: str | None = None

    def __post_init__(self):
        if self.default not in self.options:
            raise ValueError(f"default: expected one of {list(self.options)}; got {self.default!r}")

    def control(self, name: str):
        import ipywidgets

        return ipywidgets.Dropdown(options=list(self.options), value=self.default, **_named(name, self.label))


@dataclass(frozen=True)
class Toggle:
    """Yes or no."""

    default: bool
    label: str | None = None

    def control(self, name: str):
        import ipywidgets

        return ipywidgets.Checkbox(value=self.default, indent=False, **_named(name, self.label))


def explore(
    draw: Callable[..., Figure],
    caption: str | Callable[..., str],
    alt: str | None = None,
    **controls: Slider | Choice | Toggle,
) -> None:
    """Show a figure with controls that draw it again.

    Args:
        draw: takes the values of all controls by name and returns a matplotlib figure. What it prints stands above.
        caption: below the figure; or a function of the same values that returns it.
        alt: what someone who cannot see the figure should know; the caption where it is left out.
        controls: by the name of draw's argument.

    Raises:
        ValueError: if there is no control. TypeError: if one is none of Slider, Choice, Toggle.
    """
    if not controls:
        raise ValueError("controls: expected at least one, such as rank=widgets.Slider(8, 1, 64)")
    for name, control in controls.items():
        if not isinstance(control, Slider | Choice | Toggle):
            raise TypeError(
                f"{name}: expected widgets.Slider, Choice or Toggle; got {type(control).__name__}"
            )

    def show(**values) -> None:
        text = caption(**values) if callable(caption) else caption
        plots.show(draw(**values), text, alt)

    if os.environ.get("QLORA_STATIC"):
        show(**{name: control.default for name, control in controls.items()})
        return
    import ipywidgets
    from IPython.display import display

    live = {name: control.control(name) for name, control in controls.items()}
    box = ipywidgets.GridBox(
        list(live.values()),
        layout=ipywidgets.Layout(
            grid_template_columns="repeat(auto-fill, minmax(300px, 1fr))", width="680px"
        ),
    )
    display(box, ipywidgets.interactive_output(show, live))


def _named(name: str, label: str | None) -> dict:
    import ipywidgets

    return {
        "description": label or name.replace("_", " "),
        "style": {"description_width": "initial"},
        "layout": ipywidgets.Layout(width="300px"),
    }
