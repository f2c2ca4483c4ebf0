"""Answers as students write them: wrong ones, each with the mistake that the hint must name, and right ones.

    @wrong("02-forward", "scale-missing")
    def unscaled(x, weight, a, b, alpha, r): ...

    @right("02-forward")
    def with_einsum(x, weight, a, b, alpha, r): ...

One module for each topic. None of them may share code with the check. What an answer remembers from call to call
is made by `remembers`, so that one process can judge it again.
"""

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable

WRONG: dict[str, list[tuple[str, Callable]]] = defaultdict(list)
RIGHT: dict[str, list[Callable]] = defaultdict(list)
_REMEMBERED: list[dict | list] = []


def remembers(empty: dict | list):
    """An empty dict or list that `forget` empties again."""
    _REMEMBERED.append(empty)
    return empty


def forget() -> None:
    """Every answer begins anew, as in a new process."""
    for kept in _REMEMBERED:
        kept.clear()


def wrong(exercise: str, mistake: str):
    """Register a wrong answer, and the mistake that the check must recognise."""

    def register(answer):
        WRONG[exercise].append((mistake, answer))
        return answer

    return register


def right(exercise: str):
    """Register a right answer that is written differently from the solution."""

    def register(answer):
        RIGHT[exercise].append(answer)
        return answer

    return register


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
