"""Checks of chapter 08, the task: how answers are judged, how sure a score is, and examples of one's own."""

import json
import math
import random
import re
from collections import Counter
from itertools import accumulate, combinations, count, product
from unittest.mock import patch

import numpy
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
        (True, "space-demanded", "several spaces after a colon", whole.replace(": ", ":   ")),
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
        (False, "twice", "the tool twice", f"{first}\n{whole}"),
        (False, "twice", "another tool in the last line", f"{whole}\ntool: start_timer"),
        (False, "names-ignored", "the values exchanged", f"{first}\ntime: {name}\nlabel: {hour}:15 am"),
        (False, "tool-not-first", "the tool at the end", f"{time}\n{label}\n{first}"),
        (False, "empty-value", "an argument without a value", f"{whole}\nroom:"),
        (False, "space-before-colon", "a space before a colon", whole.replace("label:", "label :")),
        (False, "blank-line", "an empty line in between", f"{first}\n\n{time}\n{label}"),
        (False, "empty", "an empty text", ""),
        (False, "empty", "white space alone", " \n"),
        (False, "tool-key", "the tool under another key", whole.replace("tool:", "name:")),
        (True, "spaces-outside", "a tab after a colon", whole.replace(": ", ":\t")),
        (True, "spaces-outside", "other white space around the text", f"\t\r\n{whole}\t\r\n\r\n"),
        (False, "blank-line", "a line of blanks in between", f"{first}\n{time}\n  \n{label}"),
        (False, "blank-line", "an empty line that ends with \\r\\n", f"{first}\r\n{time}\r\n\r\n{label}"),
    ]
    for right, mistake, what, text in cases:
        _decided(answer, text, tool, arguments, right, what, mistake)
    # Other numbers of arguments, and keys with underscores.
    keys = ["meeting_room", "to", "day", "number_of_guests", "note_"]
    keys = [keys[i] for i in draw.permutation(len(keys)).tolist()]
    for number in (1, 3, 5):
        wanted = {
            key: f"{draw.choice(['Attic', 'Hall B', '3: left'])} {i}" for i, key in enumerate(keys[:number])
        }
        lines = [f"{key}: {value}" for key, value in wanted.items()]
        call, many = "\n".join([first, *lines[::-1]]), f"of {number}"
        _decided(answer, call, tool, wanted, True, "keys with underscores", "key-refused")
        for i, line in enumerate(lines):
            without = "\n".join([first, *lines[:i], *lines[i + 1 :]])
            _decided(
                answer,
                call.replace(line, line + "0"),
                tool,
                wanted,
                False,
                f"one wrong value {many}",
                "prefix",
            )
            _decided(answer, without, tool, wanted, False, f"an argument too few {many}", "missing-argument")
        _decided(
            answer, f"{call}\nroom: attic", tool, wanted, False, "an argument too many", "extra-argument"
        )
    for odd in ("\u2028", "\x0c", "\r"):
        wanted, what = {"label": f"Gym{odd}Bag"}, f"a value that holds {odd!r}"
        _decided(answer, f"{first}\nlabel: Gym{odd}Bag", tool, wanted, True, what, "line-ends")
    for pair in (  # whichever is wanted, the other is wrong
        ("Gym", '"Gym"'), ("Gym", "'Gym'"), ("6 p.m", "6 p.m."), ("Gym", "Gym,"), ("7:15", "07:15"), ("2", "2.0"),
        ("left", ":left"), ("Caf\u00e9", "Cafe\u0301"), ("m2", "m\u00b2"), ("Gym Bag", "Gym\tBag"),
        ("Gym Bag", "Gym\u00a0Bag"), ("GymBag", "Gym\u200bBag"), ("GymBag", "Gym\ufeffBag"),
        ("Al's", "Al\u2019s"), ('a "Gym"', 'a \u201cGym\u201d'),
    ):  # fmt: skip
        mistake = "spaces-inside" if re.search("[\t\u00a0]", pair[1]) else "tidied"
        for value, written, space in product(pair, pair, ("", " ")):
            what, line = f"a value where {value!r} is wanted", f"label:{space}{written}"
            _decided(answer, f"{first}\n{line}", tool, {"label": value}, value == written, what, mistake)
    stop = "tool: stop"
    for right, mistake, what, text, wanted in (
        (True, "refuses-right", "a call without arguments", stop, {}),
        (False, "tool-key", "a call without arguments, the tool under another key", "name: stop", {}),
        (False, "extra-argument", "an argument where none is wanted", f"{stop}\nroom: attic", {}),
        (False, "text-around", "a sentence after a call without arguments", f"{stop}\nDone.", {}),
        (False, "missing-argument", "no argument where one is wanted", stop, {"to": "noon"}),
        (False, "empty-value", "an empty value that is wanted", f"{stop}\nto:", {"to": ""}),
        (False, "empty", "an empty text for a call without arguments", "", {}),
    ):
        _decided(answer, text, "stop", wanted, right, what, mistake)


