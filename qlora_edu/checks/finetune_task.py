"""Checks of chapter 08, the task: how answers are judged, how sure a score is, and examples of one's own."""

import json
import math
import re
from collections import Counter
from itertools import count
from unittest.mock import patch

import torch

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, exercise
from qlora_edu.checks.finetune import numbers

_SALTS = count()


@exercise("08-exact")
def exact(answer: Answer, draw: Draw) -> None:
    """`f(text, tool, arguments)`: whether a text is exactly that call."""
    hour, name = draw.whole(1, 12), draw.choice(["Gym Bag", "Oat Milk", "Rye Bread"])
    tool, arguments = draw.choice(["set_alarm", "add_event"]), {"time": f"{hour}:15 am", "label": name}
    first, time, label = f"tool: {tool}", f"time: {hour}:15 am", f"label: {name}"
    whole = f"{first}\n{time}\n{label}"
    cases = [
        (True, "refuses-right", "the call as it stands", whole),
        (True, "order-fixed", "the arguments in the other order", f"{first}\n{label}\n{time}"),
        (True, "spaces-outside", "white space outside", f"\n {first} \r\n\t{time}\r\n{label} \n"),
        (True, "space-demanded", "no space after a colon", whole.replace(": ", ":")),
        (False, "tool-ignored", "another tool", whole.replace(tool, "start_timer")),
        (False, "case", "a value in lower case", whole.replace(name, name.lower())),
        (False, "case", "a key with a capital", whole.replace("label", "Label")),
        (False, "case", "the tool with a capital", whole.replace(tool, tool.capitalize())),
        (False, "spaces-inside", "two spaces inside a value", whole.replace(name, name.replace(" ", "  "))),
        (False, "prefix", "a value that goes on", whole + " today"),
        (False, "prefix", "a value that stops early", whole[:-1]),
        (False, "text-around", "a sentence after the call", whole + "\nDone."),
        (False, "text-around", "a sentence before the call", f"Sure, here it is.\n{whole}"),
        (False, "text-around", "a word before the call", f"Sure! {whole}"),
        (False, "missing-argument", "an argument too few", f"{first}\n{time}"),
        (False, "extra-argument", "an argument too many", f"{whole}\nroom: attic"),
        (False, "twice", "a key that comes twice, right at last", f"{first}\ntime: noon\n{time}\n{label}"),
        (False, "twice", "a key that comes twice, wrong at last", f"{whole}\ntime: noon"),
        (False, "twice", "a line that comes twice", f"{whole}\n{label}"),
        (False, "names-ignored", "the values exchanged", f"{first}\ntime: {name}\nlabel: {hour}:15 am"),
        (False, "tool-not-first", "the tool at the end", f"{time}\n{label}\n{first}"),
        (False, "empty-value", "an argument without a value", f"{whole}\nroom:"),
        (False, "space-before-colon", "a space before a colon", whole.replace("label:", "label :")),
        (False, "blank-line", "an empty line in between", f"{first}\n\n{time}\n{label}"),
        (False, "empty", "an empty text", ""),
        (False, "empty", "white space alone", " \n"),
    ]
    for right, mistake, what, text in cases:
        _decided(answer, text, tool, arguments, right, what, mistake)
    _decided(answer, "tool: stop", "stop", {}, True, "a call without arguments", "refuses-right")
    _decided(
        answer, "tool: stop\nto:", "stop", {"to": ""}, False, "an empty value that is wanted", "empty-value"
    )
    _decided(answer, "", "stop", {}, False, "an empty text for a call without arguments", "empty")


def _decided(
    answer: Answer, text: str, tool: str, arguments: dict, right: bool, what: str, mistake: str
) -> None:
    got = answer(text, tool, arguments, crash=mistake)
    expect.true(isinstance(got, bool), f"the verdict on {what}", "wrong-type", "True or False", got)
    expect.true(got == right, f"the verdict on {what}, {text!r}", mistake, str(right), str(got))


