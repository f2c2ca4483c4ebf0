"""Uniform grids: k-bit integers, their scales, and what is lost when weights are rounded to them.

A weight w becomes an integer code q and comes back as ŵ = q·Δ + z. Δ is the step of the grid, z where it begins.
A group of weights (the whole tensor, a row, or a block) shares one Δ and one z:

    absmax    Δ = max|w| / (2^(k-1) - 1)        z = 0         q from -(2^(k-1) - 1) to 2^(k-1) - 1
    min-max   Δ = (max w - min w) / (2^k - 1)   z = min w     q from 0 to 2^k - 1

Absmax is the scheme of QLoRA's equation 1 (arXiv 2305.14314, with 127 for 8 bits); min-max is that of GGUF's Q4_1. The
steps are float32 here, as they are in bitsandbytes. Rounding is to the nearest code, ties to the even one, unless told.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_edu.blockwise import check_finite, check_weight

GRANULARITIES = ("tensor", "row", "block")
ROUNDINGS = ("nearest", "stochastic", "truncate")


def round_trip(
    weight: Tensor,
    bits: int,
    granularity: str = "block",
    block_size: int = 64,
    symmetric: bool = True,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The weights as they come back from `bits`-bit integers: `quantize(...).dequantize()`, float32, same shape.

    >>> round_trip(torch.tensor([1.0, -7.0, 2.4, 0.0]), bits=4)
    tensor([ 1., -7.,  2.,  0.])
    """
    return quantize(weight, bits, granularity, block_size, symmetric, rounding, generator).dequantize()


def quantize(
    weight: Tensor,
    bits: int,
    granularity: str = "block",
    block_size: int = 64,
    symmetric: bool = True,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> "UniformTensor":
    """Round a tensor to `bits`-bit integers.

    Args:
        weight: any shape, at least one element; float32, bfloat16 or float16; every value finite.
        bits: 2 to 8.
        granularity: what shares a step: "tensor", "row" (along the last dimension) or "block".
        block_size: weights in a block, counted in row-major order; the last block may be shorter.
        symmetric: True for absmax, False for min-max.
        rounding: "nearest" (ties to even), "stochastic" (up with the probability of the fraction: right on
            average) or "truncate" (towards zero, to see its bias).
        generator: for stochastic rounding; torch's own if None.

    Returns:
        A UniformTensor; `weight` is left as it was.

    Raises:
        TypeError: if `weight` is not a tensor of those dtypes.
        ValueError: if it is empty, on the meta device, or holds NaN or Inf; or another argument is none of the above.
    """
    _check(weight, bits, granularity, block_size)
    grouped = groups(weight.detach().float().contiguous(), granularity, block_size)  # (groups, size)
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        smallest = -largest
        start = None
        step = grouped.abs().amax(dim=1, keepdim=True) / largest  # (groups, 1)
    else:
        largest, smallest = 2**bits - 1, 0
        start = grouped.amin(dim=1, keepdim=True)
        step = (grouped.amax(dim=1, keepdim=True) - start) / largest
        if not step.isfinite().all():
            raise ValueError(
                "weight: expected a range below 3.4e38; got a wider one. Scale the weights down."
            )
        grouped = grouped - start
    # Equal weights have no span, and zeros no absmax. Their codes are 0, whatever they are divided by.
    position = grouped / torch.where(step > 0, step, 1.0)
    codes = round_to_integer(position, rounding, generator).clamp_(smallest, largest).to(torch.int16)
    return UniformTensor(codes, step, start, bits, granularity, block_size, tuple(weight.shape))


def groups(weight: Tensor, granularity: str, block_size: int) -> Tensor:
    """The weights, one group a row. Returns (groups, size).

    A short last block is filled up with copies of the last weight, which change neither its largest nor its smallest.
    """
    if granularity == "tensor":
        return weight.reshape(1, -1)
    if granularity == "row":
        return weight.reshape(-1, weight.shape[-1] if weight.dim() else 1)
    flat = weight.reshape(-1)  # (n,)
    missing = -flat.numel() % block_size
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, block_size)


def round_to_integer(
    x: Tensor, rounding: str = "nearest", generator: torch.Generator | None = None
) -> Tensor:
    """Whole numbers near x, in x's dtype; see `quantize` for the three ways.

    >>> round_to_integer(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.7])).tolist()  # a tie goes to the even neighbour
    [0.0, 2.0, 2.0, -0.0, -2.0]
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}; got {rounding!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None; got {generator!r}. "
            "Write torch.Generator().manual_seed(0)."
        )
    if rounding == "nearest":
        return x.round()
    if rounding == "truncate":
        return x.trunc()
    below = x.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device) < x - below
    return below + up


@dataclass(frozen=True, eq=False)
class UniformTensor:
    """A tensor rounded to integers.

    Attributes:
        codes: int16 (groups, size), one integer a weight; a short last block is filled up.
        step: float32 (groups, 1), Δ of each group.
        start: float32 (groups, 1), z of each group; None where it is zero (absmax).
        bits, granularity, block_size: as given to `quantize`.
        shape: of the tensor that was rounded.
    """

    codes: Tensor
    step: Tensor
    start: Tensor | None
    bits: int
    granularity: str
    block_size: int
    shape: tuple[int, ...]

    def dequantize(self) -> Tensor:
        """q·Δ + z, computed in float32. Returns float32 of `shape`."""
        values = self.codes.float() * self.step
        if self.start is not None:
            values += self.start
        return values.view(-1)[: math.prod(self.shape)].view(self.shape)

    def bits_per_weight(self, scale_bits: int = 32) -> float:
        """What a weight costs: its code, and its share of the steps (and starts), `scale_bits` bits each."""
        scales = self.step.numel() * (1 if self.start is None else 2)
        return self.bits + scales * scale_bits / math.prod(self.shape)


def relative_rmse(weight: Tensor, approximation: Tensor) -> float:
    """‖w - ŵ‖ / ‖w‖, computed in float64: the root-mean-square error in units of the weights' own size.

    >>> relative_rmse(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    if weight.shape != approximation.shape:
        raise ValueError(
            f"approximation: expected shape {tuple(weight.shape)}; got {tuple(approximation.shape)}. "
            "Compare tensors of one shape."
        )
    if weight.is_meta or approximation.is_meta:
        raise ValueError("weight, approximation: expected tensors with values; got one on the meta device.")
    w = weight.detach().double()
    size = w.norm().item()
    if size == 0:
        raise ValueError("weight: expected a value that is not zero; got zeros only. Its error has no unit.")
    return (w - approximation.detach().double()).norm().item() / size


def snr_db(weight: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in decibels: 20·log10(‖w‖ / ‖w - ŵ‖). Infinite where nothing was lost.

    Twice the step costs 6 dB; 20 dB is an error of 10%, 40 dB one of 1%.

    >>> round(snr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 9)
    20.0
    """
    error = relative_rmse(weight, approximation)
    return -20 * math.log10(error) if error else math.inf


def _check(weight: Tensor, bits: int, granularity: str, block_size: int) -> None:
    check_weight(weight)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits: expected a whole number from 2 to 8; got {bits!r}.")
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size: expected a whole number of at least 1; got {block_size!r}.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}; got {granularity!r}.")
    check_finite(weight)
