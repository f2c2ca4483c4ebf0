"""`python -m qlora_edu.grading SUBMISSIONS [--out grades]`: grade what is new or changed, write the reports."""

import argparse
import hashlib
import json
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import qlora_edu.checks
from qlora_edu.adapters import write_whole
from qlora_edu.grading import report
from qlora_edu.grading.grade import Result, grade, ungraded
from qlora_edu.grading.sandbox import landlock_version
from qlora_edu.grading.submissions import Assignment, Submission, assignments, collect, file_name
from qlora_edu.notebooks.file import NotebookError

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_edu.grading", description="Grade a folder of submissions."
    )
    parser.add_argument("submissions", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("grades"), help="where results, tables and feedback go"
    )
    parser.add_argument("--solutions", type=Path, default=ROOT / "solutions")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="submissions at a time")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB that one submission may take")
    parser.add_argument(
        "--seconds", type=float, default=None, help="for one call, instead of each exercise's own limit"
    )
    options = parser.parse_args(arguments)
    try:
        known = assignments(options.solutions)
        found, ignored = collect(options.submissions, known)
        entered = report.marks(options.out / "marks.csv")
    except (NotebookError, NotADirectoryError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    secret = own_secret(options.out / "secret.txt")
    if not landlock_version():
        print(
            "This system has no Landlock: Python's audit hooks alone fence submissions (docs/instructor.md)."
        )
    hidden = tuple(
        str(p.resolve()) for p in (options.submissions, options.out, options.solutions, ROOT / "tests")
    )
    limits = (max(1, options.jobs), int(options.memory * 2**30), options.seconds)
    results = grade_all(found, known, secret, options.out, hidden, *limits)
    report.apply_marks(results, entered)
    report.write(options.out, results, ignored, known)
    print(report.summary(results, ignored))
    print(f"{len(results)} submissions graded; tables and feedback are in {options.out}.")
    waiting = sum(part.points is None for result in results for part in result.parts)
    if waiting:
        print(f"{waiting} written answers wait for points in {options.out / 'marks.csv'}.")
    return 0


def grade_all(
    found: list[Submission],
    known: dict[str, Assignment],
    secret: str,
    out: Path,
    hidden: tuple[str, ...],
    jobs: int,
    memory: int,
    seconds: float | None = None,
) -> list[Result]:
    """Grade what has no result yet, several at a time, and keep each result as soon as it is there."""
    version = checks_version(known, secret)
    (out / "results").mkdir(parents=True, exist_ok=True)

    def one(submission: Submission) -> Result:
        file = out / "results" / f"{submission.topic}--{file_name(submission.student)}.json"
        if (kept := _kept(file)) and (kept.sha256, kept.version) == (submission.sha256, version):
            return kept
        assignment = known[submission.topic]
        try:
            result = grade(submission, assignment, secret, version, hidden, memory, seconds)
        except (
            Exception
        ) as error:  # a fault of this program must not stop the others; it is tried again next time
            problem = f"grading failed, please report it: {type(error).__name__}: {error}"
            return ungraded(submission, assignment, problem)
        write_whole(file, (json.dumps(result.as_dict(), indent=1) + "\n").encode())
        return result

    results = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, submission) for submission in found]
        for number, future in enumerate(as_completed(futures), start=1):
            results.append(future.result())
            print(
                f"{number} of {len(found)}: {results[-1].student}, {results[-1].topic}",
                file=sys.stderr,
                flush=True,
            )
    return sorted(results, key=lambda r: (r.student, r.topic))


def own_secret(file: Path) -> str:
    """The secret that hidden inputs are drawn from: made once, readable by you alone."""
    if not file.exists():
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


if __name__ == "__main__":
    sys.exit(main())
