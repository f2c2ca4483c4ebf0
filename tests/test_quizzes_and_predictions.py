"""Every question is whole; a prediction is kept, shown again, and never stops a run."""

import json
import re
from pathlib import Path

import pytest

from qlora_edu import checks, quizzes
from qlora_edu import progress as own_record
from qlora_edu.predictions import outcome, predict
from qlora_edu.quizzes import questions, quiz

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_every_question_has_an_explanation_for_each_choice():
    assert len(questions()) >= 6
    for question in questions().values():
        assert len(question.choices) >= 3
        assert question.choices.keys() == question.explanations.keys()
        assert all(len(text) > 30 for text in question.explanations.values()), question.id


def test_right_answers_do_not_always_stand_in_the_same_place():
    assert len({question.right for question in questions().values()}) >= 3


def test_every_question_is_asked_in_its_chapter():
    for question in questions():
        asking = [p for p in NOTEBOOKS if f'quiz(\\"{question}\\"' in p.read_text()]
        assert [p.stem[:2] for p in asking] == [question[:2]], question


def shown(monkeypatch, *arguments):
    seen = []
    monkeypatch.setattr(quizzes, "display", lambda content: seen.append(content.data))
    quiz(*arguments)
    return seen[0]


def test_an_answer_is_judged(monkeypatch):
    question = questions()["08-scored"]
    assert question.text in shown(monkeypatch, "08-scored")
    for letter in question.choices:
        text = shown(monkeypatch, "08-scored", letter.upper())
        assert question.explanations[letter] in text
        assert text.startswith("**Right." if letter == question.right else "**Not quite.")


@pytest.mark.parametrize("arguments", [("08-nothing",), ("08-scored", "z"), ("08-scored", 3)])
def test_an_unknown_question_or_letter_is_named(arguments):
    with pytest.raises(ValueError, match=re.escape(repr(arguments[-1]))):
        quiz(*arguments)


@pytest.fixture
def progress(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EDU_PROGRESS", str(tmp_path / "folder" / "progress.json"))
    monkeypatch.delenv("QLORA_STATIC", raising=False)
    return tmp_path / "folder" / "progress.json"


def test_a_prediction_is_shown_beside_the_outcome(progress, capsys):
    predict("x", 60, unit="%")
    outcome("x", 88.5)
    assert capsys.readouterr().out == "Written down: 60%.\nIt is 88.5%.\nYou predicted 60%.\n"
    predict("x", 70, unit="%")
    assert json.loads(progress.read_text()) == {"x": {"value": 70, "unit": "%", "outcome": 88.5}}


def test_no_prediction_is_fine(progress, capsys):
    predict("y", ...)
    outcome("y", 3, unit="MB")
    assert capsys.readouterr().out.splitlines()[-1] == "It is 3 MB."
    assert not progress.exists()


def test_a_batch_run_leaves_no_trace(progress, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_STATIC", "1")
    predict("x", 60)
    outcome("x", 61)
    assert "You predicted" not in capsys.readouterr().out
    assert not progress.exists()


def test_a_damaged_or_unwritable_file_stops_nothing(progress, monkeypatch, capsys):
    progress.parent.mkdir()
    progress.write_text("{")
    predict("x", 60)
    assert json.loads(progress.read_text())["x"]["value"] == 60

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(own_record, "write_whole", refuse)
    predict("x", 61)
    assert "could not be kept" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["60", None, True])
def test_a_prediction_is_a_number(progress, value):
    with pytest.raises(TypeError, match="expected a number"):
        predict("x", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_prediction_is_finite(progress, value):
    with pytest.raises(ValueError, match="expected a finite number"):
        predict("x", value)


def test_the_record_shows_what_was_predicted_and_what_came_out(progress, monkeypatch):
    predict("01-memory", 60, unit="GB")
    outcome("01-memory", 48.0)
    predict("08-exact", 80, unit="%")
    outcome("08-exact", 88.5)
    predict("02-rank", 8)
    seen = []
    monkeypatch.setattr(own_record, "display", lambda content: seen.append(content.data))
    own_record.record()
    rows = seen[0].splitlines()
    assert "| 01-memory | 60 GB | 48 GB | a factor of 1.2 |" in rows
    assert "| 08-exact | 80% | 88.5% | 8.5 points |" in rows
    assert "| 02-rank | 8 | not run yet | |" in rows
    own_record.forget()
    assert not progress.exists()


def test_an_empty_or_foreign_record_says_so(progress, capsys):
    own_record.record()
    progress.parent.mkdir()
    progress.write_text('["something else"]')
    own_record.record()
    assert capsys.readouterr().out.count("Nothing here yet") == 2


def test_a_second_prediction_keeps_what_came_out_before(progress):
    predict("x", 1)
    outcome("x", 2)
    predict("x", 3)
    assert json.loads(progress.read_text()) == {"x": {"value": 3, "unit": "", "outcome": 2.0}}


def test_an_answer_is_kept_and_a_right_one_stays_right(progress):
    question = questions()["08-scored"]
    wrong = next(letter for letter in question.choices if letter != question.right)
    quiz(question.id, wrong)
    assert own_record.read()[question.id] == {"right": False}
    quiz(question.id, question.right)
    quiz(question.id, wrong)
    assert own_record.read()[question.id] == {"right": True}


def page(monkeypatch, capsys):
    seen = []
    capsys.readouterr()
    monkeypatch.setattr(own_record, "display", lambda content: seen.append(content.data))
    own_record.progress()
    return seen[0].splitlines(), capsys.readouterr().out


def test_the_page_of_an_empty_record_names_the_first_exercise(progress, monkeypatch, capsys):
    lines, said = page(monkeypatch, capsys)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [f"{n:02}" for n in range(9)]
    first = next(iter(checks.exercises().values()))
    assert said == f"Next: {first.id}, {first.title} ({first.minutes} minutes, {first.points} points).\n"


def test_the_page_counts_what_is_done_and_names_what_is_next(progress, monkeypatch, capsys):
    own_record.keep("02-forward", passed=True, points=2)
    own_record.keep("02-merged", value=3, unit="%")
    quiz(next(id for id in questions() if id[:2] == "02"), "a")
    lines, said = page(monkeypatch, capsys)
    row = next(line for line in lines if line.startswith("| 02"))
    given = [e for e in checks.exercises().values() if e.id[:2] == "02"]
    assert f"| 1 of {len(given)} |" in row and f"| 2 of {sum(e.points for e in given)} |" in row
    assert row.split(" | ")[1] == "1"
    assert said.startswith("Next: 02-init,")
    for exercise in checks.exercises():
        own_record.keep(exercise, passed=True)
    assert page(monkeypatch, capsys)[1] == "Every exercise has passed its check.\n"
