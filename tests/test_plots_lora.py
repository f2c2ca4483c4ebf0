"""The drawings of chapter 02 show the numbers they are given, and moving a control changes the picture."""

import pytest
import torch

from qlora_edu import plots, spectra
from qlora_edu.plots import lora as drawings

pytestmark = pytest.mark.usefixtures("course_style")
START = {"source": "update", "matrix": "q_proj", "rank": 8}


@pytest.mark.parametrize("change", [{"source": "weight"}, {"matrix": "up_proj"}, {"rank": 9}], ids=str)
def test_every_control_changes_the_picture(change):
    assert plots.png(drawings.rank_k(**START)) != plots.png(drawings.rank_k(**START | change))


def test_it_prints_the_share_and_shows_what_adds_up(capsys):
    figure = drawings.rank_k(**START)
    held = spectra.stored()["update", "q_proj"].share(8)
    assert f"holds {held:.1%} of" in capsys.readouterr().out
    whole, near, left = (torch.tensor(axes.images[0].get_array().data) for axes in figure.axes[:3])
    torch.testing.assert_close(near + left, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    assert near.shape == (32, 32) and torch.linalg.matrix_rank(near, rtol=1e-4) == 8


@pytest.mark.parametrize(
    "wrong", [{"source": "other"}, {"matrix": "lm_head"}, {"rank": 0}, {"rank": 65}, {"rank": 1.5}]
)
def test_what_is_not_stored_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        drawings.rank_k(**START | wrong)


def test_shares_draws_a_line_for_each_matrix_and_their_median():
    curves = [torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0.4, 0.9, 1.0]), torch.tensor([0.3, 0.6, 1.0])]
    lines = drawings.shares({"update": curves}).axes[0].lines
    assert len(lines) == 3 + 1 + 1  # and the dotted one
    assert list(lines[3].get_ydata()) == pytest.approx([0.3, 0.6, 1.0])
    with pytest.raises(ValueError, match="curves: expected"):
        drawings.shares({"update": []})


def test_against_rank_draws_every_line_and_refuses_what_a_log_axis_cannot_show():
    figure = drawings.against_rank({"one": {"a": {1: 0.5, 4: 0.25}}, "two": {"a": {1: 3.0}, "b": {1: 4.0}}})
    assert [len(axes.lines) for axes in figure.axes] == [1, 2]
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.5, 0.25]
    for wrong in ({}, {"one": {"a": {1: 0.0}}}):
        with pytest.raises(ValueError, match="panels: expected"):
            drawings.against_rank(wrong)
