"""Passes through memory compiled by Numba; the definitions are the functions of the same names in `plain`.

NumPy has no bfloat16: the loops are given its bits as uint16. Each number is made a float32, calculated with, and
rounded at the places where torch rounds, so that both give the same bits.
"""

from functools import partial

import numpy as np
import torch
from numba import carray
from torch import Tensor

from qlora_edu.kernels import team
from qlora_edu.kernels.team import compiled, next_piece

SHARED_FROM = 2**18  # numbers: fewer are done before another thread has begun


@compiled
def wide(bits):
    """bfloat16 is the upper half of a float32."""
    return np.uint32(bits << np.uint32(16)).view(np.float32)


@compiled
def narrow(x):
    """To the nearest bfloat16, ties to even; a NaN stays one."""
    bits = np.float32(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(0x7FC0) if x != x else np.uint16(rounded)


@compiled
def _normalise_row(y, x, weight, r):
    """y, x, weight: (n,)."""
    for i in range(len(x)):
        y[i] = narrow(wide(narrow(wide(x[i]) * r)) * wide(weight[i]))


@compiled
def _product(a, b, c):
    return (wide(a) * wide(b)) * wide(c)


@partial(compiled, fastmath={"reassoc"})  # the sum may be taken in any order, so that it can be vectorised
def _sum_of_products(a, b, c):
    total = 0.0  # float64
    for i in range(len(a)):
        total += np.float64(_product(a[i], b[i], c[i]))
    return total


@compiled
def _normalise_row_backward(dx, x, weight, r, grad):
    """dx, x, weight, grad: (n,)."""
    mean = np.float32(_sum_of_products(grad, weight, x) / len(x))
    shift = mean * r * r
    for i in range(len(x)):
        dx[i] = narrow((wide(grad[i]) * wide(weight[i]) - wide(x[i]) * shift) * r)


@compiled
def _rotate_head(y, x, cos, sin, back):
    """y, x, cos, sin: (d,)."""
    half = len(x) // 2
    for i in range(half):
        first, second = wide(x[i]), wide(x[half + i])
        up, down = wide(narrow(first * wide(sin[i]))), wide(narrow(second * wide(sin[i])))
        if back:
            up, down = -up, -down
        y[i] = narrow(wide(narrow(first * wide(cos[i]))) - down)
        y[half + i] = narrow(wide(narrow(second * wide(cos[i]))) + up)


def _normalise(job):
    """Loops for `team.run`, over rows. numbers: n. tensors: out, x (rows, n), weight (n,), r (rows,)."""
    numbers = carray(job[0], 4, np.int64)
    rows, n = numbers[1], numbers[3]
    out, x = carray(job[1], (rows, n), np.uint16), carray(job[2], (rows, n), np.uint16)
    weight, r = carray(job[3], n, np.uint16), carray(job[4], rows, np.float32)
    start, stop = next_piece(numbers)
    while start < rows:
        for row in range(start, stop):
            _normalise_row(out[row], x[row], weight, r[row])
        start, stop = next_piece(numbers)


def _normalise_backward(job):
    """As `_normalise`, and grad (rows, n)."""
    numbers = carray(job[0], 4, np.int64)
    rows, n = numbers[1], numbers[3]
    out, x = carray(job[1], (rows, n), np.uint16), carray(job[2], (rows, n), np.uint16)
    weight, r = carray(job[3], n, np.uint16), carray(job[4], rows, np.float32)
    grad = carray(job[5], (rows, n), np.uint16)
    start, stop = next_piece(numbers)
    while start < rows:
        for row in range(start, stop):
            _normalise_row_backward(out[row], x[row], weight, r[row], grad[row])
        start, stop = next_piece(numbers)


def _rotate(job):
    """Over pairs (row, t). numbers: t, heads, d, rows of cos and sin, whether back. tensors: out, x, cos, sin."""
    numbers = carray(job[0], 8, np.int64)
    pairs, length, heads = numbers[1], numbers[3], numbers[4]
    d, tables, back = numbers[5], numbers[6], numbers[7] == 1
    first, second = (job[1], job[2]) if back else (job[2], job[1])
    by_position = carray(first, (pairs // length, length, heads, d), np.uint16)
    by_head = carray(second, (pairs // length, heads, length, d), np.uint16)
    cos, sin = carray(job[3], (tables, length, d), np.uint16), carray(job[4], (tables, length, d), np.uint16)
    start, stop = next_piece(numbers)
    while start < pairs:
        for pair in range(start, stop):
            row, t = pair // length, pair % length
            c, s = cos[row % tables, t], sin[row % tables, t]
            for head in range(heads):
                if back:
                    _rotate_head(by_position[row, t, head], by_head[row, head, t], c, s, True)
                else:
                    _rotate_head(by_head[row, head, t], by_position[row, t, head], c, s, False)
        start, stop = next_piece(numbers)


def _run(loop, pieces: int, numbers: tuple[int, ...], out: Tensor, *tensors: Tensor) -> Tensor:
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    if out.numel():
        team.run(loop, pieces, numbers, (out, *tensors), shared=out.numel() >= SHARED_FROM)
    return out


def normalise(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run(_normalise, r.numel(), weight.shape, out, x, weight, r)


def normalise_backward(x: Tensor, weight: Tensor, r: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run(_normalise_backward, r.numel(), weight.shape, out, x, weight, r, grad)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, t, heads, d = x.shape
    out = torch.empty((b, heads, t, d), dtype=x.dtype, device=x.device)
    return _run(_rotate, b * t, (t, heads, d, len(cos), 0), out, x, cos, sin)


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, heads, t, d = x.shape
    out = torch.empty((b, t, heads, d), dtype=x.dtype, device=x.device)
    return _run(_rotate, b * t, (t, heads, d, len(cos), 1), out, x, cos, sin)
