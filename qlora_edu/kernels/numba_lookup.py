"""Decoding with the one instruction that looks up many codes at once, for `numba_codes`.

A block of 4-bit weights has only sixteen different values, level * scale. A vector register of an x86 CPU holds all
of them (AVX-512), or two hold them (AVX2), and a permutation instruction looks up 16 or 8 codes in it at once. Neither
Python nor NumPy has a name for that instruction, and LLVM, the compiler behind Numba, does not use it for such a loop
by itself. So the inner loop is written in LLVM's own language. The functions that take a builder `b` calculate
nothing: they run once, while Numba compiles, and each `b.something(...)` appends one instruction that works on whole
vectors.
"""

from functools import cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qlora_edu.double_quantization import BLOCK_SIZE as SCALES_IN_A_BLOCK
from qlora_edu.kernels.team import compiled, next_piece

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # Numba has the last two as uint16 and int16
BLOCKS_OF = 32  # weights: block sizes must be multiples of that many, because only whole vectors are written
INT32 = ir.IntType(32)


@cache
def lanes() -> int:
    """How many codes one instruction looks up on the CPU that Numba compiles for: 16, 8, or 0 if it has none."""
    features = cpu_target.target_context.codegen().magic_tuple()[-1].split(",")
    if numba.config.DISABLE_JIT:
        return 0
    if "+avx512f" in features:
        return 16
    return 8 if {"+avx2", "+f16c"} <= set(features) else 0  # f16c rounds to float16


def _vector(bits: int, count: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), count)


def _repeat(kind: ir.VectorType, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


def _table(b: ir.IRBuilder, levels, scale, dtype):
    """The sixteen weights of a block, one in each lane of 32 bits: a float32, or 16 bits and zeros above them."""
    floats, bits = ir.VectorType(ir.FloatType(), 16), _vector(32, 16)
    first_lane = b.insert_element(ir.Constant(floats, ir.Undefined), scale, INT32(0))
    all_lanes = b.shuffle_vector(first_lane, first_lane, _repeat(bits, 0))
    weights = b.fmul(levels, all_lanes)
    if dtype == types.float32:
        return b.bitcast(weights, bits)
    if dtype == types.int16:  # stands for float16, see DTYPES
        float16 = b.fptrunc(weights, ir.VectorType(ir.HalfType(), 16))
        return b.zext(b.bitcast(float16, _vector(16, 16)), bits)
    # bfloat16 is the upper half, rounded to the nearest, ties to even; a NaN stays one.
    exact = b.bitcast(weights, bits)
    odd = b.and_(b.lshr(exact, _repeat(bits, 16)), _repeat(bits, 1))
    rounded = b.lshr(b.add(b.add(exact, _repeat(bits, 0x7FFF)), odd), _repeat(bits, 16))
    return b.select(b.fcmp_unordered("uno", weights, weights), _repeat(bits, 0x7FC0), rounded)


def _look_up(b: ir.IRBuilder, table, codes):
    """table[code] for each code; only its lowest four bits count."""
    kind = codes.type
    # LLVM's names for the x86 instruction vpermd, of 512 bits and of 256
    name = "llvm.x86.avx512.permvar.si.512" if kind.count == 16 else "llvm.x86.avx2.permd"
    permute = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), name)
    if kind.count == 16:
        return b.call(permute, [table, codes])
    halves = [b.shuffle_vector(table, table, ir.Constant(kind, list(range(at, at + 8)))) for at in (0, 8)]
    low, high = (b.call(permute, [half, codes]) for half in halves)  # each by the lowest three bits
    is_high = b.icmp_unsigned("!=", b.and_(codes, _repeat(kind, 8)), _repeat(kind, 0))
    return b.select(is_high, high, low)


@intrinsic
def _decode_block(_, levels, scale, packed, start, stop, out):
    """For the bytes from start to stop of packed: out[2 i] and out[2 i + 1] from byte i.

    The arguments here are types, not values: Numba calls this while it compiles, and then `write`, which appends the
    instructions.
    """
    width = lanes()

    def write(context, b, signature, arguments):
        level_at, byte_at, out_at = (
            context.make_array(signature.args[i])(context, b, arguments[i]).data for i in (0, 2, 5)
        )
        dtype = signature.args[5].dtype
        # align: an address is a multiple of that many bytes, and need not be one of a whole vector's
        sixteen = ir.VectorType(ir.FloatType(), 16).as_pointer()
        table = _table(b, b.load(b.bitcast(level_at, sixteen), align=4), arguments[1], dtype)
        # float32: a byte fills two lanes of 32 bits, one for each weight. 16 bits: one lane, for both weights.
        is_float32 = dtype == types.float32
        step = width // 2 if is_float32 else width  # bytes
        kind = _vector(64, step) if is_float32 else _vector(32, step)
        with cgutils.for_range_slice(b, arguments[3], arguments[4], arguments[3].type(step)) as (i, _):
            place = b.bitcast(b.gep(byte_at, [i]), _vector(8, step).as_pointer())
            byte = b.zext(b.load(place, align=1), kind)
            first = b.lshr(byte, _repeat(kind, 4))
            if is_float32:
                codes = b.or_(first, b.shl(byte, _repeat(kind, 32)))  # x86 stores the lower half first
                found = _look_up(b, table, b.bitcast(codes, _vector(32, width)))
            else:
                second = _look_up(b, table, byte)  # by its lowest four bits
                found = b.or_(_look_up(b, table, first), b.shl(second, _repeat(kind, 16)))
            place = b.bitcast(b.gep(out_at, [b.add(i, i)]), found.type.as_pointer())
            b.store(found, place, align=2)
        return context.get_dummy_value()  # None

    return types.void(levels, scale, packed, start, stop, out), write


@compiled
def _scale(block, in_8_bits, scales, codes, absmax, offset, levels_of_scales):
    """As `double_quantization.QuantizedScales.dequantize`: rounded after each step."""
    if in_8_bits:
        return levels_of_scales[codes[block]] * absmax[block // SCALES_IN_A_BLOCK] + offset[0]
    return scales[block]


@compiled
def _decode_blocks(start, stop, out, packed, levels, half, stored):
    for block in range(start, stop):
        scale = _scale(block, *stored)
        _decode_block(levels, scale, packed, block * half, (block + 1) * half, out)


def decode(job):
    """A loop for `team.run`: blocks of packed codes to weights.

    numbers: bytes in a block, position of the dtype in DTYPES, whether scales are in 8 bits. tensors: out, packed,
    levels; scales, or their codes; and of scales in 8 bits absmax, offset, levels, otherwise anything.
    """
    numbers = carray(job[0], 6, np.int64)
    blocks, half, dtype = numbers[1], numbers[3], numbers[4]
    count = 2 * half * blocks
    packed, levels = carray(job[2], count // 2, np.uint8), carray(job[3], 16, np.float32)
    stored = (
        numbers[5] == 1,
        carray(job[4], blocks, np.float32),
        carray(job[4], blocks, np.uint8),
        carray(job[5], blocks // SCALES_IN_A_BLOCK + 1, np.float32),
        carray(job[6], 1, np.float32),
        carray(job[7], 256, np.float32),
    )
    start, stop = next_piece(numbers)
    while start < blocks:
        if dtype == 0:
            _decode_blocks(start, stop, carray(job[1], count, np.float32), packed, levels, half, stored)
        elif dtype == 1:
            _decode_blocks(start, stop, carray(job[1], count, np.uint16), packed, levels, half, stored)
        else:
            _decode_blocks(start, stop, carray(job[1], count, np.int16), packed, levels, half, stored)
        start, stop = next_piece(numbers)
