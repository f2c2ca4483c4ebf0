"""The drawings of chapter 06 show the numbers they are given, and moving a control changes the picture."""

import pytest

from qlora_edu import memory, plots
from qlora_edu.memory import decoded
from qlora_edu.memory.activations import Work
from qlora_edu.plots import qlora as drawings

pytestmark = pytest.mark.usefixtures("course_style")
START = {"model": "llama-7b", "length": 512, "rank": 64, "naive": True, "checkpointing": False}


@pytest.mark.parametrize(
    "change",
    [{"model": "llama-13b"}, {"length": 576}, {"rank": 65}, {"naive": False}, {"checkpointing": True}],
    ids=str,
)
def test_every_control_changes_the_picture(change):
    assert plots.png(drawings.kept_for_backward(**START)) != plots.png(
        drawings.kept_for_backward(**START | change)
    )


@pytest.mark.parametrize("naive", [True, False])
def test_bars_are_the_formula(capsys, naive):
    figure = drawings.kept_for_backward(**START | {"naive": naive})
    parts = decoded.kept(memory.shape_of("llama-7b"), Work(1, 512, rank=64), naive)
    top, bottom = figure.axes
    assert [bar.get_width() for bar in bottom.patches] == [size / 1e6 for size in parts.values()]
    assert sum(bar.get_width() for bar in top.patches[1:]) == pytest.approx(sum(parts.values()) / 1e6)
    assert f"{sum(parts.values()) / 1e6:,.0f} MB kept" in capsys.readouterr().out


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="got 'gpt-9'"):
        drawings.kept_for_backward(model="gpt-9")


def test_kept_bars_keep_a_parts_colour_and_refuse_others():
    figure = drawings.kept_bars({"a": {"activations kept": 2.0}, "b": {"linear weights": 1.0}})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [2.0, 1.0]
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert colours[0] != colours[1]
    assert [text.get_text() for text in figure.legends[0].texts] == ["linear weights", "activations kept"]
    for wrong in ({}, {"a": {}}, {"a": {"something": 1.0}}):
        with pytest.raises(ValueError, match="rows: expected parts"):
            drawings.kept_bars(wrong)


def test_agreements_draws_a_line_of_medians_for_each_source():
    pairs = {
        f"model.layers.{b}.{kind}": (c, 1.0) for b, kind, c in ((0, "q", 0.2), (0, "k", 0.6), (1, "q", 0.9))
    }
    pairs["model.layers.0.v"] = (0.4, 2.0)
    figure = drawings.agreements({"one": pairs, "other": pairs})
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert [list(line.get_ydata()) for line in lines] == [[0.4, 0.9]] * 2
    for wrong in ({}, {"one": {}}):
        with pytest.raises(ValueError, match="sources: expected"):
            drawings.agreements(wrong)


def test_data_flow_names_what_is_kept_and_what_is_decoded():
    texts = [text.get_text() for text in drawings.data_flow().axes[0].texts]
    assert sum("decode" in text for text in texts) == 3
    assert {"x", "x Aᵀ", "dx", "dy W + s (dy B) A"} <= set(texts)


def test_a_negative_cosine_is_in_the_picture():
    pairs = {"model.layers.0.q": (-0.4, 1.0), "model.layers.1.q": (0.9, 1.0)}
    low, high = drawings.agreements({"one": pairs}).axes[0].get_ylim()
    assert low < -0.4 and high > 1


def test_no_source_is_dropped_in_silence():
    pairs = {"model.layers.0.q": (0.4, 1.0)}
    assert len(drawings.agreements(dict.fromkeys("abcd", pairs)).legends[0].texts) == 4
    with pytest.raises(ValueError, match=r"sources: expected 1 to 4, .*; got 5"):
        drawings.agreements(dict.fromkeys("abcde", pairs))


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="rows: expected finite sizes in MB of at least 0"):
        drawings.kept_bars({"a": {"linear weights": size}})
