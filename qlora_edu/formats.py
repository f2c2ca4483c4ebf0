"""4-bit formats side by side: the levels of each, and a weight matrix sent through any of them and back.

A format is a row of ascending levels in [-1, 1]. A block of weights is divided by its largest magnitude (absmax), each
quotient becomes the nearest level (a tie the lower one), and the level times absmax is what comes back. The order of
the codes and how they are packed does not matter here; `blockwise` has that. No table is typed in.

Sources: NF4 and equation 4, arXiv 2305.14314; AbnormalFloat, arXiv 2306.06965; E2M1, the OCP Microscaling Formats (MX)
specification 1.0; FP4, bitsandbytes.
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks, lloyd
from qlora_edu.blockwise import check_finite, check_weight
from qlora_edu.kernels.encode import CELLS, WEIGHTS_PER_PIECE, cell

_SMALLEST_SCALE = 1e-38  # as in `blockwise`: keeps 1 / scale finite


def eq4() -> Tensor:
    """Equation 4 of QLoRA, to the letter: q_i = ½·(Q(i/17) + Q((i+1)/17)), i = 0 to 15, divided by the largest.

    Q is the quantile function of N(0, 1). Q(0) is minus infinity, so q_0 is too; clipped to -1 it repeats q_1. Left are
    15 different levels, symmetric about q_8 = 0.
    """
    quantiles = torch.special.ndtri(torch.arange(17, dtype=torch.float64) / 17)  # (17,): Q(0) to Q(16/17)
    q = (quantiles[:-1] + quantiles[1:]) / 2  # (16,)
    return (q / q.max()).clamp(min=-1)


def _two_sided(positive: list[float]) -> Tensor:
    """-positive, 0, positive, divided by the largest."""
    return torch.tensor([-p for p in positive] + [0.0] + positive, dtype=torch.float64) / max(positive)


def _zero_and_steps() -> Tensor:
    """7 equal steps below zero and 8 above, as NF4 has them: 16 levels."""
    return torch.tensor([k / 7 for k in range(-7, 0)] + [k / 8 for k in range(9)], dtype=torch.float64)


LEVELS = {
    "nf4": codebooks.nf4,
    "fp4": codebooks.fp4,  # bitsandbytes' E2M1; its smallest number is 1/16 where the standard has 1
    "e2m1": lambda: _two_sided([0.5, 1, 1.5, 2, 3, 4, 6]),
    "e3m0": lambda: _two_sided([2.0**e for e in range(7)]),  # powers of two only
    "int4": codebooks.int4,
    "dynamic4": lambda: codebooks.dynamic_map(4),
    "af4": lambda: lloyd.abnormal_float(64),
    "lloyd-max": lambda: lloyd.best_levels(64),
    "lloyd-max-zero": lambda: lloyd.best_levels(64, pinned=(-1, 0, 1)),
    "uniform16": lambda: torch.tensor([k / 15 for k in range(-15, 16, 2)], dtype=torch.float64),
    "uniform16-zero": _zero_and_steps,
    "eq4": eq4,
}


@cache
def levels(name: str) -> Tensor:
    """The different levels of a format, ascending. It is shared: do not write to it.

    Args:
        name: a key of LEVELS.

    Returns:
        float32 (16,), or (15,) where two of the 16 codes mean the same number.

    Raises:
        ValueError: for an unknown name.

    >>> [round(level, 3) for level in levels("e3m0").tolist()][7:]
    [0.0, 0.016, 0.031, 0.062, 0.125, 0.25, 0.5, 1.0]
    """
    if name not in LEVELS:
        raise ValueError(
            f"name: expected one of {', '.join(LEVELS)}; got {name!r}. Or pass levels of your own."
        )
    return LEVELS[name]().float().unique()  # sorted


def round_trip(weight: Tensor, levels: Tensor, block_size: int = 64) -> Tensor:
    """The weights as a format gives them back: the level nearest to weight / absmax, times absmax.

    Args:
        weight: any shape, at least one element; float32, bfloat16 or float16; every value finite.
        levels: (n,), ascending, in [-1, 1]; such as `levels("nf4")`.
        block_size: weights that share an absmax, counted in row-major order; the last block may be shorter.

    Returns:
        float32, in weight's shape; equal in all bits to `blockwise.quantize(...).dequantize(torch.float32)`.

    Raises:
        TypeError, ValueError: if an argument is none of the above.

    >>> round_trip(torch.tensor([0.5, -1.5, 1.2, 2.0]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([ 0., -2.,  2.,  2.])
    """
    levels = check(weight, levels, block_size)
    flat = weight.detach().reshape(-1)
    whole = flat.numel() // block_size * block_size
    out = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    tables = _tables(levels)
    piece = max(WEIGHTS_PER_PIECE // block_size, 1) * block_size
    for start in range(0, whole, piece):
        stop = min(start + piece, whole)
        rows = flat[start:stop].float().view(-1, block_size)
        scale = rows.abs().amax(dim=1, keepdim=True)
        x = (rows * (1 / scale.clamp(min=_SMALLEST_SCALE))).clamp_(-1, 1)
        torch.mul(
            nearest(x.flatten(), levels, tables).view_as(rows), scale, out=out[start:stop].view_as(rows)
        )
    if (
        whole < flat.numel()
    ):  # a short last block is divided, not multiplied by the inverse, as in `blockwise`
        rest = flat[whole:].float()
        scale = rest.abs().amax().clamp(min=_SMALLEST_SCALE)
        out[whole:] = nearest(rest / scale, levels, tables) * scale
    return out.view(weight.shape)


def nearest(x: Tensor, levels: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The level nearest to each number; a tie goes to the lower level.

    Without `tables` this is the definition; with those of `_tables`, the fast path (`kernels.encode` explains it).

    Args:
        x: float32 (n,), in [-1, 1].
        levels: float32, ascending.

    Returns:
        float32 (n,).
    """
    if tables is None:
        return levels[torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)]
    threshold, values = tables
    index = cell(x)
    above = x > threshold.index_select(0, index)
    return values.index_select(0, index.mul_(2).add_(above))


def _tables(levels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of each cell: its threshold, float32 (CELLS,), and the levels up to it and above it, float32 (2 * CELLS,).

    None where two thresholds share a cell.
    """
    thresholds = (levels[:-1] + levels[1:]) / 2
    of_threshold = cell(thresholds)
    if not (of_threshold.diff() > 0).all():
        return None
    cells = torch.arange(CELLS, dtype=torch.int32, device=levels.device)
    below = torch.bucketize(cells, of_threshold)
    threshold = torch.full((CELLS,), 2.0, device=levels.device)  # above every weight
    threshold[of_threshold.long()] = thresholds
    above = (below + (threshold < 2)).clamp(max=len(levels) - 1)
    return threshold, levels[torch.stack([below, above], dim=1)].flatten()


def check(weight: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Raise if an argument of `round_trip` will not do. Returns the levels as float32 where the weight is."""
    check_weight(weight)
    check_finite(weight)
    if type(block_size) is not int or block_size < 2:
        raise ValueError(
            f"block_size: expected a whole number of at least 2; got {block_size!r}. 64 is usual."
        )
    if not isinstance(levels, Tensor) or levels.dim() != 1 or len(levels) < 2:
        raise ValueError("levels: expected a tensor of shape (n,), n at least 2. Use formats.levels(name).")
    levels = levels.to(weight.device, torch.float32)
    if not (levels.diff() > 0).all() or not (levels.abs() <= 1).all():
        raise ValueError(f"levels: expected ascending numbers in [-1, 1]; got {levels.tolist()}. Sort them.")
    return levels
