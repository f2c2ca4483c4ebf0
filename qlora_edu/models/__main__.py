"""`python -m qlora_edu.models fetch | status | path [NAME]`: the models from the command line."""

import argparse
import sys

from qlora_edu.models import SMOLLM2, SOURCES, ModelError, fetch, status

DESCRIPTION = "The models of the course: fetch them, see whether they are ready, find their folders."
EXITS = "Exit status: 0 ready, 1 not ready or failed, 2 wrong usage, 130 interrupted."


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser("python -m qlora_edu.models", description=DESCRIPTION, epilog=EXITS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch|status|path")
    get = commands.add_parser(
        "fetch", help="verify every byte of what is cached; download and convert the rest"
    )
    show = commands.add_parser("status", help="say whether the models are ready")
    show.add_argument("--full", action="store_true", help="verify every byte, not only the sizes")
    path = commands.add_parser("path", help="print the folder of a cached model")
    for command, default, means in ((get, None, "all"), (show, None, "all"), (path, SMOLLM2, SMOLLM2)):
        one = f"one of {', '.join(SOURCES)} (default: {means})"
        command.add_argument("name", nargs="?", choices=[*SOURCES], metavar="NAME", default=default, help=one)
    chosen = parser.parse_args(arguments)
    names = [chosen.name] if chosen.name else [*SOURCES]
    try:
        if chosen.command == "fetch":
            for name in names:
                print(fetch(name, full=True), flush=True)
            return 0
        return (
            _path(chosen.name)
            if chosen.command == "path"
            else max(_show(name, chosen.full) for name in names)
        )
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left to be believed", file=sys.stderr)
        return 130


def _show(name: str, full: bool) -> int:
    found = status(name, full=full)
    print(f"{found.state}: {found.folder} ({found.bytes / 1e6:.1f} MB; {found.detail})")
    if found.remedy:
        print(found.remedy)
    return 0 if found.state == "ready" else 1


def _path(name: str) -> int:
    found = status(name)
    if found.state != "ready":
        raise ModelError(f"the model in {found.folder} is {found.state}: {found.detail}. {found.remedy}")
    print(found.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
