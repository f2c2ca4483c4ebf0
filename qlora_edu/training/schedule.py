"""How large each step is."""

import math


def cosine_with_warmup(step: int, total: int, warmup: int) -> float:
    """The share of the peak learning rate for a step, counted from 0: a straight line up, half a cosine down to 0.

    >>> [round(cosine_with_warmup(step, total=10, warmup=2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
