"""`python -m qlora_edu.grading SUBMISSIONS [--out grades]`: grade what is new or changed, write the reports."""

import argparse
import os
import sys
from pathlib import Path

from qlora_edu.grading import report
from qlora_edu.grading.batch import Terms, checks_version, grade_all, own_secret
from qlora_edu.grading.sandbox import landlock_version
from qlora_edu.grading.submissions import assignments, collect
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
    if not found:
        print(f"SUBMISSIONS: no submission in {options.submissions}; nothing was changed", file=sys.stderr)
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
    version = checks_version(known, secret)
    terms = Terms(secret, version, hidden, int(options.memory * 2**30), options.seconds)
    results = grade_all(found, known, terms, options.out, max(1, options.jobs))
    others = report.apply_marks(results, entered)
    report.write(options.out, results, ignored, known, others)
    print(report.summary(results, ignored))
    print(f"{len(results)} submissions graded; tables and feedback are in {options.out}.")
    for mark in others:
        print(
            f"kept in marks.csv, but there is no such answer here: {mark.row['student']}, {mark.row['part']}"
        )
    waiting = sum(part.points is None for result in results for part in result.parts)
    if waiting:
        print(f"{waiting} written answers wait for points in {options.out / 'marks.csv'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
