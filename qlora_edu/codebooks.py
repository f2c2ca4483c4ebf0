"""Codebooks: the few numbers that a quantized weight may take, and where they come from.

A codebook is a float32 tensor. Entry `i` is the value, in [-1, 1], that code `i` stands for; a block of weights
stores one code per weight and one scale (the block's largest magnitude), and `code value * scale` is the weight that
comes back. Every table here is derived; none is typed in. `tests/test_codebooks.py` compares all bits of each
with the tables in bitsandbytes.

Sources: NF4 is section 3 of QLoRA (arXiv 2305.14314), the 8-bit dynamic map is arXiv 1511.04561 as used by 8-bit
optimizers (arXiv 2110.02861).
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

#: Where NF4 cuts off the tails of the normal distribution. Cutting at 1 would give an infinite level, so the
#: largest probability is the mean of 1 - 1/32 and 1 - 1/30, the centres of the last bin when [0, 1] is cut into 16
#: and into 15 equal bins. It was released with seven digits.
NF4_OFFSET = round(1 - (1 / 32 + 1 / 30) / 2, 7)


def nf4() -> Tensor:
    """The 16 NormalFloat4 levels, ascending: quantiles of N(0, 1), divided by the largest.

    Eight quantiles stand on the positive side and seven on the negative one, so that zero can be a level too. The
    probabilities are spaced in float32 and the quantiles computed in float64: float64 spacing gives other last
    bits in 8 of the 16 levels.

    Returns:
        float32 tensor of shape (16,), from -1 to 1, with an exact zero at code 7.

    >>> nf4()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """

    def quantiles(count: int) -> list[float]:
        probabilities = torch.linspace(NF4_OFFSET, 0.5, count + 1, dtype=torch.float32)
        # The last one, 0.5, is left out: its quantile is zero, which is added once, below.
        return [NormalDist().inv_cdf(p) for p in probabilities[:-1].tolist()]

    negative = [-q for q in quantiles(7)]
    positive = quantiles(8)
    levels = torch.tensor([*negative, 0.0, *positive], dtype=torch.float32).sort().values
    return levels / levels.max()


def fp4() -> Tensor:
    """The 16 values of bitsandbytes' 4-bit float, by code: one sign bit, two exponent bits `e`, one mantissa bit `m`.

    The value is (1 + m/2) * 2**(4 - e), or m * 2**-4 where e = 0, divided by the largest, 12. The exponent counts
    *down*, so codes are not in order of value, and the two zeros, codes 0 and 8, are both +0 here.

    Returns:
        float32 tensor of shape (16,), in the order of the codes.

    >>> [round(v, 4) for v in fp4()[:8].tolist()]
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    """
    values = []
    for code in range(16):
        sign, e, m = (-1) ** (code >> 3), (code >> 1) & 0b11, code & 1
        magnitude = (1 + m / 2) * 2 ** (4 - e) if e else m * 2**-4
        values.append(sign * magnitude + 0.0)  # + 0.0 turns -0.0 into 0.0
    levels = torch.tensor(values, dtype=torch.float32)
    return levels / levels.abs().max()


def int4() -> Tensor:
    """The symmetric 4-bit integers 7, 6, ..., -7, divided by 7; zero appears twice, so there are 15 different levels.

    Returns:
        float32 tensor of shape (16,), in the order of the codes (descending, as in bitsandbytes).

    >>> (int4() * 7).tolist()[:9]
    [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    """
    return torch.tensor([*range(7, -1, -1), *range(0, -8, -1)], dtype=torch.float32) / 7


def dynamic_map(bits: int = 8, signed: bool = True) -> Tensor:
    """The dynamic map: `bits` - 1 decades of magnitude, each cut twice as fine as the one below it.

    Decade `i` spans 0.1 to 1 times 10**(i - bits + 2) and is cut into 2**i equal intervals, whose midpoints are levels
    with either sign; 0 and 1 are added. Without signs it is cut into 2**(i + 1). Small values keep their order of
    magnitude, large ones have up to 64 steps a decade (of 8 bits; 128 without signs).

    Args:
        bits: 2 to 8. signed: whether there are negative levels.

    Returns:
        float32 tensor of shape (2**bits,), ascending, with an exact zero.

    Raises:
        ValueError: for other bits.

    >>> levels = dynamic_map()
    >>> levels.numel(), round(levels[0].item(), 4), levels[127].item(), levels[255].item()
    (256, -0.993, 0.0, 1.0)
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: expected a whole number from 2 to 8; got {bits!r}")
    levels = [0.0, 1.0]
    for i in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32)
        midpoints = (10 ** (i - bits + 2) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += midpoints + [-m for m in midpoints] * signed
    return torch.tensor(sorted(levels), dtype=torch.float32)


CODEBOOKS = {"nf4": nf4, "fp4": fp4, "int4": int4}


@cache
def _table(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    levels = CODEBOOKS[name]()
    order = levels.argsort(stable=True)
    ascending = levels[order]
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    return levels.to(device), thresholds.to(device), order.to(torch.uint8).to(device)


def table(name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """What encoding and decoding need of a 4-bit codebook, computed once for each device.

    Args:
        name: "nf4", "fp4" or "int4".
        device: where the tensors should live.

    Returns:
        levels: float32 (16,), the value of each code.
        thresholds: float32 (15,), ascending: the midpoints between neighbouring levels.
        order: uint8 (16,), the code of the k-th smallest level (for NF4 simply 0 to 15).
        They are shared: do not write to them.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in CODEBOOKS:
        raise ValueError(f"codebook: expected one of {', '.join(CODEBOOKS)}; got {name!r}")
    return _table(name, torch.device(device))
