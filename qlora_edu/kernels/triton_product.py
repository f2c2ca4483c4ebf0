"""Products with a 4-bit weight W (out, in) that is never written down, in Triton.

    y = x Wᵀ        g W

Each program computes one tile of the result. It walks along the dimension that is summed over, decodes a tile of W
where it is needed, multiplies, and forgets it. Where there are too few tiles to keep a GPU busy, several programs
share one: each takes every parts-th step and stores its part of the sum. The sums are float32. The definition is
`F.linear(x, W)`, or `g @ W`, with W decoded to the dtype of x: the same products, added in another order.

They save memory, not time: on an H100, decoding W once and multiplying by torch was faster in 23 of 24 cases. So
nothing in this package calls them by itself (`benchmarks/records/h100.md`).

Triton's interpreter cannot multiply bfloat16, so there the tiles are converted to float32 (FACTORS), which changes
no product: it holds that of two 16-bit numbers exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from qlora_edu import codebooks
from qlora_edu.blockwise import QuantizedTensor
from qlora_edu.kernels.triton_decode import INTERPRETED, decoded, rounded

PROGRAMS = 1024  # enough for a large GPU


@triton.jit
def _tile(
    w, scales, levels, n, k, N, K, dtype: constexpr, FACTORS: constexpr, BLOCK_SIZE: constexpr, BK: constexpr
):
    """Rows n of W and BK columns from k on, k even: the even columns and the odd ones, each (rows, BK / 2)."""
    column = k + 2 * tl.arange(0, BK // 2)[None, :]
    byte = (n[:, None].to(tl.int64) * K + column) // 2
    high, low = decoded(w, scales, levels, byte, (n[:, None] < N) & (column < K), BLOCK_SIZE)
    return rounded(high, dtype).to(FACTORS), rounded(low, dtype).to(FACTORS)


@triton.jit
def _forward(
    x, w, scales, levels, y, M, N, K,
    FACTORS: constexpr, BLOCK_SIZE: constexpr, BM: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    part, parts = tl.program_id(2), tl.num_programs(2)
    for k in range(part * BK, K, parts * BK):
        column = k + 2 * tl.arange(0, BK // 2)[None, :]
        inside = (m < M) & (column < K)
        even, odd = _tile(w, scales, levels, n, k, N, K, x.dtype.element_ty, FACTORS, BLOCK_SIZE, BK)
        here = tl.load(x + m * K + column, mask=inside, other=0.0).to(FACTORS)
        total = tl.dot(here, tl.trans(even), total, input_precision="ieee")
        here = tl.load(x + m * K + column + 1, mask=inside, other=0.0).to(FACTORS)
        total = tl.dot(here, tl.trans(odd), total, input_precision="ieee")
    n = n[None, :]
    tl.store(y + (part * M + m) * N + n, total, mask=(m < M) & (n < N))


@triton.jit
def _backward(
    g, w, scales, levels, dx, M, N, K,
    FACTORS: constexpr, BLOCK_SIZE: constexpr, BM: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
    k = tl.program_id(1) * BK
    high = tl.zeros((BM, BK // 2), tl.float32)
    low = tl.zeros((BM, BK // 2), tl.float32)
    part, parts = tl.program_id(2), tl.num_programs(2)
    for start in range(part * BN, N, parts * BN):
        n = start + tl.arange(0, BN)
        here = tl.load(g + m * N + n[None, :], mask=(m < M) & (n[None, :] < N), other=0.0).to(FACTORS)
        even, odd = _tile(w, scales, levels, n, k, N, K, g.dtype.element_ty, FACTORS, BLOCK_SIZE, BK)
        high = tl.dot(here, even, high, input_precision="ieee")
        low = tl.dot(here, odd, low, input_precision="ieee")
    column = k + tl.arange(0, BK)[None, :]
    tl.store(dx + (part * M + m) * K + column, tl.interleave(high, low), mask=(m < M) & (column < K))


def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x Wᵀ: x (m, in) with weight (out, in) gives (m, out), in the dtype of x.

    Raises:
        ValueError: if x is no contiguous float matrix of that width, or `in` is odd: a byte would lie in two rows.
    """
    rows, columns = weight.shape
    _check("x", x, columns, weight)
    return _launch(_forward, x, weight, rows)


def product_back(g: Tensor, weight: QuantizedTensor) -> Tensor:
    """g W: g (m, out) with weight (out, in) gives (m, in), in the dtype of g. Errors as in `product`."""
    rows, columns = weight.shape
    _check("g", g, rows, weight)
    return _launch(_backward, g, weight, columns)


def _launch(kernel, x: Tensor, weight: QuantizedTensor, width: int) -> Tensor:
    m, (rows, columns) = len(x), weight.shape
    if not m:
        return x.new_empty(0, width)
    BM = 16 if m <= 16 else 64
    if kernel is _forward:
        BN, BK = 64, 64  # of those tried on an H100, the fastest
        tiles, steps = (triton.cdiv(m, BM), triton.cdiv(rows, BN)), triton.cdiv(columns, BK)
    else:
        BN, BK = 16, 256
        tiles, steps = (triton.cdiv(m, BM), triton.cdiv(columns, BK)), triton.cdiv(rows, BN)
    parts = min(max(1, PROGRAMS // (tiles[0] * tiles[1])), steps)
    sums = torch.empty(parts, m, width, dtype=torch.float32, device=x.device)
    levels, _, _ = codebooks.table(weight.codebook, x.device)
    factors = tl.float32 if INTERPRETED.value else getattr(tl, str(x.dtype).removeprefix("torch."))
    with torch.cuda.device_of(x):
        kernel[*tiles, parts](
            *(x, weight.packed, weight.scales(), levels, sums, m, rows, columns),
            *(factors, weight.block_size, BM, BN, BK),
        )
    return sums.sum(0).to(x.dtype)


def _check(name: str, x: Tensor, width: int, weight: QuantizedTensor) -> None:
    if weight.shape[1] % 2:
        raise ValueError(f"weight: expected an even number of columns; got shape {weight.shape}")
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous float matrix (m, {width}); got {x.dtype}, {tuple(x.shape)}"
        )
