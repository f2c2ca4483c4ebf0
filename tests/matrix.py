"""The kill matrix: every exercise against its wrong and right answers.

python -m tests.matrix               prints it; exit status 1 for a survivor, a wrong hint or a false alarm
python -m tests.matrix 02-init       only these exercises, and what the check says to each wrong answer
python -m tests.matrix --seeds 100   each attempt judged so many times, with other inputs each time

Inputs are fresh in every run: with few seeds it may find a coincidence that the last run did not meet. The tests hold
the matrix at seed 0, so that what they say depends on the code alone.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import qlora_edu.checks as check
from tests.attempts import RIGHT, WRONG, forget


@dataclass
class Row:
    """One attempt: its name, the mistake that must be named (None for a right one), and what the check said."""

    exercise: str
    name: str
    meant: str | None
    verdict: check.Verdict
    seconds: float  # of computing
    seed: int

    @property
    def good(self) -> bool:
        if self.meant is None:
            return self.verdict.passed
        return not self.verdict.passed and self.verdict.mistake == self.meant and bool(self.verdict.hint)


def rows(exercise: str, seeds: Sequence[int] = (0,)) -> list[Row]:
    """Every attempt at an exercise, judged once with each seed."""
    judged = check.exercises()[exercise]
    attempts = [(None, answer) for answer in RIGHT[exercise]] + WRONG[exercise]
    found = []
    for seed in seeds:
        for meant, answer in attempts:
            forget()
            start = time.process_time()
            verdict = judged.verdict(answer, seed)
            seconds = time.process_time() - start
            found.append(Row(exercise, answer.__name__, meant, verdict, seconds, seed))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.split("\n")[0])
    parser.add_argument(
        "exercises", nargs="*", metavar="exercise", help="only these; each wrong answer is shown"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="judge each attempt N times")
    options = parser.parse_args(arguments)
    if unknown := set(options.exercises) - set(check.exercises()):
        parser.error(
            f"exercise: expected some of {', '.join(check.exercises())}; got {', '.join(sorted(unknown))}"
        )
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1; got {options.seeds}")
    seeds = [random.SystemRandom().getrandbits(48) for _ in range(options.seeds)]
    bad = 0
    columns = f"{'right':>7}{'accepted':>10}{'wrong':>8}{'rejected':>10}{'with its hint':>15}{'mistakes':>10}"
    print(f"{'exercise':<24}{columns}{'seconds':>9}")  # of computing, for the slowest right answer
    for exercise in options.exercises or check.exercises():
        judged = rows(exercise, seeds)
        right = [row for row in judged if row.meant is None]
        wrong = [row for row in judged if row.meant is not None]
        accepted = sum(row.verdict.passed for row in right)
        rejected = sum(not row.verdict.passed for row in wrong)
        hinted = sum(row.good for row in wrong)
        kinds = len({row.meant for row in wrong})
        slowest = max(row.seconds for row in right)
        counts = f"{len(right):>7}{accepted:>10}{len(wrong):>8}{rejected:>10}{hinted:>15}{kinds:>10}"
        print(f"{exercise:<24}{counts}{slowest:>9.2f}", flush=True)
        for row in judged:
            shown = options.exercises and row.meant is not None and row.seed == seeds[0]
            if not row.good or shown:
                bad += not row.good
                said = "accepted" if row.verdict.passed else f"rejected as {row.verdict.mistake}"
                meant = "right" if row.meant is None else f"meant: {row.meant}"
                print(f"    {row.name}: {meant}; {said}; seed {row.seed}")
                print("        " + str(row.verdict).replace("\n", "\n        "))
    print(
        "All right answers are accepted, all wrong ones rejected with the hint meant for them."
        if not bad
        else f"{bad} not as meant."
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
