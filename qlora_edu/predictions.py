"""Predict, then run: a number that you commit to before the computer shows it.

    predict("08-exact", 60, unit="%")     writes your prediction down
    outcome("08-exact", 88.5)             shows it beside what came out

`progress.record()` shows all of them. Nothing depends on them.
"""

import math
from types import EllipsisType

from qlora_edu import progress
from qlora_edu.progress import progress_file, with_unit

__all__ = ["outcome", "predict", "progress_file"]


def predict(id: str, value: float | EllipsisType = ..., unit: str = "") -> None:
    """Write a prediction down. With `...` in the place of a number it only reminds you to make one.

    Raises:
        TypeError: if `value` is no number. ValueError: if it is NaN or infinite.
    """
    if value is ...:
        print("No prediction yet. Put a number in the place of ... and run the cell again, or go on without.")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value: expected a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"value: expected a finite number; got {value!r}")
    print(f"Written down: {with_unit(value, unit)}.")
    progress.keep(id, value=value, unit=unit)


def outcome(id: str, value: float, unit: str | None = None) -> None:
    """Show what came out, and the prediction beside it if there is one."""
    predicted = progress.read().get(id, {})
    unit = unit if unit is not None else predicted.get("unit", "")
    print(f"It is {with_unit(value, unit)}.")
    if "value" in predicted:
        print(f"You predicted {with_unit(predicted['value'], predicted.get('unit', ''))}.")
        progress.keep(id, outcome=float(value))
