"""A whole class graded: nobody lost, nobody harmed, the gradebook right, and the hidden part hidden."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_edu.grading import report
from qlora_edu.grading.__main__ import main
from qlora_edu.grading.batch import own_secret
from qlora_edu.grading.grade import PartResult, Result
from qlora_edu.grading.sandbox import landlock_version
from qlora_edu.grading.submissions import assignments, collect, file_name
from qlora_edu.grading.values import Unreadable, decode, encode
from tests import classroom
from tests.classroom import CLASS, TOPIC, UNREADABLE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The class, graded by the command after it was killed half-way: (folder of submissions, of grades, the canary)."""
    folder = tmp_path_factory.mktemp("class")
    canary = folder / "canary.txt"
    canary.write_text("alive")
    classroom.hand_in(folder / "in", canary)
    out = folder / "out"
    command = [
        sys.executable,
        "-m",
        "qlora_edu.grading",
        str(folder / "in"),
        "--out",
        str(out),
        "--seconds",
        "2",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        while len(list((out / "results").glob("*.json"))) < 5 and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    early = {file: file.stat().st_mtime_ns for file in (out / "results").glob("*.json")}
    assert 5 <= len(early) < len(CLASS), "killed half-way"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert all(file.stat().st_mtime_ns == at for file, at in early.items()), "what was graded stays"
    return folder / "in", out, canary, done


def rows(out: Path) -> dict[str, dict[str, dict]]:
    with (out / "grades.csv").open(encoding="utf-8-sig", newline="") as lines:
        by = {}
        for row in csv.DictReader(lines):
            by.setdefault(row["student"], {})[row["part"]] = row
        return by


def test_nobody_is_lost(graded):
    assert len(CLASS) + len(UNREADABLE) >= 30
    assert set(rows(graded[1])) == set(CLASS) | set(UNREADABLE)
    assert all(len(parts) == 7 for parts in rows(graded[1]).values())


@pytest.mark.parametrize("name", CLASS)
def test_each_gets_what_was_earned(graded, name):
    student, got = CLASS[name], rows(graded[1])[name]
    got = {id: row for id, row in got.items() if id != "02-init-why"}
    assert {id for id, row in got.items() if row["status"] == "passed"} == student.passes, got
    assert {id: got[id]["status"] for id in student.status} == student.status
    for id, row in got.items():
        assert float(row["points"]) == (float(row["of"]) if id in student.passes else 0)
        assert float(row["of"]) <= 4


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_notebook_gets_a_row_and_a_reason(graded, name):
    assert {row["status"] for row in rows(graded[1])[name].values()} == {"unreadable"}
    page = (graded[1] / "feedback" / file_name(name) / f"{TOPIC}.html").read_text()
    assert "the file cannot be read" in page


def test_the_machine_and_the_others_are_as_they_were(graded):
    folder, _, canary, _ = graded
    assert canary.read_text() == "alive" and not canary.with_name("canary.txt.made").exists()
    assert len(list(folder.rglob("*.ipynb"))) == len(CLASS) + len(UNREADABLE)
    assert (ROOT / "solutions" / TOPIC / f"{TOPIC}.ipynb").stat().st_size > 10_000
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert left == []


def test_neither_the_secret_nor_the_hidden_part_is_told(graded):
    out = graded[1]
    secret = (out / "secret.txt").read_text().strip()
    assert len(secret) == 32
    if os.name == "posix":
        assert (out / "secret.txt").stat().st_mode & 0o077 == 0
    for file in out.rglob("*"):
        if file.is_file() and file.name != "secret.txt":
            assert secret not in file.read_text(encoding="utf-8-sig"), file
    page = (out / "feedback" / file_name("knows the inputs") / f"{TOPIC}.html").read_text()
    assert "not with other inputs" in page and "Expected" not in page


def test_feedback_says_what_failed_and_the_hint(graded):
    page = (graded[1] / "feedback" / file_name("alpha forgotten") / f"{TOPIC}.html").read_text()
    assert "Multiply it by alpha / r" in page and "Expected" in page
    page = (graded[1] / "feedback" / file_name("plagiarist") / f"{TOPIC}.html").read_text()
    assert "Write it yourself" in page
    page = (graded[1] / "feedback" / file_name("older version") / f"{TOPIC}.html").read_text()
    assert "another version" in page


def test_what_a_student_wrote_is_inert_in_pages_and_tables(graded):
    out = graded[1]
    page = (out / "feedback" / file_name("html and formula") / f"{TOPIC}.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    with (out / "marks.csv").open(encoding="utf-8-sig", newline="") as lines:
        answers = {row["student"]: row["answer"] for row in csv.DictReader(lines)}
    assert answers["html and formula"].startswith("'=HYPERLINK")


def test_the_written_answers_stand_below_the_sample(graded):
    page = (graded[1] / f"written_{TOPIC}.html").read_text()
    assert "Sample answer (3 points)" in page and "html and formula" in page


def test_totals_add_up(graded):
    with (graded[1] / "totals.csv").open(encoding="utf-8-sig", newline="") as lines:
        totals = {row["student"]: float(row["sum"]) for row in csv.DictReader(lines)}
    for name, parts in rows(graded[1]).items():
        assert totals[name] == sum(float(row["points"] or 0) for row in parts.values())
    content = json.loads((graded[1] / "grades.json").read_text())
    assert len(content["results"]) == len(totals)


def test_graded_again_nothing_is_computed_and_nothing_changes(graded):
    folder, out, _, _ = graded
    before = {f: f.stat().st_mtime_ns for f in (out / "results").glob("*.json")}
    table = (out / "grades.csv").read_bytes()
    assert main([str(folder), "--out", str(out), "--seconds", "2"]) == 0
    assert {f: f.stat().st_mtime_ns for f in (out / "results").glob("*.json")} == before
    assert (out / "grades.csv").read_bytes() == table


def test_marks_are_taken_over_and_kept(graded, tmp_path):
    folder = graded[0]
    one = tmp_path / "in"
    (one / "ann").mkdir(parents=True)
    notebook = json.loads((folder / "all right" / f"{TOPIC}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == "02-init-why":
            cell["source"] = "Because."
    (one / "ann" / f"{TOPIC}.ipynb").write_text(json.dumps(notebook))
    assert main([str(one), "--out", str(tmp_path / "out")]) == 0
    marks = tmp_path / "out" / "marks.csv"
    lines = list(csv.DictReader(marks.open(encoding="utf-8-sig", newline="")))
    assert [(row["student"], row["part"], row["points"]) for row in lines] == [("ann", "02-init-why", "")]
    lines[0].update(points="2.5", comment="Which gradient?")
    with marks.open("w", newline="") as out_file:
        writer = csv.DictWriter(out_file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    for _ in range(2):
        assert main([str(one), "--out", str(tmp_path / "out")]) == 0
        assert rows(tmp_path / "out")["ann"]["02-init-why"]["points"] == "2.5"
    assert "Which gradient?" in (tmp_path / "out" / "feedback" / "ann" / f"{TOPIC}.html").read_text()
    kept = marks.read_text(encoding="utf-8-sig")

    def graded_with(text: str) -> int:
        marks.write_text(text)
        return main([str(one), "--out", str(tmp_path / "out")])

    header, row = kept.splitlines()[:2]
    for refused in (
        kept.replace("2.5", "9"),
        kept.replace("points", "Punkte"),
        "",
        f"{kept}{row.replace('2.5', '1')}\n",
    ):
        assert graded_with(refused) == 1
        assert marks.read_text() == refused, "what was refused is left as it is"
    assert graded_with(kept.replace(",", ";")) == 0
    assert rows(tmp_path / "out")["ann"]["02-init-why"]["points"] == "2.5"
    assert graded_with(f"{header}\n{row.replace('ann', 'Ann')}\n") == 0
    assert "Ann,02_lora,02-init-why,2.5" in marks.read_text(encoding="utf-8-sig"), "what fits nobody is kept"
    assert "Ann" in (tmp_path / "out" / "marks.csv~").read_text(encoding="utf-8-sig")
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "out")]) == 1, (
        "no submissions: nothing is touched"
    )
    assert graded_with(kept) == 0
    (one / "ann" / f"{TOPIC}.ipynb").write_text(json.dumps(notebook).replace("Because.", "Something else."))
    assert graded_with(kept) == 0
    assert rows(tmp_path / "out")["ann"]["02-init-why"]["status"] == "to be marked", (
        "it is another answer now"
    )
    assert "since it got 2.5" in marks.read_text(encoding="utf-8-sig")


def test_submissions_are_found_in_every_usual_layout(tmp_path):
    known = assignments(ROOT / "solutions")
    content = (ROOT / "exercises" / TOPIC / f"{TOPIC}.ipynb").read_bytes()
    for place in ("ann/02_lora.ipynb", "bob/02_lora/02_lora.ipynb", "02_lora - Zoë Ó Néill.ipynb", "02_lora_carl.ipynb",
                  "dora/homework.ipynb",
                  "notes.zip", "x y/02_lora.ipynb", "x-y/02_lora.ipynb",
                  "ann/.ipynb_checkpoints/02_lora-checkpoint.ipynb"):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "other.ipynb").write_text("{}")
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "02_lora.ipynb").symlink_to(ROOT / "solutions" / TOPIC / f"{TOPIC}.ipynb")
    found, ignored = collect(tmp_path, known)
    students = [s.student for s in found]
    assert sorted(students) == sorted(["ann", "bob", "Zoë Ó Néill", "carl", "dora", "x y", "x-y"])
    assert len({file_name(student) for student in students}) == len(students)
    said = "\n".join(ignored)
    assert (
        "eve/02_lora.ipynb: a link" in said
        and "nothing: holds no notebook" in said
        and "other.ipynb: for none" in said
    )


