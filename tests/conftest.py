"""What several test modules share."""

import pytest


@pytest.fixture
def course_style():
    """Figures in the course's look; afterwards matplotlib is as it was, and no figure is left open."""
    import matplotlib.pyplot as plt

    from qlora_edu import plots

    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


@pytest.fixture
def tiny_base(monkeypatch):
    """A small random model in the place of the one whose losses are measured: (model, tokenizer)."""
    from qlora_edu import format_losses, models

    model, tokenizer = models.tiny()
    model = model.float().eval()
    monkeypatch.setattr(format_losses, "base", lambda: (model, tokenizer))
    return model, tokenizer
