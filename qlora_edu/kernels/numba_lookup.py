"""Decoding with the one instruction that looks up many codes at once, for `numba_codes`.

A block of 4-bit weights has only sixteen different values, level * scale. A vector register of an x86 CPU holds all
of them (AVX-512), or two hold them (AVX2), and a permutation instruction looks up 16 or 8 codes in it at once.
Python has no word for that instruction, and LLVM, the compiler behind Numba, finds it in no loop. So the inner part is
written in LLVM's own language: each `b.` below appends an instruction that works on vectors.
"""

from functools import cache

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

INT32 = ir.IntType(32)


def compiled(function):
    """Machine code of a Python function, made at its first call and kept on disk."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        return numba.njit(nogil=True)(function)


@cache
def lanes() -> int:
    """How many codes an instruction looks up on the CPU that is compiled for: 16, 8, or 0 where there is none."""
    features = cpu_target.target_context.codegen().magic_tuple()[-1].split(",")
    if "+avx512f" in features:
        return 16
    return 8 if {"+avx2", "+f16c"} <= set(features) else 0


def _vector(bits: int, count: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), count)


def _all(kind: ir.VectorType, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


def _table(b: ir.IRBuilder, levels, scale, dtype):
    """The sixteen weights of a block, each in 32 bits: of float32, or the 16 of a smaller dtype and zeros."""
    floats, bits = ir.VectorType(ir.FloatType(), 16), _vector(32, 16)
    one = b.insert_element(ir.Constant(floats, ir.Undefined), scale, INT32(0))
    weights = b.fmul(levels, b.shuffle_vector(one, one, _all(bits, 0)))  # times the scale, sixteen times
    if dtype == types.float32:
        return b.bitcast(weights, bits)
    if dtype == types.int16:
        half = b.fptrunc(weights, ir.VectorType(ir.HalfType(), 16))
        return b.zext(b.bitcast(half, _vector(16, 16)), bits)
    # bfloat16 is the upper half, rounded to the nearest, ties to even; a NaN stays one.
    whole = b.bitcast(weights, bits)
    odd = b.and_(b.lshr(whole, _all(bits, 16)), _all(bits, 1))
    rounded = b.lshr(b.add(b.add(whole, _all(bits, 0x7FFF)), odd), _all(bits, 16))
    return b.select(b.fcmp_unordered("uno", weights, weights), _all(bits, 0x7FC0), rounded)


def _look_up(b: ir.IRBuilder, table, codes):
    """table[codes], of which the lowest four bits count."""
    kind = codes.type
    name = "llvm.x86.avx512.permvar.si.512" if kind.count == 16 else "llvm.x86.avx2.permd"
    permute = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), name)
    if kind.count == 16:
        return b.call(permute, [table, codes])
    halves = [b.shuffle_vector(table, table, ir.Constant(kind, list(range(at, at + 8)))) for at in (0, 8)]
    low, high = (b.call(permute, [half, codes]) for half in halves)  # of which the lowest three bits count
    is_high = b.icmp_unsigned("!=", b.and_(codes, _all(kind, 8)), _all(kind, 0))
    return b.select(is_high, high, low)


@intrinsic
def _decode_block(_, levels, scale, packed, start, stop, out):
    """For the bytes from start to stop of packed: out[2 i] and out[2 i + 1] from byte i."""
    size = lanes()

    def write(context, b, signature, arguments):
        level_at, byte_at, out_at = (
            context.make_array(signature.args[i])(context, b, arguments[i]).data for i in (0, 2, 5)
        )
        dtype = signature.args[5].dtype
        floats = ir.VectorType(ir.FloatType(), 16)
        table = _table(b, b.load(b.bitcast(level_at, floats.as_pointer()), align=4), arguments[1], dtype)
        # A byte becomes two codes in lanes of 32 bits, or, of two weights of 16 bits, one lane.
        wide = dtype == types.float32
        count = size // 2 if wide else size
        kind = _vector(64, count) if wide else _vector(32, count)
        step = ir.Constant(arguments[3].type, count)
        with cgutils.for_range_slice(b, arguments[3], arguments[4], step) as (i, _):
            place = b.bitcast(b.gep(byte_at, [i]), _vector(8, count).as_pointer())
            byte = b.zext(b.load(place, align=1), kind)
            first = b.lshr(byte, _all(kind, 4))
            if wide:
                codes = b.or_(first, b.shl(byte, _all(kind, 32)))
                found = _look_up(b, table, b.bitcast(codes, _vector(32, size)))
            else:
                second = b.shl(_look_up(b, table, byte), _all(kind, 16))
                found = b.or_(_look_up(b, table, first), second)
            place = b.bitcast(b.gep(out_at, [b.add(i, i)]), found.type.as_pointer())
            b.store(found, place, align=2)
        return context.get_dummy_value()

    return types.void(levels, scale, packed, start, stop, out), write


@compiled
def decode(start, stop, out, packed, scales, levels, half):
    """As the loops of `numba_codes`. out: float32, or the bits of float16 as int16, of bfloat16 as uint16."""
    for block in range(start, stop):
        _decode_block(levels, scales[block], packed, block * half, (block + 1) * half, out)
