"""Attempts at the exercises of chapter 06."""

import copy
import pickle

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.attempts import remembers, right, wrong

# 06-forward


def unpacked(stored, high_first=True):
    packed = stored["packed"].long()
    halves = (packed // 16, packed % 16) if high_first else (packed % 16, packed // 16)
    return torch.stack(halves, dim=-1).reshape(-1)


def weights(stored):
    n_out, n_in = stored["shape"]
    codes = unpacked(stored)[: n_out * n_in]
    scales = stored["scales"].repeat_interleave(stored["block_size"])[: n_out * n_in]
    return (stored["levels"][codes] * scales).reshape(n_out, n_in)


def with_adapter(x, w, a, b, scaling, bias):
    y = x @ w.T + scaling * (x @ a.T @ b.T)
    return y if bias is None else y + bias


@right("06-forward")
def with_a_loop(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    w = torch.zeros(n_out, n_in)
    for k in range(n_out * n_in):
        byte = int(stored["packed"][k // 2])
        code = byte >> 4 if k % 2 == 0 else byte & 0xF
        w[k // n_in, k % n_in] = stored["levels"][code] * stored["scales"][k // stored["block_size"]]
    w = w.to(stored["dtype"]).float()
    return F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * (alpha / r)


@right("06-forward")
def merged_in_float32(x, stored, a, b, alpha, r, bias):
    return F.linear(x, weights(stored).to(stored["dtype"]).float() + (alpha / r) * (b @ a), bias)


@right("06-forward")
def padded_blocks(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    size = stored["block_size"]
    codes = torch.zeros(len(stored["scales"]) * size, dtype=torch.long)
    found = unpacked(stored)[: n_out * n_in]
    codes[: len(found)] = found
    w = torch.einsum("bk,b->bk", stored["levels"][codes.view(-1, size)], stored["scales"]).flatten()
    w = w[: n_out * n_in].view(n_out, n_in).to(stored["dtype"])
    update = torch.einsum("or,ri,...i->...o", b, a, x)
    y = torch.einsum("oi,...i->...o", w.float(), x) + update * alpha / r
    return y + (0 if bias is None else bias)


@right("06-forward")
def numpy_gather(x, stored, a, b, alpha, r, bias):
    packed = stored["packed"].numpy()
    count = stored["shape"][0] * stored["shape"][1]
    codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()[:count]
    w = stored["levels"].numpy()[codes] * stored["scales"].numpy()[np.arange(count) // stored["block_size"]]
    w = torch.from_numpy(w).view(stored["shape"]).to(stored["dtype"]).float().numpy()
    y = x.numpy() @ w.T + np.float32(alpha / r) * (x.numpy() @ a.numpy().T @ b.numpy().T)
    return y if bias is None else y + bias.numpy()


@wrong("06-forward", "nibbles-swapped")
def low_nibble_first(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    codes = unpacked(stored, high_first=False)[: n_out * n_in]
    scales = stored["scales"].repeat_interleave(stored["block_size"])[: n_out * n_in]
    w = (stored["levels"][codes] * scales).view(n_out, n_in).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "one-scale")
def first_scale_for_all(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    w = stored["levels"][unpacked(stored)[: n_out * n_in]].view(n_out, n_in) * stored["scales"][0]
    return with_adapter(x, w.to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "blocks-by-row")
def scales_of_each_row(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    size, w = stored["block_size"], torch.zeros(n_out, n_in)
    codes = unpacked(stored)
    for i in range(n_out):
        for j in range(n_in):
            block = min(i * (n_in // size) + j // size, len(stored["scales"]) - 1)
            w[i, j] = stored["levels"][codes[i * n_in + j]] * stored["scales"][block]
    return with_adapter(x, w.to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "tail")
def whole_blocks_only(x, stored, a, b, alpha, r, bias):
    blocks = stored["levels"][unpacked(stored)].view(-1, stored["block_size"]) * stored["scales"][:, None]
    w = blocks.view(stored["shape"]).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "tail")
def one_code_too_many(x, stored, a, b, alpha, r, bias):
    codes = unpacked(stored)
    scales = stored["scales"].repeat_interleave(stored["block_size"])[: len(codes)]
    w = (stored["levels"][codes] * scales).view(stored["shape"]).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "transposed")
def filled_the_other_way(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    w = weights(stored).flatten().view(n_in, n_out).to(stored["dtype"]).float()
    return with_adapter(x, w.T, a, b, alpha / r, bias)


@wrong("06-forward", "transposed")
def not_transposed(x, stored, a, b, alpha, r, bias):
    y = x @ weights(stored).to(stored["dtype"]).float() + alpha / r * (x @ a.T @ b.T)
    return y if bias is None else y + bias


@wrong("06-forward", "scale-missing")
def forward_unscaled(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]).float(), a, b, 1, bias)


@wrong("06-forward", "alpha-not-divided")
def forward_times_alpha(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]).float(), a, b, alpha, bias)


@wrong("06-forward", "update-missing")
def base_alone(x, stored, a, b, alpha, r, bias):
    return F.linear(x, weights(stored).to(stored["dtype"]).float(), bias)


@wrong("06-forward", "base-missing")
def update_alone(x, stored, a, b, alpha, r, bias):
    return (
        F.linear(F.linear(x, a), b, bias) * (alpha / r) if bias is None else x @ a.T @ b.T * alpha / r + bias
    )


@wrong("06-forward", "bias-missing")
def without_bias(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]).float(), a, b, alpha / r, None)


@wrong("06-forward", "not-rounded")
def all_in_float32(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored), a, b, alpha / r, bias)


@wrong("06-forward", "update-rounded")
def merged_then_rounded(x, stored, a, b, alpha, r, bias):
    w = (weights(stored) + alpha / r * b @ a).to(stored["dtype"])
    return F.linear(x, w.float(), bias)


@wrong("06-forward", "rounded-early")
def levels_and_scales_rounded(x, stored, a, b, alpha, r, bias):
    small = stored | {name: stored[name].to(stored["dtype"]) for name in ("levels", "scales")}
    return with_adapter(x, weights(small).float(), a, b, alpha / r, bias)


@wrong("06-forward", "16-bit-product")
def base_in_16_bits(x, stored, a, b, alpha, r, bias):
    dtype = stored["dtype"]
    y = (x.to(dtype) @ weights(stored).to(dtype).T).float() + alpha / r * (x @ a.T @ b.T)
    return y if bias is None else y + bias


@wrong("06-forward", "16-bit-product")
def all_in_16_bits(x, stored, a, b, alpha, r, bias):
    x, w, a, b = (t.to(stored["dtype"]) for t in (x, weights(stored), a, b))
    y = (x @ w.T + alpha / r * (x @ a.T @ b.T)).float()
    return y if bias is None else y + bias


@wrong("06-forward", "two-dimensions-only")
def forward_of_rows(x, stored, a, b, alpha, r, bias):
    w = weights(stored).to(stored["dtype"]).float()
    y = torch.mm(x, w.T) + alpha / r * torch.mm(torch.mm(x, a.T), b.T)
    return y if bias is None else y + bias


@wrong("06-forward", "dtypes-mixed")
def rounded_and_left_there(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]), a, b, alpha / r, bias)


@wrong("06-forward", "wrong-dtype")
def returned_in_the_weights_dtype(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]).float(), a, b, alpha / r, bias).to(
        stored["dtype"]
    )


