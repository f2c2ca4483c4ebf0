"""The best levels there are for normal weights in blocks, by exact integrals instead of samples.

Two conditions hold at the optimum (Lloyd 1957, Max 1960): the border between two levels lies halfway, and each level is
the best single number for the weights between its borders: their mean for the squared error, their median for the
absolute error. Taking turns at the two leads there, since for this distribution there is only one such point.

Weights count by the square (or the magnitude) of their block's scale, since the error that matters is that of
w = x·absmax, and not that of x.
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks
from qlora_edu.normalised import Phi, phi, scales

ROUNDS, PRECISION = 5_000, 1e-10
STRIDE = 1.8  # each round goes so many times as far as it says, which takes half the rounds


@cache
def best_levels(
    block_size: int = 64,
    power: int = 2,
    pinned: tuple[float, ...] = (),
    of_weights: bool = True,
    empty_zero: bool = False,
) -> Tensor:
    """16 levels with the least mean |w - ŵ|^power, starting from NF4's.

    Args:
        block_size: weights that share an absmax.
        power: 2 (mean squared error: Lloyd-Max) or 1 (mean absolute error).
        pinned: levels of NF4 that must stay: some of -1, 0, 1.
        of_weights: False minimizes the error of x = w / absmax instead of that of w.
        empty_zero: let the bins beside zero reach to zero itself; see `abnormal_float`.

    Returns:
        float64 (16,), ascending. It is shared: do not write to it.

    Raises:
        ValueError: if `power` is neither 1 nor 2, or a pinned level is not one of NF4's.

    >>> [round(level, 3) for level in best_levels()[8:].tolist()]
    [0.046, 0.14, 0.236, 0.339, 0.452, 0.582, 0.74, 0.953]
    """
    if power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2; got {power!r}.")
    if not set(pinned) <= {-1, 0, 1}:
        raise ValueError(f"pinned: expected some of -1, 0, 1; got {pinned!r}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors as small as these, a second one costs more than it brings
    try:
        return _take_turns(block_size, power, pinned, of_weights, empty_zero)
    finally:
        torch.set_num_threads(threads)


def _take_turns(
    block_size: int, power: int, pinned: tuple[float, ...], of_weights: bool, empty_zero: bool
) -> Tensor:
    levels = codebooks.nf4().double()
    stays = torch.isin(levels, torch.tensor(pinned, dtype=torch.float64))
    best = _means if power == 2 else _medians
    for _ in range(ROUNDS):
        borders = (levels[:-1] + levels[1:]) / 2  # (15,)
        if empty_zero:
            borders[6:8] = 0.0
        moved = torch.where(stays, levels, best(levels, borders, block_size, of_weights))
        if (moved - levels).abs().max() < PRECISION:
            return moved
        levels = levels + STRIDE * (moved - levels)
    raise RuntimeError(f"no optimum after {ROUNDS} rounds: {levels.tolist()}")


def _means(levels: Tensor, borders: Tensor, block_size: int, of_weights: bool) -> Tensor:
    """The mean of x = w / absmax between the borders, each x weighted with absmax². Returns (16,)."""
    m, largest, others = scales(block_size)
    weight = m**2 if of_weights else torch.ones_like(m)
    z = _with_ends(borders)[:, None] * m  # (17, points)
    mass = (Phi(z).diff(dim=0) * others * weight).sum(dim=1)
    first = (-phi(z).diff(dim=0) / m * others * weight).sum(dim=1)  # Σ x
    spike = (largest * weight).sum() / (2 * block_size)
    mass[[0, -1]] += spike
    first[0] -= spike
    first[-1] += spike
    return first / mass


def _medians(levels: Tensor, borders: Tensor, block_size: int, of_weights: bool) -> Tensor:
    """One Newton step from the levels to the median between the borders, x weighted with absmax. Returns (16,)."""
    m, largest, others = scales(block_size)
    weight = m if of_weights else torch.ones_like(m)

    def below(x: Tensor) -> Tensor:
        return ((Phi(x[:, None] * m) - Phi(-m)) * others * weight).sum(dim=1)

    spike = (largest * weight).sum() / (2 * block_size)
    at = below(_with_ends(borders))
    at[0] -= spike
    at[-1] += spike
    density = (phi(levels[:, None] * m) * m * others * weight).sum(dim=1)
    step = ((at[:-1] + at[1:]) / 2 - below(levels)) / density
    return (levels + step).clamp(-1, 1)


def _with_ends(borders: Tensor) -> Tensor:
    return torch.cat([borders.new_tensor([-1.0]), borders, borders.new_tensor([1.0])])


def abnormal_float(block_size: int = 64) -> Tensor:
    """AbnormalFloat (AF4) of Yoshida, arXiv 2306.06965: levels meant to have the least mean |x - nearest level|.

    -1, 0 and 1 are levels, and each other level is the median of its bin. In the published tables, however, the bins
    beside zero reach to zero itself and leave none for the level 0, so that AF4 is not quite the minimum it aims at:
    `best_levels(block_size, 1, (-1, 0, 1), of_weights=False)` is.

    >>> [round(level, 4) for level in abnormal_float()[:7].tolist()]
    [-1.0, -0.6944, -0.5124, -0.3737, -0.2561, -0.1498, -0.0493]
    """
    return best_levels(block_size, 1, (-1, 0, 1), of_weights=False, empty_zero=True)
