"""What a committed notebook must be: fresh, clean, readable. Looking needs no kernel."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

from qlora_edu.notebooks.file import code_hash, dump, normalise, parse, read

LARGEST_BYTES = 1_000_000

MACHINE_PATH = re.compile(
    r"(?<![\w.~])/(?:home|Users|root|tmp|work|mnt|opt|var/folders)(?:/|\b)|\b[A-Z]:\\+Users"
)
NO_ALT = re.compile(r"!\[\s*\]\(|<img(?![^>]*\balt=)")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
INSTALLS = re.compile(r"^\s*(?:!|%{1,2}(?:pip|conda|mamba|uv|load_ext)\b)|\bpip3? install\b", re.MULTILINE)


def check(path: Path) -> list[str]:
    """What keeps a committed notebook from being fresh, clean and readable; empty when nothing does."""
    text = read(path)
    notebook = parse(text, path.name)
    problems = []
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        problems.append("the first cell is not a title: begin with a Markdown cell `# Title`")
    counter = 0
    for number, cell in enumerate(notebook.cells, start=1):
        where = f"cell {number}"
        if cell.cell_type == "code":
            counter += 1
            if cell.execution_count != counter:
                problems.append(
                    f"{where} was not executed in order (count {cell.execution_count}, not {counter})"
                )
            problems += [f"{where} {problem}" for problem in code_cell_problems(cell)]
        elif NO_ALT.search(cell.source):
            problems.append(f"{where} shows a picture without a text description: ![description](file)")
        shown = "\n".join(texts(cell))
        for pattern, what in ((MACHINE_PATH, "a path of one machine"), (ADDRESS, "an object's address")):
            if found := pattern.search(shown):
                problems.append(f"{where} shows {what}: {found.group()!r}")
    if notebook.metadata.get("qlora_edu", {}).get("code_sha256") != code_hash(notebook):
        problems.append("the code was changed after it was last executed: run `make notebooks NB=...`")
    elif text != dump(normalise(notebook)):
        problems.append(
            "the file is not as the project writes it (an editor's traces): run `make tidy NB=...`"
        )
    if len(text.encode()) > LARGEST_BYTES:
        problems.append(
            f"the file has {len(text.encode()):,} bytes, more than {LARGEST_BYTES:,}: draw fewer or smaller"
        )
    return problems


def texts(cell: nbformat.NotebookNode) -> Iterator[str]:
    """Every text that a reader of the cell sees: its source, then its outputs."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from output.get("traceback", [])
        yield from (
            str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/")
        )


def code_cell_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    if not cell.source.strip():
        yield "is empty: remove it"
    if INSTALLS.search(cell.source):
        yield "installs, loads or shells out: notebooks import what `make lab` installed, and nothing else"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"ended in {output.ename}: mend it, or catch the error and print what is to be learned"
        if output.get("name") == "stderr":
            yield f"wrote to stderr: {output.text.strip()[:90]!r}"
        if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
            yield "shows a figure without a text description: show it with plots.show(figure, caption)"