def _decided(
    answer: Answer, text: str, tool: str, arguments: dict, right: bool, what: str, mistake: str
) -> None:
    try:
        got = answer(text, tool, arguments, crash=mistake)
    except expect.Wrong as wrong:
        if not text:  # which would be shown as nothing
            wrong.what = wrong.what.replace("the call with ,", "the call with '',", 1)
        raise
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
    some, many = draw.whole(11, 60), draw.whole(1000, 5000)
    for right, n, confidence in (
        (17, 24, 0.8),  # where a rounded z is seen
        (draw.whole(1, some - 1), some, draw.number(0.6, 0.94)),
        (31, 40, 0.95),
        (0, some, 0.9),
        (some, some, 0.99),
        (1, 2, 0.5),
        (draw.whole(1, many - 1), many, draw.number(0.991, 0.9999)),
        (draw.whole(0, 1), 1, draw.number(0.02, 0.45)),
    ):
        z = _halved(0.0, 9.0, lambda z, c=confidence: math.erf(z / math.sqrt(2)) >= c)
        one_sided = _halved(0.0, 9.0, lambda z, c=confidence: (1 + math.erf(z / math.sqrt(2))) / 2 >= c)
        share, low_high = right / n, _bounds(right, n, z)
        normal = torch.tensor([-1.0, 1.0]).double() * z * math.sqrt(share * (1 - share) / n) + share
        between = 0 < right < n
        wilson = torch.tensor(low_high, dtype=torch.float64)
        what = f"the interval for {right} of {n} at {confidence:.4g}"
        got = numbers(answer(right, n, confidence), what, 2)
        looks = {
            "normal": [normal, normal.clamp(0, 1)] if between else [],
            "point": [] if between else normal,
            "one-sided": torch.tensor(_bounds(right, n, one_sided), dtype=torch.float64),
            "z-fixed": [
                torch.tensor(_bounds(right, n, fixed), dtype=torch.float64)
                for fixed in (1.96, 1.959964, 1.645, 1.644854, 2, 2.576, 2.575829, 1)
            ],
            "z-rounded": [
                torch.tensor(_bounds(right, n, round(z, digits)), dtype=torch.float64)
                for digits in (1, 2, 3, 4)
            ],
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
    head, odd = "request,answer\n", f"{a}\u2028{c}\x85{d}"
    older = f"{a}\x0b{b}\x0c{c}\x1c{d}"  # splitlines cuts here, too

    def objects(*pairs, **more) -> str:
        """A line for each pair; with further keys, these come first and the answer before the request."""
        records = (
            {**more, "answer": y, "request": x} if more else {"request": x, "answer": y} for x, y in pairs
        )
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    two, alike = [(a, b), (c, d)], [(a, b), (c, b)]
    wide, high = f"{a}  {b}\t{c}e\u0301", [(a.upper(), b), (a, d)]
    lines, names = f"{b}  \n\t {c}\n\n {d}", ("request", "answer")
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
        ("csv", "splitlines", "the character U+2028 in a field", f"{head}{odd},{b}\n", [(odd, b)]),
        ("csv", "splitlines", "a form feed and the like in a field", f"{head}{older},{b}\n", [(older, b)]),
        ("csv", "squeezed", "white space inside texts", f"{head}{wide},{b}  {d}\n", [(wide, f"{b}  {d}")]),
        ("csv", "capitals", "a request in capitals", f"{head}{a.upper()},{b}\n{a},{d}\n", high),
        ("csv", "same-answer", "two requests with the same answer", f"{head}{a},{b}\n{c},{b}\n", alike),
        ("csv", "ignored", "empty fields in another column", f"id,{head},{a},{b}\n \t,{c},{d}\n", two),
        ("csv", "squeezed", "white space around lines in a text", f'{head}{a},"{lines}"\n', [(a, lines)]),
        ("csv", "bom", "a byte order mark, names in quotes", f'\ufeff"request","answer"\n{a},{b}\n', two[:1]),
        ("csv", "bom", "a byte order mark before an empty line", f"\ufeff\n{head}{a},{b}\n", two[:1]),
        ("csv", "bom", "U+FEFF inside a text", f"{head}{a}\ufeff{c},{b}\n", [(f"{a}\ufeff{c}", b)]),
        ("csv", "bom", "U+FEFF at the end of the file", f"{head}{a},{b}\ufeff", [(a, f"{b}\ufeff")]),
        ("csv", "skipped", "a request that begins with #", f"{head}#{a},{b}\n{c},{d}\n", [(f"#{a}", b), (c, d)]),
        ("csv", "skipped", "the header's words once more", f"{head}{a},{b}\n{head}", [(a, b), names]),
        ("jsonl", "refuses-right", "a plain JSONL file", objects(*two[::-1]), two[::-1]),
        ("jsonl", "by-position", "one more key, before the others", objects(*two, id="1"), two),
        ("jsonl", "bom", "a byte order mark", "\ufeff" + objects(*two), two),
        ("jsonl", "blank-lines", "empty lines", "\n" + objects(*two).replace("\n", "\n \n"), two),
        ("jsonl", "not-stripped", "white space around texts", objects((f" {a}\n", f"{b} ")), two[:1]),
        ("jsonl", "splitlines", "the character U+2028 in a text", objects((odd, b)), [(odd, b)]),
        ("jsonl", "repeated", "a record that comes twice", objects(*two, two[0]), two),
        ("jsonl", "squeezed", "white space inside texts", objects((wide, wide)), [(wide, wide)]),
        ("jsonl", "capitals", "a request in capitals", objects(*high), high),
        ("jsonl", "same-answer", "two requests with the same answer", objects(*alike), alike),
        ("jsonl", "ignored", "other keys whose values are no texts", objects(*two, id=7, tag=None, to=["x"]), two),
        ("jsonl", "ignored", "other keys whose values are empty", objects(*two, note="", more={}), two),
        ("jsonl", "squeezed", "white space around lines in a text", objects((lines, lines)), [(lines, lines)]),
        ("jsonl", "bom", "a byte order mark before an empty line", "\ufeff\n" + objects(*two), two),
    ):  # fmt: skip
        facts, what = answer(text, kind, crash=mistake), f"{what} ({kind})"
        if "refused" in facts:
            expect.fail(what, "a list", f"ValueError: {facts['refused']}", mistake)
        expect.same(_pairs(facts["examples"], what), right, what, {mistake: _pairs(facts["examples"], what)})
    before_csv, before = f'\n{head}{a},"{b}\n{c}"\n\n', "\n" + objects((a, b)) + "\n" + objects((c, d))
    both = '{"request": "x", "answer": "y"}'
    other, space = f'{a},"{b}\n{c}"'.upper().replace(a.upper(), a), f"{a},{b} {c}"
    three, last, none = (
        f"id,request,answer\nx,{a},{b}\n",
        f"{head[:-1]},id\n{a},{b},x\n",
        f"\n \nid,{{}}\n{a},{b}\n",
    )
    more = [(f"note {word}", f"reply {word}") for word in "klmnopqrstuvwxyz"]  # good records come after
    count = draw.whole(30, 60)  # and before, in two long files
    long = [(f"wish {'abcdefgh'[i // 8]}{'klmnopqr'[i % 8]}", "done") for i in range(count)]
    long_csv = head + "".join(f"{x},{y}\n" for x, y in long)
    for kind, mistake, what, text, lines in (
        ("csv", "missing-column", "no column `answer`", f"request,reply\n{a},{b}\n", {1}),
        ("csv", "missing-column", "no column `request`", f"note,answer\n{a},{b}\n", {1}),
        ("csv", "missing-column", "no column `answer`", none.format("request"), {3}),
        ("csv", "missing-column", "no column `request`", none.format("answer"), {3}),
        ("csv", "short-row", "a row with one field", f"{before_csv}{d}\n{c},{a}\n", {6}),
        ("csv", "short-row", "a row with two fields of three", f"{three}y,{c}\n", {3}),
        ("csv", "short-row", "a row without the field that is ignored", f"{last}{c},{d}\n", {3}),
        ("csv", "long-row", "a row with four fields of three", f"{three}y,{c},{d},\n", {3}),
        ("csv", "long-row", "a comma without quotes", f"{before_csv}{d},{a}, {b}\n", {6}),
        ("csv", "empty", "an answer of white space", f"{before_csv}{d}, \n", {6}),
        ("csv", "empty", "an empty request", f'{head}{a},{b}\n,"{c}\n{d}"\n', {3, 4}),
        ("csv", "empty", "a row of a comma alone", f"{before_csv},\n", {6}),
        ("csv", "empty", "a row of a comma between blanks", f"{before_csv} , \n", {6}),
        ("csv", "empty", "a row of two commas alone", f"{three},,\n", {3}),
        ("csv", "contradiction", "a request with two answers", f"{before_csv}{d},{b}\n{a},{d}\n", {7}),
        ("csv", "contradiction", "an answer in other capitals", f"{before_csv}{other}\n", {6, 7}),
        ("csv", "contradiction", "an answer with other white space", f"{before_csv}{space}\n", {6}),
        ("csv", "missing-column", "`Request` in the place of `request`", f"Request,answer\n{a},{b}\n", {1}),
        ("csv", "missing-column", "`ANSWER` in the place of `answer`", f"request,ANSWER\n{a},{b}\n", {1}),
        ("csv", "short-row", "a row with one field in a long file", f"{long_csv}{d}\n", {count + 2}),
        ("jsonl", "missing-key", "no key `request`", before + '{"answer": "y"}\n', {5}),
        ("jsonl", "missing-key", "no key `answer`", before + '{"request": "x"}\n', {5}),
        ("jsonl", "broken", "a line that is no JSON", before + "{'request': 'x', 'answer': 'y'}\n", {5}),
        ("jsonl", "not-text", "a number for a text", before + '{"request": "x", "answer": 7}\n', {5}),
        ("jsonl", "not-text", "null for a text", before + '{"request": null, "answer": "y"}\n', {5}),
        ("jsonl", "not-text", "a list for an object", before + '["request", "answer"]\n', {5}),
        ("jsonl", "empty", "an empty answer", before + '{"request": "x", "answer": ""}\n', {5}),
        ("jsonl", "contradiction", "a request with two answers", before + objects((f"{a} ", d)), {5}),
        ("jsonl", "contradiction", "an answer in other capitals", before + objects((a, b.upper())), {5}),
        ("jsonl", "missing-key", "`Request` for `request`", before + '{"Request": "x", "answer": "y"}\n', {5}),
        ("jsonl", "missing-key", "an object without keys", before + "{}\n", {5}),
        ("jsonl", "missing-key", "no key in a long file", objects(*long) + '{"answer": "y"}\n', {count + 1}),
        *(
            ("jsonl", "not-text", f"{value} for {key}", f'{before}{{"{names[1 - i]}": "x", "{key}": {value}}}\n', {5})
            for value in ('["y"]', '{"job": "y"}', "7.5", "true", "false")
            for i, key in enumerate(names)
        ),
        *(
            ("jsonl", "not-text", f"{line} for an object", f"{before}{line}\n", {5})
            for line in ("null", f"[{both}]", '"request, answer"', "7", "[]")
        ),
        *(
            ("jsonl", "broken", what, f"{before}{line}\n", {5})
            for what, line in (
                ("two objects in a line", f"{both} {both}"),
                ("a comma after an object", f"{both},"),
                ("a line that begins with #", f"# {both}"),
            )
        ),
        ("csv", "nothing", "an empty text", "", None),
        ("csv", "nothing", "a header alone", head, None),
        ("jsonl", "nothing", "an empty text", "\n", None),
        *((kind, "unknown-kind", "a kind of file", f"{head}{a},{b}\n", None) for kind in ("xlsx", "CSV", ".csv", "a")),
        *((kind, "unknown-kind", "a kind of file", objects(*two), None) for kind in ("xlsx", "JSONL", "json")),
    ):  # fmt: skip
        if lines:
            columns = text.strip("\n ").split("\n")[0].split(",")
            rows = "".join(
                ",".join({"request": x, "answer": y}.get(column.lower(), "z") for column in columns) + "\n"
                for x, y in more
            )
            text += rows if kind == "csv" else objects(*more)
        what = f"{what} ({kind})"
        try:
            facts = answer(text, kind, crash=mistake)
        except expect.Wrong as wrong:
            if wrong.mistake == mistake:  # another error than a ValueError
                wrong.what, wrong.expected = what, "a ValueError"
            raise
        if "refused" not in facts:
            expect.fail(what, "a ValueError", facts["examples"], mistake)
        invented = not lines and re.search(r"\bline \d", facts["refused"], re.IGNORECASE)
        if invented:
            expect.fail(
                what,
                "a ValueError without a line",
                facts["refused"],
                "line-invented" if mistake == "nothing" else mistake,
            )
        named = {int(number) for number in re.findall(r"\d+", facts["refused"])}
        if lines and not named & lines:
            wanted = f"a ValueError that names line {min(lines)}"
            expect.fail(what, wanted, facts["refused"], "line-wrong" if named else "line-unnamed")
        # A message may have some other numbers, such as columns and characters, or how many records came before.
        if lines and (len(named) > 8 or (min(lines) > 30 and max(lines) + 1 in named)):
            expect.fail(what, f"line {min(lines)} alone", facts["refused"], "lines-all")


