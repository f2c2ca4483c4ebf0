"""The figures of chapter 01: they show what they are given, and every control moves the calculator."""

import pytest

from qlora_edu import memory, plots
from qlora_edu.plots import memory as draw

pytestmark = pytest.mark.usefixtures("course_style")


def texts(figure):
    return [text.get_text().strip() for axes in figure.axes for text in axes.texts]


def test_grouped_parts_add_up_to_the_peak():
    found = memory.predict("llama-7b")
    assert sum(draw.grouped(found.at_peak).values()) == found.peak
    assert list(draw.grouped(found.at_peak)) == list(draw.COLORS)


def test_a_stack_shows_its_total_and_its_lines():
    figure = draw.stacks({"a": {"weights": 20.0, "adapter": 3.5}, "b": {"weights": 1040.0}}, lines=(24,))
    assert texts(figure) == ["23.5 GB", "1,040 GB", "24 GB"]


def test_bars_are_as_long_as_their_numbers():
    figure = draw.compared({"a": (10.0, 12.0)})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [10.0, 12.0]


def test_a_timeline_is_drawn_with_its_stages():
    line = memory.Timeline([0.0, 1.0, 2.0], [5_000_000, 9_000_000, 0], [("forward", 0.0), ("backward", 1.0)])
    figure = draw.over_time({"one": line, "two": line})
    assert texts(figure) == ["forward", "backward"] * 2


@pytest.mark.parametrize(
    "moved",
    [
        {"model": "llama-13b"},
        {"method": "lora"},
        {"length": 576},
        {"batch": 2},
        {"rank": 65},
        {"targets": "q and v"},
        {"block_size": 128},
        {"checkpointing": False},
    ],
    ids=lambda moved: next(iter(moved)),
)
def test_every_control_changes_the_picture(moved, capsys):
    before, after = plots.png(draw.calculator()), plots.png(draw.calculator(**moved))
    assert before != after
    first, second = capsys.readouterr().out.splitlines()
    assert first != second and "GB at the fullest moment" in first


def test_wrong_targets_are_named():
    with pytest.raises(ValueError, match="targets: expected one of all seven, attention, q and v; got 'all'"):
        draw.calculator(targets="all")
