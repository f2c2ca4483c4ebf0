"""The pictures of chapter 05 show what is computed from their data, and every control changes them."""

import numpy as np
import pytest

from qlora_edu import blockwise, codebooks, double_quantization, plots, second_level
from qlora_edu.parity import stored_weights
from qlora_edu.plots import double_quantization as pictures

START = {"first": 64, "second": 256, "bits": 8, "offset": True, "grid": "dynamic"}


pytestmark = pytest.mark.usefixtures("course_style")


@pytest.fixture
def sample(monkeypatch):
    """Stored numbers in the place of MiniLM's matrix."""
    weight = stored_weights(96 * 1024).view(96, 1024)
    monkeypatch.setattr(pictures.models, "load_minilm", lambda progress: {pictures.SAMPLE: weight})
    pictures._sample.cache_clear(), pictures.error.cache_clear()
    yield weight
    pictures._sample.cache_clear(), pictures.error.cache_clear()


def test_the_map_is_drawn_with_its_bits_and_all_its_levels():
    left, right = pictures.dynamic_map().axes
    text = [t.get_text() for t in left.texts]
    rows = ["".join(text[8 * i : 8 * i + 8]) for i in range(7)]
    assert rows[0] == "s0000001" and rows[3] == "s0001fff" and rows[6] == "s1ffffff"
    drawn = [segment[0, 0] for lines in right.collections for segment in lines.get_segments()]
    levels = codebooks.dynamic_map()
    assert sorted(drawn) == pytest.approx(levels[(levels > 0) & (levels < 1)].tolist())


def test_the_histograms_and_the_gaps_are_those_of_the_data():
    scales = stored_weights(64 * 512).view(-1, 64).abs().amax(dim=1)
    without, centred = scales / scales.max(), (scales - scales.mean()) / (scales - scales.mean()).abs().max()
    figure = pictures.against_levels(without, centred)
    for ax, x, low in zip(figure.axes[:2], (without, centred), (0, -1), strict=True):
        expected, _ = np.histogram(x.numpy(), bins=np.arange(low, 1.0001, 0.025), density=True)
        assert [patch.get_height() for patch in ax.patches] == pytest.approx(expected.tolist())
    values, edges, _ = figure.axes[3].patches[0].get_data()
    assert edges.tolist() == pytest.approx(codebooks.dynamic_map().tolist())
    assert values == pytest.approx(100 * np.diff(edges))


def test_an_interval_without_zero_is_red():
    axes = pictures.losses({"small": (1.0, 1.0), "large": (5.0, 1.0)}, "loss").axes[0]
    assert [line.get_color() for line in axes.lines if line.get_marker() == "o"] == [
        plots.BLUE,
        plots.VERMILLION,
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large"]


@pytest.mark.parametrize("first", [32, 64, 1024])
@pytest.mark.parametrize(("bits", "grid"), [(32, "dynamic"), (8, "dynamic"), (5, "min-max"), (4, "uniform")])
def test_the_error_is_that_of_the_decoded_weights(sample, first, bits, grid):
    stored = blockwise.quantize(sample, first)
    scales = stored.scales()
    back = scales if bits == 32 else second_level.store(scales, grid, bits, 64)
    decoded = blockwise.decode(stored.packed, back, "nf4", first, sample.numel()).view_as(sample)
    expected = ((decoded - sample).double().norm() / sample.double().norm()).item()
    assert pictures.error(first, 64, bits, True, grid) == pytest.approx(expected, rel=1e-5)


def test_qlora_s_choice_is_what_bitsandbytes_stores(sample):
    stored = blockwise.quantize(sample, double_quant=True)
    expected = ((stored.dequantize() - sample).double().norm() / sample.double().norm()).item()
    assert pictures.error(64, 256, 8, True, "dynamic") == pytest.approx(expected, rel=1e-4)
    assert stored.stored_scales.codes.numel() == double_quantization.to_blocks(sample.flatten(), 64).shape[0]


def test_trade_prints_and_marks_the_choice(sample, capsys):
    figure = pictures.trade(**START)
    error = pictures.error(64, 256, 8, True, "dynamic")
    plain = pictures.error(64, 256, 32, True, "dynamic")
    assert capsys.readouterr().out == (
        f"4.127 bits a weight, error {error:.2%}; with scales of 32 bits 4.500 and {plain:.2%}\n"
    )
    x, y = figure.axes[0].lines[-1].get_data()
    assert (x[0], y[0]) == pytest.approx((8 / 64 + 32 / (64 * 256), 100 * error))


def test_every_control_changes_the_picture(sample, capsys):
    start = plots.png(pictures.trade(**START))
    for change in ({"first": 32}, {"second": 512}, {"bits": 7}, {"offset": False}, {"grid": "uniform"}):
        assert start != plots.png(pictures.trade(**START | change)), change


def test_a_choice_beyond_the_picture_is_marked_at_its_edge(sample, capsys):
    y = pictures.trade(**START | {"bits": 2}).axes[0].lines[-1].get_ydata()
    assert y[0] == 17.6 and 100 * pictures.error(64, 256, 2, True, "dynamic") > 17.6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": "e4m3"}, "grid: expected one of 'dynamic', 'uniform', 'min-max'; got 'e4m3'"),
        ({"bits": 32}, "bits: expected one of 2, .*, 8; got 32"),
        ({"first": 48}, "first: .*got 48"),
        ({"second": 0}, "second: .*got 0"),
        ({"offset": "no"}, "offset: .*got 'no'"),
    ],
)
def test_trade_refuses_what_it_cannot_draw_before_it_prints(sample, capsys, change, says):
    with pytest.raises(ValueError, match=says):
        pictures.trade(**(START | change))
    assert capsys.readouterr().out == ""


def test_no_losses_are_no_picture():
    with pytest.raises(ValueError, match="rows: expected one way or more"):
        pictures.losses({}, "loss")
