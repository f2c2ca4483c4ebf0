"""What students receive, made from the solutions: `solutions/` is the only source, `exercises/` is never edited.

In a solution notebook

- a code cell with a region `### BEGIN SOLUTION` to `### END SOLUTION`, inside a function or class, is an answer;
  the region becomes `raise NotImplementedError`;
- the next code cell, `check.<topic>.<exercise>(<what the answer defines>)`, is its check; a region `### BEGIN
  HIDDEN TESTS` to `### END HIDDEN TESTS` in it is left out;
- a Markdown cell that begins with `<!-- written 02-init-why, 3 points -->` is a sample answer with its marking
  scheme; the student gets an empty cell;
- everything else is kept.

The cells' nbgrader metadata (ids, points, locks) follows from that and is written by `annotate`. The clearing is
nbgrader's own.
"""

import ast
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat

from qlora_edu.notebooks.file import NotebookError, dump, normalise, parse, read, save

BEGIN = "### BEGIN SOLUTION"
WRITTEN = re.compile(r"<!-- written (\d\d-[a-z0-9-]+), (\d+) points? -->\n")
CHECK = re.compile(r"^check\.([a-z0-9_]+)\.([a-z0-9_]+)\((\w+)", re.MULTILINE)
STUB = "raise NotImplementedError"
WRITTEN_STUB = "*Your answer, in three to six sentences.*"


@dataclass(frozen=True)
class Part:
    """A piece of a solution notebook that is worth points.

    Attributes:
        id: "02-forward", or that of a written answer. points: what it is worth.
        name: what the answer cell must define; "" for a written answer.
        answer: position of the answer's cell. check: that of the check's cell; None for a written answer.
    """

    id: str
    points: int
    name: str
    answer: int
    check: int | None


def is_solution(notebook: nbformat.NotebookNode) -> bool:
    return any(BEGIN in cell.source for cell in notebook.cells if cell.cell_type == "code")


def parts(notebook: nbformat.NotebookNode) -> list[Part]:
    """Every answer with its check, and every written answer, in order.

    Raises:
        NotebookError: names the cell and what is wrong there.
    """
    import qlora_edu.checks as check

    found, waiting, said = [], None, ""
    for position, cell in enumerate(notebook.cells):
        where = f"cell {position + 1}"
        if cell.cell_type == "markdown":
            said += cell.source + "\n"
            if match := WRITTEN.match(cell.source):
                found.append(Part(match[1], int(match[2]), "", position, None))
            elif "<!-- written" in cell.source:
                raise NotebookError(
                    f"{where}: expected `<!-- written 02-name, 3 points -->` as its first line"
                )
        if cell.cell_type != "code":
            continue
        calls = CHECK.findall(cell.source)
        if BEGIN in cell.source:
            if waiting is not None:
                raise NotebookError(f"cell {waiting + 1}: this answer has no check before the next answer")
            _check_regions(cell.source, where)
            waiting = position
        elif calls:
            topic, name, student = calls[0]
            exercise = getattr(getattr(check, topic, None), name, None)
            if not isinstance(exercise, check.Exercise):
                raise NotebookError(f"{where}: there is no exercise check.{topic}.{name}")
            if waiting is None:
                raise NotebookError(f"{where}: this check has no answer before it")
            if len(set(calls)) != 1:
                raise NotebookError(f"{where}: expected one check in a cell; got {len(set(calls))}")
            if student not in _defined(notebook.cells[waiting].source):
                raise NotebookError(
                    f"cell {waiting + 1}: does not define {student}, which cell {position + 1} checks"
                )
            heading = re.compile(
                rf"^## \d+ · {re.escape(exercise.title)}\n+{re.escape(exercise.header)}$", re.MULTILINE
            )
            if not heading.search(said):
                raise NotebookError(
                    f"{where}: expected a statement before it with the lines `## <number> · {exercise.title}` "
                    f"and `{exercise.header}`"
                )
            found.append(Part(exercise.id, exercise.points, student, waiting, position))
            waiting, said = None, ""
    if waiting is not None:
        raise NotebookError(f"cell {waiting + 1}: this answer has no check")
    for id, count in Counter(part.id for part in found).items():
        if count > 1:
            raise NotebookError(f"{id} stands there {count} times")
    return found


