"""Mutation testing of the checks: every solution changed in one place by machine, and what no check notices.

    pip install cosmic-ray
    python -m tests.mutants             all of them (minutes); exit status 1 for a survivor without a reason
    python -m tests.mutants 02-merge    only these

The mutations are Cosmic Ray's. A mutant that its check accepts is a survivor: a hole in the check, or a change that
changes nothing. `mutants.toml` has a reason for each that is no hole, by exercise and changed line.
"""

import ast
import difflib
import io
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import qlora_edu.checks as check
from qlora_edu.notebooks.exercises import parts
from qlora_edu.notebooks.file import parse, read
from tests.test_checks import SOLUTIONS, needed

REASONS = Path(__file__).with_name("mutants.toml")
SECONDS = 2.0


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Every change of one place: the lines that differ, as "- old", "+ new", and the whole changed source."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    seen = {source}
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():  # such as a regular expression of things to remove: needs a choice
            continue
        occurrence = 0
        while (changed := mutate_code(source, kind(), occurrence)) is not None:
            occurrence += 1
            if changed not in seen:
                seen.add(changed)
                yield difference(source, changed), changed


def difference(before: str, after: str) -> str:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return " ".join(f"{line[0]} {line[2:].strip()}" for line in lines if line[0] in "+-")


def survivors(exercise: str) -> tuple[int, list[str]]:
    """How many mutants of an exercise's solution there are, and the changes that its check does not notice."""
    judged, space, source, name = check.exercises()[exercise], {}, "", ""
    for path in SOLUTIONS:
        notebook = parse(read(path), path.name)
        found = {part.id: part for part in parts(notebook)}
        if exercise in found:
            source, name = notebook.cells[found[exercise].answer].source, found[exercise].name
            checked = {part.check for part in found.values()}
            for position, cell in enumerate(notebook.cells):
                if cell.cell_type == "code" and position not in checked and needed(cell.source):
                    with redirect_stdout(io.StringIO()):
                        exec(compile(ast.parse(cell.source), path.name, "exec"), space)
    count, alive = 0, []
    for change, mutant in mutants(source):
        count += 1
        own = dict(space)
        try:
            exec(compile(mutant, "<mutant>", "exec"), own)
        except Exception:
            continue
        call = partial(judged.outcome, own[name], seconds=SECONDS)
        if all(judged.judge(lambda arguments, call=call: call(arguments), seed).passed for seed in (1, 2, 3)):
            alive.append(change)
    return count, alive


def main(only: list[str]) -> int:
    reasons = tomllib.loads(REASONS.read_text()) if REASONS.exists() else {}
    total = bad = 0
    for exercise in only or check.exercises():
        count, alive = survivors(exercise)
        total += count
        print(f"{exercise:<24} {count:>4} mutants, {len(alive):>3} survive", flush=True)
        for change in alive:
            reason = reasons.get(exercise, {}).get(change, "")
            bad += not reason
            print(f"    {change}\n        {reason or 'NO REASON'}", flush=True)
    print(f"{total} mutants; {bad} survivors without a reason.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
