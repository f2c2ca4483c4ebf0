"""4-bit encoding at memory speed in plain torch; its definition is `blockwise.encode`.

A search for the right level is slow because each weight takes its own way through the table. Instead, [-1, 1] is cut
into equal cells, so narrow that no two thresholds share one. The cell is found by one multiplication; a weight in it
then needs a single comparison, with the cell's own threshold. Rounding may move a weight into a neighbouring cell, but
it moves the thresholds in the same way and never swaps two numbers, so that codes are exact, ties included.
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks

CELLS = 1024
WEIGHTS_PER_PIECE = 2**17  # as in `decode`: the pieces of one step stay in the cache
WEIGHTS_PER_PIECE_ON_GPU = 2**24  # there a call costs more than its work, unless it has much to do
_NO_THRESHOLD = 2.0  # above every weight


def cell(x: Tensor) -> Tensor:
    """The cell, int32 from 0 to CELLS - 1, of each number in [-1, 1]."""
    return ((x + 1) * ((CELLS - 1) / 2)).to(torch.int32)


@cache
def tables(codebook: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell: its threshold, float32 (CELLS,), and the codes up to it and above it, uint8 (2 * CELLS,)."""
    _, thresholds, order = codebooks.table(codebook, device)
    of_threshold = cell(thresholds)
    below = torch.bucketize(torch.arange(CELLS, device=device, dtype=torch.int32), of_threshold)
    threshold = torch.full((CELLS,), _NO_THRESHOLD, device=device, dtype=torch.float32)
    threshold[of_threshold.long()] = thresholds
    above = (below + (threshold < _NO_THRESHOLD)).clamp(max=len(order) - 1)
    return threshold, order[torch.stack([below, above], dim=1)].flatten()


def encode_into(packed: Tensor, weight: Tensor, inverse: Tensor, codebook: str, block_size: int) -> Tensor:
    """Encode whole blocks of weights into packed 4-bit codes.

    Args:
        packed: uint8 (n / 2,); n is a multiple of `block_size`. Overwritten, high nibble first.
        weight: (n,), contiguous, float32, bfloat16 or float16; finite.
        inverse: float32 (n / block_size,), 1 / scale of each block.
        codebook: a name known to `codebooks.table`.
        block_size: weights that share a scale, a power of two.

    Returns:
        packed. A code belongs to the level nearest to the float32 product weight * inverse; a tie to the lower one.
    """
    threshold, codes = tables(codebook, packed.device)
    piece = max(WEIGHTS_PER_PIECE_ON_GPU if weight.is_cuda else WEIGHTS_PER_PIECE, block_size)
    for start in range(0, weight.numel(), piece):
        stop = min(start + piece, weight.numel())
        rows = weight[start:stop].view(-1, block_size)
        x = (rows * inverse[start // block_size : stop // block_size, None]).flatten().clamp_(-1, 1)
        index = cell(x)
        above = x > threshold.index_select(0, index)
        code = codes.index_select(0, index.mul_(2).add_(above))
        torch.bitwise_or(code[::2] << 4, code[1::2], out=packed[start // 2 : stop // 2])
    return packed
