"""How figures look and how they reach a notebook."""

import io
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from qlora_edu import plots


@pytest.fixture(autouse=True)
def leave_matplotlib_as_it_was():
    with plt.rc_context():
        yield
    plt.close("all")


def draw():
    plots.use_style()
    figure, axes = plt.subplots()
    axes.plot([1, 3, 2], label="a line")
    axes.set(title="Title", xlabel="step", ylabel="loss (nats)")
    axes.legend()
    return figure


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook would show, in order."""
    shown = []
    monkeypatch.setattr(plots.figures, "display", shown.append)
    return shown


def test_show_displays_the_figure_once_with_its_caption_and_description(displayed):
    figure = draw()
    plots.show(figure, "A line. ", alt="It rises, then falls.")
    picture, caption = displayed
    data, metadata = picture._repr_mimebundle_()
    assert data["image/png"]
    assert metadata["image/png"] == {"alt": "It rises, then falls.", "width": 672}
    assert caption.data == "*A line.*"
    assert not plt.get_fignums()


def test_the_caption_describes_where_nothing_else_does(displayed):
    plots.show(draw(), "A line that rises, then falls.")
    assert displayed[0]._repr_mimebundle_()[1]["image/png"]["alt"] == "A line that rises, then falls."


def test_what_is_no_figure_and_what_has_no_caption_is_refused(displayed):
    figure = draw()
    with pytest.raises(TypeError, match=r"got Axes.*axes\.figure"):
        plots.show(figure.axes[0], "A line.")
    with pytest.raises(ValueError, match="caption is empty"):
        plots.show(figure, " ")
    assert displayed == []


def test_the_same_figure_gives_the_same_bytes_with_no_date_or_version_in_them():
    first, second = plots.png(draw()), plots.png(draw())
    assert first == second
    assert Image.open(io.BytesIO(first)).info.keys() <= {"dpi"}


def test_the_picture_is_sharp_small_and_nearly_what_matplotlib_drew():
    figure = draw()
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=plots.DOTS_PER_INCH)
    small = plots.png(figure)
    assert len(small) < len(raw.getvalue()) / 2
    drawn = np.asarray(Image.open(raw).convert("RGB"), dtype=float)
    kept = np.asarray(Image.open(io.BytesIO(small)).convert("RGB"), dtype=float)
    assert kept.shape == drawn.shape == (round(3.25 * 144), 7 * 144, 3)
    assert np.abs(kept - drawn).max() <= 16  # of 255 steps


def test_the_style_does_not_depend_on_the_readers_own_settings():
    expected = plots.png(draw())
    plt.rcParams.update({"lines.linewidth": 9, "axes.facecolor": "black", "font.size": 30})
    assert plots.png(draw()) == expected


def luminance(colour):
    """Relative luminance, as the Web Content Accessibility Guidelines (WCAG 2.2) define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_on_the_card_and_the_card_hides_the_page():
    figure = draw()
    assert contrast(plots.INK, plots.CARD) >= 7
    assert Image.open(io.BytesIO(plots.png(figure))).convert("RGBA").getextrema()[3] == (255, 255)


def test_the_first_four_colours_stand_out_from_the_card_and_the_rest_do_as_areas():
    contrasts = [contrast(colour, plots.CARD) for colour in plots.PALETTE]
    assert min(contrasts[:3]) >= 3
    assert min(contrasts) >= 2


# Viénot, Brettel and Mollon (1999), linear RGB as seen without long- or without medium-wave cones.
SEEN = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("kind", SEEN)
def test_the_colours_can_be_told_apart_by_people_with_colour_blindness(kind):
    linear = np.array([to_rgb(colour) for colour in plots.PALETTE]) ** 2.2
    seen = np.clip(linear @ np.array(SEEN[kind]).T, 0, 1) ** (1 / 2.2)
    for (i, one), (j, other) in combinations(enumerate(seen), 2):
        assert np.abs(one - other).max() > 0.1, (plots.PALETTE[i], plots.PALETTE[j])