def test_of_two_files_the_newer_counts(tmp_path):
    known = assignments(ROOT / "solutions")
    content = (ROOT / "exercises" / TOPIC / f"{TOPIC}.ipynb").read_bytes()
    for age, name in ((100, "02_lora.ipynb"), (50, "02_lora (1).ipynb")):
        (tmp_path / "ann").mkdir(exist_ok=True)
        (tmp_path / "ann" / name).write_bytes(content)
        os.utime(tmp_path / "ann" / name, (time.time() - age,) * 2)
    found, ignored = collect(tmp_path, known)
    assert [s.path.name for s in found] == ["02_lora (1).ipynb"] and "is newer" in ignored[0]


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "expected a folder" in capsys.readouterr().err


def test_the_secret_is_made_once(tmp_path):
    assert own_secret(tmp_path / "secret.txt") == own_secret(tmp_path / "secret.txt")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(plain)
def test_plain_values_survive_the_way(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
)
def test_tensors_survive_the_way(dtype):
    value = {
        "a": [torch.arange(6).reshape(2, 3).to(dtype).T],
        "d": dtype,
        "e": torch.empty(0, 3, dtype=dtype),
    }
    back = decode(encode(value))
    assert torch.equal(back["a"][0], value["a"][0]) and back["d"] is dtype and back["e"].shape == (0, 3)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(message):
    try:
        decode(message)
    except Unreadable:
        pass


def test_what_is_no_plain_value_is_refused():
    loop = []
    loop.append(loop)
    for value in (object(), loop, {1, 2}, torch.ones(2).to_sparse()):
        with pytest.raises(Unreadable):
            encode(value)


def test_the_fence_is_the_kernels_where_it_can_be():
    if sys.platform == "linux" and landlock_version() == 0:
        pytest.skip("this kernel has no Landlock; the audit hooks were tested alone")
    assert sys.platform != "linux" or landlock_version() >= 1


def test_a_page_of_feedback_without_answers_is_whole():
    result = Result("ann", TOPIC, "", "", [PartResult("02-forward", "passed", 2, 2, "Passed.")])
    page = report.feedback(result)
    assert page.startswith("<!doctype html>") and "2 of 2 points" in page


def test_the_solutions_of_every_chapter_get_full_points(tmp_path):
    for path in (ROOT / "solutions").glob("*/*.ipynb"):
        (tmp_path / "in" / "reference").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "reference" / path.name).write_bytes(path.read_bytes())
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    got = rows(tmp_path / "out")["reference"]
    assert len(got) > 50
    assert {
        id: row["status"] for id, row in got.items() if row["status"] not in ("passed", "to be marked")
    } == {}
