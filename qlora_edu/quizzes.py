"""Questions at the end of a chapter. Every choice has an explanation, the wrong ones too.

    quiz("08-scored")         shows the question
    quiz("08-scored", "b")    says whether b is right, and why

Questions live in `data/quizzes/<chapter>.toml`.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from IPython.display import Markdown, display

from qlora_edu import progress

_FOLDER = Path(__file__).parent / "data" / "quizzes"


@dataclass(frozen=True)
class Question:
    """A question; `choices` and `explanations` by letter, and the letter of the right choice."""

    id: str
    text: str
    choices: dict[str, str]
    explanations: dict[str, str]
    right: str


@cache
def questions() -> dict[str, Question]:
    """All questions by id.

    Raises:
        ValueError: if a question lacks an explanation, or its right answer is none of the choices.
    """
    found = {}
    for file in sorted(_FOLDER.glob("*.toml")):
        for id, entry in tomllib.loads(file.read_text(encoding="utf-8")).items():
            question = Question(id, entry["text"], entry["choices"], entry["explanations"], entry["right"])
            if (
                question.choices.keys() != question.explanations.keys()
                or question.right not in question.choices
            ):
                raise ValueError(
                    f"{file.name}: {id} needs one explanation for each choice, and a right one among them"
                )
            if id in found:
                raise ValueError(f"{file.name}: {id} stands there a second time")
            found[id] = question
    return found


def quiz(id: str, answer: str | None = None) -> None:
    """Show a question, or judge an answer to it.

    Args:
        id: such as "08-scored".
        answer: the letter of a choice.

    Raises:
        ValueError: for an unknown id or letter.
    """
    if id not in questions():
        raise ValueError(f"id: expected one of {', '.join(questions())}; got {id!r}")
    question = questions()[id]
    if answer is None:
        choices = "\n".join(f"- **{letter}**  {text}" for letter, text in question.choices.items())
        display(Markdown(f'{question.text}\n\n{choices}\n\nAnswer with `quiz("{id}", "a")`.'))
        return
    letter = str(answer).strip().lower()
    if letter not in question.choices:
        raise ValueError(f"answer: expected one of {', '.join(question.choices)}; got {answer!r}")
    verdict = "Right." if letter == question.right else "Not quite."
    display(Markdown(f"**{verdict}** {question.explanations[letter]}"))
    if letter == question.right or "right" not in progress.read().get(id, {}):
        progress.keep(id, right=letter == question.right)
