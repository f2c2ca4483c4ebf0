"""The product with a frozen 4-bit weight: decoded forward, decoded again backward, never kept in between."""

import torch
from torch import Tensor

from qlora_edu.blockwise import QuantizedTensor
from qlora_edu.kernels.scratch import scratch


class Frozen4BitProduct(torch.autograd.Function):
    """x (..., in) times the transpose of a 4-bit weight (out, in). Saves no tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.quantized = quantized  # not the layer: it may be given other codes before the backward pass
        return torch.nn.functional.linear(x, decoded(quantized, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        # As bitsandbytes does: decoded to the dtype of the original weight first, then converted to that of dy.
        weight = decoded(ctx.quantized, ctx.quantized.dtype).to(grad_y.dtype)
        return torch.matmul(grad_y, weight), None, None


def decoded(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The decoded weight (out, in) in scratch memory, to be used before any other is decoded."""
    return quantized.dequantize(out=scratch(quantized.shape, dtype, quantized.packed.device))
