"""RMSNorm and SwiGLU, each as one function with a derivative of its own."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora_edu.fused import plain
from qlora_edu.fused.choice import passes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps), rounded where transformers' LlamaRMSNorm does (arXiv 1910.07467, equation 4).

    Args:
        x: (..., n).
        weight: (n,), frozen: gradients go to x only.

    Raises:
        ValueError: if the shapes do not fit, or the weight wants a gradient.
    """
    if weight.dim() != 1 or not len(weight) or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"weight: expected shape ({x.shape[-1]},), one number a column of x; got {tuple(weight.shape)}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected one that is frozen; got one that requires a gradient")
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """r = 1 / sqrt(mean(x²) + eps),   y = w x r,   dx = r (w dy - x r² mean(w dy x))"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = x.to(plain.wide_dtype(x), copy=True).square_()
        r = torch.rsqrt(squares.mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return passes(x, weight).normalise(x, weight, r)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        return passes(x, weight, grad).normalise_backward(x, weight, r, grad), None, None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of one shape. silu(a) = a / (1 + exp(-a)) is computed again in the backward pass, not kept.

    Raises:
        ValueError: if the shapes or dtypes differ.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
            f"b: expected the shape and dtype of a, {tuple(a.shape)}, {a.dtype}; got {tuple(b.shape)}, {b.dtype}"
        )
    return _SwiGLU.apply(a, b)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a) * grad