def _halved(low: float, high: float, inside) -> float:
    """The border between `low`, which is not inside, and `high`, which is."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle) else (middle, high)
    return high


def _bounds(right: int, n: int, z: float) -> tuple[float, float]:
    """The shares p for which `right` of n is no more than z standard errors away, the errors as p makes them."""
    share = right / n

    def inside(p: float) -> bool:
        return n * (p - share) ** 2 <= z**2 * p * (1 - p)

    return (
        _halved(-1e-18, share, inside) if right else 0.0,
        1 - _halved(-1e-18, 1 - share, lambda q: inside(1 - q)) if right < n else 1.0,
    )


@exercise("08-interval")
def interval(answer: Answer, draw: Draw) -> None:
    """`f(right, n, confidence)`: (low, high), Wilson's interval for a share."""
    some = draw.whole(11, 60)
    for right, n, confidence in (
        (31, 40, 0.95),
        (draw.whole(1, some - 1), some, draw.number(0.6, 0.94)),
        (0, some, 0.9),
        (some, some, 0.99),
        (1, 2, 0.5),
    ):
        z = _halved(0.0, 9.0, lambda z, c=confidence: math.erf(z / math.sqrt(2)) >= c)
        one_sided = _halved(0.0, 9.0, lambda z, c=confidence: (1 + math.erf(z / math.sqrt(2))) / 2 >= c)
        share, low_high = right / n, _bounds(right, n, z)
        normal = torch.tensor([-1.0, 1.0]).double() * z * math.sqrt(share * (1 - share) / n) + share
        wilson = torch.tensor(low_high, dtype=torch.float64)
        what = f"the interval for {right} of {n} at {confidence:.4g}"
        got = numbers(expect.parts(answer(right, n, confidence), what, 2), what, 2)
        looks = {
            "normal": [normal, normal.clamp(0, 1)],
            "one-sided": torch.tensor(_bounds(right, n, one_sided), dtype=torch.float64),
            "z-fixed": torch.tensor(_bounds(right, n, 1.96), dtype=torch.float64),
            "not-scaled": wilson * (1 + z**2 / n),
            "centre-kept": share + torch.tensor([-0.5, 0.5]).double() * (wilson[1] - wilson[0]),
            "swapped": wilson.flip(0),
            "percent": wilson * 100,
        }
        expect.close(got, wilson, what, 1e-6, looks, place=lambda i: ("low", "high")[i[0]])  # float32 passes
    answer.raises(ValueError, 0, 0, 0.95, what="0 of 0 says nothing", mistake="no-rows")


def _read(student, text, kind):
    """What the student's reader returns, or the text of its ValueError."""
    try:
        return {"examples": student(text, kind)}
    except ValueError as error:
        return {"refused": str(error)}


def _pairs(got, what: str) -> list[tuple[str, str]]:
    """The answer as a list of (request, answer)."""
    fine = isinstance(got, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in got
    )
    expect.true(fine, f"{what}: a list of (request, answer)", "wrong-type", "pairs of texts", got)
    return [tuple(pair) for pair in got]