def annotate(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Write nbgrader's metadata into the cells, in place: ids, points and locks. NotebookError as `parts` does."""
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)
    for part in parts(notebook):
        cell = notebook.cells[part.answer]
        written = part.check is None
        cell.metadata["nbgrader"] = _metadata(
            part.id, cell, solution=True, points=part.points if written else None
        )
        if not written:
            cell = notebook.cells[part.check]
            cell.metadata["nbgrader"] = _metadata(
                f"{part.id}-check", cell, solution=False, points=part.points
            )
    return notebook


def _metadata(id: str, cell: nbformat.NotebookNode, solution: bool, points: int | None) -> dict:
    facts = {
        "grade_id": id,
        "grade": points is not None,
        "solution": solution,
        "locked": not solution,
        "task": False,
        "cell_type": cell.cell_type,
        "schema_version": 3,
    }
    return facts if points is None else facts | {"points": points}


def student_version(solution: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook that students receive: stubs for answers, no hidden part, no outputs. The solution is left alone.

    Raises:
        NotebookError: if the solution does not hold what it should (see above).
    """
    try:
        from nbgrader import preprocessors
    except ImportError:
        raise NotebookError("making exercises needs nbgrader: pip install -e '.[instructor]'") from None
    notebook = annotate(nbformat.from_dict(solution))
    resources: dict = {}
    steps = [
        preprocessors.LockCells(),
        preprocessors.ClearSolutions(code_stub={"python": STUB}, text_stub=WRITTEN_STUB),
        preprocessors.ClearHiddenTests(),
        preprocessors.ClearOutput(),
        preprocessors.CheckCellMetadata(),
        preprocessors.ComputeChecksums(),
    ]
    for step in steps:
        try:
            notebook, resources = step.preprocess(notebook, resources)
        except Exception as error:
            raise NotebookError(f"nbgrader's {type(step).__name__}: {error}") from None
    notebook.metadata.pop("widgets", None)
    notebook.metadata["qlora_edu"] = {"release": release_version(notebook)}
    return notebook


def release_version(notebook: nbformat.NotebookNode) -> str:
    """Tells one release of an exercise from another: a hash of all its cells."""
    sources = "\0".join(cell.source for cell in notebook.cells)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def release(solutions: Path, exercises: Path) -> list[Path]:
    """Write the student version of every `solutions/NN_topic/NN_topic.ipynb`, and copy the files beside it.

    Returns what was written. Whatever is wrong in a solution stops everything before anything is written.
    """
    made = {}
    for source in sorted(solutions.glob("*/*")):
        target = exercises / source.relative_to(solutions)
        if source.suffix == ".ipynb":
            if source.stem != source.parent.name:
                raise NotebookError(f"{source}: expected {source.parent.name}.ipynb in a folder of that name")
            try:
                made[target] = dump(
                    normalise(parse(dump(student_version(parse(read(source), source.name))), source.name))
                )
            except NotebookError as error:
                raise NotebookError(f"{source}: {error}") from None
        elif source.is_file() and not source.name.startswith("."):
            made[target] = source.read_bytes()
    if not made:
        raise NotebookError(f"{solutions}: expected folders with notebooks; there are none")
    for target, content in made.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            save(target, content)
        else:
            target.write_bytes(content)
    return list(made)


def _check_regions(source: str, where: str) -> None:
    """Regions are closed, and what stands in the place of each one, a stub, is inside a function."""
    begins, ends = source.count(BEGIN), source.count("### END SOLUTION")
    if begins != ends:
        raise NotebookError(f"{where}: {begins} times {BEGIN}, {ends} times ### END SOLUTION")
    for line in source.splitlines():
        if BEGIN in line and not line.startswith(" "):
            raise NotebookError(
                f"{where}: {BEGIN} must stand inside a function, so that the stub fails only when called"
            )


def _defined(source: str) -> set[str]:
    """The functions and classes that a cell defines at its top level."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise NotebookError(f"an answer is not Python: {error}") from None
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
