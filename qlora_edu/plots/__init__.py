"""What the chapters draw. `figures` gives every figure one look and one way to be shown; the other modules hold a
chapter's drawings, which its widgets call with other numbers.
"""

from qlora_edu.plots.boxes import boxes
from qlora_edu.plots.figures import (
    BLUE,
    CARD,
    CSS_PIXELS_PER_INCH,
    DOTS_PER_INCH,
    GREEN,
    INK,
    ORANGE,
    PALETTE,
    PURPLE,
    RULE,
    SKY,
    STYLE,
    VERMILLION,
    png,
    show,
    stacked_bars,
    use_style,
)

__all__ = [
    "BLUE",
    "CARD",
    "CSS_PIXELS_PER_INCH",
    "DOTS_PER_INCH",
    "GREEN",
    "INK",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "RULE",
    "SKY",
    "STYLE",
    "VERMILLION",
    "boxes",
    "png",
    "show",
    "stacked_bars",
    "use_style",
]
