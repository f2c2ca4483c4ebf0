"""The exercises are what the solutions make of them and run as handed out; broken sources are refused."""

import copy
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import qlora_edu.checks as check
from qlora_edu import notebooks
from qlora_edu.notebooks import NotebookError
from qlora_edu.notebooks.__main__ import main
from qlora_edu.notebooks.exercises import WRITTEN_STUB, parts, release, student_version
from qlora_edu.notebooks.file import dump, parse, read

ROOT = Path(__file__).parents[1]
SOLUTIONS = sorted((ROOT / "solutions").glob("*/*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("*/*.ipynb"))

LINE = check.lora.forward.header
HEADER = f"## 1 · The forward pass\n\n{LINE}\n\nWrite it."
ANSWER = "def f(x, weight, a, b, alpha, r):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION"
CHECK = (
    "check.lora.forward(f)\n### BEGIN HIDDEN TESTS\ncheck.lora.forward(f, hidden=True)\n### END HIDDEN TESTS"
)
WRITTEN = "<!-- written 02-why, 3 points -->\n**Sample answer (3 points).** Because."


def solution(*cells) -> nbformat.NotebookNode:
    made = [new_markdown_cell(c) if c.startswith(("# ", "## ", "<!--")) else new_code_cell(c) for c in cells]
    return new_notebook(cells=[new_markdown_cell("# Exercises"), *made])


def good() -> nbformat.NotebookNode:
    return solution(HEADER, ANSWER, CHECK, WRITTEN)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_committed_solution_is_fresh_clean_readable_and_marked(path):
    assert notebooks.check(path) == []
    notebook = parse(read(path), path.name)
    marked = copy.deepcopy(notebook)
    notebooks.annotate(marked)
    assert dump(marked) == dump(notebook)


def test_the_exercises_are_what_the_solutions_make_of_them(tmp_path):
    made = release(ROOT / "solutions", tmp_path)
    assert {p.relative_to(tmp_path) for p in made} == {
        p.relative_to(ROOT / "exercises") for p in (ROOT / "exercises").glob("*/*") if p.is_file()
    }
    for path in made:
        committed = ROOT / "exercises" / path.relative_to(tmp_path)
        assert path.read_bytes() == committed.read_bytes(), f"run `make release`: {committed.name} differs"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_chapter_has_three_to_six_exercises_and_a_written_answer(path):
    found = parts(parse(read(path), path.name))
    assert 3 <= sum(part.check is not None for part in found) <= 8
    assert any(part.check is None for part in found)


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_an_exercise_gives_nothing_away_and_runs_as_it_is_handed_out(path, tmp_path):
    notebook = parse(read(path), path.name)
    text = dump(notebook)
    for word in ("BEGIN SOLUTION", "HIDDEN", "hidden=True", "Sample answer", "<!-- written"):
        assert word not in text
    for file in path.parent.iterdir():
        if file.is_file():  # no folder of an editor
            shutil.copy(file, tmp_path)
    notebooks.run(notebook, tmp_path, timeout=120)  # raises where a cell fails
    checks = [c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("check.")]
    assert checks
    for cell in checks:
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert "not attempted yet." in said and "NotImplementedError" in said, said


def test_the_student_gets_stubs_and_keeps_the_rest():
    source = good()
    before = dump(source)
    made = student_version(source)
    assert dump(source) == before, "the solution is left alone"
    assert [c.source for c in made.cells] == [
        "# Exercises",
        HEADER,
        "def f(x, weight, a, b, alpha, r):\n    raise NotImplementedError",
        "check.lora.forward(f)",
        WRITTEN_STUB,
    ]
    marks = [c.metadata.get("nbgrader", {}) for c in made.cells]
    assert [m.get("grade_id") for m in marks] == [None, None, "02-forward", "02-forward-check", "02-why"]
    assert [m.get("points") for m in marks] == [None, None, None, 2, 3]
    assert made.cells[3].metadata["editable"] is False and made.cells[2].metadata["deletable"] is False


def test_made_twice_it_is_the_same_and_another_text_is_another_release():
    once, twice = student_version(good()), student_version(good())
    assert [c.source for c in once.cells] == [c.source for c in twice.cells]
    assert once.metadata["qlora_edu"] == twice.metadata["qlora_edu"]
    other = student_version(solution(HEADER + " Now.", ANSWER, CHECK, WRITTEN))
    assert other.metadata["qlora_edu"] != once.metadata["qlora_edu"]


BROKEN = {
    "this answer has no check": (HEADER, ANSWER),
    "no check before the next answer": (HEADER, ANSWER, ANSWER, CHECK),
    "this check has no answer before it": (HEADER, CHECK),
    "there is no exercise check.lora.backward": (HEADER, ANSWER, "check.lora.backward(f)"),
    "there is no exercise check.nothing.forward": (HEADER, ANSWER, "check.nothing.forward(f)"),
    "does not define g, which cell 4 checks": (HEADER, ANSWER, "check.lora.forward(g)"),
    "expected one check in a cell; got 2": (HEADER, ANSWER, "check.lora.forward(f)\ncheck.lora.init(f)"),
    "02-forward stands there 2 times": (HEADER, ANSWER, CHECK, HEADER, ANSWER, CHECK),
    "expected a statement before it": (f"## 1 · Another\n\n{LINE}", ANSWER, CHECK),
    LINE: ("## 1 · The forward pass\n\n★☆☆ · 99 minutes · 2 points", ANSWER, CHECK),
    "1 times ### BEGIN SOLUTION, 0 times": (HEADER, ANSWER.replace("    ### END SOLUTION", ""), CHECK),
    "must stand inside a function": (HEADER, "### BEGIN SOLUTION\nf = 1\n### END SOLUTION", CHECK),
    "an answer is not Python": (HEADER, ANSWER.replace("(x,", "(x"), CHECK),
    "expected `<!-- written 02-name, 3 points -->`": (
        HEADER,
        ANSWER,
        CHECK,
        "# Why\n<!-- written 02-why -->",
    ),
    "No end hidden tests": (HEADER, ANSWER, "check.lora.forward(f)\n### BEGIN HIDDEN TESTS"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_source_is_refused_with_the_cell_and_the_reason(reason):
    with pytest.raises(NotebookError) as error:
        student_version(solution(*BROKEN[reason]))
    assert reason in str(error.value)


def test_one_broken_source_stops_all_before_anything_is_written(tmp_path, capsys):
    for name, notebook in {"01_good": good(), "02_bad": solution(HEADER, ANSWER)}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        nbformat.write(notebook, tmp_path / "in" / name / f"{name}.ipynb")
    assert main(["release", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "02_bad.ipynb: cell 3: this answer has no check" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_beside_a_solution_go_along_and_a_misnamed_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "in" / "02_lora"
    folder.mkdir(parents=True)
    nbformat.write(good(), folder / "02_lora.ipynb")
    (folder / "task.csv").write_text("a,b\n")
    assert main(["release", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "02_lora" / "task.csv").read_text() == "a,b\n"
    nbformat.write(good(), folder / "03_other.ipynb")
    assert main(["release", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "expected 02_lora.ipynb in a folder of that name" in capsys.readouterr().err
    assert main(["release", str(tmp_path / "none"), str(tmp_path / "out")]) == 1


def test_release_takes_two_folders(capsys):
    with pytest.raises(SystemExit):
        main(["release", "solutions"])
    assert "expected two folders" in capsys.readouterr().err


def test_nbgrader_itself_grades_the_solution_full_and_the_untouched_exercise_nothing(tmp_path, monkeypatch):
    """What a hub's nbgrader does with these notebooks: its own autograding, in its own gradebook."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("QLORA_EDU_GRADING", "1")
    monkeypatch.setenv("QLORA_EDU_SECRET", "a secret of this test")
    topic = "02_lora"
    (tmp_path / "solutions" / topic).mkdir(parents=True)
    shutil.copy(ROOT / "solutions" / topic / f"{topic}.ipynb", tmp_path / "solutions" / topic)
    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.source_directory = "solutions"
    config.CourseDirectory.release_directory = "exercises"
    config.CourseDirectory.db_url = f"sqlite:///{tmp_path / 'gradebook.db'}"
    config.ExecutePreprocessor.timeout = 60
    api = NbGraderAPI(config=config)
    assert api.generate_assignment(topic)["success"]
    for student, source in {"ann": "solutions", "bob": "exercises"}.items():
        (tmp_path / "submitted" / student / topic).mkdir(parents=True)
        shutil.copy(tmp_path / source / topic / f"{topic}.ipynb", tmp_path / "submitted" / student / topic)
        assert api.autograde(topic, student)["success"]
    with Gradebook(config.CourseDirectory.db_url) as book:
        code = {s: book.find_submission(topic, s).code_score for s in ("ann", "bob")}
        most = book.find_submission(topic, "ann").max_code_score
    assert code == {"ann": most, "bob": 0} and most == 15
