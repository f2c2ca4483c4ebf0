"""Your own record: what you predicted, answered and solved. It stays on this machine, in one small file.

    from qlora_edu.progress import forget, progress, record

    progress()     what is done in each chapter, and what is next
    record()       each prediction beside what came out
    forget()       deletes all of it

`QLORA_EDU_PROGRESS` names another file. Nothing in the course depends on it; a batch run neither reads nor writes it.
"""

import json
import os
from pathlib import Path

from IPython.display import Markdown, display
from platformdirs import user_data_path

from qlora_edu.adapters import write_whole


def progress_file() -> Path:
    """Where the record is kept: QLORA_EDU_PROGRESS, or a file in your user data folder."""
    chosen = os.environ.get("QLORA_EDU_PROGRESS")
    return Path(chosen) if chosen else user_data_path("qlora-edu") / "progress.json"


def read() -> dict[str, dict]:
    """The entries by id; none where there is no readable file, or in a batch run."""
    if os.environ.get("QLORA_STATIC"):
        return {}
    try:
        entries = json.loads(progress_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {id: entry for id, entry in entries.items() if isinstance(entry, dict)}


def keep(id: str, **facts) -> None:
    """Add facts to an entry and save the file in one step. A file that cannot be written stops nothing."""
    if os.environ.get("QLORA_STATIC"):  # a batch run is nobody's work
        return
    entries = read()
    entries[id] = entries.get(id, {}) | facts
    try:
        progress_file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(progress_file(), json.dumps(entries, indent=2).encode())
    except OSError as error:
        print(f"(It could not be kept for the next time: {error.strerror}.)")


def forget() -> None:
    """Delete the record."""
    progress_file().unlink(missing_ok=True)
    print("Your record is empty.")


def record() -> None:
    """Show every prediction beside what came out."""
    entries = {id: entry for id, entry in sorted(read().items()) if "value" in entry}
    if not entries:
        print("Nothing here yet: predict a number in any chapter, then run this again.")
        return
    lines = ["| prediction | yours | it was | off by |", "|:--|--:|--:|--:|"]
    display(Markdown("\n".join(lines + [_row(id, entry) for id, entry in entries.items()])))


def with_unit(value: float, unit: str) -> str:
    """ "48 GB", "87.5%".

    >>> with_unit(48, "GB"), with_unit(87.5, "%")
    ('48 GB', '87.5%')
    """
    return f"{value:g}{' ' if unit and unit != '%' else ''}{unit}"


def progress() -> None:
    """Show what is done in each chapter and what is next: predictions, quizzes, exercises and their points."""
    import qlora_edu.checks as check
    from qlora_edu.quizzes import questions

    entries, exercises = read(), check.exercises()
    lines = ["| chapter | predictions | quiz | exercises | points |", "|:--|:--|:--|:--|:--|"]
    for chapter in sorted({id[:2] for id in [*exercises, *questions()]}):
        asked = [id for id in questions() if id[:2] == chapter]
        right = sum(bool(entries.get(id, {}).get("right")) for id in asked)
        given = [exercise for id, exercise in exercises.items() if id[:2] == chapter]
        passed = [exercise for exercise in given if entries.get(exercise.id, {}).get("passed")]
        predicted = sum("value" in entry for id, entry in entries.items() if id[:2] == chapter)
        points = f"{sum(e.points for e in passed)} of {sum(e.points for e in given)}" if given else ""
        solved = f"{len(passed)} of {len(given)}" if given else ""
        lines.append(
            f"| {chapter} | {predicted or ''} | {right} of {len(asked)} right | {solved} | {points} |"
        )
    display(Markdown("\n".join(lines)))
    waiting = [exercise for id, exercise in exercises.items() if not entries.get(id, {}).get("passed")]
    begun = max((id[:2] for id, entry in entries.items() if entry), default="")
    here = [exercise for exercise in waiting if exercise.id[:2] == begun] or waiting
    if here:
        print(f"Next: {here[0].id}, {here[0].title} ({here[0].minutes} minutes, {here[0].points} points).")
    else:
        print("Every exercise has passed its check.")


def _row(id: str, entry: dict) -> str:
    value, unit = entry["value"], entry.get("unit", "")
    if "outcome" not in entry:
        return f"| {id} | {with_unit(value, unit)} | not run yet | |"
    outcome = entry["outcome"]
    if unit == "%" or value * outcome <= 0:
        off = with_unit(round(abs(value - outcome), 3), "points" if unit == "%" else unit)
    else:
        off = f"a factor of {max(value / outcome, outcome / value):.2g}"
    return f"| {id} | {with_unit(value, unit)} | {with_unit(outcome, unit)} | {off} |"
