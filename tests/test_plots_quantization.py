"""The pictures of chapter 03 show what NumPy computes, and every control changes them."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from qlora_edu import plots
from qlora_edu.plots import quantization as pictures

pytestmark = pytest.mark.usefixtures("course_style")


def test_the_normals_are_normal_and_stored():
    x = pictures.normals()
    assert x.shape == (65_536,) and x.dtype == torch.float32
    assert abs(x.mean()) < 5 / 256 and abs(x.std() - 1) < 5 / 362  # five standard errors


def test_shades_tell_the_sign_and_the_size():
    below, zero, little, large = (to_rgb(c) for c in pictures.shades([-2.0, 0.0, 0.5, 2.0]))
    assert below[2] > below[0] and large[0] > large[2]  # blue, orange
    assert zero == to_rgb(plots.CARD)
    distance = [np.abs(np.array(c) - zero).sum() for c in (little, large)]
    assert 0 < distance[0] < distance[1]
    assert pictures.shades([0.0, 0.0]) == [plots.CARD.lower()] * 2


@pytest.mark.parametrize(("how", "square"), [("nearest", 1 / 12), ("truncate", 1 / 3), ("stochastic", 1 / 6)])
def test_errors_shows_the_tooth_and_the_theory(how, square, capsys):
    left, right = pictures.errors(8, how).axes
    x, error = left.lines[0].get_data()
    assert np.allclose(np.rint(x + error), x + error, atol=1e-5)  # what comes back is a whole number
    assert np.abs(error).max() <= (0.5 if how == "nearest" else 1)
    shown = float(right.get_title(loc="left").split("RMSE ")[1].split()[0])
    assert shown == pytest.approx((square * 63 / 64) ** 0.5, abs=0.005)
    heights = np.array([patch.get_height() for patch in right.patches])
    widths = np.array([patch.get_width() for patch in right.patches])
    assert (heights * widths).sum() == pytest.approx(1)


@pytest.mark.parametrize(("granularity", "width"), [("tensor", 512), ("row", 64), ("block", 16)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outlier_shows_the_errors_that_numpy_finds(granularity, width, bits, capsys):
    figure = pictures.outlier(20, granularity, bits)
    weight = pictures.normals()[pictures.FIRST :][:512].numpy().copy()
    weight[3 * 64 + 21] = 20
    groups = weight.reshape(-1, width).astype(np.float64)
    step = np.abs(groups).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    back = np.rint(groups / step) * step
    error = np.abs(back - groups).reshape(8, 64)
    image = figure.axes[1].images[0]
    assert np.allclose(image.get_array(), error, atol=1e-5)
    others = np.ones((8, 64), bool)
    others[3, 21] = False
    lost = np.sqrt((error[others] ** 2).sum() / (weight.reshape(8, 64)[others] ** 2).sum())
    zeros = (back.reshape(8, 64)[others] == 0).mean()
    assert capsys.readouterr().out == (
        f"error of the other 511 weights: {lost:.1%}; {zeros:.0%} of them came back as zero\n"
    )
    drawn = np.concatenate([[p[0, 1] for p in c.get_segments()] for c in figure.axes[0].collections[:1]])
    first = (3 * 64) // width  # the group that the row begins with
    assert np.allclose(drawn / step[first, 0], np.rint(drawn / step[first, 0]), atol=1e-4)
    assert (
        len(drawn) == (np.abs(np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) * step[first, 0]) < 4.6).sum()
    )


def test_every_control_changes_the_picture(capsys):
    start = plots.png(pictures.outlier(30, "row", 4))
    for changed in ((31, "row", 4), (30, "block", 4), (30, "tensor", 4), (30, "row", 5)):
        assert start != plots.png(pictures.outlier(*changed))
    start = plots.png(pictures.errors(4, "nearest"))
    for changed in ((5, "nearest"), (4, "truncate"), (4, "stochastic")):
        assert start != plots.png(pictures.errors(*changed))


def test_bits_against_error_draws_the_points_in_order_of_their_bits():
    panels = {"a": {"x": [(5.0, 0.1), (4.0, 0.2)]}, "b": {"x": [(4.0, 0.3)]}}
    figure = pictures.bits_against_error(panels, {4.0: "a row"})
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["a row", "a row"]
    x, y = figure.axes[0].lines[0].get_data()
    assert list(x) == [4.0, 5.0] and list(y) == [20.0, 10.0]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x"]


def test_snr_map_uses_one_scale_for_all_maps():
    maps = {"first": torch.tensor([[1.0, 2.0]]), "second": torch.tensor([[3.0, 9.0]])}
    figure = pictures.snr_map(maps, ["q_proj"])
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert [image.get_clim() for image in images] == [(1.0, 9.0), (1.0, 9.0)]
    assert np.array_equal(images[1].get_array(), maps["second"].numpy())
