"""Causal attention of a LLaMA block, with its rotary embedding, as one function with a derivative of its own.

Several query heads share a key head (grouped-query attention). Instead of repeating the keys for each of them, their
queries are put below one another, and one product serves the group. Queries come a part at a time, and only to the keys
that the mask lets them see. Scores are rounded to the model's dtype where transformers' eager attention rounds them, so
that the result is the same in every bit (where: see `qlora_edu.fused`); gradients are rounded less often.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_edu.fused import plain
from qlora_edu.fused.choice import passes

QUERIES = 64  # of each head at a time


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """softmax(scaling R(q) R(k)ᵀ + mask) v for each head, where R turns pairs of numbers by the angle of a position.

    Args:
        q: (b, t, heads, d); k, v: (b, t, groups, d), where groups divides heads, and d is even.
        cos, sin: (1 or b, t, d), both halves of d alike (arXiv 2104.09864, equation 34).
        mask: is added to the scores, (1 or b, 1, t, t), or None. It hides a key by the least number of its dtype.

    Returns:
        (b, t, heads, d). A query that may see no key gets the mean of all values. Gradients go to q, k and v.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    _check(q, k, v, cos, sin, mask)
    return _Attention.apply(q, k, v, cos, sin, mask, scaling)


class _Attention(torch.autograd.Function):
    """s = scaling q kᵀ + mask,   p = softmax(s),   y = p v

    dv = pᵀ dy,   dp = dy vᵀ,   ds = p (dp - sum(p dp)),   dq = scaling ds k,   dk = scaling dsᵀ q
    """

    @staticmethod
    def forward(ctx, q, k, v, cos, sin, mask, scaling):
        b, length, groups, _ = k.shape
        turn = passes(q, k, cos, sin)
        q, k, v = turn.rotate(q, cos, sin), turn.rotate(k, cos, sin), v.transpose(1, 2)
        q, (k, v) = _by_group(q, groups), (_by_group(x, groups)[:, 0] for x in (k, v))
        y, kept, parts = torch.empty_like(q), [], _parts(mask, length)
        for rows, seen in parts:
            part = q[:, :, rows].flatten(1, 2)  # (b * groups, heads of the group * rows, d)
            scores = _scores(part, k[:, :seen], scaling)
            if mask is not None:
                scores.view(b, groups, -1, *mask[0, 0, rows, :seen].shape).add_(mask[:, :, None, rows, :seen])
            p = scores.softmax(-1, dtype=plain.wide_dtype(q)).to(q.dtype)
            y[:, :, rows] = (p @ v[:, :seen]).view_as(q[:, :, rows])
            kept.append(p)
        ctx.save_for_backward(q, k, v, cos, sin, *kept)
        ctx.parts, ctx.scaling = parts, scaling
        return _by_head(y, b).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        b = len(grad)
        grad = _by_group(grad.transpose(1, 2), len(k) // b)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, seen), p in zip(ctx.parts, kept, strict=True):
            part, slope = (x[:, :, rows].flatten(1, 2) for x in (q, grad))
            grad_v[:, :seen].baddbmm_(p.mT, slope)
            slope = torch._softmax_backward_data(slope @ v[:, :seen].mT, p, -1, p.dtype)  # of the scores
            some = torch.baddbmm(q.new_empty(1), slope, k[:, :seen], beta=0, alpha=ctx.scaling)
            grad_q[:, :, rows] = some.view_as(q[:, :, rows])
            grad_k[:, :seen].baddbmm_(slope.mT, part, alpha=ctx.scaling)
        grad_q, grad_k, grad_v = (_by_head(x, b) for x in (grad_q, grad_k, grad_v))
        turn = passes(grad_q, grad_k, cos, sin)
        return (
            turn.rotate_back(grad_q, cos, sin),
            turn.rotate_back(grad_k, cos, sin),
            grad_v.transpose(1, 2).contiguous(),
            *[None] * 4,
        )


def _scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """scaling q kᵀ, rounded after the product and once more after the multiplication, as transformers does."""
    if math.frexp(scaling)[0] == 0.5:  # a power of two, such as 1 / sqrt(64), rounds nothing
        return torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scaling)
    return torch.bmm(q, k.mT).mul_(scaling)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(b, heads, t, d) to (b * groups, heads of a group, t, d)."""
    return x.reshape(len(x) * groups, -1, *x.shape[2:])


def _by_head(x: Tensor, b: int) -> Tensor:
    """And back, also without the second dimension where there is one head a group."""
    return x.reshape(b, -1, *x.shape[-2:])


def _parts(mask: Tensor | None, length: int) -> list[tuple[slice, int]]:
    """Queries, a part of them at a time, and how many keys they need.

    Where the mask hides all later keys, no more than up to the last query; but all where a query may see none, since
    it gets the mean of all then.
    """
    parts = []
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        seen = length
        if mask is not None and rows.stop < length:
            least = torch.finfo(mask.dtype).min
            sees_one = (mask[:, :, rows, : rows.stop].amax(-1) > least).all()
            if sees_one and mask[:, :, rows, rows.stop :].amax() == least:
                seen = rows.stop
        parts.append((rows, seen))
    return parts


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError unless the arguments of `attention` fit: the compiled loops look at no bounds."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.numel() == 0:
            raise ValueError(f"{name}: expected shape (b, t, heads, d), none of them 0; got {tuple(x.shape)}")
    b, t, heads, d = q.shape
    one_or_b = f"1 or {b}" if b > 1 else "1"
    if d % 2:
        raise ValueError(f"q: expected an even d, since numbers are turned in pairs; got {tuple(q.shape)}")
    if (*k.shape[:2], k.shape[3]) != (b, t, d) or heads % k.shape[2]:
        raise ValueError(
            f"k: expected ({b}, {t}, groups, {d}), groups a divisor of {heads}; got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}; got {tuple(v.shape)}")
    for name, x, shape in (("cos", cos, (t, d)), ("sin", sin, (t, d)), ("mask", mask, (1, t, t))):
        if x is not None and (len(x) not in (1, b) or tuple(x.shape[1:]) != shape):
            wanted = ", ".join(map(str, (one_or_b, *shape)))
            raise ValueError(f"{name}: expected shape ({wanted}); got {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v), ("cos", cos), ("sin", sin), ("mask", mask)):
        if x is not None and (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device}, as q is; got {x.dtype} on {x.device}"
            )
    for name, x in (("cos", cos), ("sin", sin), ("mask", mask)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a constant; got a tensor that requires a gradient")
