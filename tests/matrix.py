"""The kill matrix: every exercise against its wrong and right answers.

python -m tests.matrix            prints it; exit status 1 for a survivor, a wrong hint or a false alarm
python -m tests.matrix 02-init    only these exercises, and what the check says to each wrong answer
"""

import sys
import time
from dataclasses import dataclass

import qlora_edu.checks as check
from tests.attempts import RIGHT, WRONG


@dataclass
class Row:
    """One attempt: its name, the mistake that must be named (None for a right one), and what the check said."""

    exercise: str
    name: str
    meant: str | None
    verdict: check.Verdict
    seconds: float  # of computing

    @property
    def good(self) -> bool:
        if self.meant is None:
            return self.verdict.passed
        return not self.verdict.passed and self.verdict.mistake == self.meant and bool(self.verdict.hint)


def rows(exercise: str, seed: int | None = None) -> list[Row]:
    """Every attempt at an exercise, judged; with fresh inputs unless there is a seed."""
    judged = check.exercises()[exercise]
    attempts = [(a.__name__, None, a) for a in RIGHT[exercise]] + [
        (a.__name__, m, a) for m, a in WRONG[exercise]
    ]
    found = []
    for name, meant, answer in attempts:
        start = time.process_time()
        verdict = judged.verdict(answer, seed)
        found.append(Row(exercise, name, meant, verdict, time.process_time() - start))
    return found


def main(only: list[str]) -> int:
    bad = 0
    columns = f"{'right':>6}{'accepted':>10}{'wrong':>7}{'rejected':>10}{'with its hint':>15}{'mistakes':>10}"
    print(f"{'exercise':<24}{columns}{'seconds':>9}")  # of computing, for the slowest right answer
    for exercise in check.exercises():
        if only and exercise not in only:
            continue
        judged = rows(exercise)
        right = [row for row in judged if row.meant is None]
        wrong = [row for row in judged if row.meant is not None]
        accepted = sum(row.verdict.passed for row in right)
        rejected = sum(not row.verdict.passed for row in wrong)
        hinted = sum(row.good for row in wrong)
        kinds = len({row.meant for row in wrong})
        slowest = max(row.seconds for row in right)
        counts = f"{len(right):>6}{accepted:>10}{len(wrong):>7}{rejected:>10}{hinted:>15}{kinds:>10}"
        print(f"{exercise:<24}{counts}{slowest:>9.2f}", flush=True)
        for row in judged:
            if not row.good or (only and row.meant is not None):
                bad += not row.good
                said = "accepted" if row.verdict.passed else f"rejected as {row.verdict.mistake}"
                print(f"    {row.name}: {'right' if row.meant is None else 'meant: ' + row.meant}; {said}")
                print("        " + str(row.verdict).replace("\n", "\n        "))
    print(
        "All right answers are accepted, all wrong ones rejected with the hint meant for them."
        if not bad
        else f"{bad} not as meant."
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
