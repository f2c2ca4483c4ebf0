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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

BLOCKS_OF = 32  # weights: block sizes must be multiples of that many, because only whole vectors are written
INT32 = ir.IntType(32)


def compiled(function, **options):
    """Machine code of a Python function, made at its first call and kept on disk."""
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder can be written to: it is compiled again in each process
        return numba.njit(nogil=True, **options)(function)


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
    if dtype == types.int16:  # stands for float16, see `numba_codes.BITS`
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
def decode(start, stop, out, packed, scales, levels, half):
    """What the decoding loops of `numba_codes` do.

    half: bytes in a block; out: float32, or 16 bits as int16 (float16) or uint16 (bfloat16).
    """
    for block in range(start, stop):
        _decode_block(levels, scales[block], packed, block * half, (block + 1) * half, out)
