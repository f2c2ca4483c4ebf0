"""Passes through memory compiled by Numba; the definitions are the functions of the same names in `plain`.

NumPy has no bfloat16: the loops are given its bits as uint16. Each number is made a float32, calculated with, and
rounded at the places where torch rounds, so that both give the same bits.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from qlora_edu.kernels.team import compiled


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
def _normalise(out, x, weight, r):
    """out, x (rows, n); weight (n,); r float32 (rows,)."""
    for row in range(len(x)):
        y, a, b = out[row], x[row], r[row]
        for i in range(len(a)):
            y[i] = narrow(wide(narrow(wide(a[i]) * b)) * wide(weight[i]))


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
def _normalise_backward(out, x, weight, r, grad):
    for row in range(len(x)):
        dx, a, b, g = out[row], x[row], r[row], grad[row]
        mean = np.float32(_sum_of_products(g, weight, a) / len(a))
        shift = mean * b * b
        for i in range(len(a)):
            dx[i] = narrow((wide(g[i]) * wide(weight[i]) - wide(a[i]) * shift) * b)


@compiled
def _rotate(out, x, cos, sin, back):
    """x (b, t, heads, d), out (b, heads, t, d), or the other way where `back` is True; cos, sin (1 or b, t, d)."""
    rows, heads, length = (x if back else out).shape[:3]
    half = x.shape[3] // 2
    for row in range(rows):
        for head in range(heads):
            for t in range(length):
                a, y = (x[row, head, t], out[row, t, head]) if back else (x[row, t, head], out[row, head, t])
                c, s = cos[row % len(cos), t], sin[row % len(sin), t]
                for i in range(half):
                    first, second = wide(a[i]), wide(a[half + i])
                    up, down = wide(narrow(first * wide(s[i]))), wide(narrow(second * wide(s[i])))
                    if back:
                        up, down = -up, -down
                    y[i] = narrow(wide(narrow(first * wide(c[i]))) - down)
                    y[half + i] = narrow(wide(narrow(second * wide(c[i]))) + up)


def _bits(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.uint16).numpy()


def _rows(x: Tensor) -> np.ndarray:
    return _bits(x).reshape(-1, x.shape[-1])


def normalise(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise(_rows(out), _rows(x), _bits(weight), r.reshape(-1).numpy())
    return out


def normalise_backward(x: Tensor, weight: Tensor, r: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise_backward(_rows(out), _rows(x), _bits(weight), r.reshape(-1).numpy(), _rows(grad))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    b, one, other, d = x.shape
    out = torch.empty((b, other, one, d), dtype=x.dtype, device=x.device)
    _rotate(_bits(out), _bits(x), _bits(cos), _bits(sin), back)
    return out


rotate_back = partial(rotate, back=True)
