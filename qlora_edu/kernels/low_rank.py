"""A frozen linear layer and its low-rank update in one step; the definition is `LoRALinear.forward`.

    y = x Wᵀ + s (x Aᵀ) Bᵀ
    dx = g W + s (g B) A        dA = s (g B)ᵀ x        dB = s gᵀ (x Aᵀ)

The products of the update are accumulated straight into y and dx, in the dtype of x; A and B keep their float32
parameters. Only x and x Aᵀ are saved for backward: W is asked for again, so a quantized layer decodes it twice
instead of keeping it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def linear_with_update(x: Tensor, base: nn.Module, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """What `base` gives for x, plus scaling * (x Aᵀ) Bᵀ.

    Args:
        x: (..., in).
        base: a frozen linear layer; if it has `weight_now()`, that gives a function of a dtype for its weight
            (out, in), which may be overwritten by the next call of any layer.
        lora_a: (r, in); lora_b: (out, r).

    Returns:
        (..., out), in the dtype of x.
    """
    return _LinearWithUpdate.apply(x, lora_a, lora_b, base, scaling)


def _weight_of(base: nn.Module) -> Callable[[torch.dtype], Tensor]:
    """What gives W to both passes, whatever weight the base is given between them."""
    return base.weight_now() if hasattr(base, "weight_now") else base.weight.detach().to


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, lora_b, base, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (m, in)
        weight = _weight_of(base)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y = torch.nn.functional.linear(rows, weight(x.dtype), bias)  # (m, out)
        h = rows @ lora_a.to(x.dtype).T  # (m, r)
        y.addmm_(h, lora_b.to(x.dtype).T, alpha=scaling)
        ctx.weight, ctx.scaling = weight, scaling
        ctx.save_for_backward(rows, h, lora_a, lora_b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("backward: no second derivatives here; compute_dtype=None has them")
        rows, h, lora_a, lora_b = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1])  # (m, out)
        gh = g @ lora_b.to(g.dtype)  # (m, r)
        gh *= ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ ctx.weight(g.dtype)  # (m, in)
            grad_x.addmm_(gh, lora_a.to(g.dtype))
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
        grad_a = (gh.T @ rows).to(lora_a.dtype)
        grad_b = (g.T @ h).to(lora_b.dtype) * ctx.scaling
        return grad_x, grad_a, grad_b, None, None
