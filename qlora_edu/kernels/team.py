"""Compiled loops that several threads share: those that torch has anyway.

To wake a thread of Python's takes longer than to decode a small matrix. OpenMP's threads, which torch's own operations
run on, stay awake for a moment after each of them and begin within microseconds. `GOMP_parallel` is what a C compiler
makes of `#pragma omp parallel`: all threads of the team call one function with the same argument, and it returns when
all are done. There are as many pieces as threads, no more, and a thread takes the next one that is free.
"""

import ctypes
import os
from array import array
from functools import cache

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

_JOB = types.void(types.CPointer(types.voidptr))
_PROCESS = os.getpid()


def compiled(function, **options):
    """Machine code of a Python function, made at its first call and kept on disk. Options are Numba's."""
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to: it is compiled again in each process
        return numba.njit(**options)(function)


@cache
def _c_function(loop):
    """`loop`, compiled as a C function of one argument, the address of a job; and how Python calls it."""
    try:
        function = numba.cfunc(_JOB, cache=True)(loop)
    except RuntimeError:
        function = numba.cfunc(_JOB)(loop)
    return function, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)


@intrinsic
def _count(_, numbers):
    """Add 1 to numbers[0] and give what it was; no two threads get the same."""

    def write(context, b, signature, arguments):
        first = context.make_array(signature.args[0])(context, b, arguments[0]).data
        return b.atomic_rmw("add", first, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(numbers), write


@compiled
def next_piece(numbers):
    """The next blocks that no thread has taken, (start, stop). Once none is left, start is their number.

    numbers: int64, pieces taken, blocks and pieces first. Numba does not notice an edit of these lines: delete
    kernels/__pycache__ and fused/__pycache__ after one.
    """
    blocks, pieces = numbers[1], numbers[2]
    piece = min(_count(numbers), pieces)
    return blocks * piece // pieces, blocks * (piece + 1) // pieces


@cache
def _parallel():
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch calls, or None if it has another."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def run(loop, blocks: int, numbers: tuple[int, ...], tensors: tuple[Tensor, ...], shared: bool) -> None:
    """Run a loop on all blocks, in all of torch's threads if it is to be shared.

    All or one: OpenMP ends threads that are left out, and torch would make them anew. A fork has none of its parent's.

    Args:
        loop: a function of a job: job[0] is the address of (pieces taken, blocks, pieces, *numbers), int64; job[1] and
            so on are those of the tensors' data. It takes blocks by `next_piece`.
        numbers, tensors: its own.
    """
    function, call = _c_function(loop)
    threads = torch.get_num_threads() if shared and _parallel() and os.getpid() == _PROCESS else 1
    facts = array("q", (0, blocks, threads, *numbers))
    job = array("Q", (facts.buffer_info()[0], *(tensor.data_ptr() for tensor in tensors)))
    if blocks and not all(job):
        raise ValueError("tensors: expected memory behind each; got one that has none, such as a FakeTensor")
    address = job.buffer_info()[0]
    if threads == 1:
        call(address)
    else:
        _parallel()(function.address, address, threads, 0)
