"""`python -m qlora_edu.notebooks execute | tidy | check NOTEBOOK...`, or `release SOLUTIONS EXERCISES`."""

import argparse
import sys
import time
from pathlib import Path

from qlora_edu.notebooks import CELL_TIMEOUT_S, NotebookError, check, execute, release, tidy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_edu.notebooks", description="Execute, tidy or check notebooks."
    )
    parser.add_argument("action", choices=["execute", "tidy", "check", "release"])
    parser.add_argument("notebooks", nargs="+", type=Path, help="notebooks; for release, two folders")
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT_S, help="seconds a cell may take")
    options = parser.parse_args(arguments)
    if options.action == "release":
        if len(options.notebooks) != 2:
            parser.error("release: expected two folders, that of the solutions and that of the exercises")
        try:
            for path in release(*options.notebooks):
                print(path)
        except NotebookError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    faults = 0
    for path in options.notebooks:
        try:
            if options.action == "execute":
                print(f"{path}: executing", flush=True)
                start = time.monotonic()
                execute(path, options.timeout)
                print(f"{path}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")
            elif options.action == "tidy":
                tidy(path)
            problems = check(path)
        except NotebookError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{path}: interrupted; the file is as it was", file=sys.stderr)
            return 130
        for problem in problems:
            print(f"{path}: {problem}", file=sys.stderr)
        faults += len(problems)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
