"""The commands that execute and tidy a notebook, and the one that says whether a notebook is fit to be read.

    python -m qlora_edu.notebooks execute notebooks/08_finetune.ipynb
    python -m qlora_edu.notebooks tidy notebooks/08_finetune.ipynb
    python -m qlora_edu.notebooks check notebooks/*.ipynb
    python -m qlora_edu.notebooks release solutions exercises

`execute` formats, runs the cells from top to bottom in a fresh kernel of this environment, removes what differs
between two runs of the same code, and replaces the file in one step; when a cell fails, the file stays as it was.
Where the outputs are determined, executing twice gives the same bytes. `tidy` only removes, which is enough after
an edit of the text. `check` only reads, and runs as a test too. `release` makes the exercises from the solutions.
Read the modules in this order: `file`, `execution`, `hygiene`, `exercises`.
"""

from qlora_edu.notebooks.execution import BATCH_ENVIRONMENT, CELL_TIMEOUT_S, execute, run, tidy
from qlora_edu.notebooks.exercises import annotate, release, student_version
from qlora_edu.notebooks.file import NotebookError, code_hash, dump, normalise, parse, save
from qlora_edu.notebooks.hygiene import check

__all__ = [
    "BATCH_ENVIRONMENT",
    "CELL_TIMEOUT_S",
    "NotebookError",
    "annotate",
    "check",
    "code_hash",
    "dump",
    "execute",
    "normalise",
    "parse",
    "release",
    "run",
    "save",
    "student_version",
    "tidy",
]
