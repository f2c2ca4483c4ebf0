"""An exercise: what it is worth, how it is checked, and the hint for each known mistake.

    @exercise("02-forward")
    def forward(answer, draw):
        x, weight, ... = draw.normal(5, 7), ...
        y = answer(x, weight, ...)                       # calls the student's function
        expect.close(y, right, "y", within=..., looks_like={"scale-missing": what_that_would_give})

The body says what is right; it ends silently or raises `expect.Wrong`. The name `forward` becomes an `Exercise`,
which a notebook calls with the student's function: `check.lora.forward(my_forward)`. Title, minutes, points and the
hint for each known mistake stand in `data/exercises/02_lora.toml`.
"""

import os
import random
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from qlora_edu import progress
from qlora_edu.checks.attempt import SECONDS, Outcome, attempt
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.expect import Wrong, show

_FOLDER = Path(__file__).parents[1] / "data" / "exercises"

#: Mistakes that any function can have.
HINTS = {
    "not-attempted": "It still raises NotImplementedError. Put your answer there, run that cell, then this one.",
    "crashed": "Call it with such an input yourself, in a cell of your own, and read the whole traceback.",
    "endless": "A loop that does not end, or far too slow a way. Try it on three numbers.",
    "exited": "A function gives its result back with `return`; exit() would end your whole notebook.",
    "ended": "Your code ended the whole process. Look for os._exit, too much memory, a very deep recursion.",
    "missing": "No function or class of that name is defined. Keep the name that the exercise gives.",
    "flood": "Take the print out of the loop, or print one line.",
    "not-yours": "This calls the answer of the course or of a library. Write it yourself; that is the exercise.",
    "not-callable": "Give the check the function itself, not what it returns: `check(f)`, not `check(f(x))`.",
    "changed-input": "It writes into its input. Make a new one: `x = x * 2`, `x.clone()`, `list(x)`, `dict(x)`.",
    "not-new": "What comes back lies in the memory of an input: whoever changes one changes both. Make a new tensor.",
    "wrong-type": "Look at what the statement says of the result. Without a `return`, None comes back.",
    "wrong-shape": "Print the shapes on the way, and compare them with those in the statement.",
    "wrong-dtype": "Look at the dtype that the statement asks for; `.to(dtype)` and `.float()` convert.",
}


@dataclass(frozen=True)
class Score:
    """What a challenge's answer reached, for a scoreboard that stays on this machine.

    Attributes:
        value: the score; unit: what it counts. smaller: whether less is better.
        rivals: known ways and what they reach, in the same unit.
    """

    value: float
    unit: str
    rivals: Mapping[str, float]
    smaller: bool = True

    def board(self, best: float | None = None) -> str:
        """A table of rivals and the student, the best first. best: the student's best so far, if there is one."""
        rows = [*((value, f"   {name}") for name, value in self.rivals.items()), (self.value, " > you, now")]
        if best is not None:
            rows.append((best, "   you, best so far"))
        rows.sort(key=lambda row: row[0] if self.smaller else -row[0])
        order = "less is better" if self.smaller else "more is better"
        return "\n".join(
            [f"  {self.unit} ({order})", *(f"{name:<28} {value:>12.5g}" for value, name in rows)]
        )

    def better(self, other: float | None) -> bool:
        return other is None or (self.value < other if self.smaller else self.value > other)


@dataclass(frozen=True)
class Verdict:
    """What a check says: whether it passed, else the property that failed and the mistake that this looks like."""

    exercise: str
    passed: bool
    what: str = ""
    expected: str = ""
    got: str = ""
    mistake: str | None = None
    hint: str = ""
    printed: str = ""
    score: Score | None = None

    def __str__(self) -> str:
        if self.passed:
            return f"{self.exercise}: passed."
        if self.mistake == "not-attempted":
            return f"{self.exercise}: not attempted yet. {self.hint}"
        lines = [f"{self.exercise}: not yet."]
        rows = {"What": self.what, "Expected": self.expected, "Got": self.got, "Hint": self.hint}
        lines += [f"  {name + ':':<10}{text}" for name, text in rows.items() if text]
        return "\n".join(lines)


class Answer:
    """The student's function as a check sees it: called with inputs, it returns plain values or raises Wrong."""

    def __init__(self, outcome: Callable[[tuple], Outcome]):
        self._outcome = outcome
        self.printed = ""

    def __call__(self, *arguments, crash: str | None = None, inplace: bool = False, fresh: bool = False):
        """What the student's function returns for these inputs.

        Args:
            crash: the mistake that an exception here looks like. inplace: whether it may write into its inputs.
            fresh: whether the result must be new memory, also where its numbers are those of an input.
        """
        outcome = self._seen(arguments)
        if outcome.problem:
            mistake = crash if crash and outcome.problem == "crashed" else outcome.problem
            raise Wrong(f"the call with {described(arguments)}", "a result", outcome.message, mistake)
        if outcome.changed and not inplace:
            position = outcome.changed[0] + 1
            raise Wrong(
                f"the call with {described(arguments)} changed its argument {position}",
                mistake="changed-input",
            )
        if fresh and outcome.shared:
            raise Wrong(f"the call with {described(arguments)} returns an input itself", mistake="not-new")
        return outcome.value

    def raises(self, error: type[Exception], *arguments, what: str, mistake: str) -> None:
        """Wrong unless the function refuses these inputs with that error. `what` says why it must."""
        outcome = self._seen(arguments)
        if outcome.problem not in ("", "crashed"):
            raise Wrong(
                f"the call with {described(arguments)}", error.__name__, outcome.message, outcome.problem
            )
        if error.__name__ not in outcome.error:
            got = outcome.message or "no error"
            raise Wrong(f"{what}: the call with {described(arguments)}", f"a {error.__name__}", got, mistake)

    def _seen(self, arguments: tuple) -> Outcome:
        outcome = self._outcome(arguments)
        self.printed = (self.printed + outcome.printed)[:4000]
        return outcome