@exercise("08-examples", probe=_read)
def examples(answer: Answer, draw: Draw) -> None:
    """`f(text, kind)`: the (request, answer) of each record of a CSV or JSONL text."""
    a, b, c, d = (f"{draw.choice('abcdefgh')}{word}" for word in ("-lamp", "-chain", "-pump", "-bell"))
    head, odd = "request,answer\n", f"{a}\u2028{c}"

    def objects(*pairs, **more) -> str:
        """A line for each pair; with further keys, these come first and the answer before the request."""
        records = (
            {**more, "answer": y, "request": x} if more else {"request": x, "answer": y} for x, y in pairs
        )
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    two = [(a, b), (c, d)]
    for kind, mistake, what, text, right in (
        ("csv", "refuses-right", "a plain CSV file", f"{head}{a},{b}\n{c},{d}\n", two),
        ("csv", "by-position", "columns in another order", f"id,answer,request\n1,{b},{a}\n2,{d},{c}", two),
        ("csv", "quotes", "a comma in quotes", f'{head}"{a}, please",{b}\n', [(f"{a}, please", b)]),
        ("csv", "quotes", "doubled quotation marks", f'{head}"a ""{a}""",{b}\n', [(f'a "{a}"', b)]),
        ("csv", "line-breaks", "a line break in quotes", f'{head}{a},"{b}\n\n{c}"\n', [(a, f"{b}\n\n{c}")]),
        ("csv", "line-breaks", "a line break in a request", f'{head}"{a}\n{c}",{b}\n', [(f"{a}\n{c}", b)]),
        ("csv", "bom", "a byte order mark", f"\ufeff{head}{a},{b}\n", two[:1]),
        ("csv", "blank-lines", "empty lines", f"\n{head}\n{a},{b}\n \n\n{c},{d}\n\n", two),
        ("csv", "not-stripped", "white space around texts", f"{head} {a} ,\t{b} \r\n{c},{d} \r\n", two),
        ("csv", "repeated", "a record that comes twice", f"{head}{a},{b}\n{c},{d}\n{a} ,{b}\n", two),
        ("jsonl", "refuses-right", "a plain JSONL file", objects(*two[::-1]), two[::-1]),
        ("jsonl", "by-position", "one more key, before the others", objects(*two, id="1"), two),
        ("jsonl", "bom", "a byte order mark", "\ufeff" + objects(*two), two),
        ("jsonl", "blank-lines", "empty lines", "\n" + objects(*two).replace("\n", "\n \n"), two),
        ("jsonl", "not-stripped", "white space around texts", objects((f" {a}\n", f"{b} ")), two[:1]),
        ("jsonl", "splitlines", "the character U+2028 in a text", objects((odd, b)), [(odd, b)]),
        ("jsonl", "repeated", "a record that comes twice", objects(*two, two[0]), two),
    ):  # fmt: skip
        facts, what = answer(text, kind, crash=mistake), f"{what} ({kind})"
        if "refused" in facts:
            expect.fail(what, "a list", f"ValueError: {facts['refused']}", mistake)
        expect.same(_pairs(facts["examples"], what), right, what, {mistake: _pairs(facts["examples"], what)})
    before_csv, before = f'\n{head}{a},"{b}\n{c}"\n\n', "\n" + objects((a, b)) + "\n" + objects((c, d))
    for kind, mistake, what, text, lines in (
        ("csv", "missing-column", "no column `answer`", f"request,reply\n{a},{b}\n", {1}),
        ("csv", "short-row", "a row with one field", f"{before_csv}{d}\n{c},{a}\n", {6}),
        ("csv", "long-row", "a comma without quotes", f"{before_csv}{d},{a}, {b}\n", {6}),
        ("csv", "empty", "an answer of white space", f"{before_csv}{d}, \n", {6}),
        ("csv", "empty", "an empty request", f'{head}{a},{b}\n,"{c}\n{d}"\n', {3, 4}),
        ("csv", "empty", "a row of a comma alone", f"{before_csv},\n", {6}),
        ("csv", "contradiction", "a request with two answers", f"{before_csv}{d},{b}\n{a},{d}\n", {7}),
        ("jsonl", "missing-key", "no key `answer`", before + '{"request": "x"}\n', {5}),
        ("jsonl", "broken", "a line that is no JSON", before + "{'request': 'x', 'answer': 'y'}\n", {5}),
        ("jsonl", "not-text", "a number for a text", before + '{"request": "x", "answer": 7}\n', {5}),
        ("jsonl", "not-text", "null for a text", before + '{"request": null, "answer": "y"}\n', {5}),
        ("jsonl", "not-text", "a list for an object", before + '["request", "answer"]\n', {5}),
        ("jsonl", "empty", "an empty answer", before + '{"request": "x", "answer": ""}\n', {5}),
        ("jsonl", "contradiction", "a request with two answers", before + objects((f"{a} ", d)), {5}),
        ("csv", "nothing", "an empty text", "", None),
        ("csv", "nothing", "a header alone", head, None),
        ("jsonl", "nothing", "an empty text", "\n", None),
        (
            draw.choice(["xlsx", "json", "CSV"]),
            "unknown-kind",
            "another kind of file",
            f"{head}{a},{b}\n",
            None,
        ),
    ):
        facts, what = answer(text, kind, crash=mistake), f"{what} ({kind})"
        if "refused" not in facts:
            expect.fail(what, "a ValueError", facts["examples"], mistake)
        named = {int(number) for number in re.findall(r"\d+", facts["refused"])}
        if lines and not named & lines:
            wanted, mistake = (
                f"a ValueError that names line {min(lines)}",
                "line-wrong" if named else "line-unnamed",
            )
            expect.fail(what, wanted, facts["refused"], mistake)


