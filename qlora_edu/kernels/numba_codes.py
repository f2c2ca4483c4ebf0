"""4-bit encoding and decoding compiled by Numba; the definitions are `blockwise.encode` and `blockwise.decode`.

The loops below are what one would write in C, and Numba makes machine code of them. They take blocks from `start` to
`stop`, so that several threads can share a tensor: a compiled loop lets the others run (`nogil`). The first call of
each kind takes a second to compile; the result is kept on disk (`cache`). Where the CPU has an instruction that looks
many codes up at once, `numba_lookup` decodes with it, and the decoding loops here are not run: they say what it does.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qlora_edu import codebooks
from qlora_edu.kernels import decode, numba_lookup
from qlora_edu.kernels.encode import tables
from qlora_edu.kernels.numba_lookup import compiled

BITS = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}  # NumPy has no bfloat16, Numba hardly any float16
BLOCKS_OF_A_THREAD = 4096  # fewer are done before another thread has begun
FASTER_BY_LOOKUP = 16  # a thread gets so many times the blocks where one instruction looks up many codes


@compiled
def _decode_float32(start, stop, out, packed, scales, levels, half):
    for block in range(start, stop):
        scale = scales[block]
        for i in range(block * half, (block + 1) * half):
            byte = packed[i]
            out[2 * i] = levels[byte >> 4] * scale
            out[2 * i + 1] = levels[byte & 15] * scale


@compiled
def _decode_bfloat16(start, stop, out, packed, scales, levels, half):
    """out: uint16. A block has sixteen different weights: they are rounded once, and then only looked up."""
    weights = np.empty(16, np.float32)
    bits = weights.view(np.uint32)
    rounded = np.empty(16, np.uint16)
    for block in range(start, stop):
        for code in range(16):
            weights[code] = levels[code] * scales[block]
        for code in range(16):  # to the nearest, ties to even; a NaN stays one
            odd = (bits[code] >> np.uint32(16)) & np.uint32(1)
            rounded[code] = (bits[code] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            if weights[code] != weights[code]:
                rounded[code] = 0x7FC0
        for i in range(block * half, (block + 1) * half):
            byte = packed[i]
            out[2 * i] = rounded[byte >> 4]
            out[2 * i + 1] = rounded[byte & 15]


@compiled
def _encode(start, stop, packed, weight, is_bfloat16, inverse, threshold, codes, half):
    """weight: float32, or the bits of bfloat16 as uint16. See `kernels.encode` for the cells."""
    x = np.empty(2 * half, np.float32)
    bits = x.view(np.uint32)
    code = np.empty(2 * half, np.uint8)
    for block in range(start, stop):
        first = 2 * half * block
        for i in range(2 * half):
            if is_bfloat16:
                bits[i] = np.uint32(weight[first + i]) << np.uint32(16)
            else:
                x[i] = weight[first + i]
        for i in range(2 * half):
            scaled = min(max(x[i] * inverse[block], np.float32(-1)), np.float32(1))
            cell = np.int32((scaled + np.float32(1)) * np.float32((len(threshold) - 1) / 2))
            code[i] = codes[2 * cell + (scaled > threshold[cell])]
        for i in range(half):
            packed[block * half + i] = (code[2 * i] << 4) | code[2 * i + 1]


def check_sizes(packed: Tensor, weights: Tensor, scales: Tensor, block_size: int) -> None:
    """Raise a ValueError unless all is there that the loops touch: machine code looks at no bounds.

    All are contiguous. weights: float32, bfloat16 or float16 (n,), of whole blocks; packed: uint8 (n / 2,); scales:
    float32, at least (n / block_size,).
    """
    n = weights.numel()
    if block_size % 2 or n % block_size or packed.numel() != n // 2 or scales.numel() < n // block_size:
        raise ValueError(
            f"weights: expected whole blocks of {block_size}, an even number, half as many bytes and a scale for each; "
            f"got {n:,} weights, {packed.numel():,} bytes, {scales.numel():,} scales"
        )
    for name, tensor, dtypes in (
        ("weights", weights, (torch.float32, *BITS)),
        ("packed", packed, (torch.uint8,)),
        ("scales", scales, (torch.float32,)),
    ):
        if tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype)[6:] for dtype in dtypes)
            raise ValueError(f"{name}: expected {kinds}; got {str(tensor.dtype)[6:]}")
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a contiguous tensor on the CPU; got one on {tensor.device}")


def decode_into(out: Tensor, packed: Tensor, scales: Tensor, codebook: str, block_size: int) -> Tensor:
    """As `kernels.decode.decode_into`, in every bit."""
    check_sizes(packed, out, scales, block_size)
    by_lookup = numba_lookup.lanes() > 0 and block_size % numba_lookup.BLOCKS_OF == 0
    if out.dtype == torch.float16 and not by_lookup:  # which NumPy has to imitate
        return decode.decode_into(out, packed, scales, codebook, block_size)
    if by_lookup:
        kernel = numba_lookup.decode
    else:
        kernel = _decode_float32 if out.dtype == torch.float32 else _decode_bfloat16
    array = out.view(BITS[out.dtype]) if out.dtype in BITS else out
    levels, _, _ = codebooks.table(codebook)
    _share(out.numel() // block_size, kernel, array, packed, scales, levels, block_size // 2)
    torch.autograd.graph.increment_version(out)  # so that autograd notices what it did not see written
    return out


def encode_into(packed: Tensor, weight: Tensor, inverse: Tensor, codebook: str, block_size: int) -> Tensor:
    """As `kernels.encode.encode_into`, in every bit."""
    weight = weight.detach().contiguous()
    check_sizes(packed, weight, inverse, block_size)
    is_bfloat16 = weight.dtype == torch.bfloat16
    weight = weight.view(torch.uint16) if is_bfloat16 else weight.float()
    threshold, codes = tables(codebook, packed.device)
    _share(
        len(packed) * 2 // block_size,
        _encode,
        packed,
        weight,
        is_bfloat16,
        inverse,
        threshold,
        codes,
        block_size // 2,
    )
    return packed


@cache
def ready() -> float:
    """Seconds until all loops had run once: some to compile them, the first time; a moment where they are on disk.

    Raises:
        RuntimeError: if what they give is not what plain torch gives.
    """
    begin = time.perf_counter()
    with torch.device("cpu"):  # whatever the default is
        _compare_with_torch()
    return time.perf_counter() - begin


def _compare_with_torch() -> None:
    packed, scales = torch.arange(256, dtype=torch.uint8), torch.linspace(0.1, 2, 16)
    for dtype in (torch.float32, *BITS):
        found, right = torch.empty(512, dtype=dtype), torch.empty(512, dtype=dtype)
        decode_into(found, packed, scales, "nf4", 32)
        decode.decode_into(right, packed, scales, "nf4", 32)
        again = encode_into(torch.empty_like(packed), right, 1 / scales, "nf4", 32)
        if not torch.equal(found, right) or not torch.equal(again, packed):
            raise RuntimeError(
                f"Numba's loops, compiled for this CPU, compute something else than torch in {dtype}"
            )


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a fork has none of its parent's threads


def _share(blocks: int, kernel, *arguments) -> None:
    """Run a kernel on all blocks, in as many threads as torch has."""
    arrays = [a.numpy() if isinstance(a, Tensor) else a for a in arguments]
    least = BLOCKS_OF_A_THREAD * (FASTER_BY_LOOKUP if kernel is numba_lookup.decode else 1)
    parts = max(1, min(torch.get_num_threads(), blocks // least))
    bounds = [blocks * part // parts for part in range(parts + 1)]
    others = [
        _threads(parts - 1).submit(kernel, start, stop, *arrays) for start, stop in pairwise(bounds[1:])
    ]
    kernel(0, bounds[1], *arrays)
    for other in others:
        other.result()
