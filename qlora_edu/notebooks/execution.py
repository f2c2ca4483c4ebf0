"""Executing a notebook: formatted, linted, run in a fresh kernel, normalised, saved."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from qlora_edu.notebooks.exercises import annotate, is_solution
from qlora_edu.notebooks.file import NotebookError, code_hash, dump, normalise, parse, read, save

CELL_TIMEOUT_S = 600

# A batch run draws widgets once, shows no progress bars, asks no hub, and does not let OpenMP spin.
BATCH_ENVIRONMENT = {
    "QLORA_STATIC": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
}

COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class ThisPython(KernelSpecManager):
    """Starts the kernel of the environment that runs this command, whatever else is registered as python3."""

    def get_kernel_spec(self, kernel_name):
        return self.kernel_spec_class(resource_dir=RESOURCES, **get_kernel_dict())


def ruff(command: str, path: Path, text: str) -> str:
    """What `ruff <command>` makes of the text, judged as if it stood in the file at path."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", command, "--stdin-filename", str(path), "-"],
        input=text,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise NotebookError(
            f"{path} was not executed, because `ruff {command}` refuses it:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: float = CELL_TIMEOUT_S) -> None:
    """Execute the code cells in place, in a fresh kernel that starts in the folder.

    Raises NotebookError with the cell and its traceback when a cell fails, takes more than timeout seconds,
    or takes the kernel down.
    """
    begun = []
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython(), transport_encryption="auto"),
        on_cell_execute=lambda cell, cell_index: begun.append((cell_index + 1, cell.source)),
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(cleanup_kc=True, env=os.environ | BATCH_ENVIRONMENT)
    except (CellExecutionError, CellTimeoutError) as error:
        raise NotebookError(f"cell {begun[-1][0]}: {COLOUR_CODES.sub('', str(error))}") from None
    except DeadKernelError:
        number, source = begun[-1]
        raise NotebookError(f"cell {number} took the kernel down (out of memory?):\n{source}") from None
    except AssertionError as error:
        if client.km is None:  # what nbclient makes of Ctrl-C, after it has ended the kernel
            raise KeyboardInterrupt from None
        raise error


def tidy(path: Path) -> None:
    """Save the notebook as the project writes it, without executing: after an edit of the text alone."""
    save(path, dump(normalise(_marked(parse(read(path), path.name)))))


def execute(path: Path, timeout: float = CELL_TIMEOUT_S) -> None:
    """Format, lint, run, normalise and save one notebook. Raises NotebookError and leaves the file alone."""
    text = ruff("format", path, read(path))
    ruff("check", path, text)
    notebook = _marked(parse(text, path.name))
    notebook.metadata.pop("widgets", None)
    run(notebook, path.parent, timeout)
    notebook.metadata["qlora_edu"] = {"code_sha256": code_hash(notebook)}
    save(path, dump(normalise(notebook)))


def _marked(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook, with its answers and checks marked as such if it is a solution."""
    return annotate(notebook) if is_solution(notebook) else notebook
