"""The figures of chapter 07 show what they are given, and every control of the card changes its picture."""

import pytest

from qlora_edu import plots
from qlora_edu.memory import Timeline
from qlora_edu.paging import policies, runs
from qlora_edu.plots import paging as draw
from qlora_edu.plots import spikes

pytestmark = pytest.mark.usefixtures("course_style")


def test_a_page_map_says_how_many_faults_and_marks_them():
    figure = draw.page_map(8, (8, 7))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "room for 8: 8 faults",
        "room for 7: 24 faults",
    ]
    for axes, room in zip(panels, (8, 7), strict=True):
        cells = axes.collections[0].get_array()
        assert (cells == 3).sum() == sum(policies.faults(policies.sweep(8, 3), room))
        assert (cells[:, -1] > 0).sum() == room  # on the device at the end


def test_the_cliff_is_one_page_wide():
    lines = {line.get_label(): list(line.get_ydata()) for line in draw.cliff(pages=16).axes[0].lines}
    lru = next(values for label, values in lines.items() if "LRU" in label)
    assert set(lru[:-1]) == {100.0} and lru[-1] == 0


def test_timelines_say_what_moved_and_where_a_run_ended():
    results = {"fits": runs.run(60 * 65_536), "does not": runs.run(27 * 65_536)}
    figure = draw.timelines(results)
    titles = [axes.get_title(loc="right") for axes in figure.axes]
    assert titles[0] == "faults 32, in 2.1, out 0.0 MB"
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["does not fit"]


@pytest.mark.parametrize(
    "moved",
    [{"model": "llama-65b"}, {"card": 23.75}, {"spike": 1920}, {"page": 4}, {"prefetch": True}],
    ids=lambda moved: next(iter(moved)),
)
def test_every_control_changes_the_picture(moved):
    assert plots.png(draw.card()) != plots.png(draw.card(**moved))


def test_the_card_says_how_it_ends(capsys):
    draw.card()
    draw.card(spike=4096)
    assert capsys.readouterr().out.splitlines() == [
        "paged: goes through; not paged: fails in step 5",
        "paged: fails in step 5; not paged: fails in step 5",
    ]


def test_the_time_on_the_card_leaves_out_the_first_step_in_which_all_states_come():
    title = draw.card().axes[0].get_title(loc="left")
    assert title == "After step 1: faults 75, in 1.26, out 1.26 GB, 0.16 s at 16 GB/s"


def test_lengths_have_two_curves_a_constant_apart():
    axes = spikes.lengths({"llama-33b": 24}).axes[0]
    upper, lower = (line.get_ydata() for line in axes.lines[:2])
    apart = {round(a - b, 6) for a, b in zip(upper, lower, strict=True)}
    assert len(apart) == 1 and apart.pop() == pytest.approx(3.900703)


def test_bars_are_as_long_as_their_numbers():
    axes = spikes.remedies({"as it is": 100.0, "paging": 100.0}, 20.0).axes[0]
    assert [text.get_text().strip() for text in axes.texts] == ["120", "100"]
    assert sum(bar.get_width() for bar in axes.patches) == 220


def test_steps_are_drawn_equally_wide_with_their_sizes():
    line = Timeline([0.0, 1.0, 9.0, 10.0], [5_000_000, 0, 9_000_000, 0], [("step 1", 0.0), ("step 2", 9.0)])
    axes = spikes.over_steps(line, 1e6, [(4, 8), (4, 16)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["4 × 8", "4 × 16"]
    assert axes.get_xlim() == (1, 3)
