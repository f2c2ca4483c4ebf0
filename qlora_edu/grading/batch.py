"""A folder of submissions graded: several at a time, each result kept as soon as it is there, nothing graded twice."""

import hashlib
import json
import os
import secrets
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import qlora_edu.checks
from qlora_edu.adapters import write_whole
from qlora_edu.grading.grade import Result, grade, ungraded
from qlora_edu.grading.session import CONTEXT
from qlora_edu.grading.submissions import Assignment, Submission, file_name


@dataclass(frozen=True)
class Terms:
    """What is the same for all submissions of a run: see `grade`."""

    secret: str
    version: str
    hidden: tuple[str, ...]
    memory: int
    seconds: float | None


def grade_all(
    found: list[Submission], known: dict[str, Assignment], terms: Terms, out: Path, jobs: int
) -> list[Result]:
    """Grade what has no result yet, several at a time, and keep each result as soon as it is there.

    Checks change torch's global state for a moment (the default dtype, say), so they run in processes, not in threads.
    """
    (out / "results").mkdir(parents=True, exist_ok=True)
    results = []
    with ProcessPoolExecutor(jobs, mp_context=CONTEXT) as pool:
        futures = [pool.submit(grade_one, s, known[s.topic], terms, out / "results") for s in found]
        for number, future in enumerate(as_completed(futures), start=1):
            results.append(future.result())
            print(
                f"{number} of {len(found)}: {results[-1].student}, {results[-1].topic}",
                file=sys.stderr,
                flush=True,
            )
    return sorted(results, key=lambda r: (r.student, r.topic))


def grade_one(submission: Submission, assignment: Assignment, terms: Terms, folder: Path) -> Result:
    """The result that is kept, if it is of this file by these checks; else a new one, kept in one step."""
    file = folder / f"{submission.topic}--{file_name(submission.student)}.json"
    if (kept := _kept(file)) and (kept.sha256, kept.version) == (submission.sha256, terms.version):
        return kept
    try:
        result = grade(submission, assignment, **vars(terms))
    except (
        Exception
    ) as error:  # a fault of this program must not stop the others; it is tried again next time
        problem = f"grading failed, please report it: {type(error).__name__}: {error}"
        return ungraded(submission, assignment, problem)
    write_whole(file, (json.dumps(result.as_dict(), indent=1) + "\n").encode())
    return result


def own_secret(file: Path) -> str:
    """The secret that hidden inputs are drawn from: made once, readable by you alone."""
    if not file.exists() or not file.read_text().strip():
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(16) + "\n")
    return file.read_text().strip()


def checks_version(known: dict[str, Assignment], secret: str) -> str:
    """Changes with the checks, the exercises or the secret: then everything is graded anew."""
    digest = hashlib.sha256(secret.encode())
    for file in sorted(Path(qlora_edu.checks.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for topic, assignment in sorted(known.items()):
        digest.update(f"{topic} {assignment.version}".encode())
    return digest.hexdigest()[:16]


def _kept(file: Path) -> Result | None:
    try:
        return Result.of(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
