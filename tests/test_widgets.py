"""Controls, and what a batch run makes of them. What happens when one is moved is tested in a browser."""

import matplotlib.pyplot as plt
import pytest

from qlora_edu import plots, widgets


@pytest.fixture
def shown(monkeypatch):
    seen = []
    monkeypatch.setattr(plots.figures, "display", seen.append)
    monkeypatch.setenv("QLORA_STATIC", "1")
    yield seen
    plt.close("all")


def draw(rank, model):
    figure, axes = plt.subplots()
    axes.set_title(f"{model}, r={rank}")
    print(f"rank={rank}")
    return figure


def test_a_batch_run_draws_once_at_the_defaults(shown, capsys):
    widgets.explore(
        draw,
        lambda rank, model: f"{model} with r = {rank}.",
        rank=widgets.Slider(8, 1, 64),
        model=widgets.Choice("7B", ["7B", "65B"]),
    )
    picture, caption = shown
    assert picture._repr_mimebundle_()[0]["image/png"]
    assert caption.data == "*7B with r = 8.*"
    assert capsys.readouterr().out == "rank=8\n"
    assert not plt.get_fignums()


def test_live_controls_start_at_the_defaults_and_call_draw_again_when_moved(monkeypatch):
    import ipywidgets
    from IPython import display as ipython

    monkeypatch.delenv("QLORA_STATIC", raising=False)
    seen, shown = [], []
    monkeypatch.setattr(ipython, "display", lambda *widgets: shown.extend(widgets))
    monkeypatch.setattr(plots, "show", lambda figure, caption, alt: plt.close(figure))

    def draw_all(rank, rate, model, on):
        seen.append((rank, rate, model, on))
        return plt.figure()

    widgets.explore(
        draw_all,
        "A figure.",
        rank=widgets.Slider(8, 1, 64, label="rank r"),
        rate=widgets.Slider(0.5, 0.0, 1.0, 0.25, format=".2f"),
        model=widgets.Choice("7B", ["7B", "65B"]),
        on=widgets.Toggle(False),
    )
    rank, rate, model, on = shown[0].children
    assert isinstance(rank, ipywidgets.IntSlider) and isinstance(rate, ipywidgets.FloatSlider)
    assert rank.description == "rank r" and rate.readout_format == ".2f"
    rank.value, rate.value, model.value, on.value = 9, 0.75, "65B", True
    assert seen[0] == (8, 0.5, "7B", False)
    assert seen[-1] == (9, 0.75, "65B", True) and len(seen) == 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: widgets.Slider(0, 1, 64), "expected 1 <= default <= 64; got 0"),
        (lambda: widgets.Slider(2, 1, 64, 0), "step: expected a positive number; got 0"),
        (lambda: widgets.Choice("x", ["7B"]), r"expected one of \['7B'\]; got 'x'"),
        (lambda: widgets.explore(draw, "A figure."), "expected at least one"),
    ],
)
def test_what_cannot_be_moved_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_control_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"rank: expected widgets\.Slider, Choice or Toggle; got int"):
        widgets.explore(draw, "A figure.", rank=8)
