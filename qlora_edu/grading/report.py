"""What comes of grading: a page for each student, tables for the instructor, and the written answers to mark."""

import csv
import html
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from qlora_edu.adapters import write_whole
from qlora_edu.grading.grade import PartResult, Result
from qlora_edu.grading.submissions import Assignment, file_name

MARKS = ("student", "assignment", "part", "points", "of", "comment", "answer")

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0
1rem;color:#1a1a1a;background:#fff}
pre{background:#f4f4f4;padding:.7rem;overflow-x:auto;white-space:pre-wrap}h2{font-size:1.05rem;margin:1.6rem 0
.3rem} table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#1b1b1b}pre{background:#2a2a2a}td,th{border-color:#444}}"""


@dataclass(frozen=True)
class Mark:
    """What an instructor entered for a written answer: points or None, a comment, and the answer that was marked."""

    points: float | None
    comment: str
    row: dict[str, str]

    def fits(self, answer: str) -> bool:
        """Whether the answer is still the one that was marked; a spreadsheet may have changed its line breaks."""
        marked = _plain(self.row.get("answer") or "")
        return not marked or marked.split() == answer.split()


def marks(file: Path) -> dict[tuple[str, str], Mark]:
    """What an instructor has entered, by student and part; the columns separated by commas, semicolons or tabs.

    Raises:
        ValueError: says what is wrong with the file, and in which row.
    """
    found: dict[tuple[str, str], Mark] = {}
    if not file.exists():
        return found
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected UTF-8. Save it as CSV UTF-8.") from None
    first = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    if missing := {"student", "part", "points", "of"} - set(rows.fieldnames or ()):
        raise ValueError(
            f"{file}: expected the columns {', '.join(MARKS)}; {', '.join(sorted(missing))} is missing"
        )
    for row in rows:
        key = (_plain(row["student"] or ""), row["part"] or "")
        mark = (row["points"] or "").strip()
        try:
            points = float(mark.replace(",", ".")) if mark else None
            if points is not None and not 0 <= points <= float(row["of"]):
                raise ValueError
        except (ValueError, TypeError):
            what = f"expected points from 0 to {row['of']}, or nothing; got {mark!r}"
            raise ValueError(f"{file}, {' '.join(key)}: {what}") from None
        if key in found and found[key].points != points:
            raise ValueError(f"{file}, {' '.join(key)}: stands there twice, with different points")
        found[key] = Mark(points, row.get("comment") or "", row)
    return found


def apply_marks(results: list[Result], entered: dict[tuple[str, str], Mark]) -> list[Mark]:
    """Put an instructor's marks into results, in place. Returns those that belong to no answer of this run."""
    left = dict(entered)
    for result in results:
        for part in result.parts:
            mark = left.pop((result.student, part.id), None)
            if part.status not in ("to be marked", "marked"):
                if mark and (mark.points is not None or mark.comment):
                    left[result.student, part.id] = mark
                continue
            part.status, part.points, part.feedback = "to be marked", None, mark.comment if mark else ""
            if mark and mark.points is not None and mark.fits(part.answer):
                part.status, part.points = "marked", mark.points
            elif mark and mark.points is not None:
                part.feedback = (
                    f"(The answer has changed since it got {_number(mark.points)}.) {mark.comment}"
                )
    return [mark for mark in left.values() if mark.points is not None or mark.comment]


