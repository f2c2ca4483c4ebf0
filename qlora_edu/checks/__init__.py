"""The checks of the exercises: one module for each topic, one `Exercise` for each exercise.

    import qlora_edu.checks as check

    check.lora.forward(my_forward)      judges what you wrote, and says what is not right yet

A check takes *your* function, draws fresh inputs of awkward shapes, and compares what comes back with a definition
that is written out in the check itself. To write one, read `exercise` first, then `expect`; `draw` and `attempt`
are what they use.
"""

import importlib
import pkgutil

from qlora_edu.checks.exercise import Exercise, Verdict

_MACHINERY = {"__main__", "attempt", "draw", "exercise", "expect"}
TOPICS = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _MACHINERY))
for _topic in TOPICS:
    importlib.import_module(f"{__name__}.{_topic}")


def exercises() -> dict[str, Exercise]:
    """All exercises by id, in the order of the chapters."""
    found = {}
    for topic in TOPICS:
        for exercise in vars(globals()[topic]).values():
            if isinstance(exercise, Exercise):
                found[exercise.id] = exercise
    return dict(sorted(found.items(), key=lambda item: item[1].order))


__all__ = ["TOPICS", "Exercise", "Verdict", "exercises", *TOPICS]