def _split_elsewhere(student, examples, share, seed):
    """What the student's split returns in a process of its own, as far as hash() goes: it differs from call to call.

    Also whether it leaves the generators alone that everybody draws from.
    """
    salt, true_hash = next(_SALTS), hash
    before = _generators()
    with patch("builtins.hash", lambda value: true_hash((salt, value))):
        sides = student(examples, share, seed)
    return {"sides": sides, "kept": before == _generators()}


def _generators() -> tuple:
    """The states of the generators that a whole program draws from."""
    _, keys, position, *_ = numpy.random.get_state()
    return random.getstate(), keys.tobytes(), position, torch.get_rng_state().numpy().tobytes()


def _key(request: str) -> str:
    return " ".join(request.lower().split())


@exercise("08-split", probe=_split_elsewhere)
def split(answer: Answer, draw: Draw) -> None:
    """`f(examples, share, seed)`: (training, held out), no request on both sides."""
    seeds = [*range(8), *(10**4 * draw.whole(1, 99) + 1000 * i + draw.whole(0, 999) for i in range(4))]
    many = draw.whole(14, 25)
    by_seed = [[] for _ in seeds]
    for groups, share, size in (
        (10, 0.31, 3),
        (many, 6.3 / many, 6),
        (many, 5.7 / many, 6),
        (2, 0.5, 1),
        (7, 0.05, 1),
        (6, 0.97, 5),
    ):
        rows = [(f"Fix v\u00e9lo {i}", f"answer {i}") for i in range(groups)]
        for i in range(0, groups, 2):  # the same request in other letters, and more often
            one = rows[i][0]
            others = (f"fix  V\u00c9LO {i}", one.replace("o ", "o\n"), f"\t{one}", f"{one} \n", one)
            more = [(other, f"answer {n % 2} of {i}") for n, other in enumerate(others)]
            rows += [*more, rows[i], more[0]][: 1 + i % 5] if i else [*more, rows[i], more[0]]
        rows = [rows[i] for i in draw.permutation(len(rows)).tolist()]
        case = f"for {groups} requests in {len(rows)} rows, share = {share:.3f}"
        kept = []

        def held_out(rows, seed, share=share, groups=groups, size=size, case=case, kept=kept) -> set[str]:
            """The requests that are held out, once it is certain that the two sides are right."""
            facts = answer(rows, share, seed)
            kept.append(facts["kept"])
            parts = expect.parts(facts["sides"], "the result", 2)
            train, held = (_pairs(part, f"the rows of a side, {case}") for part in parts)
            total, what = len(train + held), f"every row is on one side, {case}"
            changed = [pair for pair in train + held if pair not in rows]
            expect.true(not changed, f"a row as it was given, {case}", "rows-changed", "", changed[:1])
            lost = [*(Counter(rows) - Counter(train + held))]
            expect.true(not lost, what, "rows-lost", lost[:1], "not on any side, or not as often")
            expect.true(total == len(rows), what, "rows-twice", len(rows), total)
            sides = [{_key(request) for request, _ in side} for side in (train, held)]
            both = ", ".join(sorted(sides[0] & sides[1]))
            expect.true(not both, f"requests on both sides, {case}", "leak", "none", both)
            mistake = "empty-side" if len(sides[1]) in (0, groups) else "size"
            expect.true(len(sides[1]) == size, f"requests held out, {case}", mistake, size, len(sides[1]))
            return sides[1]

        found, again, moved = ([held_out(r, seed) for seed in seeds] for r in (rows, rows, rows[::-1]))
        order = list(dict.fromkeys(_key(request) for request, _ in rows))
        an_end = found[0] in (set(order[:size]), set(order[-size:])) and found != moved
        expect.true(found == again, f"a seed gives the same split again, {case}", "not-fixed")
        if math.comb(groups, size) > 100:
            for seen, held in zip(by_seed, found, strict=True):
                seen.append(frozenset(held))
            # Twelve drawn from so many are hardly ever fewer than six different ones.
            count, mistake = len(set(map(frozenset, found))), "in-order" if an_end else "seed-ignored"
            expect.true(count > 5, f"different splits for 12 seeds, {case}", mistake, "about 12", count)
        expect.true(found == moved, f"the order of the rows does not matter, {case}", "order-matters")
        expect.true(
            all(kept), "the generator that the whole program draws from stays as it was", "global-seed"
        )
    _drawn_alike(answer, draw)
    _whole_seed(answer, draw)
    # That two seeds draw the same three times over, from 120 and twice from more than 3,000, never happens.
    alike, what = (
        len(by_seed) - len(set(map(tuple, by_seed))),
        "seeds whose splits are always those of another",
    )
    expect.true(not alike, f"{what}, among {', '.join(map(str, seeds))}", "seed-ignored", 0, alike)
    asked = "New bell for the red bike, please"  # what differs in anything else is another request
    words, long = asked.split(), asked + ", it is the one with the basket in front: 1"
    for one, other in (
        *((asked, other) for other in (asked[:-1], asked + "?", " ".join(sorted(words)))),
        (asked, asked.replace("New bell", "Newbell")),
        (asked, asked.replace("New", "N\u00e9w")),
        (asked.replace("New", "N\u00e9w"), asked.replace("New", "Ne\u0301w")),
        (asked.replace("red", "m\u00b2"), asked.replace("red", "m2")),
        (long, long[:-1] + "2"),
    ):
        pairs = [(one, "a"), (other, "a")]
        sides = answer(pairs, 0.5, draw.whole(0, 99), crash="merged")["sides"]
        sizes = [len(_pairs(side, "the rows of a side")) for side in expect.parts(sides, "the result", 2)]
        what = f"{one!r} and {other!r} are two requests, one for each side"
        expect.true(sizes == [1, 1], what, "merged", "1 and 1", f"{sizes[0]} and {sizes[1]}")
    one = [("Fix bike", "a"), ("fix bike", "a")]
    answer.raises(ValueError, one, 0.5, 0, what="one request cannot be on two sides", mistake="one-request")
    answer.raises(ValueError, [], 0.5, 0, what="no request cannot be on two sides", mistake="one-request")


