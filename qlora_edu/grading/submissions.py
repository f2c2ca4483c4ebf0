"""What was handed in: which file is whose, for which assignment, and what of it counts.

A submission is only ever read as data. What counts of it are its code cells (but for the checks, which the grader
calls itself) and its written answers; what stands in cells that the course wrote comes from the course's own copy.
"""

import ast
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat

from qlora_edu.notebooks.exercises import CHECK, WRITTEN_STUB, Part, parts, release_version, student_version
from qlora_edu.notebooks.file import NotebookError, dump, normalise, parse, read

LARGEST_BYTES = 20_000_000


@dataclass(frozen=True)
class Assignment:
    """A released notebook: `topic` as in "02_lora", its parts, and the cells that the course wrote, by id."""

    topic: str
    parts: tuple[Part, ...]
    given: dict[str, str] = field(hash=False)
    ids: dict[str, str] = field(hash=False)  # the part's id by the id of its cell, as released
    samples: dict[str, str] = field(hash=False)  # sample answers with their marking schemes, by the part's id
    version: str = ""


@dataclass(frozen=True)
class Submission:
    """A file that was handed in.

    Attributes:
        student, topic: whose, for which assignment.
        path: the file. sha256: of its bytes.
        problem: "" or why it cannot be graded.
        cells: sources of the code to run, in order; the first `given` of them are the course's.
        written: texts by the part's id.
        note: what an instructor should know, such as another version.
    """

    student: str
    topic: str
    path: Path
    sha256: str = ""
    problem: str = ""
    cells: tuple[str, ...] = ()
    given: int = 0
    written: dict[str, str] = field(default_factory=dict)
    note: str = ""


def file_name(student: str) -> str:
    """A name for a student's files: the student's own where it is harmless, else made so, and still nobody else's."""
    plain = re.sub(r"[^\w@-]+", "-", student).strip("-")[:80]
    if plain == student.lower():  # some file systems do not tell capitals from small letters
        return plain
    return f"{plain}-{hashlib.sha256(student.encode()).hexdigest()[:8]}"


@cache
def assignments(solutions: Path) -> dict[str, Assignment]:
    """Every assignment by its topic.

    Raises:
        NotebookError: if a solution does not hold what it should.
    """
    found = {}
    for path in sorted(solutions.glob("*/*.ipynb")):
        solution = parse(read(path), path.name)
        released = parse(dump(normalise(student_version(solution))), path.name)
        here = tuple(parts(solution))
        found[path.stem] = Assignment(
            path.stem,
            here,
            {cell.id: cell.source for cell in released.cells},
            {released.cells[part.answer].id: part.id for part in here},
            {part.id: solution.cells[part.answer].source for part in here if part.check is None},
            release_version(released),
        )
    if not found:
        raise NotebookError(f"{solutions}: expected solutions; there are none")
    return found