def _split_elsewhere(student, examples, share, seed):
    """What the student's split returns in a process of its own, as far as hash() goes: it differs from call to call."""
    salt, true_hash = next(_SALTS), hash
    with patch("builtins.hash", lambda value: true_hash((salt, value))):
        return student(examples, share, seed)


def _key(request: str) -> str:
    return " ".join(request.lower().split())


@exercise("08-split", probe=_split_elsewhere)
def split(answer: Answer, draw: Draw) -> None:
    """`f(examples, share, seed)`: (training, held out), no request on both sides."""
    many = draw.whole(14, 25)
    for groups, share, size in (
        (10, 0.31, 3),
        (many, 6.3 / many, 6),
        (2, 0.5, 1),
        (7, 0.05, 1),
        (6, 0.97, 5),
    ):
        rows = [(f"Fix bike {i}", f"answer {i}") for i in range(groups)]
        for i in range(0, groups, 2):  # the same request in other letters, and more often
            rows += [(f"fix  BIKE {i}", f"answer {i}"), (f"Fix bike\n{i}", f"other answer {i}")][: 1 + i % 4]
        rows = [rows[i] for i in draw.permutation(len(rows)).tolist()]
        case = f"for {groups} requests in {len(rows)} rows, share = {share:.3f}"

        def held_out(rows, seed, share=share, groups=groups, size=size, case=case) -> set[str]:
            """The requests that are held out, once it is certain that the two sides are right."""
            parts = expect.parts(answer(rows, share, seed), "the result", 2)
            train, held = (_pairs(part, f"the rows of a side, {case}") for part in parts)
            total, what = len(train + held), f"every row is on one side, {case}"
            expect.true(not Counter(rows) - Counter(train + held), what, "rows-lost", len(rows), total)
            expect.true(total == len(rows), what, "rows-twice", len(rows), total)
            sides = [{_key(request) for request, _ in side} for side in (train, held)]
            both = ", ".join(sorted(sides[0] & sides[1]))
            expect.true(not both, f"requests on both sides, {case}", "leak", "none", both)
            mistake = "empty-side" if len(sides[1]) in (0, groups) else "size"
            expect.true(len(sides[1]) == size, f"requests held out, {case}", mistake, size, len(sides[1]))
            return sides[1]

        found, again, moved = ([held_out(r, seed) for seed in range(12)] for r in (rows, rows, rows[::-1]))
        order = list(dict.fromkeys(_key(request) for request, _ in rows))
        an_end = found[0] in (set(order[:size]), set(order[-size:])) and found != moved
        mistake = "in-order" if an_end else "seed-ignored"
        expect.true(found == again, f"a seed gives the same split again, {case}", "not-fixed")
        expect.true(any(f != found[0] for f in found), f"another seed gives another split, {case}", mistake)
        expect.true(found == moved, f"the order of the rows does not matter, {case}", "order-matters")
    one = [("Fix bike", "a"), ("fix bike", "a")]
    answer.raises(ValueError, one, 0.5, 0, what="one request cannot be on two sides", mistake="one-request")
