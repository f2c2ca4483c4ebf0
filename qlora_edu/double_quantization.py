"""Double quantization: the scales of 4-bit blocks, stored in 8 bits (QLoRA, section 3).

The mean of the scales is subtracted, because all scales are positive and the 8-bit map spends half its codes on
negative numbers; the rest is cut into blocks of 256 and quantized with the 8-bit dynamic map. With 4-bit blocks of 64
a weight then costs 4 + 8/64 + 32/(64 * 256) = 4.127 bits instead of 4 + 32/64 = 4.5.

On a CPU bitsandbytes does not search for the nearest of the 256 levels: it looks the code up in a table with an entry
for each of 65,536 positions between -1 and 1. Near zero, where levels lie closer than those positions, the
code found is not always the nearest. Codes here are the same as there.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks

BLOCK_SIZE = 256
_POSITIONS = 65_536


@cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 levels (float32), and the code (uint8) of the level nearest to each of 65,536 positions in [-1, 1].

    The positions are spaced in float32, as bitsandbytes does it: float64 gives one other code of the unsigned map.
    """
    levels = codebooks.dynamic_map(signed=signed)
    positions = torch.arange(_POSITIONS).float() / (_POSITIONS - 1) * 2 - 1
    nearest = torch.bucketize(positions, (levels[:-1] + levels[1:]) / 2)
    return levels.to(device), nearest.to(torch.uint8).to(device)


def levels(device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels of the signed map, float32, in which scales are stored. Shared: do not write to them."""
    return _table(True, torch.device(device))[0]


def to_blocks(flat: Tensor, block_size: int) -> Tensor:
    """flat (n,), n >= 1, as rows of `block_size`, the last one filled up with zeros.

    Returns (ceil(n / block_size), block_size).
    """
    if not isinstance(flat, Tensor) or flat.dim() != 1 or not len(flat):
        what = f"shape {tuple(flat.shape)}" if isinstance(flat, Tensor) else f"{flat!r:.60}"
        raise ValueError(f"flat: expected a non-empty 1-D tensor; got {what}. Flatten it first.")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: expected a whole number of 1 or more; got {block_size!r}.")
    missing = -flat.numel() % block_size
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, block_size)


def encode(values: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Numbers in blocks of 256 as bitsandbytes stores them in 8 bits: the dynamic map, and an absmax for each block.

    values: float32 (n,), n >= 1, finite; none below 0 for the unsigned map.

    Returns:
        codes, uint8 (n,), and absmax, float32 (ceil(n / 256),).
    """
    _, nearest = _table(signed, values.device)
    rows = to_blocks(values, BLOCK_SIZE)
    absmax = rows.abs().amax(dim=1)  # (rows,)
    # Where a whole row is zero, 0 * (1 / 0) is NaN; any code would do, and bitsandbytes stores that of position -1.
    normalised = (rows * (1 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    position = (normalised + 1) * 0.5 * (_POSITIONS - 1) + 0.5
    return nearest[position.to(torch.int32)].flatten()[: values.numel()], absmax


def decode(codes: Tensor, absmax: Tensor, signed: bool = True) -> Tensor:
    """The numbers again, float32 (n,): level times absmax."""
    levels, _ = _table(signed, codes.device)
    rows = to_blocks(levels.index_select(0, codes.int()), BLOCK_SIZE).mul_(absmax[:, None])
    return rows.flatten()[: codes.numel()]


@dataclass(frozen=True, eq=False)
class QuantizedScales:
    """Scales stored in 8 bits.

    Attributes:
        codes: uint8 (n,), positions in the 8-bit dynamic map.
        absmax: float32 (ceil(n / 256),), the second-level scales.
        offset: float32 scalar, the mean of the original scales.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """The scales again, float32 (n,): level * second-level scale + offset, rounded after each step."""
        return decode(self.codes, self.absmax).add_(self.offset)

    def to(self, device: torch.device | str) -> "QuantizedScales":
        return QuantizedScales(*(t.to(device=device) for t in (self.codes, self.absmax, self.offset)))


def as_float32(scales: Tensor | QuantizedScales) -> Tensor:
    """The scale of each block, float32 (blocks,), however they are stored."""
    return scales.dequantize() if isinstance(scales, QuantizedScales) else scales


def check_scales(scales: Tensor) -> None:
    """Raise a ValueError unless scales are a non-empty 1-D float32 tensor of finite values."""
    if (
        not isinstance(scales, Tensor)
        or scales.dtype != torch.float32
        or scales.dim() != 1
        or not len(scales)
    ):
        what = f"{scales.dtype}, shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else repr(scales)
        raise ValueError(
            f"scales: expected a non-empty 1-D float32 tensor; got {what:.60}. "
            f"Convert them first: torch.as_tensor(scales, dtype=torch.float32).flatten()."
        )
    if not scales.isfinite().all():
        raise ValueError(
            f"scales: expected finite values; got {scales[~scales.isfinite()][0].item()}. "
            f"Look for it in the weights."
        )


def mean_of(scales: Tensor) -> Tensor:
    """The offset of scales that were checked, a float32 scalar; a ValueError if it overflows."""
    offset = scales.mean()
    if not offset.isfinite():
        raise ValueError(
            "scales: their mean overflows float32, so they cannot be double-quantized. Use double_quant=False."
        )
    return offset


def quantize_scales(scales: Tensor) -> QuantizedScales:
    """Quantize the scales of a 4-bit tensor to 8 bits.

    Args:
        scales: float32 (n,), n >= 1, finite.

    Raises:
        ValueError: if `scales` is not a non-empty 1-D float32 tensor of finite values, or their mean overflows.

    >>> stored = quantize_scales(torch.tensor([1.0, 2.0, 3.0]))
    >>> stored.codes.tolist(), stored.offset.item(), stored.absmax.tolist()
    ([0, 131, 255], 2.0, [1.0])
    """
    check_scales(scales)
    offset = mean_of(scales)
    return QuantizedScales(*encode(scales - offset), offset)