def described(arguments: tuple) -> str:
    """Inputs in few characters."""
    text = ", ".join(map(show, arguments)) or "no arguments"
    return text if len(text) <= 200 else text[:197] + "..."


@dataclass(frozen=True, eq=False)
class Exercise:
    """An exercise and its check.

    Attributes:
        id: chapter and name, as in "02-forward"; it names the cells, the points and the record too.
        title, minutes, points: as its statement says. difficulty: 1, 2 or 3 stars.
        hints: by mistake, what to think about.
        examine: the check's body; that of a challenge returns a Score.
        probe: None, or a function of the student's object and inputs that returns plain values. Where the student
        hands in a class, it uses the class beside the student's code, and the check compares what it returns.
        allow: modules of the course that an answer may use.
        seconds: how long one call may take.
    """

    id: str
    examine: Callable[[Answer, Draw], Score | None]
    title: str
    minutes: int
    difficulty: int
    points: int
    hints: Mapping[str, str]
    order: int
    probe: Callable | None = None
    allow: tuple[str, ...] = ()
    seconds: float = SECONDS

    @property
    def header(self) -> str:
        """The line under its title in the notebook."""
        stars = "★" * self.difficulty + "☆" * (3 - self.difficulty)
        return f"{stars} · {self.minutes} minutes · {self.points} point{'s' if self.points > 1 else ''}"

    def outcome(self, target: Callable, arguments: tuple, seconds: float | None = None) -> Outcome:
        """One call of the student's object, with what it may use and how long it may take."""
        call = partial(self.probe, target) if self.probe else target
        return attempt(call, arguments, seconds or self.seconds, self.allow)

    def judge(self, outcome: Callable[[tuple], Outcome], seed: int, hidden: bool = False) -> Verdict:
        """The verdict on whatever answers calls with outcomes, here or in another process."""
        answer = Answer(outcome)
        try:
            score = self.examine(answer, Draw(seed, hidden))
        except Wrong as wrong:
            hint = {**HINTS, **self.hints}.get(wrong.mistake, "")
            return Verdict(
                self.id, False, wrong.what, wrong.expected, wrong.got, wrong.mistake, hint, answer.printed
            )
        except Exception as error:  # a result so strange that the check itself stumbles over it
            what = f"the result cannot be compared ({type(error).__name__}: {error})"[:200]
            return Verdict(
                self.id, False, what, mistake="wrong-type", hint=HINTS["wrong-type"], printed=answer.printed
            )
        return Verdict(self.id, True, printed=answer.printed, score=score)

    def verdict(self, target, seed: int | None = None, hidden: bool = False) -> Verdict:
        """The verdict on an object of this process; another seed each time unless one is given."""
        if not callable(target):
            return Verdict(
                self.id, False, "what was given to the check", "a function or class", show(target),
                "not-callable", HINTS["not-callable"],
            )  # fmt: skip
        seed = random.SystemRandom().getrandbits(48) if seed is None else seed
        return self.judge(partial(self.outcome, target), seed, hidden)

    def __call__(self, target, hidden: bool = False) -> None:
        """Judge the student's object, print the verdict, and keep it in the student's own record.

        Under `QLORA_EDU_GRADING` (nbgrader's autograding), what is not right raises an AssertionError. hidden: draw
        what an instructor's seed draws, from `QLORA_EDU_SECRET`.
        """
        secret = os.environ.get("QLORA_EDU_SECRET")
        seed = secret_seed(secret, self.id) if hidden and secret else None
        verdict = self.verdict(target, seed, hidden)
        if os.environ.get("QLORA_EDU_GRADING"):
            # Nothing of a hidden part may be shown: neither inputs nor results.
            assert verdict.passed, f"{self.id}: not passed (hidden part)" if hidden else str(verdict)
            return
        if verdict.printed.strip():
            print(f"(Your function printed:)\n{verdict.printed.rstrip()}\n")
        print(f"{self.id}: passed (hidden part)." if hidden and verdict.passed else verdict)
        if not verdict.passed or hidden:
            return
        facts = {"passed": True, "points": self.points}
        if score := verdict.score:
            best = progress.read().get(self.id, {}).get("score")
            print(score.board(best))
            facts["score"] = score.value if score.better(best) else best
        progress.keep(self.id, **facts)


def secret_seed(secret: str, exercise: str, round: int = 0) -> int:
    """A seed that nobody can tell without the secret."""
    return random.Random(f"{secret}/{exercise}/{round}").getrandbits(48)


@cache
def descriptions() -> dict[str, dict]:
    """What stands in `data/exercises/*.toml`: title, minutes, difficulty, points and hints of each exercise, by id."""
    found = {}
    for file in sorted(_FOLDER.glob("*.toml")):
        for id, entry in tomllib.loads(file.read_text(encoding="utf-8")).items():
            if id in found or not file.stem.startswith(id[:2] + "_"):
                raise ValueError(f"{file.name}: {id} stands there twice, or belongs to another chapter")
            found[id] = entry | {"order": len(found)}
    return found


def exercise(id: str, **options) -> Callable[[Callable], Exercise]:
    """Turn the body of a check into an `Exercise`. options: probe, allow, seconds."""

    def made(examine: Callable[[Answer, Draw], Score | None]) -> Exercise:
        made = Exercise(id, examine, **descriptions()[id], **options)
        object.__setattr__(made, "__doc__", examine.__doc__)
        return made

    return made
