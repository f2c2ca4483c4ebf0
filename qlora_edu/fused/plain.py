"""The passes through memory of a LLaMA block, in plain torch: what `loops` does faster, in the same bits."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is that."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def normalise(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """weight * (x * r), rounded twice.

    Args:
        x: (..., n); weight: (n,); r: one number a row, (..., 1), not rounded to the dtype of x.
    """
    return weight * (wide(x) * r).to(x.dtype)


def normalise_backward(x: Tensor, weight: Tensor, r: Tensor, grad: Tensor) -> Tensor:
    """The derivative of that by x, where r = 1 / sqrt(mean(x²) + eps), times grad (..., n)."""
    scaled, long = wide(grad) * wide(weight), wide(x)
    # summed in float64, so that the order of the sum does not show
    mean = (scaled * long).sum(-1, keepdim=True, dtype=torch.float64).div(x.shape[-1]).to(long.dtype)
    return ((scaled - long * (mean * r * r)) * r).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x[i], x[i + d/2]) turned by an angle that depends on the position (arXiv 2104.09864, equation 34).

    Args:
        x: (b, t, heads, d).
        cos, sin: (1 or b, t, d), both halves of d alike.

    Returns:
        (b, heads, t, d), contiguous.
    """
    x = x.transpose(1, 2)
    first, second = x.chunk(2, dim=-1)
    turned = x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return turned.contiguous()


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same pairs turned by the opposite angle, (b, heads, t, d) to (b, t, heads, d): the derivative of `rotate`."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cos[:, None] + torch.cat((second, -first), dim=-1) * sin[:, None]
    return turned.transpose(1, 2).contiguous()
