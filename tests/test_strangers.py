"""The requests that nobody tuned on: whole, unchanged, answerable by copying, and apart from training."""

from collections import Counter
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest

from qlora_edu import tasks

FILE = Path(tasks.__file__).parent.parent / "data" / "strangers.jsonl"
ALL = tasks.strangers()


def test_they_are_the_ones_that_were_first_scored():
    digest = "566196c97661eafb3e3d878454a5635517c1e9550a4f2c13737ba6022f705a2d"
    assert sha256(FILE.read_bytes()).hexdigest() == digest


def test_each_kind_of_person_asks_once_for_every_tool():
    people = {example.phrasing for example in ALL}
    asked = Counter((example.tool, example.phrasing) for example in ALL)
    assert len(people) == 12
    assert asked == Counter({(tool, person): 1 for tool in tasks.TOOLS for person in people})


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.request[:40])
def test_every_argument_is_copied_from_the_request(example):
    assert tuple(example.arguments) == tuple(tasks.TOOLS[example.tool].arguments)
    spans = []
    for value in example.arguments.values():
        assert value and value == value.strip()
        assert example.request.count(value) == 1
        start = example.request.index(value)
        spans.append((start, start + len(value)))
    spans.sort()
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert tasks.parse(example.answer) == (example.tool, example.arguments)


def test_none_stands_in_the_drawn_sets():
    data = tasks.tool_calls()
    drawn = {e.request for e in data.train} | {e.request for s in data.evaluation_sets().values() for e in s}
    assert not drawn & {example.request for example in ALL}
