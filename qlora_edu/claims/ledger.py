"""The ledger: what is said about LoRA and QLoRA, who says it, and what comes out when it is computed again.

A claim is an entry in `data/claims/<topic>.toml` and a function in `claims/<topic>.py` that computes its figures:

    ["memory-780gb"]
    statement = "Full fine-tuning of a 65B model takes more than 780 GB."
    who = "QLoRA paper"
    source = "arXiv 2305.14314, abstract"
    verdict = "confirmed"
    judgement = "65 billion × 12 bytes = {total:.1f} GB. Activations are left out."
    figures.total = { claimed = 780, within = 0.5, found = 780.0, tolerance = 1e-9, unit = "GB" }

The verdict is not free. A claim is *confirmed* when every figure that it states is recomputed as stated, *corrected*
when at least one is not, and *open* when what can be computed here does not decide it; `faults` holds an entry to that.
"""

import importlib
import math
import string
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VERDICTS = ("confirmed", "corrected", "open")
FOLDER = Path(__file__).parents[1] / "data" / "claims"

_recomputations: dict[str, Callable[[], dict[str, float]]] = {}


class LedgerError(ValueError):
    """An entry of the ledger is incomplete, or there is none."""


@dataclass(frozen=True)
class Figure:
    """One number of a claim.

    Attributes:
        found: what this course finds. A yes or no is True or False.
        tolerance: how far a recomputation may be from `found`, relative to it: how well the number is determined.
        claimed: what is said; None for a number that only the course states.
        within: how exactly it is said, in its own unit: "780" leaves 0.5 to either side.
        unit: such as "GB".
    """

    found: float
    tolerance: float
    claimed: float | None = None
    within: float | None = None
    unit: str = ""

    def __post_init__(self):
        if (self.claimed is None) != (self.within is None):
            raise LedgerError("a figure with `claimed` needs `within`, and the other way round")
        if self.tolerance < 0 or (self.within or 0) < 0:
            raise LedgerError("`tolerance` and `within` must not be negative")

    def is_as_found(self, value: float) -> bool:
        """Whether a recomputed value is the one on record."""
        return math.isfinite(value) and abs(value - self.found) <= self.tolerance * abs(self.found)

    def is_as_claimed(self, value: float) -> bool:
        """Whether a recomputed value is the one that is claimed."""
        return self.claimed is None or abs(value - self.claimed) <= self.within


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger. `judgement` names figures in braces, as `str.format` does: {total:.1f}."""

    id: str
    statement: str
    who: str
    source: str
    verdict: str
    judgement: str
    figures: dict[str, Figure]

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise LedgerError(f"verdict: expected one of {', '.join(VERDICTS)}; got {self.verdict!r}")
        named = {name for _, name, _, _ in string.Formatter().parse(self.judgement) if name is not None}
        if unknown := named - self.figures.keys():
            raise LedgerError(
                f"judgement: names {', '.join(sorted(unknown))}, which is no figure of the claim"
            )

    @property
    def topic(self) -> str:
        return self.id.split("-")[0]

    def recompute(self) -> dict[str, float]:
        """The figures, computed now (once in a process).

        Raises:
            LedgerError: if no function computes them, or it returns others.
        """
        return dict(_recomputed(self.id))

    def judge(self) -> str:
        """The judgement with the recomputed figures in it."""
        return self.judgement.format(**self.recompute())

    def faults(self) -> list[str]:
        """Why this entry cannot stand: figures that are not found again, or a verdict that they do not bear."""
        values = self.recompute()
        found = [
            f"{name}: expected {figure.found:g} {figure.unit} (relative tolerance {figure.tolerance:g}); "
            f"recomputed {values[name]:.9g}"
            for name, figure in self.figures.items()
            if not figure.is_as_found(values[name])
        ]
        stated = [name for name, figure in self.figures.items() if figure.claimed is not None]
        missed = [name for name in stated if not self.figures[name].is_as_claimed(values[name])]
        if self.verdict == "confirmed" and (missed or not stated):
            found.append(
                f"confirmed, but not recomputed as claimed: {', '.join(missed) or 'it states no figure'}"
            )
        if self.verdict == "corrected" and not missed:
            found.append("corrected, but every figure is recomputed as claimed")
        return found


@cache
def entries() -> dict[str, Claim]:
    """All claims by id, topic by topic.

    Raises:
        LedgerError: if an entry is incomplete; the message names the file and the entry.
    """
    claims = {}
    for file in sorted(FOLDER.glob("*.toml")):
        for id, entry in tomllib.loads(file.read_text(encoding="utf-8")).items():
            if id.split("-")[0] != file.stem:
                raise LedgerError(f"{file.name}: {id}: an id begins with its topic, {file.stem}-")
            try:
                figures = {name: Figure(**figure) for name, figure in entry.pop("figures", {}).items()}
                claims[id] = Claim(id, figures=figures, **entry)
            except (LedgerError, TypeError) as error:
                raise LedgerError(f"{file.name}: {id}: {error}") from None
    return claims


def claim(id: str) -> Claim:
    """The claim with this id.

    Raises:
        LedgerError: if there is none; the message names the nearest.
    """
    if id not in entries():
        topic = str(id).split("-")[0]
        known = [name for name in entries() if name.startswith(f"{topic}-")] or list(entries())
        raise LedgerError(f"id: expected one of {', '.join(known)}; got {id!r}")
    return entries()[id]


def recomputes(id: str) -> Callable:
    """Decorator: this function, without arguments, returns the figures of the claim `id` as {name: value}."""

    def register(function):
        if id in _recomputations:
            raise LedgerError(f"{id} is recomputed by two functions, {_recomputations[id].__name__} is one")
        _recomputations[id] = function
        return function

    return register


def recomputation(id: str) -> Callable[[], dict[str, float]]:
    """The function that recomputes a claim.

    Raises:
        LedgerError: if there is no such claim, or no function for it.
    """
    entry = claim(id)
    importlib.import_module(f"qlora_edu.claims.{entry.topic}")
    if id not in _recomputations:
        raise LedgerError(f"{id}: no function in claims/{entry.topic}.py recomputes it")
    return _recomputations[id]


@cache
def _recomputed(id: str) -> dict[str, float]:
    entry, function = claim(id), recomputation(id)
    values = function()
    if values.keys() != entry.figures.keys():
        raise LedgerError(
            f"{id}: {function.__name__} returns {sorted(values)}, the ledger has {sorted(entry.figures)}"
        )
    return values
