"""A notebook as a file: read, named cell by cell, freed of what changes from run to run, replaced in one step."""

import copy
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import nbformat

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
LEFT_BY_EDITORS = ("execution", "ExecuteTime", "trusted", "scrolled", "collapsed")


class NotebookError(RuntimeError):
    """A notebook that cannot be read, formatted or executed; the message says which, where and why."""


def read(path: Path) -> str:
    if path.suffix != ".ipynb":
        raise NotebookError(f"{path} is not a notebook: its name must end in .ipynb")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotebookError(f"{path} cannot be read: {error}") from error


def parse(text: str, name: str) -> nbformat.NotebookNode:
    """The notebook in a file's text, its cells named after their contents.

    A cell's id is a hash of its source: the same cells have the same ids in whatever editor they were made.
    """
    try:
        raw = json.loads(text)
        seen = Counter()
        for cell in raw["cells"]:
            source = "".join(cell["source"])
            cell_id = hashlib.sha256(f"{cell['cell_type']}\n{source}".encode()).hexdigest()[:8]
            seen[cell_id] += 1
            cell["id"] = cell_id if seen[cell_id] == 1 else f"{cell_id}-{seen[cell_id]}"
        raw["nbformat_minor"] = max(5, raw["nbformat_minor"])
        notebook = nbformat.reads(json.dumps(raw), as_version=4)
        nbformat.validate(notebook)
    except (ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise NotebookError(f"{name} is not a notebook of format 4: {error}") from error
    return notebook


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over the sources of the code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without what changes from run to run or from editor to editor: timings, versions, widget ids."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata |= {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    for cell in notebook.cells:
        for key in LEFT_BY_EDITORS:
            cell.metadata.pop(key, None)
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    text = nbformat.writes(notebook)
    for number, widget in enumerate(widgets):
        text = text.replace(widget, f"{number:032x}")
    return nbformat.reads(text, as_version=4)


def dump(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def save(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old notebook or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
