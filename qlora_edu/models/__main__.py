"""`python -m qlora_edu.models fetch | status | path`: the default model from the command line."""

import argparse
import sys

from qlora_edu.models import ModelError, fetch, status

DESCRIPTION = "The language model of the course: fetch it, see whether it is ready, find its folder."
EXITS = "Exit status: 0 ready, 1 not ready or failed, 2 wrong usage, 130 interrupted."


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser("python -m qlora_edu.models", description=DESCRIPTION, epilog=EXITS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch|status|path")
    commands.add_parser(
        "fetch", help="verify every byte of the cached model; download and convert it if needed"
    )
    show = commands.add_parser("status", help="say whether the cached model is ready")
    show.add_argument("--full", action="store_true", help="verify every byte, not only the sizes")
    commands.add_parser("path", help="print the folder of the cached model")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "fetch":
            print(fetch(full=True))
            return 0
        return _show(full=chosen.full) if chosen.command == "status" else _path()
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left to be believed", file=sys.stderr)
        return 130


def _show(full: bool) -> int:
    found = status(full)
    print(f"{found.state}: {found.folder} ({found.bytes / 1e6:.1f} MB; {found.detail})")
    if found.remedy:
        print(found.remedy)
    return 0 if found.state == "ready" else 1


def _path() -> int:
    found = status()
    if found.state != "ready":
        raise ModelError(f"the model in {found.folder} is {found.state}: {found.detail}. {found.remedy}")
    print(found.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
