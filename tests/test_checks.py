"""The checks of the exercises, tried both ways: known mistakes are named, right answers accepted."""

import ast
import functools
import os
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlora_edu.checks as check
from qlora_edu import blockwise, lora, progress
from qlora_edu.checks import expect
from qlora_edu.checks.__main__ import table
from qlora_edu.checks.attempt import attempt, clone, plain, unchanged
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import HINTS, Score, descriptions, secret_seed
from qlora_edu.notebooks.exercises import parts
from qlora_edu.notebooks.file import parse, read
from tests import matrix
from tests.attempts import RIGHT, WRONG

ROOT = Path(__file__).parents[1]
EXERCISES = check.exercises()
SOLUTIONS = sorted((ROOT / "solutions").glob("*/*.ipynb"))


@functools.cache
def answers(path: Path) -> dict:
    """What a solution or exercise notebook defines for each exercise; its cells but for the checks are run."""
    solution = parse(read(ROOT / "solutions" / path.parent.name / path.name), path.name)
    notebook = parse(read(path), path.name)
    found, space = parts(solution), {}
    checked = {part.check for part in found}
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and position not in checked and needed(cell.source):
            exec(compile(cell.source, path.name, "exec"), space)
    return {part.id: space[part.name] for part in found if part.name}


def needed(source: str) -> bool:
    """Whether a cell imports, defines or sets something (and does not only show it)."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(source).body)


def solution_of(exercise: str):
    return next(a[exercise] for a in map(answers, SOLUTIONS) if exercise in a)


def test_every_exercise_described_is_checked_and_stands_in_a_solution():
    assert set(descriptions()) == set(EXERCISES)
    assert {id for path in SOLUTIONS for id in answers(path)} == set(EXERCISES)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_known_mistakes_are_rejected_with_their_hint_and_right_answers_accepted(exercise):
    rows = matrix.rows(exercise)
    assert [f"{row.name}: {row.verdict}" for row in rows if not row.good] == []
    assert len({row.meant for row in rows if row.meant}) >= 5
    assert sum(row.meant is None for row in rows) >= 2


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_hint_is_met_by_a_wrong_answer(exercise):
    assert set(EXERCISES[exercise].hints) - {mistake for mistake, _ in WRONG[exercise]} == set()


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_passes_twice_in_a_row_with_any_seed_and_thread_count(exercise):
    answer, judged = solution_of(exercise), EXERCISES[exercise]
    verdicts = [judged.verdict(answer), judged.verdict(answer)]
    verdicts += [judged.verdict(answer, seed, hidden) for seed in (0, 1, 2**40) for hidden in (False, True)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        verdicts.append(judged.verdict(answer, 3))
    finally:
        torch.set_num_threads(threads)
    assert [str(v) for v in verdicts if not v.passed] == []


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_untouched_stub_is_not_attempted(exercise):
    path = next(p for p in sorted((ROOT / "exercises").glob("*/*.ipynb")) if exercise in answers(p))
    verdict = EXERCISES[exercise].verdict(answers(path)[exercise])
    assert not verdict.passed and verdict.mistake == "not-attempted"


def test_what_torch_has_not_implemented_is_no_untouched_stub():
    verdict = EXERCISES["02-forward"].verdict(lambda *_: torch.ones(2, dtype=torch.uint16) >> 1)
    assert verdict.mistake == "crashed" and "rshift" in verdict.got


# What any broken answer becomes: a message.


def crashes(*_):
    raise ZeroDivisionError("a reason")


def never_ends(*_):
    while True:
        pass


def sleeps(*_):
    time.sleep(1000)


def swallows_errors(*_):
    while True:
        try:
            time.sleep(1000)
        except Exception:
            continue


def prints_without_end(*_):
    while True:
        print("x" * 10_000)


def exits(*_):
    sys.exit(0)


BROKEN = {
    crashes: "crashed",
    never_ends: "endless",
    sleeps: "endless",
    swallows_errors: "endless",
    prints_without_end: "flood",
    exits: "exited",
}


@pytest.mark.parametrize("answer", BROKEN, ids=lambda answer: answer.__name__)
def test_a_broken_answer_becomes_a_message(answer, capsys):
    quick = attempt(answer, (torch.ones(2),), seconds=0.5)
    assert quick.problem == BROKEN[answer]
    assert len(quick.printed) < 3000
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "value", [None, "text", 3, [], {}, object(), torch.ones(0), (), float("nan"), 10**400, b"", {1, 2}]
)
def test_a_wrong_type_becomes_a_message(value):
    for exercise in EXERCISES.values():
        verdict = exercise.verdict(lambda *_, value=value: value)
        assert not verdict.passed and verdict.what, exercise.id


def test_the_checks_machinery_never_raises_for_an_object_that_is_no_function(capsys):
    check.lora.forward(3)
    assert "Give the check the function itself" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer",
    [
        blockwise.quantize,
        lambda *a: blockwise.quantize(a[0]),
        functools.partial(blockwise.quantize, block_size=64),
        lambda *a: lora.LoRALinear(torch.nn.Linear(3, 3)),
    ],
    ids=["as it is", "in a lambda", "in a partial", "a class"],
)
def test_the_courses_own_answer_is_refused_however_it_is_wrapped(answer):
    outcome = attempt(answer, (torch.ones(64),))
    assert outcome.problem == "not-yours" and "qlora_edu." in outcome.message


def test_an_answer_may_not_ask_the_check():
    notebook = {"__name__": "__main__", "check": check}
    exec("def asks(deltas, budget): return check.lora._best(deltas, budget)", notebook)
    outcome = attempt(notebook["asks"], ([torch.ones(3, 3)], 12))
    assert outcome.problem == "not-yours" and "checks.lora._best" in outcome.message


def test_what_an_exercise_allows_may_be_used():
    assert (
        attempt(
            lambda w: blockwise.pack(w), (torch.ones(2, dtype=torch.uint8),), allow=("qlora_edu.blockwise",)
        ).problem
        == ""
    )


def test_an_input_that_was_changed_is_named():
    def doubles(x, y):
        y *= 2
        return x

    outcome = attempt(doubles, (torch.ones(2), torch.ones(2)))
    assert outcome.changed == [1]
    assert attempt(doubles, (torch.ones(2), torch.zeros(2))).changed == []


def test_inputs_are_copies_that_keep_their_strides():
    x = torch.arange(6.0).view(2, 3).T
    assert clone(x).stride() == x.stride() and clone((x, {"a": [x]}))[1]["a"][0].data_ptr() != x.data_ptr()


def test_nan_is_unchanged_and_other_bits_are_not():
    nan = torch.tensor([float("nan"), 1.0])
    assert unchanged(nan, nan.clone()) and not unchanged(nan, torch.tensor([1.0, 1.0]))


def test_plain_values_hold_no_history_and_nothing_strange():
    import numpy as np

    value = plain(
        {"t": torch.ones(2, requires_grad=True) * 2, "n": np.float32(2), "a": np.ones(2), "o": object()}
    )
    assert (
        not value["t"].requires_grad and value["n"] == 2.0 and torch.equal(value["a"], torch.ones(2).double())
    )
    assert value["o"] == "object object"


def test_a_verdict_says_what_was_expected_what_came_and_the_hint(capsys):
    check.lora.forward(lambda x, w, a, b, alpha, r: x @ w.T + x @ a.T @ b.T)
    said = capsys.readouterr().out
    assert "02-forward: not yet." in said and "Expected:" in said and "Got:" in said
    assert "Multiply it by alpha / r" in said


def test_in_a_notebook_a_check_prints_and_keeps_a_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_EDU_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.delenv("QLORA_STATIC", raising=False)
    check.lora.forward(crashes)
    assert progress.read() == {}
    check.lora.forward(solution_of("02-forward"))
    assert capsys.readouterr().out.endswith("02-forward: passed.\n")
    assert progress.read()["02-forward"] == {"passed": True, "points": 2}


def test_a_challenge_keeps_the_best_score(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_EDU_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.delenv("QLORA_STATIC", raising=False)
    check.lora.share(solution_of("02-share"))
    first = progress.read()["02-share"]["score"]
    check.lora.share(next(a for a in RIGHT["02-share"] if a.__name__ == "by_dynamic_programming"))
    assert progress.read()["02-share"]["score"] <= first
    assert "you, best so far" in capsys.readouterr().out


def test_a_scoreboard_is_in_order():
    board = Score(2.0, "faults", {"a": 1.0, "b": 3.0}).board(best=1.5).splitlines()
    assert [line.split()[-1] for line in board[1:]] == ["1", "1.5", "2", "3"]
    assert Score(2.0, "hits", {"a": 1.0, "b": 3.0}, smaller=False).board().splitlines()[1].endswith("3")
    assert Score(1.0, "", {}).better(None) and not Score(2.0, "", {}).better(1.0)


def test_in_grading_a_check_raises_and_a_hidden_part_says_nothing(monkeypatch):
    monkeypatch.setenv("QLORA_EDU_GRADING", "1")
    with pytest.raises(AssertionError, match="The update comes out as if"):
        check.lora.forward(lambda x, w, a, b, alpha, r: x @ w.T + x @ a.T @ b.T)
    monkeypatch.setenv("QLORA_EDU_SECRET", "s")
    with pytest.raises(AssertionError, match=r"^02-forward: not passed \(hidden part\)"):
        check.lora.forward(crashes, hidden=True)


def test_secret_seeds_differ_by_secret_exercise_and_round():
    seeds = {secret_seed(s, e, r) for s in ("a", "b") for e in ("02-forward", "02-init") for r in (0, 1)}
    assert len(seeds) == 8 and secret_seed("a", "x") == secret_seed("a", "x")


def test_the_same_seed_draws_the_same():
    a, b = Draw(5), Draw(5)
    assert torch.equal(a.normal(3, 2), b.normal(3, 2)) and a.whole(0, 10**9) == b.whole(0, 10**9)
    assert torch.equal(a.integers(9, low=1, high=3), b.integers(9, low=1, high=3))
    assert not torch.equal(a.normal(4), a.normal(4))


def test_every_general_hint_tells_what_to_do():
    assert all(len(hint) > 40 for hint in HINTS.values())


@given(st.lists(st.integers(1, 12), min_size=3, max_size=5), st.integers(0, 2**31))
def test_dot_error_bounds_what_float32_loses(sizes, seed):
    draw = Draw(seed)
    factors = [draw.normal(m, n) for m, n in pairwise(sizes)]
    got, exact = factors[0], factors[0].double()
    for factor in factors[1:]:
        got, exact = got @ factor, exact @ factor.double()
    assert ((got.double() - exact).abs() <= expect.dot_error(*factors)).all()


def test_close_names_the_first_place_and_the_mistake():
    right = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(expect.Wrong, match=r"y: 1 of 4 numbers differ, first at \[1, 0\]") as error:
        expect.close(
            torch.tensor([[1.0, 2.0], [9.0, 4.0]]),
            right,
            "y",
            1e-6,
            {"nine": torch.tensor([[1.0, 2], [9, 4]])},
        )
    assert (error.value.expected, error.value.got, error.value.mistake) == ("3", "9", "nine")
    nan = torch.tensor([1.0, float("nan")])
    with pytest.raises(expect.Wrong):
        expect.close(nan, torch.ones(2), "y", 1e9)
    expect.close(nan, nan.clone(), "y", 0.0)
    expect.equal(torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 2]), "codes")
    expect.close(torch.tensor([float("inf")]), torch.tensor([float("inf")]), "y", 0.0)


def test_same_names_the_first_position():
    with pytest.raises(expect.Wrong, match="first at position 1"):
        expect.same([1, 2], [1, 3], "faults")
    with pytest.raises(expect.Wrong, match="number of entries"):
        expect.same([1], [1, 3], "faults")
    with pytest.raises(expect.Wrong):
        expect.same(1, True, "flag")
    expect.same({"a": [1]}, {"a": [1]}, "dict")


def test_the_matrix_is_printed_by_one_command(capsys):
    assert matrix.main(["02-init"]) == 0
    assert "rejected with the hint meant for them" in capsys.readouterr().out
    assert matrix.main(["02-init", "--seeds", "2"]) == 0
    answers = len(RIGHT["02-init"]), len(WRONG["02-init"])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert [int(n) for n in row[1:6]] == [2 * answers[0]] * 2 + [2 * answers[1]] * 3


@pytest.mark.parametrize("wrong", [["02-inti"], ["--seeds", "0"], ["--seeds", "many"]])
def test_the_matrix_refuses_what_it_does_not_know(wrong, capsys):
    with pytest.raises(SystemExit):
        matrix.main(wrong)
    assert wrong[-1] in capsys.readouterr().err


def test_what_an_answer_remembers_is_forgotten_before_the_next_is_judged():
    assert all(row.good for row in matrix.rows("06-backward", [1, 1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals")
def test_a_check_in_another_thread_than_the_main_one_works():
    import threading

    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(check.lora.forward.verdict(solution_of("02-forward")))
    )
    thread.start()
    thread.join()
    assert verdicts[0].passed


def test_the_instructors_table_is_that_of_the_checks():
    text = (ROOT / "docs" / "instructor.md").read_text()
    assert table() in text, "put what `python -m qlora_edu.checks` prints into docs/instructor.md"


def test_every_exercise_that_the_guide_names_is_one():
    named = set(re.findall(r"\b\d\d-[a-z][a-z-]+[a-z]\b", (ROOT / "docs" / "instructor.md").read_text()))
    assert named <= set(EXERCISES)


def test_strange_tensors_and_numbers_become_messages():
    for value in (
        torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(),
        10**400,
        -(10**400),
        torch.ones(2) * 1j,
    ):
        for exercise in EXERCISES.values():
            assert not exercise.verdict(lambda *_, value=value: value).passed
    with pytest.raises(expect.Wrong, match="the number"):
        expect.number(10**400, 3.0, "the number")
