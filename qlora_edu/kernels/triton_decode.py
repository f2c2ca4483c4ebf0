"""4-bit decoding on a GPU, written in Triton; its definition is `blockwise.decode`.

A Triton kernel is run by many programs at once. Each of them decodes PIECE bytes: it loads them, the scales of their
blocks and the levels of their codes, and stores two weights for every byte. `tl.arange` gives the positions that one
program works on; a mask keeps the last program inside the tensor.

With TRITON_INTERPRET=1 in the environment the same code is run by Triton's interpreter, on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from qlora_edu import codebooks
from qlora_edu.double_quantization import QuantizedScales, as_float32

PIECE = 1024  # bytes of a program
INTERPRETED = constexpr(triton.knobs.runtime.interpret)  # as it is while the kernels below are made


@triton.jit
def rounded(x, dtype: constexpr):
    """float32 to `dtype`, to the nearest number, ties to even. The interpreter would cut bfloat16 off: bits do it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # NaN stays NaN
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def decoded(packed, scales, levels, byte, inside, BLOCK_SIZE: constexpr):
    """The two weights of each byte, float32: that of its high nibble, and that of its low nibble, which comes next."""
    code = tl.load(packed + byte, mask=inside, other=0)
    scale = tl.load(scales + byte // (BLOCK_SIZE // 2), mask=inside, other=0.0)
    return tl.load(levels + (code >> 4)) * scale, tl.load(levels + (code & 0xF)) * scale


@triton.jit
def _decode(packed, scales, levels, out, count, BLOCK_SIZE: constexpr, PIECE: constexpr):
    first = tl.program_id(0).to(tl.int64) * PIECE
    byte = first + tl.arange(0, PIECE)
    high, low = decoded(packed, scales, levels, byte, byte < tl.cdiv(count, 2), BLOCK_SIZE)
    at = 2 * first + tl.arange(0, 2 * PIECE)
    tl.store(out + at, rounded(tl.interleave(high, low), out.dtype.element_ty), mask=at < count)


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor | QuantizedScales, codebook: str, block_size: int
) -> Tensor:
    """Decode packed 4-bit codes into `out`; a short last block and an odd count are allowed.

    Args:
        out: (n,), contiguous, float32, bfloat16 or float16. Overwritten.
        packed: uint8 (ceil(n / 2),), high nibble first.
        scales: float32 (ceil(n / block_size),), or the same in 8 bits.
        codebook, block_size: as for `kernels.decode.decode_into`.

    Returns:
        out. A weight is the float32 product level * scale, rounded once to `out.dtype`.

    Raises:
        ValueError: if there are too few bytes or scales, or `out` is not contiguous: the kernel looks at no bounds.
    """
    scales, count = as_float32(scales), out.numel()
    if 2 * packed.numel() < count or scales.numel() * block_size < count or not out.is_contiguous():
        raise ValueError(
            f"out: expected a contiguous tensor of at most {2 * packed.numel():,} weights in {scales.numel():,} blocks "
            f"of {block_size}; got {count:,}, contiguous: {out.is_contiguous()}"
        )
    if count:
        levels, _, _ = codebooks.table(codebook, packed.device)
        programs = (triton.cdiv(count, 2 * PIECE),)
        with torch.cuda.device_of(out):
            _decode[programs](packed, scales, levels, out, count, block_size, PIECE)
        torch.autograd.graph.increment_version(out)  # so that autograd notices what it did not see written
    return out