def _whole_seed(answer: Answer, draw: Draw) -> None:
    """Refuse if a seed draws what another one draws that has the same first or last digits or bits."""
    rows = [(f"Fix the {i}", "an answer") for i in draw.permutation(60).tolist()]
    seed = draw.whole(10**6, 10**9)
    # By chance two of them draw the same 30 of 60 requests once in more than 10**15 checks.
    others, found = [seed + more for more in (0, 1, 256, 1000, 10**6, 2**31)], []
    for other in others:
        sides = expect.parts(answer(rows, 0.5, other)["sides"], "the result", 2)
        found.append(frozenset(request for request, _ in _pairs(sides[1], "the rows held out")))
        first = found.index(found[-1])
        what = f"the splits of 60 requests for the seeds {others[first]} and {other}"
        expect.true(first == len(found) - 1, what, "seed-ignored", "different ones", "the same")


def _drawn_alike(answer: Answer, draw: Draw) -> None:
    """Refuse unless, over many seeds, any request, and any two together, are held out about as often as others."""
    times, share, size = 200, 0.45, 4
    names = ["bell", "chain", "frame", "lamp", "pedal", "pump", "saddle", "tyre", "wheel"]
    rows = [(f"Fix the {names[i]}", "an answer") for i in draw.permutation(len(names)).tolist()]
    sets, found = [*combinations(names, 1), *combinations(names, 2)], Counter()
    for i in range(times):
        sides = expect.parts(answer(rows, share, i * 10**4 + draw.whole(0, 9999))["sides"], "the result", 2)
        held = {request.split()[-1] for request, _ in _pairs(sides[1], "the rows held out")}
        found.update(names for names in sets if held.issuperset(names))
    for some in sets:
        each = math.comb(len(names) - len(some), size - len(some)) / math.comb(len(names), size)
        # A right answer fails once in a million checks.
        low, high = _likely(times, each, 1e-6 / (2 * len(sets)))
        what = f"how often {' and '.join(some)} of {len(names)} requests are held out, {size} for each of {times} seeds"
        expect.true(low <= found[some] <= high, what, "not-drawn", f"{low} to {high}", found[some])


def _likely(times: int, each: float, chance: float) -> tuple[int, int]:
    """The bounds of a count of `times` events of probability `each`, but for that chance on either side."""
    terms = [math.comb(times, i) * each**i * (1 - each) ** (times - i) for i in range(times + 1)]
    below, above = (
        next(i for i, total in enumerate(accumulate(line)) if total > chance) for line in (terms, terms[::-1])
    )
    return below, times - above
