"""Other ways to store the scales of 4-bit blocks, beside the one that QLoRA took (`double_quantization`).

Scales c₂, all of them positive, are cut into second-level blocks. With an offset, their mean is subtracted first. A
block is divided by its largest magnitude c₁, each quotient becomes the nearest level of a grid, and level * c₁ + offset
is the scale that comes back. Here the level is the nearest one; bitsandbytes on a CPU looks it up in a table, which at
times is the neighbour (`double_quantization`). What a weight costs, in bits, with B₁ weights to a block and B₂
scales to a second-level block:

    4 + bits / B₁ + 32 / (B₁ · B₂)

Sources: QLoRA, arXiv 2305.14314, section 3; the dynamic map, arXiv 1511.04561 and arXiv 2110.02861; the uniform grid
with an offset is what torchao does; E4M3 is the OCP 8-bit floating point specification 1.0.
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks
from qlora_edu.double_quantization import BLOCK_SIZE, check_scales, mean_of, to_blocks

GRIDS = ("dynamic", "uniform", "unsigned dynamic", "unsigned uniform", "min-max", "e4m3")


def levels(grid: str, bits: int = 8) -> Tensor:
    """The levels of a grid in [-1, 1], ascending float32. They are shared: do not write to them.

    dynamic            `codebooks.dynamic_map`: decades, each cut twice as fine as the one below it
    uniform            whole numbers from -q to q, divided by q = 2**(bits - 1) - 1: symmetric integers
    unsigned dynamic   the same from 0 up only, and cut twice as fine
    unsigned uniform   whole numbers from 0 to q, divided by q = 2**bits - 1
    e4m3               the 8-bit float of current hardware, divided by its largest number, 448

    Raises:
        ValueError: for another grid ("min-max" has no levels of its own), or bits that it does not come in.

    >>> [round(level, 3) for level in levels("dynamic", 3).tolist()]
    [-0.775, -0.325, -0.055, 0.0, 0.055, 0.325, 0.775, 1.0]
    """
    check(grid, bits)
    if grid == "min-max":
        raise ValueError("grid: 'min-max' follows each block, so it has no levels of its own. Use `store`.")
    return _levels(grid, bits)


@cache
def _levels(grid: str, bits: int) -> Tensor:
    if grid == "e4m3":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return (values[values.isfinite()] / 448).unique()
    if "uniform" in grid:
        largest = 2**bits - 1 if "unsigned" in grid else 2 ** (bits - 1) - 1
        return torch.arange(0 if "unsigned" in grid else -largest, largest + 1) / largest
    return codebooks.dynamic_map(bits, signed="unsigned" not in grid)


def nearest(x: Tensor, grid: str, bits: int = 8) -> Tensor:
    """The code of the level nearest to each x, int64; a tie goes to the lower level. x: finite, any shape."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.isfinite().all():
        raise ValueError(f"x: expected a floating tensor of finite values; got {x!r:.60}. Convert it first.")
    ascending = levels(grid, bits).to(x.device)
    return torch.bucketize(x, (ascending[:-1] + ascending[1:]) / 2)


def store(
    scales: Tensor, grid: str = "dynamic", bits: int = 8, block_size: int = BLOCK_SIZE, offset: bool = True
) -> Tensor:
    """The scales as they come back.

    Args:
        scales: float32 (n,), n >= 1, finite; for an unsigned grid 0 or more.
        grid: one of GRIDS. "min-max" has 2**bits even levels, from the smallest to the largest scale of each block.
        bits: 2 to 8; "e4m3" has 8.
        block_size: scales in a second-level block, 2 or more; the last block may be shorter.
        offset: subtract the mean of all scales first. It changes nothing for "min-max", and an unsigned grid, which
            has no negative levels, is used without.

    Returns:
        float32 (n,).

    Raises:
        ValueError: if an argument is none of these.

    >>> store(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1.0070, 2.0000, 3.0000])
    """
    check(grid, bits)
    check_scales(scales)
    if (most := scales.abs().max().item()) > torch.finfo(torch.float32).max / 4:
        raise ValueError(
            f"scales: expected magnitudes whose sums fit float32; got {most:.2e}. Divide them by a constant first."
        )
    _whole("block_size", block_size, 2)
    if not isinstance(offset, bool):
        raise ValueError(f"offset: expected True (subtract the mean) or False; got {offset!r}.")
    if "unsigned" in grid and offset:
        raise ValueError(
            f"offset: expected False with the grid {grid!r}, which has no negative levels; got True."
        )
    if "unsigned" in grid and (scales < 0).any():
        raise ValueError(
            f"scales: expected none below 0 with the grid {grid!r}; got {scales.min().item()}. Use a signed one."
        )
    mean = mean_of(scales) if offset else torch.zeros((), device=scales.device)
    centred = scales - mean
    if grid == "min-max":
        missing = -len(centred) % block_size
        rows = torch.cat([centred, centred[-1:].expand(missing)]).view(-1, block_size)
        low = rows.amin(dim=1, keepdim=True)
        step = (rows.amax(dim=1, keepdim=True) - low) / (2**bits - 1)
        rows = ((rows - low) / step.where(step > 0, 1.0)).round() * step + low
    else:
        rows = to_blocks(centred, block_size)
        largest = rows.abs().amax(dim=1, keepdim=True)  # c₁, (blocks, 1)
        x = rows / largest.where(largest > 0, 1.0)
        rows = levels(grid, bits).to(scales.device)[nearest(x, grid, bits)] * largest
    return rows.flatten()[: len(scales)] + mean


def bits_per_weight(first: int, bits: int = 8, second: int = BLOCK_SIZE, grid: str = "dynamic") -> float:
    """4-bit codes, their scales and what the scales need, in bits a weight. "min-max" stores two numbers a block.

    first, second: weights in a block, scales in a second-level block. The one mean of a matrix is left out.
    ValueError: if an argument is none that `store` takes.

    >>> bits_per_weight(64)
    4.126953125
    """
    check(grid, bits)
    _whole("first", first, 1)
    _whole("second", second, 2)
    return 4 + bits / first + (64 if grid == "min-max" else 32) / (first * second)


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}: expected a whole number of {least} or more; got {value!r}. QLoRA has blocks of 64 weights, "
            f"and 256 scales to a second-level block."
        )


def check(grid: str, bits: int) -> None:
    """Raise a ValueError unless there is such a grid with so many bits."""
    if grid not in GRIDS:
        raise ValueError(f"grid: expected one of {', '.join(GRIDS)}; got {grid!r}.")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: expected a whole number from 2 to 8; got {bits!r}.")
    if grid == "e4m3" and bits != 8:
        raise ValueError(f"bits: expected 8 with the grid 'e4m3'; got {bits}.")
