"""What absmax does to normal weights: the distribution of w / absmax, and what rounding it costs, without a sample.

A block holds B independent weights from N(0, 1). One of them is the largest in magnitude; its magnitude M becomes the
scale. Given M = m, that one is ±m, and the other B - 1 are normal numbers cut off at ±m. So x = w / M is

    ±1                                     with probability 1 / B   (half for each sign: two spikes)
    normal with deviation 1/m, cut at ±1   otherwise

and M, the largest of B magnitudes, has the density B·(2Φ(m) - 1)^(B-1)·2φ(m). Everything below is an integral over m,
a sum over equally spaced m, which for so smooth an integrand is right to about 12 digits.

Source: Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)", arXiv 2306.06965, section 3.
"""

import math
from functools import cache

import torch
from torch import Tensor

STEP, LARGEST = 0.05, 9.0  # of m; the largest of 4,096 magnitudes is above 9 once in 10^15 blocks


def phi(z: Tensor) -> Tensor:
    """φ, the density of N(0, 1). Infinities give 0."""
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def Phi(z: Tensor) -> Tensor:
    """Φ, the distribution function of N(0, 1)."""
    return torch.special.ndtr(z)


@cache
def scales(block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The absmax m of a block of B weights, on a grid.

    Returns:
        m: float64 (points,).
        largest: float64 (points,), adds up to 1: the probability of each m.
        others: float64 (points,): that probability times (B - 1)/B, divided by 2Φ(m) - 1. A weight lies between a
            and b, and is not the largest of its block, with probability Σ others·(Φ(b·m) - Φ(a·m)).

    Raises:
        ValueError: if `block_size` is no whole number of at least 16 (the sum over m is less exact there).
    """
    if type(block_size) is not int or block_size < 16:
        raise ValueError(
            f"block_size: expected a whole number of at least 16; got {block_size!r}. 64 is the usual one."
        )
    m = torch.arange(STEP, LARGEST, STEP, dtype=torch.float64)
    inside = torch.erf(m / math.sqrt(2))  # 2Φ(m) - 1
    others = (block_size - 1) * inside ** (block_size - 2) * 2 * phi(m) * STEP
    largest = block_size * inside ** (block_size - 1) * 2 * phi(m) * STEP
    return m, largest, others


def expected_scale(block_size: int) -> float:
    """E[M], the mean absmax of a block of N(0, 1) weights.

    >>> round(expected_scale(64), 3)
    2.596
    """
    m, largest, _ = scales(block_size)
    return (largest * m).sum().item()


def cdf(x: Tensor, block_size: int) -> Tensor:
    """P(w / absmax <= x) for each x. x: any shape, float64. Returns the same shape."""
    m, _, others = scales(block_size)
    x = torch.as_tensor(x, dtype=torch.float64)
    inner = x.clamp(-1, 1)[..., None] * m  # (..., points)
    below = ((Phi(inner) - Phi(-m)) * others).sum(dim=-1) + 0.5 / block_size
    return torch.where(x >= 1, 1.0, torch.where(x < -1, 0.0, below))


def density(x: Tensor, block_size: int) -> Tensor:
    """The density of w / absmax at each x in (-1, 1), without the two spikes. Returns x's shape, float64."""
    m, _, others = scales(block_size)
    x = torch.as_tensor(x, dtype=torch.float64)
    return (phi(x[..., None] * m) * m * others).sum(dim=-1)


def quantile(p: Tensor, block_size: int) -> Tensor:
    """The smallest x with cdf(x) >= p, by bisection. p: any shape, in [0, 1]. Returns the same shape, float64."""
    p = torch.as_tensor(p, dtype=torch.float64)
    low, high = torch.full_like(p, -1), torch.full_like(p, 1)
    for _ in range(60):
        middle = (low + high) / 2
        reached = cdf(middle, block_size) >= p
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def usage(levels: Tensor, block_size: int) -> Tensor:
    """How often each level is the nearest one. levels: (n,), ascending. Returns float64 (n,), which adds up to 1."""
    levels = _ascending(levels)
    edges = cdf((levels[:-1] + levels[1:]) / 2, block_size)
    return torch.cat([edges, edges.new_ones(1)]) - torch.cat([edges.new_zeros(1), edges])


def entropy(probabilities: Tensor) -> float:
    """-Σ p·log2 p in bits: what a code costs on average if it could be stored as compactly as possible.

    >>> entropy(torch.full((16,), 1 / 16, dtype=torch.float64))
    4.0
    """
    probabilities = probabilities.double()
    return -(torch.special.xlogy(probabilities, probabilities).sum().item()) / math.log(2)


def error(levels: Tensor, block_size: int, power: int = 2, of_weights: bool = True) -> float:
    """The mean of |x - nearest level|^power over normal weights in blocks.

    Args:
        levels: (n,), ascending.
        block_size: B.
        power: 2 for the mean squared error, 1 for the mean absolute error.
        of_weights: True measures the weights, w = x·absmax, in units of E|w|^power (so blocks with a large scale count
            for more); False measures x itself, as Yoshida does.

    Returns:
        float.

    >>> from qlora_edu.codebooks import nf4
    >>> round(error(nf4(), 64), 5)
    0.00846
    """
    return parts(_ascending(levels), block_size, power, of_weights).sum().item()


def parts(levels: Tensor, block_size: int, power: int, of_weights: bool) -> Tensor:
    """What each level contributes to `error`. Returns float64 (n,)."""
    m, largest, others = scales(block_size)
    unit = (1.0 if power == 2 else math.sqrt(2 / math.pi)) if of_weights else 1.0
    size = m**0 if of_weights else m**-power  # (points,), undoes the scale
    edges = torch.cat([-m[None], (levels[:-1, None] + levels[1:, None]) / 2 * m, m[None]])  # (n + 1, points)
    c = levels[:, None] * m  # (n, points)
    low, high = edges[:-1], edges[1:]
    if power == 2:
        inside = _squared(high, c) - _squared(low, c)
    elif power == 1:
        middle = c.clamp(low, high)
        inside = 2 * _signed(middle, c) * -1 + _signed(high, c) + _signed(low, c)
    else:
        raise ValueError(f"power: expected 1 or 2; got {power!r}.")
    total = (inside * others * size).sum(dim=1)
    spike = (largest * m**power * size).sum() / (2 * block_size)  # the largest weight is m or -m
    total[0] += spike * (-1 - levels[0]).abs() ** power
    total[-1] += spike * (1 - levels[-1]).abs() ** power
    return total / unit


def _squared(w: Tensor, c: Tensor) -> Tensor:
    """An antiderivative of (w - c)²·φ(w)."""
    return (1 + c * c) * Phi(w) - w * phi(w) + 2 * c * phi(w)


def _signed(w: Tensor, c: Tensor) -> Tensor:
    """An antiderivative of (w - c)·φ(w)."""
    return -phi(w) - c * Phi(w)


def _ascending(levels: Tensor) -> Tensor:
    levels = torch.as_tensor(levels).double()
    if levels.dim() != 1 or len(levels) < 2 or not (levels.diff() > 0).all() or levels.abs().max() > 1:
        raise ValueError(
            f"levels: expected ascending numbers in [-1, 1]; got {levels.tolist()}. Sort them, without repeats."
        )
    return levels