def collect(folder: Path, known: dict[str, Assignment]) -> tuple[list[Submission], list[str]]:
    """Every submission below a folder, and a line for each thing that is none.

    Understood are `<student>/02_lora.ipynb`, `<student>/02_lora/02_lora.ipynb` (nbgrader's), and `02_lora -
    student.ipynb` (what a learning platform's download makes). Of two files for one assignment the newer one counts.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"SUBMISSIONS: expected a folder; got {str(folder)!r}")
    newest: dict[tuple[str, str], Path] = {}
    ignored = []
    handed_in = {
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    }
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_symlink():
            ignored.append(f"{place}: a link, not followed")
        elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in place.parts:
            student, topic = _whose(place, known), _which(place, path, known)
            if topic not in known:
                ignored.append(f"{place}: for none of the assignments {', '.join(known)}")
                continue
            rival = newest.get((student, topic))
            if rival is not None:
                older, path = sorted((rival, path), key=lambda p: (p.stat().st_mtime_ns, str(p)))
                ignored.append(f"{older.relative_to(folder)}: {path.relative_to(folder)} is newer")
            newest[student, topic] = path
        elif path.is_file() and not any(name.startswith(".") for name in place.parts):
            ignored.append(f"{place}: no notebook")
    ignored += [
        f"{name}: holds no notebook" for name in sorted(handed_in - {student for student, _ in newest})
    ]
    return [read_submission(s, path, known[topic]) for (s, topic), path in sorted(newest.items())], ignored


def _whose(place: Path, known: dict[str, Assignment]) -> str:
    name = place.parts[0] if len(place.parts) > 1 else place.stem
    for topic in _topics(name, known) if len(place.parts) == 1 else ():
        name = name.replace(topic, " ")
    return unicodedata.normalize("NFC", name).strip(" -_.") or "unknown"


def _topics(name: str, known: dict[str, Assignment]) -> list[str]:
    return sorted((topic for topic in known if topic in name), key=len, reverse=True)


def _which(place: Path, path: Path, known: dict[str, Assignment]) -> str:
    for part in reversed(place.parts):
        for topic in _topics(part, known):
            return topic
    try:  # a renamed file: the ids of its parts tell
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""
    hits = {topic: sum(f'"{part.id}"' in text for part in a.parts) for topic, a in known.items()}
    best = max(hits, key=hits.get)
    return best if hits[best] else ""


def read_submission(student: str, path: Path, assignment: Assignment) -> Submission:
    """A submission's file as data; whatever is wrong with it stands in `problem`."""
    sha256 = ""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise NotebookError(f"the file has {path.stat().st_size:,} bytes, more than {LARGEST_BYTES:,}")
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        try:
            raw = json.loads(content)
            version = str(raw.get("metadata", {}).get("qlora_edu", {}).get("release", ""))
            ids = [str(cell.get("id", "")) for cell in raw["cells"]]
            notebook = parse(content.decode(), path.name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NotebookError(f"it is not a notebook: {error}") from None
    except (OSError, NotebookError) as error:
        problem = f"the file cannot be read: {str(error).replace(str(path), path.name)[:300]}"
        return Submission(student, assignment.topic, path, sha256, problem)
    given = _given_definitions(assignment)
    cells, written = [], {}
    for id, cell in zip(ids, notebook.cells, strict=True):
        if cell.cell_type == "code":
            own = id in assignment.ids or assignment.given.get(id) != cell.source
            if own and not _only_checks(cell.source):
                cells.append(cell.source)
        elif cell.cell_type == "markdown" and (part := _written_part(id, cell, assignment)):
            written[part] = cell.source
    texts = {part: text for part, text in written.items() if text.strip() not in ("", WRITTEN_STUB)}
    note = "made from another version of the exercises" if version and version != assignment.version else ""
    every = (*given, *cells)
    return Submission(student, assignment.topic, path, sha256, "", every, len(given), texts, note)


def _written_part(id: str, cell: nbformat.NotebookNode, assignment: Assignment) -> str | None:
    """Which written answer a Markdown cell is: by nbgrader's id, or by the released cell's own."""
    written = {part.id for part in assignment.parts if part.check is None}
    marked = cell.metadata.get("nbgrader", {})
    for candidate in (marked.get("grade_id") if isinstance(marked, dict) else None, assignment.ids.get(id)):
        if candidate in written:
            return candidate
    return None


def _given_definitions(assignment: Assignment) -> list[str]:
    """Imports, functions, classes and literal constants of the cells that the course wrote; nothing that computes."""
    sources = []
    for id, source in assignment.given.items():
        if id in assignment.ids or CHECK.search(source):
            continue
        try:
            body = ast.parse(source).body
        except SyntaxError:  # Markdown
            continue
        kept = [node for node in body if isinstance(node, _DEFINES) or _names_a_constant(node)]
        sources += [ast.get_source_segment(source, node) for node in kept]
    return sources


_DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def _names_a_constant(node: ast.stmt) -> bool:
    """Whether a statement is `NAME = literal`."""
    if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
        return False
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _only_checks(source: str) -> bool:
    """Whether a cell does nothing but call checks: the grader does that itself."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return all(isinstance(node, ast.Expr) and CHECK.match(ast.unparse(node)) for node in body)