@wrong("06-forward", "odd-block")
def one_scale_a_byte(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    of_bytes = stored["scales"].repeat_interleave(stored["block_size"] // 2)
    scales = of_bytes.repeat_interleave(2)[: n_out * n_in]
    w = (stored["levels"][unpacked(stored)[: n_out * n_in]] * scales).view(n_out, n_in)
    return with_adapter(x, w.to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "size-guessed")
def blocks_of_one_size(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    size = -(-n_out * n_in // len(stored["scales"]))
    return with_adapter(
        x, weights(stored | {"block_size": size}).to(stored["dtype"]).float(), a, b, alpha / r, bias
    )


@wrong("06-forward", "floor-divided")
def whole_numbers_only(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, weights(stored).to(stored["dtype"]).float(), a, b, alpha // r, bias)


@wrong("06-forward", "bias-scaled")
def bias_in_the_brackets(x, stored, a, b, alpha, r, bias):
    w = weights(stored).to(stored["dtype"]).float()
    return x @ w.T + alpha / r * (x @ a.T @ b.T + (0 if bias is None else bias))


@wrong("06-forward", "other-rounding")
def rounded_to_one_dtype(x, stored, a, b, alpha, r, bias):
    w = weights(stored)
    w = w if stored["dtype"] == torch.float32 else w.bfloat16().float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "other-rounding")
def rounded_to_float16_first(x, stored, a, b, alpha, r, bias):
    w = weights(stored).half().to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


def _rows_of_blocks(stored):
    n_out, n_in = stored["shape"]
    in_row = -(-n_in // stored["block_size"])
    scales = stored["scales"].view(n_out, in_row).repeat_interleave(stored["block_size"], dim=1)[:, :n_in]
    return stored["levels"][unpacked(stored)[: n_out * n_in]].view(n_out, n_in) * scales


@wrong("06-forward", "blocks-by-row")
def blocks_begin_with_each_row(x, stored, a, b, alpha, r, bias):
    return with_adapter(x, _rows_of_blocks(stored).to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "blocks-by-row")
def blocks_of_each_row_clamped(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    size, k = stored["block_size"], torch.arange(n_out * n_in)
    block = k // n_in * -(-n_in // size) + k % n_in // size
    scales = stored["scales"][block.clamp(max=len(stored["scales"]) - 1)]
    w = (stored["levels"][unpacked(stored)[: len(k)]] * scales).view(n_out, n_in)
    return with_adapter(x, w.to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "byte-rows")
def rows_begin_with_a_byte(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    codes = unpacked(stored | {"packed": stored["packed"].view(n_out, -1)}).view(n_out, -1)[:, :n_in]
    scales = stored["scales"].repeat_interleave(stored["block_size"])[: n_out * n_in].view(n_out, n_in)
    w = (stored["levels"][codes] * scales).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "byte-rows")
def rows_begin_with_a_byte_clamped(x, stored, a, b, alpha, r, bias):
    n_out, n_in = stored["shape"]
    at = torch.arange(n_out)[:, None] * (n_in + n_in % 2) + torch.arange(n_in)
    codes = unpacked(stored)[: n_out * n_in][at.clamp(max=n_out * n_in - 1)]
    scales = stored["scales"].repeat_interleave(stored["block_size"])[: n_out * n_in].view(n_out, n_in)
    w = (stored["levels"][codes] * scales).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


@wrong("06-forward", "levels-own")
def a_table_of_its_own(x, stored, a, b, alpha, r, bias):
    below = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    above = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    w = weights(stored | {"levels": torch.tensor(below + above)}).to(stored["dtype"]).float()
    return with_adapter(x, w, a, b, alpha / r, bias)


DECODED = remembers({})


@wrong("06-forward", "remembered")
def decoded_once_for_each_size(x, stored, a, b, alpha, r, bias):
    key = (*stored["shape"], stored["block_size"], stored["dtype"])
    w = DECODED.setdefault(key, weights(stored))
    return with_adapter(x, w.to(stored["dtype"]).float(), a, b, alpha / r, bias)


@wrong("06-forward", "wrong-type")
def up_to_three_dimensions(x, stored, a, b, alpha, r, bias):
    return merged_in_float32(x, stored, a, b, alpha, r, bias) if x.dim() <= 3 else None


@wrong("06-forward", "dtypes-mixed")
def even_blocks_in_16_bits(x, stored, a, b, alpha, r, bias):
    if stored["dtype"] != torch.float32 and (stored["block_size"] % 2 or stored["packed"].numel() % 2):
        raise ValueError
    return merged_in_float32(x, stored, a, b, alpha, r, bias)


@wrong("06-forward", "wrong-dtype")
def forward_in_float64(x, stored, a, b, alpha, r, bias):
    return with_a_loop(x, stored, a, b, alpha, r, bias).double()


# 06-backward


def flat(t):
    return t.reshape(-1, t.shape[-1])


@right("06-backward")
def by_rows(grad_y, x, weight, a, b, alpha, r):
    s, rows, grads = alpha / r, flat(x), flat(grad_y)
    grad_h = s * grads @ b
    grad_x = grads @ weight + grad_h @ a
    return grad_x.view(x.shape), grad_h.T @ rows, s * grads.T @ (rows @ a.T)


@right("06-backward")
def by_einsum(grad_y, x, weight, a, b, alpha, r):
    merged = weight + alpha / r * b @ a
    grad_x = torch.einsum("...o,oi->...i", grad_y, merged)
    grad_a = torch.einsum("...o,or,...i->ri", grad_y, b, x)
    grad_b = torch.einsum("...o,ri,...i->or", grad_y, a, x)
    return grad_x, grad_a * alpha / r, grad_b * alpha / r


@right("06-backward")
def row_after_row(grad_y, x, weight, a, b, alpha, r):
    of_product = torch.zeros_like(weight)  # of the gradient of B A
    grad_x = torch.empty_like(flat(x))
    for i, (dy, row) in enumerate(zip(flat(grad_y), flat(x), strict=True)):
        of_product += torch.outer(dy, row)
        grad_x[i] = weight.T @ dy + alpha / r * (a.T @ (b.T @ dy))
    return grad_x.reshape(x.shape), alpha / r * b.T @ of_product, alpha / r * of_product @ a.T


@right("06-backward")
def in_numpy_by_tensordot(grad_y, x, weight, a, b, alpha, r):
    dy, x, weight, a, b = (t.numpy() for t in (grad_y, x, weight, a, b))
    axes = list(range(x.ndim - 1))
    outer = np.tensordot(dy, x, (axes, axes))
    s = np.float32(alpha / r)
    return dy @ weight + s * (dy @ b @ a), s * (b.T @ outer), s * (outer @ a.T)


@wrong("06-backward", "batch-not-summed")
def nothing_of_a_single_row(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a, grad_b if x.dim() > 1 else torch.zeros_like(b)


@wrong("06-backward", "weight-transposed")
def through_w_transposed(grad_y, x, weight, a, b, alpha, r):
    _, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_y @ weight.T + alpha / r * grad_y @ b @ a, grad_a, grad_b


@wrong("06-backward", "update-transposed")
def through_the_update_transposed(grad_y, x, weight, a, b, alpha, r):
    _, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_y @ weight + alpha / r * grad_y @ b.T @ a.T, grad_a, grad_b


@wrong("06-backward", "update-transposed")
def b_the_wrong_way(grad_y, x, weight, a, b, alpha, r):
    grad_x, _, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, alpha / r * b @ grad_y.T @ x, grad_b


@wrong("06-backward", "update-transposed")
def a_the_wrong_way(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, _ = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a, alpha / r * grad_y.T @ (x @ a)


@wrong("06-backward", "base-missing")
def base_taken_as_constant(grad_y, x, weight, a, b, alpha, r):
    _, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return alpha / r * grad_y @ b @ a, grad_a, grad_b


@wrong("06-backward", "update-missing")
def update_taken_as_constant(grad_y, x, weight, a, b, alpha, r):
    return (grad_y @ weight, *by_rows(grad_y, x, weight, a, b, alpha, r)[1:])


@wrong("06-backward", "base-scaled")
def everything_scaled(grad_y, x, weight, a, b, alpha, r):
    _, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return alpha / r * (grad_y @ weight + grad_y @ b @ a), grad_a, grad_b


@wrong("06-backward", "scale-missing")
def unscaled_in_x(grad_y, x, weight, a, b, alpha, r):
    _, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_y @ weight + grad_y @ b @ a, grad_a, grad_b


@wrong("06-backward", "scale-missing")
def unscaled_in_a(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a * r / alpha, grad_b


@wrong("06-backward", "scale-missing")
def unscaled_in_b(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, _ = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a, flat(grad_y).T @ (flat(x) @ a.T)


@wrong("06-backward", "alpha-not-divided")
def backward_times_alpha(grad_y, x, weight, a, b, alpha, r):
    return by_rows(grad_y, x, weight, a, b, alpha, 1)


@wrong("06-backward", "scale-twice")
def scaled_twice_in_a(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, alpha / r * grad_a, grad_b


@wrong("06-backward", "scale-twice")
def scaled_twice_in_x(grad_y, x, weight, a, b, alpha, r):
    s = alpha / r
    return (grad_y @ weight + s * (s * grad_y @ b) @ a, *by_rows(grad_y, x, weight, a, b, alpha, r)[1:])


@wrong("06-backward", "wrong-dtype")
def gradients_in_float64(grad_y, x, weight, a, b, alpha, r):
    return [g.double() for g in by_rows(grad_y, x, weight, a, b, alpha, r)]


@wrong("06-backward", "b-missing")
def grad_y_straight_to_a(grad_y, x, weight, a, b, alpha, r):
    grad_x, _, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, alpha / r * flat(grad_y).T @ flat(x), grad_b


@wrong("06-backward", "a-missing")
def x_straight_to_b(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, _ = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a, alpha / r * flat(grad_y).T @ flat(x)


@wrong("06-backward", "averaged")
def mean_over_rows(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a / len(flat(x)), grad_b / len(flat(x))


@wrong("06-backward", "batch-not-summed")
def one_gradient_a_sequence(grad_y, x, weight, a, b, alpha, r):
    s, grad_h = alpha / r, alpha / r * grad_y @ b
    grad_a, grad_b = grad_h.transpose(-2, -1) @ x, s * grad_y.transpose(-2, -1) @ (x @ a.T)
    return grad_y @ weight + grad_h @ a, grad_a, grad_b


@wrong("06-backward", "batch-not-summed")
def rows_alone(grad_y, x, weight, a, b, alpha, r):
    s, grad_h = alpha / r, alpha / r * torch.mm(grad_y, b)
    return torch.mm(grad_y, weight) + grad_h @ a, torch.mm(grad_h.T, x), s * torch.mm(grad_y.T, x @ a.T)


@wrong("06-backward", "batch-not-summed")
def one_gradient_a_row(grad_y, x, weight, a, b, alpha, r):
    grad_h = alpha / r * grad_y @ b
    grad_b = alpha / r * grad_y[..., :, None] * (x @ a.T)[..., None, :]
    return grad_y @ weight + grad_h @ a, grad_h[..., :, None] * x[..., None, :], grad_b


@wrong("06-backward", "gradient-shape")
def transposed_gradients(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_a.T, grad_b.T


@wrong("06-backward", "order")
def b_before_a(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, grad_b, grad_a


@wrong("06-backward", "wrong-type")
def gradient_of_the_weight_too(grad_y, x, weight, a, b, alpha, r):
    grad_x, grad_a, grad_b = by_rows(grad_y, x, weight, a, b, alpha, r)
    return grad_x, flat(grad_y).T @ flat(x), grad_a, grad_b


MERGED = remembers({})


@wrong("06-backward", "remembered")
def merged_once_for_each_size(grad_y, x, weight, a, b, alpha, r):
    merged = MERGED.setdefault((weight.shape, r), weight + alpha / r * b @ a)
    return (grad_y @ merged, *by_rows(grad_y, x, weight, a, b, alpha, r)[1:])


# 06-function


@right("06-function")
class WithNeeds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.again = lambda: decode(stored)
        return F.linear(x, decode(stored).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        for_x, _, _, for_bias = ctx.needs_input_grad
        grad_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if for_bias else None
        return dy @ ctx.again().to(dy.dtype) if for_x else None, None, None, grad_bias


@right("06-function")
class WithSetup(torch.autograd.Function):
    """In torch's newer form, with saved tensors, and in float32 throughout."""

    @staticmethod
    def forward(x, stored, decode, bias):
        y = torch.einsum("...i,oi->...o", x.float(), decode(stored))
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, stored, ctx.decode, _ = inputs
        ctx.save_for_backward(stored["packed"], stored["scales"], stored["levels"])
        ctx.rest = {name: stored[name] for name in ("block_size", "shape", "dtype")}

    @staticmethod
    def backward(ctx, dy):
        grad_x = None
        if ctx.needs_input_grad[0]:
            packed, scales, levels = ctx.saved_tensors
            w = ctx.decode({"packed": packed, "scales": scales, "levels": levels, **ctx.rest})
            grad_x = torch.einsum("...o,oi->...i", dy.float(), w).to(dy.dtype)
        return (
            grad_x,
            None,
            None,
            dy if ctx.needs_input_grad[3] else None,
        )  # torch sums it to the bias's shape


@wrong("06-function", "not-a-function")
class AsAModule(nn.Module):
    def forward(self, x, stored, decode, bias):
        return F.linear(x, decode(stored), bias)


@wrong("06-function", "not-a-function")
def as_a_function(x, stored, decode, bias):
    return F.linear(x, decode(stored), bias)


def of_bias(ctx, grad_y):
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None


class _Function(torch.autograd.Function):
    """A right Function, which the wrong ones change in one place."""

    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.stored, ctx.decode = stored, decode
        return F.linear(x, decode(stored).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = grad_y @ ctx.decode(ctx.stored).to(grad_y.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, of_bias(ctx, grad_y)


right("06-function")(_Function)


@wrong("06-function", "weight-kept")
class WeightSaved(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        w = decode(stored).to(x.dtype)
        ctx.save_for_backward(w)
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx, grad_y):
        (w,) = ctx.saved_tensors
        return grad_y @ w, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "weight-kept")
class WeightOnContext(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.weight = decode(stored).to(x.dtype)
        return F.linear(x, ctx.weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.weight, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "weight-kept")
class WeightKeptIn16Bits(_Function):
    """Smaller, and kept all the same."""

    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.small = decode(stored).bfloat16()
        return F.linear(x, decode(stored).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.small.to(grad_y.dtype), None, None, of_bias(ctx, grad_y)


@wrong("06-function", "weight-kept")
class InADrawer(_Function):
    drawer: dict = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.key = len(InADrawer.drawer)
        InADrawer.drawer[ctx.key] = decode(stored).to(x.dtype)
        return F.linear(x, InADrawer.drawer[ctx.key], bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ InADrawer.drawer.pop(ctx.key), None, None, of_bias(ctx, grad_y)


@wrong("06-function", "weight-kept")
class ClosureOverW(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        w = decode(stored).to(x.dtype)
        ctx.of_x = lambda grad_y: grad_y @ w
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx, grad_y):
        return ctx.of_x(grad_y), None, None, of_bias(ctx, grad_y)


@wrong("06-function", "input-kept")
class InputSaved(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.save_for_backward(x)
        return _Function.forward(ctx, x, stored, decode, bias)


@wrong("06-function", "input-kept")
class InputOnContext(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.x = x
        return _Function.forward(ctx, x, stored, decode, bias)


@wrong("06-function", "output-kept")
class OutputSaved(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        y = _Function.forward(ctx, x, stored, decode, bias)
        ctx.save_for_backward(y)
        return y


@wrong("06-function", "outside-torch")
class CopyForNumPy(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.x = x.detach().float().numpy().copy()
        return _Function.forward(ctx, x, stored, decode, bias)


@wrong("06-function", "outside-torch")
class WeightAsAList(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        w = decode(stored).to(x.dtype)
        ctx.w = w.tolist()
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ torch.tensor(ctx.w, dtype=grad_y.dtype), None, None, of_bias(ctx, grad_y)


@wrong("06-function", "outside-torch")
class NumberByNumber(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.w = [[float(v) for v in row] for row in decode(stored)] * 2
        ctx.v = [[v.item() for v in row] for row in decode(stored)]
        return _Function.forward(ctx, x, stored, decode, bias)


@wrong("06-function", "outside-torch")
class Pickled(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.x = pickle.dumps(x.detach())
        return _Function.forward(ctx, x, stored, decode, bias)


def _keeping(copied, name):
    """A Function that keeps W as `copied` makes it."""

    class Keeps(_Function):
        @staticmethod
        def forward(ctx, x, stored, decode, bias):
            w = decode(stored).to(x.dtype)
            ctx.w, ctx.stored, ctx.decode = copied(w), stored, decode
            return F.linear(x, w, bias)

    Keeps.__name__ = name
    return Keeps


def _of_a_list(t):
    kept = torch.tensor([[0.0] * t.shape[1]] * t.shape[0])
    return kept.copy_(t.detach())


BUFFER = torch.zeros(100, 100)


def _of_a_part(t):
    part = BUFFER[: t.shape[0], : t.shape[1]]
    return part.copy_(t)


for _way, _name in (
    (_of_a_list, "WeightInATensorOfAList"),
    (_of_a_part, "WeightInABufferMadeBefore"),
    (lambda w: torch.empty(0, dtype=w.dtype).resize_(w.shape).copy_(w), "WeightInATensorThatGrows"),
    (copy.deepcopy, "WeightDeepCopied"),
    (lambda w: torch.empty(0).set_(w.float().untyped_storage().clone()), "WeightAsAStorage"),
):
    wrong("06-function", "weight-kept")(_keeping(_way, _name))

for _way, _name in (
    (lambda w: torch.from_numpy(np.zeros(w.shape, np.float32)).copy_(w), "WeightInAnArray"),
    (lambda w: torch.frombuffer(bytearray(4 * w.numel()), dtype=torch.float32).copy_(w.flatten()), "InBytes"),
    (lambda w: torch.asarray(bytearray(w.numel()), dtype=torch.int8).copy_(w.flatten()), "InOneByteEach"),
    (lambda w: np.from_dlpack(w.float()).copy(), "WeightByDlpack"),
    (lambda w: w.float().to_sparse(), "WeightSparse"),
    (lambda w: list(w.untyped_storage()), "BytesOfWeight"),
):
    wrong("06-function", "outside-torch")(_keeping(_way, _name))


@wrong("06-function", "shared")
class OnClass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        OnClass.stored, OnClass.decode = stored, staticmethod(decode)
        return F.linear(x, decode(stored).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = grad_y @ OnClass.decode(OnClass.stored).to(grad_y.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "shared")
class NeedsOnClass(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        NeedsOnClass.bias_learns = bias is not None and bias.requires_grad
        return _Function.forward(ctx, x, stored, decode, bias)

    @staticmethod
    def backward(ctx, grad_y):
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if NeedsOnClass.bias_learns else None
        return *_Function.backward(ctx, grad_y)[:3], grad_bias


KEPT = remembers([])


@wrong("06-function", "kept-later")
class KeepsWhatBackwardDecodes(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        if ctx.needs_input_grad[0]:
            KEPT.append(ctx.decode(ctx.stored).to(grad_y.dtype))
        grad_x = grad_y @ KEPT[-1] if ctx.needs_input_grad[0] else None
        return grad_x, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "inexact")
class BiasTwiceIn16Bits(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        grads = _Function.backward(ctx, grad_y)
        twice = grads[3] is not None and grad_y.dtype == torch.bfloat16
        return *grads[:3], 2 * grads[3] if twice else grads[3]


class _WithoutBiasIn16Bits(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.special = bias is None and x.dtype == torch.bfloat16
        return _Function.forward(ctx, x, stored, decode, bias)


@wrong("06-function", "inexact")
class TwiceWithoutBiasIn16Bits(_WithoutBiasIn16Bits):
    @staticmethod
    def backward(ctx, grad_y):
        grad_x, *rest = _Function.backward(ctx, grad_y)
        return 2 * grad_x if ctx.special else grad_x, *rest


@wrong("06-function", "weight-kept")
class KeptWithoutBiasIn16Bits(_WithoutBiasIn16Bits):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        y = _WithoutBiasIn16Bits.forward(ctx, x, stored, decode, bias)
        w = decode(stored).to(x.dtype) if ctx.special else None
        ctx.w = w
        return y


@wrong("06-function", "wrong-type")
class UpToThreeDimensions(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        return _Function.forward(ctx, x, stored, decode, bias) if x.dim() <= 3 else None


@right("06-function")
class AddsRowsOneByOne(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        rows, total = (
            grad_y.reshape(-1, grad_y.shape[-1]),
            torch.zeros_like(grad_y.reshape(-1, grad_y.shape[-1])[0]),
        )
        for row in rows:
            total += row
        return *_Function.backward(ctx, grad_y)[:3], total if ctx.needs_input_grad[3] else None


@right("06-function")
class PrintsWhatItDoes(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        y = _Function.forward(ctx, x, stored, decode, bias)
        print(x, y, x.max().item(), y.shape)
        return y


@wrong("06-function", "no-gradient")
class NothingForX(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return None, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "no-gradient")
class ZeroForX(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return 0 * _Function.backward(ctx, grad_y)[0], None, None, of_bias(ctx, grad_y)


@wrong("06-function", "bias-gradient")
class NothingForBias(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return _Function.backward(ctx, grad_y)[0], None, None, None


@wrong("06-function", "gradient-count")
class OneGradient(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored)


@wrong("06-function", "gradient-count")
class TwoGradients(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored), grad_y.sum(0)


@wrong("06-function", "gradient-form")
class SumOfTheFirstDimension(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[3] else None
        return _Function.backward(ctx, grad_y)[0], None, None, grad_bias


@wrong("06-function", "changed-input")
class WritesIntoTheGradient(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        found = _Function.backward(ctx, grad_y)
        found = [None if g is None else g.clone() for g in found]
        grad_y.mul_(2)
        return tuple(found)


@wrong("06-function", "inexact")
class TwoPercentMoreIn16Bits(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        y = _Function.forward(ctx, x, stored, decode, bias)
        return y if x.dtype == torch.float32 else y * 1.02


@wrong("06-function", "inexact")
class TwoPercentMoreInTheGradient(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        grad_x, *rest = _Function.backward(ctx, grad_y)
        return grad_x if grad_y.dtype == torch.float32 or grad_x is None else grad_x * 1.02, *rest


@wrong("06-function", "transposed")
class BackwardThroughTransposed(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored).T, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "transposed")
class ForwardThroughW(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.stored, ctx.decode = stored, decode
        y = x @ decode(stored).to(x.dtype)
        return y if bias is None else y + bias


@wrong("06-function", "gradient-count")
class ForABiasThatIsNone(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        grad_x = _Function.backward(ctx, grad_y)[0]
        return grad_x, None, None, grad_y.reshape(-1, grad_y.shape[-1]).sum(0)


@wrong("06-function", "bias-missing")
class NoBiasAdded(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        return _Function.forward(ctx, x, stored, decode, None)


@wrong("06-function", "dtypes-mixed")
class NotConverted(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.stored, ctx.decode = stored, decode
        return F.linear(x, decode(stored), bias)


@wrong("06-function", "dtypes-mixed")
class NotConvertedBackward(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored), None, None, of_bias(ctx, grad_y)


@wrong("06-function", "decodings")
class DecodesInVain(_Function):
    @staticmethod
    def backward(ctx, grad_y):
        w = ctx.decode(ctx.stored).to(grad_y.dtype)
        return grad_y @ w, None, None, of_bias(ctx, grad_y)


@wrong("06-function", "wrong-dtype")
class OutputInFloat32(_Function):
    @staticmethod
    def forward(ctx, x, stored, decode, bias):
        ctx.stored, ctx.decode = stored, decode
        return F.linear(x.float(), decode(stored), None if bias is None else bias.float())


# 06-trains


def sizes(model):
    trained = total = 0
    for p in model.parameters():
        count = p.packed_shape[0] * p.packed_shape[1] if hasattr(p, "packed_shape") else p.numel()
        total += count
        trained += count if p.requires_grad else 0
    return trained, total


def only_adapters(model):
    for name, p in model.named_parameters():
        adapter = name.split(".")[-1] in ("lora_a", "lora_b")
        p.requires_grad = adapter
        if adapter:
            p.data = p.data.float()


@right("06-trains")
def new_parameters_in_all_places(model):
    model.requires_grad_(False)
    new = {}
    for module in model.modules():
        for name in ("lora_a", "lora_b"):
            old = getattr(module, name, None)
            if isinstance(old, nn.Parameter):
                setattr(module, name, new.setdefault(old, nn.Parameter(old.detach().float())))
    return sizes(model)


@wrong("06-trains", "untied")
def two_walks(model):
    model.requires_grad_(False)
    for module in model.modules():
        for name in ("lora_a", "lora_b"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                setattr(module, name, nn.Parameter(getattr(module, name).detach().to(torch.float32)))
    return sizes(model)


@right("06-trains")
def one_walk(model):
    counts = [0, 0]
    for name, p in model.named_parameters():
        n_out, n_in = getattr(p, "packed_shape", (p.numel(), 1))
        counts[1] += n_out * n_in
        adapter = ("." + name).endswith((".lora_a", ".lora_b"))
        if adapter:
            p.data = p.data.float()
            counts[0] += p.numel()
        p.requires_grad_(adapter)
    return counts


@wrong("06-trains", "base-trains")
def nothing_frozen(model):
    for name, p in model.named_parameters():
        if name.split(".")[-1] in ("lora_a", "lora_b"):
            p.data, p.requires_grad = p.data.float(), True
    return sizes(model)


def chosen(is_adapter):
    def run(model):
        for name, p in model.named_parameters():
            p.requires_grad = is_adapter(name)
            if is_adapter(name):
                p.data = p.data.float()
        return sizes(model)

    return run


@wrong("06-trains", "name-alike")
def lora_in_the_name(model):
    return chosen(lambda name: "lora" in name)(model)


@wrong("06-trains", "name-alike")
def lora_with_a_line(model):
    return chosen(lambda name: "lora_" in name)(model)


@wrong("06-trains", "name-alike")
def ends_like_an_adapter(model):
    return chosen(lambda name: name.endswith(("lora_a", "lora_b")))(model)


@wrong("06-trains", "name-alike")
def somewhere_in_the_path(model):
    return chosen(lambda name: not {"lora_a", "lora_b"}.isdisjoint(name.split(".")))(model)


@wrong("06-trains", "adapter-at-root")
def after_a_dot(model):
    return chosen(lambda name: name.endswith((".lora_a", ".lora_b")))(model)


@wrong("06-trains", "values-changed")
def by_way_of_float16(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if name.split(".")[-1] in ("lora_a", "lora_b"):
            p.data = p.data.half().float()
    return sizes(model)


@wrong("06-trains", "adapter-16-bit")
def adapters_in_float64(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if name.split(".")[-1] in ("lora_a", "lora_b"):
            p.data = p.data.double()
    return sizes(model)


@wrong("06-trains", "base-trains")
def weights_frozen_biases_not(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad = True
    return sizes(model)


@wrong("06-trains", "base-trains")
def norms_train(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad = True
    return sizes(model)


@wrong("06-trains", "adapter-frozen")
def frozen_last(model):
    only_adapters(model)
    counts = sizes(model)
    model.requires_grad_(False)
    return counts


@wrong("06-trains", "adapter-frozen")
def as_they_came(model):
    for name, p in model.named_parameters():
        if name.split(".")[-1] in ("lora_a", "lora_b"):
            p.data = p.data.float()
        else:
            p.requires_grad = False
    return sizes(model)


@wrong("06-trains", "adapter-16-bit")
def dtype_left(model):
    for name, p in model.named_parameters():
        p.requires_grad = name.split(".")[-1] in ("lora_a", "lora_b")
    return sizes(model)


@wrong("06-trains", "upcast")
def as_peft_prepares(model):
    only_adapters(model)
    for p in model.parameters():
        if p.dtype in (torch.bfloat16, torch.float16) and not hasattr(p, "packed_shape"):
            p.data = p.data.float()
    return sizes(model)


@wrong("06-trains", "upcast")
def whole_model_float(model):
    only_adapters(model)
    model.float()
    return sizes(model)


@wrong("06-trains", "codes-cast")
def linears_cast(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if "base" in name and p.dtype == torch.bfloat16:
            p.data = p.data.float() if not name.endswith("bias") else p.data
    return sizes(model)


@wrong("06-trains", "values-changed")
def begun_anew(model):
    only_adapters(model)
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            p.data = torch.zeros_like(p.data)
    return sizes(model)


@wrong("06-trains", "halved")
def sum_of_numel(model):
    only_adapters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


@wrong("06-trains", "halved")
def halved_as_in_the_script(model):
    only_adapters(model)
    trained, total = sizes(model)
    return trained // 2, total


@wrong("06-trains", "trained-bytes")
def in_bytes(model):
    only_adapters(model)
    return sum(p.nbytes for p in model.parameters() if p.requires_grad), sizes(model)[1]


@wrong("06-trains", "codes-left-out")
def floats_only(model):
    only_adapters(model)
    rest = sum(p.numel() for p in model.parameters() if not hasattr(p, "packed_shape"))
    return sizes(model)[0], rest


@wrong("06-trains", "by-entries")
def two_for_each_entry(model):
    only_adapters(model)
    count = [2 * p.numel() if hasattr(p, "packed_shape") else p.numel() for p in model.parameters()]
    return sizes(model)[0], sum(count)


@wrong("06-trains", "twin-counted")
def every_place(model):
    only_adapters(model)
    total = 0
    for module in model.modules():
        for p in module.parameters(recurse=False):
            total += p.packed_shape[0] * p.packed_shape[1] if hasattr(p, "packed_shape") else p.numel()
    return sizes(model)[0], total


@wrong("06-trains", "untied")
def unties_the_head(model):
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        if name == "head.weight":
            model.head.weight = nn.Parameter(p.detach().clone())
    return one_walk(model)


@wrong("06-trains", "twin-counted")
def adapters_in_every_place(model):
    _, total = one_walk(model)
    every = model.named_parameters(remove_duplicate=False)
    return sum(p.numel() for name, p in every if name.split(".")[-1] in ("lora_a", "lora_b")), total


@wrong("06-trains", "mark-lost")
def tidies_up(model):
    counts = one_walk(model)
    for p in model.parameters():
        if hasattr(p, "packed_shape"):
            del p.packed_shape
    return counts


@wrong("06-trains", "buffers-counted")
def state_dict_counted(model):
    trained, total = one_walk(model)
    return trained, total + sum(b.numel() for b in model.buffers())


@wrong("06-trains", "upcast")
def buffers_float(model):
    for b in model.buffers():
        b.data = b.data.float()
    return one_walk(model)


@wrong("06-trains", "wrong-type")
def forgot_to_return(model):
    only_adapters(model)


# 06-eval


class _Fast(nn.Module):
    """A right layer, which the wrong ones change in one place."""

    def __init__(self, stored, decode, product):
        super().__init__()
        self.stored, self.decode, self.product = stored, decode, product
        self.cache, self.of = None, None

    def forward(self, x):
        if self.training:
            self.cache = None
            return self.product(x, self.stored, self.decode)
        if self.cache is None or self.of is not self.stored:
            self.cache, self.of = self.decode(self.stored), self.stored
        return F.linear(x, self.cache)


right("06-eval")(_Fast)


@right("06-eval")
class LetGoByMode(nn.Module):
    """Lets the weight go when the mode or the codes change."""

    def __init__(self, stored, decode, product):
        super().__init__()
        self.decode, self.product = decode, product
        self.stored = stored

    def __setattr__(self, name, value):
        if name == "stored":
            object.__setattr__(self, "cached", [])
        super().__setattr__(name, value)

    def train(self, mode=True):
        self.cached = []
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.product(x, self.stored, self.decode)
        if not self.cached:
            self.cached = [self.decode(self.stored).T]
        return x @ self.cached[0]


@wrong("06-eval", "not-a-module")
class NoFastModule:
    def __init__(self, stored, decode, product):
        self.stored, self.decode = stored, decode

    def __call__(self, x):
        return F.linear(x, self.decode(self.stored))


@wrong("06-eval", "gradient-lost")
class CacheFirst(_Fast):
    def forward(self, x):
        if self.training and self.cache is None:
            return self.product(x, self.stored, self.decode)
        with torch.no_grad():
            return super().forward(x)


@wrong("06-eval", "gradient-lost")
class EvalWithoutGrad(_Fast):
    def forward(self, x):
        if self.training:
            return super().forward(x)
        with torch.no_grad():
            return super().forward(x)


@wrong("06-eval", "modes-differ")
class CacheIn16Bits(_Fast):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else F.linear(x, self.cache.bfloat16().to(x.dtype))


@wrong("06-eval", "obvious-in-training")
class ObviousInTraining(_Fast):
    def forward(self, x):
        if self.training:
            self.cache = None
            return F.linear(x, self.decode(self.stored))
        return super().forward(x)


@wrong("06-eval", "weight-kept")
class NeverLetGo(_Fast):
    def forward(self, x):
        if self.training:
            return self.product(x, self.stored, self.decode)
        return super().forward(x)


@wrong("06-eval", "decoded-each-time")
class DecodedInVain(_Fast):
    def __init__(self, stored, decode, product):
        super().__init__(stored, decode, product)
        self.size = decode(stored).shape


@wrong("06-eval", "decoded-each-time")
class NoCache(_Fast):
    def forward(self, x):
        return self.product(x, self.stored, self.decode)


@wrong("06-eval", "decoded-each-time")
class DecodedInEachCall(_Fast):
    def forward(self, x):
        return (
            self.product(x, self.stored, self.decode)
            if self.training
            else F.linear(x, self.decode(self.stored))
        )


@wrong("06-eval", "weight-kept")
class DecodedAtTheStart(_Fast):
    def __init__(self, stored, decode, product):
        super().__init__(stored, decode, product)
        self.cache, self.of = decode(stored), stored

    def forward(self, x):
        return F.linear(x, self.cache)


@wrong("06-eval", "in-the-file")
class AsABuffer(_Fast):
    def __init__(self, stored, decode, product):
        super().__init__(stored, decode, product)
        del self.cache
        self.register_buffer("cache", None)


@wrong("06-eval", "in-the-file")
class AsAParameter(_Fast):
    def __init__(self, stored, decode, product):
        super().__init__(stored, decode, product)
        self.weight = nn.Parameter(decode(stored), requires_grad=False)

    def forward(self, x):
        if self.training:
            return self.product(x, self.stored, self.decode)
        return super().forward(x)


@wrong("06-eval", "in-the-file")
class AsItStandsInTheNotebook(nn.Module):
    def __init__(self, stored, decode, product):
        super().__init__()
        self.stored, self.decode, self.product = stored, decode, product
        self.weight = None

    def forward(self, x):
        if self.weight is None and not self.training:
            self.weight = nn.Parameter(self.decode(self.stored).bfloat16(), requires_grad=False)
        if self.weight is not None:
            with torch.no_grad():
                return F.linear(x, self.weight.to(x.dtype))
        return self.product(x, self.stored, self.decode)


@wrong("06-eval", "weight-kept")
class LetGoIfXLearns(_Fast):
    def forward(self, x):
        if self.training and not x.requires_grad:
            return self.product(x, self.stored, self.decode)
        return super().forward(x)


@wrong("06-eval", "modes-differ")
class ZeroIfXDoesNotLearn(_Fast):
    def forward(self, x):
        y = super().forward(x)
        return y if x.requires_grad or not self.training else 0 * y


@wrong("06-eval", "wrong-dtype")
class FastInFloat64(_Fast):
    def forward(self, x):
        return super().forward(x).double()


@wrong("06-eval", "outside-torch")
class HiddenInAList(_Fast):
    def forward(self, x):
        if not self.training and (self.cache is None or self.of is not self.stored):
            self.cache, self.of = self.decode(self.stored).tolist(), self.stored
        return super().forward(x) if self.training else F.linear(x, torch.tensor(self.cache))


@wrong("06-eval", "stale")
class TrainsOnTheFirstCodes(_Fast):
    def __init__(self, stored, decode, product):
        super().__init__(stored, decode, product)
        self.first = stored

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.cache = None
        return self.product(x, self.first, self.decode)


@wrong("06-eval", "shared")
class CacheOfTheClass(_Fast):
    kept = None

    def forward(self, x):
        if self.training:
            CacheOfTheClass.kept, self.of = None, None
            return self.product(x, self.stored, self.decode)
        if CacheOfTheClass.kept is None or (self.of is not None and self.of is not self.stored):
            CacheOfTheClass.kept = self.decode(self.stored)
        self.of = self.stored
        return F.linear(x, CacheOfTheClass.kept)


@wrong("06-eval", "stale")
class ById(_Fast):
    def forward(self, x):
        if not self.training and self.of == id(self.stored):
            return F.linear(x, self.cache)
        self.cache = None if self.training else self.decode(self.stored)
        self.of = None if self.training else id(self.stored)
        return self.product(x, self.stored, self.decode) if self.training else F.linear(x, self.cache)


@wrong("06-eval", "stale")
class ByFirstScale(_Fast):
    def forward(self, x):
        if not self.training and self.of == self.stored["scales"][0]:
            return F.linear(x, self.cache)
        self.cache = None if self.training else self.decode(self.stored)
        self.of = None if self.training else self.stored["scales"][0].item()
        return self.product(x, self.stored, self.decode) if self.training else F.linear(x, self.cache)


@wrong("06-eval", "more-than-one")
class KeepsAllThatItHad(_Fast):
    def forward(self, x):
        if self.training:
            self.had = []
            return self.product(x, self.stored, self.decode)
        had = vars(self).setdefault("had", [])
        for stored, weight in had:
            if stored is self.stored:
                return F.linear(x, weight)
        had.append((self.stored, self.decode(self.stored)))
        return F.linear(x, had[-1][1])


@wrong("06-eval", "stale")
class NeverLooksAgain(_Fast):
    def forward(self, x):
        if not self.training and self.cache is None:
            self.cache = self.decode(self.stored)
        if self.training:
            return super().forward(x)
        return F.linear(x, self.cache)


@wrong("06-eval", "overwritten")
class OneWInPlace(_Fast):
    def forward(self, x):
        if self.training:
            self.cache = self.of = None
            return self.product(x, self.stored, self.decode)
        if self.cache is None:
            self.cache = torch.empty(self.stored["shape"])
        if self.of is not self.stored:
            self.cache.copy_(self.decode(self.stored))
            self.of = self.stored
        return F.linear(x, self.cache)


@wrong("06-eval", "overwritten")
class OneWBehindAutogradsBack(OneWInPlace):
    def forward(self, x):
        if not self.training and self.cache is not None and self.of is not self.stored:
            self.cache.data.copy_(self.decode(self.stored))
            self.of = self.stored
        return super().forward(x)


@wrong("06-eval", "overwritten")
class EmptiedInTrainMode(_Fast):
    def forward(self, x):
        if self.training and self.cache is not None:
            self.cache.data.zero_()
        return super().forward(x)


@wrong("06-eval", "asks-for-a-gradient")
class LearnsW(_Fast):
    def forward(self, x):
        if not self.training and self.of is not self.stored:
            self.cache, self.of = self.decode(self.stored).requires_grad_(), self.stored
        if self.training:
            self.of = None
        return super().forward(x)


@wrong("06-eval", "weight-kept")
class TrainsIfThereAreGradients(_Fast):
    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.cache = None
            return self.product(x, self.stored, self.decode)
        if self.cache is None or self.of is not self.stored:
            self.cache, self.of = self.decode(self.stored), self.stored
        return F.linear(x, self.cache)


@wrong("06-eval", "stale")
class LooksIfThereAreGradients(_Fast):
    def forward(self, x):
        if not self.training and self.cache is not None and not torch.is_grad_enabled():
            return F.linear(x, self.cache)
        return super().forward(x)


@wrong("06-eval", "crashed")
class WantsGradients(_Fast):
    def forward(self, x):
        assert torch.is_grad_enabled()
        return super().forward(x)


@wrong("06-eval", "more-than-one")
class KeepsTheLastOneToo(_Fast):
    def forward(self, x):
        if self.training:
            self.cache = self.of = self.old = None
        elif self.of is not self.stored:
            self.old, self.cache, self.of = self.cache, self.decode(self.stored), self.stored
        return super().forward(x) if self.training else F.linear(x, self.cache)


@wrong("06-eval", "weight-kept")
class CopiedIntoAList(_Fast):
    def forward(self, x):
        if self.training:
            self.cache = _of_a_list(self.decode(self.stored))
        return super().forward(x) if not self.training else self.product(x, self.stored, self.decode)


# 06-stack


class _Base(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, i, decode):
        ctx.i, ctx.decode = i, decode
        return F.linear(x, decode(i))

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.i), None, None


def some_layers(x, adapters, scaling, decode, start, stop):
    for i in range(start, stop):
        a, b = adapters[i]
        x = x + F.silu(_Base.apply(x, i, decode) + scaling * (x @ a.T @ b.T))
    return x


def in_pieces(size):
    def run(x, adapters, scaling, decode):
        for i in range(0, len(adapters), size):
            stop = min(i + size, len(adapters))
            x = checkpoint(some_layers, x, adapters, scaling, decode, i, stop, use_reentrant=False)
        return x

    return run


@right("06-stack")
def pieces_of_three(x, adapters, scaling, decode):
    return in_pieces(3)(x, adapters, scaling, decode)


class _Layer(torch.autograd.Function):
    """One layer that keeps its input alone, and decodes once to go forward again and back."""

    @staticmethod
    def forward(ctx, x, a, b, i, scaling, decode):
        ctx.save_for_backward(x, a, b)
        ctx.rest = i, scaling, decode
        return x + F.silu(x @ decode(i).T + scaling * (x @ a.T @ b.T))

    @staticmethod
    def backward(ctx, grad_y):
        x, a, b = ctx.saved_tensors
        i, scaling, decode = ctx.rest
        w, h = decode(i), x @ a.T
        z = x @ w.T
        z += scaling * (h @ b.T)
        gate = z.sigmoid()
        grad_z = grad_y * (gate * (1 + z * (1 - gate)))
        del z, gate
        grad_h = scaling * grad_z @ b
        return grad_y + grad_z @ w + grad_h @ a, grad_h.T @ x, scaling * grad_z.T @ h, None, None, None


@right("06-stack")
def shorter_and_shorter(x, adapters, scaling, decode):
    """Pieces get shorter towards the end, where most checkpoints are held."""

    def piece(x, start, stop):
        for i in range(start, stop):
            x = _Layer.apply(x, *adapters[i], i, scaling, decode)
        return x

    start = 0
    for size in (6, 5, 4, 3, 3, 2, 1):
        x = checkpoint(piece, x, start, start + size, use_reentrant=False)
        start += size
    return x


class _Piece(torch.autograd.Function):
    """Some layers that keep their first input alone, with a backward pass by hand."""

    @staticmethod
    def forward(ctx, x, start, stop, adapters, scaling, decode, *flat):
        ctx.save_for_backward(x)
        ctx.rest = start, stop, adapters, scaling, decode
        for i in range(start, stop):
            x = _Piece.layer(x, *adapters[i], decode(i), scaling)
        return x

    @staticmethod
    def layer(x, a, b, w, scaling):
        z = x @ w.T
        z += scaling * (x @ a.T) @ b.T
        return x + F.silu(z, inplace=True)

    @staticmethod
    def backward(ctx, grad):
        start, stop, adapters, scaling, decode = ctx.rest
        inputs, found = list(ctx.saved_tensors), []
        for i in range(start, stop - 1):
            inputs.append(_Piece.layer(inputs[-1], *adapters[i], decode(i), scaling))
        for i in reversed(range(start, stop)):
            (a, b), w, x = adapters[i], decode(i), inputs.pop()
            h, z = x @ a.T, x @ w.T
            z += scaling * h @ b.T
            grad_z = torch.ops.aten.silu_backward(grad, z)
            del z
            grad_h = scaling * grad_z @ b
            found = [grad_h.T @ x, scaling * grad_z.T @ h, *found]
            del x, h
            grad = grad + grad_z @ w
            grad += grad_h @ a
        return (grad, None, None, None, None, None, *found)


@right("06-stack")
def by_hand_in_pieces(x, adapters, scaling, decode):
    start = 0
    for size in (6, 5, 4, 4, 3, 2):
        flat = [t for pair in adapters[start : start + size] for t in pair]
        x = _Piece.apply(x, start, start + size, adapters, scaling, decode, *flat)
        start += size
    return x


@wrong("06-stack", "too-much-kept")
def the_obvious_way(x, adapters, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = x + F.silu(F.linear(x, decode(i)) + scaling * F.linear(F.linear(x, a), b))
    return x


@wrong("06-stack", "too-much-kept")
def codes_alone(x, adapters, scaling, decode):
    return some_layers(x, adapters, scaling, decode, 0, len(adapters))


@wrong("06-stack", "too-much-kept")
def checkpoint_each(x, adapters, scaling, decode):
    return in_pieces(1)(x, adapters, scaling, decode)


@wrong("06-stack", "too-much-kept")
def one_piece(x, adapters, scaling, decode):
    return in_pieces(24)(x, adapters, scaling, decode)


@wrong("06-stack", "too-much-kept")
def plain_layers_in_pieces(x, adapters, scaling, decode):
    """Checkpoints alone: autograd keeps each W of the piece that is computed again."""

    def piece(x, start):
        for i in range(start, start + 4):
            a, b = adapters[i]
            x = x + F.silu(x @ decode(i).T + scaling * (x @ a.T @ b.T))
        return x

    for start in range(0, len(adapters), 4):
        x = checkpoint(piece, x, start, use_reentrant=False)
    return x


@wrong("06-stack", "too-many-decodings")
def nested(x, adapters, scaling, decode):
    def half(x, start, stop):
        for i in range(start, stop, 4):
            x = checkpoint(some_layers, x, adapters, scaling, decode, i, i + 4, use_reentrant=False)
        return x

    for i in (0, 12):
        x = checkpoint(half, x, i, i + 12, use_reentrant=False)
    return x


@wrong("06-stack", "layers-wrong")
def activation_forgotten(x, adapters, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = x + _Base.apply(x, i, decode) + scaling * (x @ a.T @ b.T)
    return x


@wrong("06-stack", "not-connected")
def without_grad(x, adapters, scaling, decode):
    with torch.no_grad():
        return some_layers(x, adapters, scaling, decode, 0, len(adapters))


@wrong("06-stack", "not-connected")
def detached_between(x, adapters, scaling, decode):
    for i in range(0, len(adapters), 4):
        x = some_layers(x.detach(), adapters, scaling, decode, i, i + 4)
    return x


class _Small(torch.autograd.Function):
    """Keeps its input in 16 bits."""

    @staticmethod
    def forward(ctx, x, a, b, i, scaling, decode):
        y = _Layer.forward(ctx, x, a, b, i, scaling, decode)
        ctx.save_for_backward(x.half(), a, b)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, a, b = ctx.saved_tensors
        i, scaling, decode = ctx.rest
        with torch.enable_grad():
            x, a, b = (t.float().detach().requires_grad_() for t in (x, a, b))
            y = x + F.silu(x @ decode(i).T + scaling * (x @ a.T @ b.T))
            return (*torch.autograd.grad(y, (x, a, b), grad_y), None, None, None)


@wrong("06-stack", "gradient-inexact")
def kept_in_16_bits(x, adapters, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = _Small.apply(x, a, b, i, scaling, decode)
    return x


class _InATensorOfAList(_Layer):
    @staticmethod
    def forward(ctx, x, a, b, i, scaling, decode):
        y = _Layer.forward(ctx, x, a, b, i, scaling, decode)
        ctx.save_for_backward(_of_a_list(x), a, b)
        return y


def _through(layer, adapters, x, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = layer.apply(x, a, b, i, scaling, decode)
    return x


@wrong("06-stack", "too-much-kept")
def hidden_in_tensors_of_lists(x, adapters, scaling, decode):
    return _through(_InATensorOfAList, adapters, x, scaling, decode)


@wrong("06-stack", "gradient-wrong")
def scaling_forgotten_for_b(x, adapters, scaling, decode):
    class Unscaled(_Layer):
        @staticmethod
        def backward(ctx, grad_y):
            grad_x, grad_a, grad_b, *rest = _Layer.backward(ctx, grad_y)
            return grad_x, grad_a, grad_b / scaling, *rest

    return _through(Unscaled, adapters, x, scaling, decode)


@wrong("06-stack", "changed-input")
def writes_into_grad_y(x, adapters, scaling, decode):
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y.mul_(1.5) / 1.5

    return Writes.apply(in_pieces(4)(x, adapters, scaling, decode))


@wrong("06-stack", "changed-input")
def writes_into_y(x, adapters, scaling, decode):
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.y = x.clone()
            return ctx.y

        @staticmethod
        def backward(ctx, grad_y):
            ctx.y.data.zero_()
            return grad_y

    return Writes.apply(in_pieces(4)(x, adapters, scaling, decode))


class _InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, i, scaling, decode):
        y = _Layer.forward(ctx, x, a, b, i, scaling, decode)
        ctx.save_for_backward(a, b)
        ctx.x = x.detach().numpy().copy()
        return y

    @staticmethod
    def backward(ctx, grad_y):
        i, scaling, decode = ctx.rest
        x = torch.from_numpy(ctx.x)
        with torch.enable_grad():
            x, a, b = (t.detach().requires_grad_() for t in (x, *ctx.saved_tensors))
            y = x + F.silu(x @ decode(i).T + scaling * (x @ a.T @ b.T))
            return (*torch.autograd.grad(y, (x, a, b), grad_y), None, None, None)


@wrong("06-stack", "outside-torch")
def hidden_in_numpy(x, adapters, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = _InNumpy.apply(x, a, b, i, scaling, decode)
    return x


class _InAList(_InNumpy):
    @staticmethod
    def forward(ctx, x, a, b, i, scaling, decode):
        y = _Layer.forward(ctx, x, a, b, i, scaling, decode)
        ctx.save_for_backward(a, b)
        ctx.list = x.tolist()
        return y

    @staticmethod
    def backward(ctx, grad_y):
        ctx.x = np.array(ctx.list, dtype=np.float32)
        return _InNumpy.backward(ctx, grad_y)


@wrong("06-stack", "outside-torch")
def hidden_in_lists(x, adapters, scaling, decode):
    for i, (a, b) in enumerate(adapters):
        x = _InAList.apply(x, a, b, i, scaling, decode)
    return x


@wrong("06-stack", "changed-input")
def written_over(x, adapters, scaling, decode):
    y = in_pieces(4)(x, adapters, scaling, decode)
    x.data += 1
    return y
