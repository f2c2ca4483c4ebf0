"""4-bit decoding at memory speed in plain torch; its definition is `blockwise.decode`.

Three things make it fast: one table look-up yields both weights of a byte, the work goes through the cache in pieces,
and the result is written into a buffer that exists already (fresh memory costs more than decoding).
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import codebooks
from qlora_edu.double_quantization import QuantizedScales, as_float32

WEIGHTS_PER_PIECE = (
    2**17
)  # scratch of 0.75 MiB: small enough for the cache, large enough to hide torch's overhead


@cache
def _pairs(codebook: str, device: torch.device) -> Tensor:
    """float64 (256,): entry b is the pair of float32 levels of byte b, high nibble first, seen as one number."""
    levels, _, _ = codebooks.table(codebook, device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 0xF]], dim=1).view(torch.float64).flatten()


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor | QuantizedScales, codebook: str, block_size: int
) -> Tensor:
    """Decode whole blocks of packed 4-bit codes into `out`.

    Args:
        out: (n,), contiguous, float32, bfloat16 or float16; n is a multiple of `block_size`. Overwritten.
        packed: uint8 (n / 2,), high nibble first.
        scales: float32 (n / block_size,), or the same in 8 bits.
        codebook: a name known to `codebooks.table`.
        block_size: weights that share a scale, a power of two.

    Returns:
        out. A weight is the float32 product level * scale, rounded once to `out.dtype`.
    """
    scales = as_float32(scales)
    pairs = _pairs(codebook, packed.device)
    piece = max(WEIGHTS_PER_PIECE, block_size)
    index = torch.empty(min(piece, out.numel()) // 2, dtype=torch.int32, device=packed.device)
    found = torch.empty(index.numel(), dtype=torch.float64, device=packed.device)
    for start in range(0, out.numel(), piece):
        stop = min(start + piece, out.numel())
        size = (stop - start) // 2
        index[:size].copy_(packed[start // 2 : stop // 2])
        torch.index_select(pairs, 0, index[:size], out=found[:size])
        levels = found[:size].view(torch.float32).view(-1, block_size)
        scale = scales[start // block_size : stop // block_size, None]
        torch.mul(levels, scale, out=out[start:stop].view(-1, block_size))
    return out
