"""4-bit encoding and decoding compiled by Numba; the definitions are `blockwise.encode` and `blockwise.decode`.

Here the tensors are checked and encoding is done: its loop is what one would write in C, and Numba makes machine code
of it. The first call takes a second or more to compile; the result is kept on disk. Decoding is in `numba_lookup`, for
CPUs with an instruction that looks many codes up at once; on others plain torch is as fast. How several threads share
a loop is in `team`.
"""

import time
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from qlora_edu import codebooks, double_quantization
from qlora_edu.double_quantization import QuantizedScales
from qlora_edu.kernels import decode, numba_lookup, team
from qlora_edu.kernels.encode import CELLS, tables
from qlora_edu.kernels.team import compiled, next_piece

# Shared work waits for the last thread: a millisecond, where other programs keep the cores busy.
DECODING_SHARED_FROM = 2**21  # bytes written; one thread writes so many in 30 microseconds
ENCODING_SHARED_FROM = 2**15  # weights; these take one thread twice as long


@compiled
def _encode_blocks(start, stop, packed, weight, is_bfloat16, inverse, threshold, codes, half):
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


def _encode(job):
    """A loop for `team.run`. numbers: bytes in a block, whether weights are bfloat16; tensors: as `_encode_blocks`."""
    numbers = carray(job[0], 5, np.int64)
    blocks, half = numbers[1], numbers[3]
    packed, inverse = carray(job[1], blocks * half, np.uint8), carray(job[3], blocks, np.float32)
    threshold, codes = carray(job[4], CELLS, np.float32), carray(job[5], 2 * CELLS, np.uint8)
    start, stop = next_piece(numbers)
    while start < blocks:
        if numbers[4] == 1:
            weight = carray(job[2], 2 * len(packed), np.uint16)
            _encode_blocks(start, stop, packed, weight, True, inverse, threshold, codes, half)
        else:
            exact = carray(job[2], 2 * len(packed), np.float32)
            _encode_blocks(start, stop, packed, exact, False, inverse, threshold, codes, half)
        start, stop = next_piece(numbers)


def check(packed: Tensor, weights: Tensor, scales: Tensor | QuantizedScales, block_size: int) -> None:
    """Raise a ValueError unless all is there that the loops touch: machine code looks at no bounds.

    All are contiguous. weights: float32, bfloat16 or float16 (n,), of whole blocks; packed: uint8 (n / 2,); scales:
    float32, at least (n / block_size,), or the same in 8 bits.
    """
    n, blocks = weights.numel(), weights.numel() // block_size
    in_8_bits = isinstance(scales, QuantizedScales)
    count = scales.codes.numel() if in_8_bits else scales.numel()
    if block_size % 2 or n % block_size or packed.numel() != n // 2 or count < blocks:
        raise ValueError(
            f"weights: expected whole blocks of {block_size}, an even number, half as many bytes and a scale for each; "
            f"got {n:,} weights, {packed.numel():,} bytes, {count:,} scales"
        )
    _check_tensor("weights", weights, *numba_lookup.DTYPES)
    _check_tensor("packed", packed, torch.uint8)
    if not in_8_bits:
        return _check_tensor("scales", scales, torch.float32)
    _check_tensor("codes of the scales", scales.codes, torch.uint8)
    _check_tensor("absmax of the scales", scales.absmax, torch.float32)
    _check_tensor("offset of the scales", scales.offset, torch.float32)
    found, least = scales.absmax.numel(), -(-blocks // double_quantization.BLOCK_SIZE)
    if found < least or scales.offset.numel() != 1:
        raise ValueError(
            f"scales: expected {least:,} absmax of {blocks:,} scales and one offset; got {found:,} and "
            f"{scales.offset.numel():,}"
        )


def _check_tensor(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise ValueError(f"{name}: expected {kinds}; got {str(tensor.dtype)[6:]}")
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name}: expected a contiguous tensor on the CPU; got one on {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: no gradient passes here; got a tensor that requires one. Call detach() first."
        )


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor | QuantizedScales, codebook: str, block_size: int
) -> Tensor:
    """As `kernels.decode.decode_into`, in every bit."""
    check(packed, out, scales, block_size)
    if not numba_lookup.lanes() or block_size % numba_lookup.BLOCKS_OF:
        return decode.decode_into(out, packed, scales, codebook, block_size)
    levels, _, _ = codebooks.table(codebook)
    in_8_bits = isinstance(scales, QuantizedScales)
    if in_8_bits:
        of_scales = (scales.codes, scales.absmax, scales.offset, double_quantization.levels())
    else:
        of_scales = (scales,) * 4
    numbers = (block_size // 2, numba_lookup.DTYPES.index(out.dtype), in_8_bits)
    shared = out.nbytes >= DECODING_SHARED_FROM
    tensors = (out, packed, levels, *of_scales)
    team.run(numba_lookup.decode, out.numel() // block_size, numbers, tensors, shared)
    torch.autograd.graph.increment_version(out)  # so that autograd notices what it did not see written
    return out


def encode_into(packed: Tensor, weight: Tensor, inverse: Tensor, codebook: str, block_size: int) -> Tensor:
    """As `kernels.encode.encode_into`, in every bit."""
    weight = weight.detach().contiguous()
    check(packed, weight, inverse, block_size)
    is_bfloat16 = weight.dtype == torch.bfloat16
    weight = weight if is_bfloat16 else weight.float()
    tensors = (packed, weight, inverse, *tables(codebook, packed.device))
    shared = weight.numel() >= ENCODING_SHARED_FROM
    team.run(_encode, weight.numel() // block_size, (block_size // 2, is_bfloat16), tensors, shared)
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
    for dtype in numba_lookup.DTYPES:
        found, right = torch.empty(512, dtype=dtype), torch.empty(512, dtype=dtype)
        decode_into(found, packed, scales, "nf4", 32)
        decode.decode_into(right, packed, scales, "nf4", 32)
        again = encode_into(torch.empty_like(packed), right, 1 / scales, "nf4", 32)
        if not torch.equal(found, right) or not torch.equal(again, packed):
            raise RuntimeError(
                f"Numba's loops, compiled for this CPU, compute something else than torch in {dtype}"
            )
