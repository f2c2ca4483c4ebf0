"""`python -m qlora_edu.claims`: recompute every claim and print it; exit status 1 if one does not stand."""

import sys
import textwrap

from qlora_edu import claims


def main() -> int:
    status = 0
    for entry in claims.entries().values():
        print(f"{entry.verdict:<10} {entry.id}")
        faults = entry.faults()
        for text in (entry.statement, *([entry.judge()] if not faults else faults)):
            print(textwrap.fill(text, 108, initial_indent=" " * 11, subsequent_indent=" " * 11))
        if faults:
            status = 1
    counts = claims.counts()
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    return status


if __name__ == "__main__":
    sys.exit(main())
