"""One submission graded: its parts, one after the other, each with points, a status, and what its student is told."""

from dataclasses import asdict, dataclass, field

import qlora_edu.checks as check
from qlora_edu.checks.exercise import HINTS, secret_seed
from qlora_edu.grading.session import Session
from qlora_edu.grading.submissions import Assignment, Submission
from qlora_edu.notebooks.exercises import Part

HIDDEN_ROUNDS = 3


@dataclass
class PartResult:
    """A part of a submission.

    Attributes:
        status: "passed", "failed", "hidden part failed", "not attempted", "missing", "unreadable"; of a written answer
            "to be marked" and "marked".
        points: what it got; None while it is to be marked. of: what it is worth.
        feedback: what the student is told. mistake: the mistake that it looks like.
        answer: a written answer's text. score: of a challenge.
    """

    id: str
    status: str
    points: float | None
    of: int
    feedback: str = ""
    mistake: str = ""
    answer: str = ""
    score: float | None = None


@dataclass
class Result:
    """A graded submission. `sha256` and `version` say of which file, by which checks; `notes` are for the student."""

    student: str
    topic: str
    sha256: str
    version: str
    parts: list[PartResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str = ""

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, fields: dict) -> "Result":
        return cls(**{**fields, "parts": [PartResult(**part) for part in fields["parts"]]})


def grade(
    submission: Submission,
    assignment: Assignment,
    secret: str,
    version: str = "",
    hidden: tuple[str, ...] = (),
    memory: int = 2 * 2**30,
    seconds: float | None = None,
) -> Result:
    """Judge every part of a submission.

    Args:
        secret: what the hidden part's inputs are drawn from; neither the submission's process nor its feedback sees it.
        hidden: folders that the submission may not read. memory: bytes that it may take.
        seconds: for one call and one cell; None for the exercise's own limit.
    """
    if submission.problem:
        return ungraded(submission, assignment, submission.problem, version)
    notes = [note for note in (submission.note,) if note]
    result = Result(submission.student, assignment.topic, submission.sha256, version, notes=notes)
    with Session(submission.cells, hidden, memory, seconds, submission.given) as session:
        for part in assignment.parts:
            written = part.check is None
            result.parts.append(_written(part, submission) if written else _checked(part, session, secret))
        result.notes += session.notes
    return result


def ungraded(submission: Submission, assignment: Assignment, problem: str, version: str = "") -> Result:
    """The result of a submission that cannot be graded: a row for each part, no points, and the reason."""
    parts = [PartResult(part.id, "unreadable", 0, part.points) for part in assignment.parts]
    return Result(submission.student, assignment.topic, submission.sha256, version, parts, problem=problem)


def _written(part: Part, submission: Submission) -> PartResult:
    text = submission.written.get(part.id, "")
    if not text:
        return PartResult(part.id, "not attempted", 0, part.points, "There is no answer.")
    return PartResult(part.id, "to be marked", None, part.points, answer=text)


def _checked(part: Part, session: Session, secret: str) -> PartResult:
    """The check as the student knows it, then the hidden rounds: of those only whether they passed is ever told."""
    exercise = check.exercises()[part.id]
    if not session.defined(part.name):
        broken = next((note for note in session.notes if note.startswith("SyntaxError")), "")
        told = f"{part.name}: {HINTS['missing']}" + (f" A cell could not be read: {broken}" if broken else "")
        return PartResult(part.id, "missing", 0, part.points, told, "missing")

    def ask(arguments: tuple):
        return session.outcome(exercise, part.name, arguments)

    open_verdict = exercise.judge(ask, secret_seed(secret, part.id, -1))
    if not open_verdict.passed:
        if open_verdict.mistake == "not-attempted":
            return PartResult(
                part.id, "not attempted", 0, part.points, "It is as it was handed out.", "not-attempted"
            )
        return PartResult(part.id, "failed", 0, part.points, str(open_verdict), open_verdict.mistake or "")
    for round in range(HIDDEN_ROUNDS):
        if not exercise.judge(ask, secret_seed(secret, part.id, round), hidden=True).passed:
            told = "It passes the check of the notebook, but not with other inputs. On which does it depend?"
            return PartResult(part.id, "hidden part failed", 0, part.points, told, "hidden")
    score = open_verdict.score.value if open_verdict.score else None
    return PartResult(part.id, "passed", part.points, part.points, "Passed.", score=score)