def write(
    out: Path,
    results: list[Result],
    ignored: list[str],
    known: dict[str, Assignment],
    others: list[Mark] = (),
) -> None:
    """Write every table and page, each in one step. others: marks of answers that are not among the results, kept."""
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(
        out / "grades.csv",
        ("student", "assignment", "part", "points", "of", "status", "mistake", "score"),
        [
            (r.student, r.topic, p.id, "" if p.points is None else _number(p.points), p.of, p.status, p.mistake,
             "" if p.score is None else f"{p.score:.6g}")
            for r in results for p in r.parts
        ],
    )  # fmt: skip
    topics = sorted({result.topic for result in results})
    totals = defaultdict(dict)
    for result in results:
        totals[result.student][result.topic] = sum(part.points or 0 for part in result.parts)
    worth = {topic: sum(part.points for part in known[topic].parts) for topic in topics}
    _write_csv(
        out / "totals.csv",
        ("student", *(f"{topic} (of {worth[topic]})" for topic in topics), "sum"),
        [
            (student, *(_number(by.get(topic, 0)) for topic in topics), _number(sum(by.values())))
            for student, by in sorted(totals.items())
        ],
    )
    content = {"results": [result.as_dict() for result in results], "ignored": ignored}
    write_whole(out / "grades.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    rows = [
        (r.student, r.topic, p.id, "" if p.points is None else _number(p.points), p.of, p.feedback, p.answer)
        for r in results for p in r.parts if p.status in ("to be marked", "marked")
    ]  # fmt: skip
    rows += [tuple(_plain(mark.row.get(column) or "") for column in MARKS) for mark in others]
    if (out / "marks.csv").exists():
        write_whole(out / "marks.csv~", (out / "marks.csv").read_bytes())
    _write_csv(out / "marks.csv", MARKS, rows)
    for result in results:
        page = out / "feedback" / file_name(result.student) / f"{result.topic}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, feedback(result).encode())
    for topic in topics:
        write_whole(out / f"written_{topic}.html", _to_mark(topic, results, known[topic]).encode())


def feedback(result: Result) -> str:
    """The page of one student for one assignment: points, and what each check says."""
    got, of = sum(p.points or 0 for p in result.parts), sum(p.of for p in result.parts)
    open_marks = any(p.points is None for p in result.parts)
    body = [f"<h1>{_safe(result.topic)} · {_safe(result.student)}</h1>"]
    waiting = ", written answers not marked yet" if open_marks else ""
    body.append(f"<p><b>{_number(got)} of {of} points</b>{waiting}.</p>")
    if result.problem:
        body.append(f"<p>{_safe(result.problem)}</p>")
    if result.notes:
        body += [
            "<h2>Notes on your notebook</h2><ul>",
            *(f"<li>{_safe(n)}</li>" for n in result.notes),
            "</ul>",
        ]
    for part in result.parts:
        points = "–" if part.points is None else _number(part.points)
        body.append(f"<h2>{_safe(part.id)}: {points} of {part.of} · {_safe(part.status)}</h2>")
        body += [f"<pre>{_safe(text)}</pre>" for text in (part.answer, part.feedback) if text]
    return _page(f"{result.topic} {result.student}", body)


def _to_mark(topic: str, results: list[Result], assignment: Assignment) -> str:
    """All written answers to an assignment, part by part, below the sample answer and the marking scheme."""
    body = [f"<h1>{_safe(topic)}: written answers</h1>"]
    body.append("<p>Enter points and comments in marks.csv, then grade again.</p>")
    for id, sample in assignment.samples.items():
        body.append(f"<h2>{_safe(id)}: sample answer and marking scheme</h2><pre>{_safe(sample)}</pre>")
        for result in results:
            for part in result.parts:
                if part.id == id and part.answer:
                    body.append(f"<h2>{_safe(result.student)}</h2><pre>{_safe(part.answer)}</pre>")
    return _page(f"{topic}: written answers", body)


def summary(results: list[Result], ignored: list[str]) -> str:
    """What the command prints: a line for each submission, and what was left aside."""
    lines = []
    for result in results:
        got, of = sum(p.points or 0 for p in result.parts), sum(p.of for p in result.parts)
        waiting = sum(p.points is None for p in result.parts)
        extra = f", {waiting} to be marked" if waiting else ""
        lines.append(f"{result.student:<24} {result.topic:<24} {_number(got):>5} of {of}{extra}"
                     + (f"  ({result.problem})" if result.problem else ""))  # fmt: skip
    lines += [f"left aside: {line}" for line in ignored]
    return "\n".join(lines)


def _write_csv(file: Path, header: tuple, rows: list[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows([_inert(cell) for cell in row] for row in rows)
    write_whole(file, text.getvalue().encode("utf-8-sig"))  # the mark tells a spreadsheet that it is UTF-8


def _inert(cell):
    """Text that a spreadsheet takes for text: a student's `=cmd()` is no formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t")) else cell


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") else cell


def _safe(text: str) -> str:
    return html.escape(str(text))


def _number(value: float) -> str:
    return f"{value:g}"


def _page(title: str, body: list[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


__all__ = ["PartResult", "apply_marks", "feedback", "marks", "summary", "write"]
