"""The figures of chapter 04: every control changes the picture, and what is printed is what is drawn."""

import inspect

import pytest
import torch

from qlora_edu import formats, lloyd, normalised, plots
from qlora_edu.plots import nf4

pytestmark = pytest.mark.usefixtures("course_style")


def dots(figure):
    return [line.get_xdata() for line in figure.axes[0].lines]


def test_bins_have_equal_area_and_their_medians_are_marked():
    medians = dots(nf4.equal_bins())[-1]
    assert torch.special.ndtr(torch.tensor(medians)).tolist() == pytest.approx(
        [(k + 0.5) / 16 for k in range(16)]
    )


def test_half_grids_show_nf4_up_to_its_scale():
    lines = nf4.half_grids().axes[0].lines
    values = sorted(float(v) for line in lines[1:] for v in torch.as_tensor(line.get_ydata()).double())
    assert [v / max(values) for v in values] == pytest.approx(formats.levels("nf4").tolist(), abs=1e-6)


def test_strips_have_a_row_for_each_format_and_a_square_for_each_zero():
    figure = nf4.strips({"nf4": formats.levels("nf4"), "best": formats.levels("lloyd-max")})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["nf4", "best"]
    assert sum(line.get_marker() == "s" for line in figure.axes[0].lines) == 1


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_use_is_printed_as_it_is_drawn(block_size, capsys):
    figure = nf4.usage(block_size, "int4")
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert sum(heights) == pytest.approx(100)
    said = capsys.readouterr().out
    assert (
        f"{min(heights):.1f}%" in said
        and f"{max(heights):.1f}%" in said
        and f"blocks of {block_size}" in said
    )


def test_each_control_of_the_two_games_changes_the_picture():
    first = plots.png(nf4.usage())
    assert plots.png(nf4.usage(block_size=256)) != first != plots.png(nf4.usage(format="fp4"))
    first = plots.png(nf4.place())
    assert plots.png(nf4.place(block_size=4096)) != first
    for k in range(1, 15):
        assert plots.png(nf4.place(**{f"level_{k}": nf4.START[k - 1] + 0.02})) != first


def test_placing_nf4_by_hand_gives_nf4s_error(capsys):
    nf4.place(**{f"level_{k}": level for k, level in enumerate(formats.levels("nf4").tolist()) if 0 < k < 15})
    numbers = capsys.readouterr().out
    error = f"{100 * normalised.error(formats.levels('nf4'), 64) ** 0.5:.2f}%"
    least = f"{100 * normalised.error(lloyd.best_levels(64, pinned=(-1, 1)), 64) ** 0.5:.2f}%"
    assert f"yours {error}, NF4 {error}, least possible with -1 and 1 {least}" in numbers


def test_levels_may_cross_and_coincide(capsys):
    nf4.place(level_1=0.5, level_2=0.5, level_14=-0.9)
    assert "yours" in capsys.readouterr().out


def test_the_game_starts_from_equal_steps():
    steps = formats.levels("uniform16-zero")[1:-1].tolist()
    assert pytest.approx(steps, abs=0.0051) == nf4.START
    assert "moved" in inspect.signature(nf4.place).parameters


def test_error_and_loss_are_sorted_by_error():
    figure = nf4.error_and_loss({"a": 9.0, "b": 8.0}, {"a": 0.2, "b": 0.4}, {"a": 0.1, "b": 0.1}, {"b"})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [8.0, 9.0]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["b", "a"]


def test_errors_grow_with_the_block_and_never_fall_below_the_least():
    lines = nf4.by_block_size().axes[0].lines
    curves = {line.get_label(): line.get_ydata() for line in lines}
    for curve in curves.values():
        assert (torch.tensor(curve).diff() > 0).all()
        assert all(a >= b for a, b in zip(curve, curves["least possible"], strict=True))
