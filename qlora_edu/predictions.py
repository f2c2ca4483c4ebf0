"""Predict, then run: a number that you commit to before the computer shows it.

    predict("08-exact", 60, unit="%")     writes your prediction down
    outcome("08-exact", 88.5)             shows it beside what came out

Predictions stay on this machine, in one small file; `progress_file()` says where. Nothing depends on them.
"""

import json
import os
from pathlib import Path
from types import EllipsisType

from platformdirs import user_data_path

from qlora_edu.adapters import write_whole


def progress_file() -> Path:
    """Where predictions are kept: QLORA_EDU_PROGRESS, or a file in your user data folder."""
    chosen = os.environ.get("QLORA_EDU_PROGRESS")
    return Path(chosen) if chosen else user_data_path("qlora-edu") / "progress.json"


def predict(id: str, value: float | EllipsisType = ..., unit: str = "") -> None:
    """Write a prediction down. With `...` in the place of a number it only reminds you to make one.

    Raises:
        TypeError: if `value` is no number.
    """
    if value is ...:
        print("No prediction yet. Put a number in the place of ... and run the cell again, or go on without.")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value: expected a number; got {value!r}")
    print(f"Written down: {value:g}{_with(unit)}.")
    if os.environ.get("QLORA_STATIC"):  # a batch run is nobody's prediction
        return
    kept = _read()
    kept[id] = {"value": value, "unit": unit}
    try:
        progress_file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(progress_file(), json.dumps(kept, indent=2).encode())
    except OSError as error:
        print(f"(It could not be kept for the next time: {error.strerror}.)")


def outcome(id: str, value: float, unit: str | None = None) -> None:
    """Show what came out, and the prediction beside it if there is one."""
    kept = {} if os.environ.get("QLORA_STATIC") else _read()
    predicted = kept.get(id)
    unit = unit if unit is not None else (predicted or {}).get("unit", "")
    print(f"It is {value:g}{_with(unit)}.")
    if predicted:
        print(f"You predicted {predicted['value']:g}{_with(predicted['unit'])}.")


def _with(unit: str) -> str:
    return f" {unit}" if unit and unit != "%" else unit


def _read() -> dict:
    try:
        return json.loads(progress_file().read_text())
    except (OSError, ValueError):
        return {}
