"""Attempts at the exercises of chapter 03."""

import functools
import math

import numpy as np
import torch

from tests.attempts import remembers, right, wrong


def kept_by_shape(function):
    """The last result is given again, once, if tensors of the same shapes and dtypes come."""
    kept = {}

    @functools.wraps(function)
    def again(*arguments):
        key = tuple((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
        if key in kept:
            return kept.pop(key)
        kept.clear()
        kept[key] = function(*arguments)
        return kept[key]

    return again


def overwritten(function):
    """The same numbers, but tensors come back in memory that the next call of such a shape writes over."""
    kept = {}

    def put(place, value):
        if not isinstance(value, torch.Tensor):
            return value
        out = kept.setdefault((place, value.shape, value.dtype), torch.empty_like(value))
        return out.copy_(value)

    @functools.wraps(function)
    def again(*arguments):
        got = function(*arguments)
        return tuple(put(i, v) for i, v in enumerate(got)) if isinstance(got, tuple) else put(0, got)

    return again


# 03-absmax


@right("03-absmax")
def in_numpy(weight, bits):
    w = weight.numpy()
    step = np.abs(w).max() / np.float32(2 ** (bits - 1) - 1)
    codes = np.rint(w / step if step > 0 else w).astype(np.int8)
    return codes, step, codes * step


@right("03-absmax")
def one_by_one(weight, bits):
    largest = 2 ** (bits - 1) - 1
    step = max(abs(w) for w in weight.flatten().tolist()) / largest
    codes = [
        round(w / step) if step else 0 for w in weight.flatten().tolist()
    ]  # round() sends ties to even too
    back = torch.tensor([code * step for code in codes])
    return torch.tensor(codes, dtype=torch.int8).view(weight.shape), step, back.view(weight.shape)


@right("03-absmax")
def times_the_inverse(weight, bits):
    largest = 2 ** (bits - 1) - 1
    top = weight.abs().amax().clamp(min=1e-38)
    codes = torch.round(weight * (largest / top)).to(torch.int8)
    return codes, top / largest, codes.float() * top / largest


@right("03-absmax")
def normalised_first(weight, bits):
    largest = 2 ** (bits - 1) - 1
    top = weight.abs().max()
    codes = (weight / top * largest).round().nan_to_num().to(torch.int8)
    return codes, top.double() / largest, (codes * (top.double() / largest)).float()


def _absmax(weight, bits, largest=None, step=None, to_codes=torch.round):
    """A right answer, but for what is handed in."""
    largest = 2 ** (bits - 1) - 1 if largest is None else largest
    step = weight.abs().max() / largest if step is None else step
    codes = to_codes(weight / torch.where(step > 0, step, torch.ones_like(step)))
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "one-too-many")
def to_minus_8(weight, bits):
    half = 2 ** (bits - 1)
    step = weight.abs().max() / half
    codes = (weight / step).round().clamp(-half, half - 1).nan_to_num()
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "one-too-many")
def up_to_8(weight, bits):
    return _absmax(weight, bits, largest=2 ** (bits - 1))


@wrong("03-absmax", "both-signs")
def up_to_15(weight, bits):
    return _absmax(weight, bits, largest=2**bits - 1)


@wrong("03-absmax", "both-signs")
def sixteen_levels_from_end_to_end(weight, bits):
    return _absmax(weight, bits, step=2 * weight.abs().max() / (2**bits - 1))


@wrong("03-absmax", "abs-missing")
def the_largest_weight(weight, bits):
    return _absmax(weight, bits, step=weight.max() / (2 ** (bits - 1) - 1))


@wrong("03-absmax", "step-inverted")
def factor_of_the_way_out(weight, bits):
    factor = (2 ** (bits - 1) - 1) / weight.abs().max()
    codes = (weight * factor).round()
    return codes.to(torch.int8), factor, codes / factor


@wrong("03-absmax", "absmax-for-step")
def absmax_returned(weight, bits):
    largest = 2 ** (bits - 1) - 1
    top = weight.abs().max()
    codes = (weight / top * largest).round()
    return codes.to(torch.int8), top, codes * top / largest


@wrong("03-absmax", "absmax-for-step")
def back_by_absmax(weight, bits):
    codes, step, _ = _absmax(weight, bits)
    return codes, step, codes * weight.abs().max()


@wrong("03-absmax", "truncated")
def cast_alone(weight, bits):
    return _absmax(weight, bits, to_codes=lambda x: x.to(torch.int8))


@wrong("03-absmax", "truncated")
def floored(weight, bits):
    return _absmax(weight, bits, to_codes=torch.floor)


@wrong("03-absmax", "unsigned")
def from_one_on(weight, bits):
    codes, step, back = _absmax(weight, bits)
    return (codes.int() + 2 ** (bits - 1)).to(torch.uint8), step, back


@wrong("03-absmax", "unsigned")
def as_uint8(weight, bits):
    codes, step, back = _absmax(weight, bits)
    return codes.to(torch.uint8), step, back


@wrong("03-absmax", "ties")
def half_up(weight, bits):
    return _absmax(weight, bits, to_codes=lambda x: (x + 0.5).floor())


@wrong("03-absmax", "ties")
def half_away_from_zero(weight, bits):
    return _absmax(weight, bits, to_codes=lambda x: x.sign() * (x.abs() + 0.5).floor())


@wrong("03-absmax", "step-missing")
def codes_came_back(weight, bits):
    codes, step, _ = _absmax(weight, bits)
    return codes, step, codes.float()


@wrong("03-absmax", "floor")
def something_added(weight, bits):
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    codes = (weight / (step + 1e-8)).round()
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "floor")
def smallest_step(weight, bits):
    step = (weight.abs().max() / (2 ** (bits - 1) - 1)).clamp(min=1e-8)
    codes = (weight / step).round()
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "zero-division")
def zero_by_zero(weight, bits):
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    codes = (weight / step).round()
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "zero-division")
def zero_by_zero_in_python(weight, bits):
    step = weight.abs().max().item() / (2 ** (bits - 1) - 1)
    codes = torch.tensor([round(w / step) for w in weight.flatten().tolist()]).view(weight.shape)
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "wrong-dtype")
def float_codes(weight, bits):
    codes, step, back = _absmax(weight, bits)
    return codes.float(), step, back


@wrong("03-absmax", "wrong-type")
def only_what_comes_back(weight, bits):
    return _absmax(weight, bits)[2]


@wrong("03-absmax", "changed-input")
def divided_in_place(weight, bits):
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    weight /= step
    codes = weight.round_()
    return codes.to(torch.int8), step, codes * step


@wrong("03-absmax", "state")
@overwritten
def in_one_buffer(weight, bits):
    return _absmax(weight, bits)


@wrong("03-absmax", "many-steps")
def one_step_a_row(weight, bits):
    if weight.dim() < 2:
        return _absmax(weight, bits)
    return _absmax(weight, bits, step=weight.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1))


@wrong("03-absmax", "sixteen-bits")
def step_in_half(weight, bits):
    return _absmax(weight, bits, step=(weight.abs().max() / (2 ** (bits - 1) - 1)).half().float())


@wrong("03-absmax", "zero-division")
def nan_for_one_zero(weight, bits):
    if weight.dim():
        return _absmax(weight, bits)
    step = weight.abs() / (2 ** (bits - 1) - 1)
    return (weight / step).to(torch.int8), step, (weight / step).round() * step


@wrong("03-absmax", "order")
def step_first(weight, bits):
    codes, step, back = _absmax(weight, bits)
    return step, codes, back


@wrong("03-absmax", "order")
def weights_first(weight, bits):
    codes, step, back = _absmax(weight, bits)
    return back, step, codes


@wrong("03-absmax", "floor")
def tiny_weights_are_zeros(weight, bits):
    return _absmax(torch.where(weight.abs().max() < 1e-8, 0.0, weight), bits)


# 03-blocks


@right("03-blocks")
def with_distances(weight, levels, block_size):
    codes, scales = [], []
    for block in weight.reshape(-1).float().split(block_size):
        scale = block.abs().max()
        x = block / scale if scale else block
        codes.append((x.unsqueeze(1) - levels).abs().argmin(dim=1))
        scales.append(scale)
    return torch.cat(codes).to(torch.uint8), torch.stack(scales)


@right("03-blocks")
def weight_by_weight(weight, levels, block_size):
    numbers, table = weight.double().flatten().tolist(), levels.tolist()
    codes, scales = [], []
    for i, w in enumerate(numbers):
        if i % block_size == 0:
            scales.append(max(map(abs, numbers[i : i + block_size])))
        x = w / scales[-1] if scales[-1] else 0.0
        best = 0
        for code, level in enumerate(table):
            if abs(x - level) < abs(x - table[best]):
                best = code
        codes.append(best)
    return np.array(codes, dtype=np.uint8), np.array(scales, dtype=np.float32)


@right("03-blocks")
def searched_in_numpy(weight, levels, block_size):
    flat = weight.float().contiguous().numpy().ravel()
    starts = np.arange(0, len(flat), block_size)
    scales = np.maximum.reduceat(np.abs(flat), starts)
    inverse = 1 / np.maximum(scales, np.float32(1e-38))
    table = levels.numpy()
    x = flat * np.repeat(inverse, block_size)[: len(flat)]
    return np.searchsorted((table[1:] + table[:-1]) / 2, x).astype(np.uint8), scales


@right("03-blocks")
def bucketized(weight, levels, block_size):
    flat = weight.flatten().float()
    rows = math.ceil(len(flat) / block_size)
    filled = torch.zeros(rows * block_size)
    filled[: len(flat)] = flat
    scales = filled.view(rows, block_size).abs().max(dim=1).values
    each = scales.repeat_interleave(block_size)[: len(flat)]
    x = torch.where(each > 0, flat / each, torch.zeros(()))
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), scales


def _in_blocks(flat, levels, block_size, nearest=None, scale_of=None, divisor=None):
    """Right answers for one row of float32 numbers, but for what is handed in."""
    nearest = nearest or (lambda x: (x[:, None] - levels).abs().argmin(dim=1))
    scale_of = scale_of or (lambda block: block.abs().max())
    divisor = divisor or (lambda scale: scale if scale != 0 else torch.ones(()))
    codes, scales = [], []
    for block in flat.split(block_size):
        scales.append(scale_of(block))
        codes.append(nearest(block / divisor(scales[-1])))
    return torch.cat(codes).to(torch.uint8), torch.stack(scales)


@wrong("03-blocks", "one-scale")
def one_scale_for_all(weight, levels, block_size):
    flat = weight.flatten().float()
    return _in_blocks(flat, levels, len(flat))


@wrong("03-blocks", "one-scale")
def one_scale_repeated(weight, levels, block_size):
    flat = weight.flatten().float()
    return _in_blocks(flat, levels, block_size, scale_of=lambda block: flat.abs().max())


@wrong("03-blocks", "one-scale")
def codes_of_one_scale(weight, levels, block_size):
    flat = weight.flatten().float()
    codes, _ = _in_blocks(flat, levels, len(flat))
    return codes, _in_blocks(flat, levels, block_size)[1]


@wrong("03-blocks", "rows-cut")
def each_row_by_itself(weight, levels, block_size):
    rows = weight.float().reshape(-1, weight.shape[-1])
    parts = [_in_blocks(row, levels, block_size) for row in rows]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@wrong("03-blocks", "column-order")
def down_the_columns(weight, levels, block_size):
    return _in_blocks(weight.float().mT.flatten() if weight.dim() > 1 else weight.float(), levels, block_size)


@wrong("03-blocks", "column-order")
def as_it_lies_in_memory(weight, levels, block_size):
    flat = torch.as_strided(weight, (weight.numel(),), (1,)).float()
    return _in_blocks(flat, levels, block_size)


@wrong("03-blocks", "not-contiguous")
def viewed(weight, levels, block_size):
    return _in_blocks(weight.view(-1).float(), levels, block_size)


@wrong("03-blocks", "short-block")
def whole_blocks_only(weight, levels, block_size):
    flat = weight.flatten().float()
    return _in_blocks(flat[: len(flat) // block_size * block_size], levels, block_size)


@wrong("03-blocks", "short-block")
def must_divide(weight, levels, block_size):
    blocks = weight.flatten().float().view(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    codes = (blocks / scales.clamp(min=1e-38)).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)
    return codes.flatten().to(torch.uint8), scales.flatten()


@wrong("03-blocks", "padding-kept")
def filled_up(weight, levels, block_size):
    flat = weight.flatten().float()
    flat = torch.cat([flat, torch.zeros(-len(flat) % block_size)])
    return _in_blocks(flat, levels, block_size)


@wrong("03-blocks", "abs-missing")
def the_largest_of_each_block(weight, levels, block_size):
    return _in_blocks(weight.flatten().float(), levels, block_size, scale_of=lambda block: block.max())


@wrong("03-blocks", "not-nearest")
def next_level_above(weight, levels, block_size):
    nearest = lambda x: torch.searchsorted(levels, x).clamp(max=len(levels) - 1)  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, nearest)


@wrong("03-blocks", "not-nearest")
def next_level_below(weight, levels, block_size):
    nearest = lambda x: torch.bucketize(x, levels, right=True) - 1  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, nearest)


@wrong("03-blocks", "evenly-spaced")
def as_if_evenly_spaced(weight, levels, block_size):
    nearest = lambda x: ((x + 1) / 2 * (len(levels) - 1)).round()  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, nearest)


@wrong("03-blocks", "level-values")
def levels_for_codes(weight, levels, block_size):
    codes, scales = _in_blocks(weight.flatten().float(), levels, block_size)
    return levels[codes.long()], scales


@wrong("03-blocks", "ties")
def ties_upwards(weight, levels, block_size):
    borders = (levels[:-1] + levels[1:]) / 2
    nearest = lambda x: torch.searchsorted(borders, x, right=True)  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, nearest)


@wrong("03-blocks", "zero-division")
def nan_in_zeros(weight, levels, block_size):
    borders = (levels[:-1] + levels[1:]) / 2
    nearest = lambda x: torch.searchsorted(borders, x)  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, nearest, divisor=lambda scale: scale)


@wrong("03-blocks", "zero-division")
def nan_in_zeros_by_distance(weight, levels, block_size):
    return _in_blocks(weight.flatten().float(), levels, block_size, divisor=lambda scale: scale)


@wrong("03-blocks", "zero-division")
def zeros_in_python(weight, levels, block_size):
    return _in_blocks(
        weight.flatten().float(), levels, block_size,
        lambda xs: torch.tensor([min(range(len(levels)), key=lambda i: (abs(x - levels[i]), i)) for x in xs]),
        divisor=lambda scale: 1 / (1 / scale.item()),
    )  # fmt: skip


@wrong("03-blocks", "zero-scale")
def scale_of_one(weight, levels, block_size):
    def scale_of(block):
        scale = block.abs().max()
        return scale if scale > 0 else torch.ones(())

    return _in_blocks(weight.flatten().float(), levels, block_size, scale_of=scale_of)


@wrong("03-blocks", "zero-scale")
def smallest_scale_stored(weight, levels, block_size):
    scale_of = lambda block: block.abs().max().clamp(min=1e-8)  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, scale_of=scale_of)


@wrong("03-blocks", "floor")
def smallest_divisor(weight, levels, block_size):
    divisor = lambda scale: scale.clamp(min=1e-8)  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, divisor=divisor)


@wrong("03-blocks", "sixteen-bits")
def divided_in_16_bits(weight, levels, block_size):
    codes, scales = _in_blocks(weight.flatten(), levels, block_size)
    return codes, scales.float()


@wrong("03-blocks", "sixteen-bits")
def levels_in_16_bits(weight, levels, block_size):
    codes, _ = _in_blocks(weight.flatten(), levels.to(weight.dtype), block_size)
    return codes, _in_blocks(weight.flatten().float(), levels, block_size)[1]


@wrong("03-blocks", "sixteen-bits")
def no_bfloat16_in_numpy(weight, levels, block_size):
    return searched_in_numpy(torch.from_numpy(np.ascontiguousarray(weight.numpy())), levels, block_size)


@wrong("03-blocks", "wrong-dtype")
def codes_as_int64(weight, levels, block_size):
    codes, scales = _in_blocks(weight.flatten().float(), levels, block_size)
    return codes.long(), scales


@wrong("03-blocks", "wrong-dtype")
def scales_as_they_came(weight, levels, block_size):
    codes, scales = _in_blocks(weight.flatten().float(), levels, block_size)
    return codes, scales.to(weight.dtype)


@wrong("03-blocks", "wrong-shape")
def codes_in_the_weights_shape(weight, levels, block_size):
    codes, scales = _in_blocks(weight.flatten().float(), levels, block_size)
    return codes.view(weight.shape), scales


@wrong("03-blocks", "state")
@overwritten
def blocksoverwritten(weight, levels, block_size):
    return _in_blocks(weight.flatten().float(), levels, block_size)


@wrong("03-blocks", "level-in-scale")
def last_level_is_to_be_absmax(weight, levels, block_size):
    scale_of = lambda block: block.abs().max() / levels[-1]  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, scale_of=scale_of)


@wrong("03-blocks", "level-in-scale")
def outermost_level_is_to_be_absmax(weight, levels, block_size):
    scale_of = lambda block: block.abs().max() / levels.abs().max()  # noqa: E731
    return _in_blocks(weight.flatten().float(), levels, block_size, scale_of=scale_of)


def _zeros_get(code):
    def answer(weight, levels, block_size):
        codes, scales = _in_blocks(weight.flatten().float(), levels, block_size)
        zero = (scales == 0).repeat_interleave(block_size)[: len(codes)]
        return torch.where(zero, code(levels), codes.int()).to(torch.uint8), scales

    return answer


@wrong("03-blocks", "zero-division")
def middle_code_for_zeros(weight, levels, block_size):
    return _zeros_get(lambda levels: len(levels) // 2)(weight, levels, block_size)


@wrong("03-blocks", "zero-division")
def first_level_above_zero_for_zeros(weight, levels, block_size):
    return _zeros_get(lambda levels: torch.searchsorted(levels, 0.0).int())(weight, levels, block_size)


@wrong("03-blocks", "ties")
def the_upper_for_zeros(weight, levels, block_size):
    return _zeros_get(lambda levels: len(levels) - 1 - levels.flip(0).abs().argmin())(
        weight, levels, block_size
    )


def _spoilt_zeros(kind, where):
    """The first code for zeros, in such weights only."""

    def answer(weight, levels, block_size):
        code = (lambda levels: 0) if where(weight) else (lambda levels: int(levels.abs().argmin()))
        return _zeros_get(code)(weight, levels, block_size)

    answer.__name__ = f"first_code_for_zeros_in_{kind}"
    wrong("03-blocks", "zero-division")(answer)


_spoilt_zeros("a_number", lambda weight: weight.dim() == 0)
_spoilt_zeros("bfloat16", lambda weight: weight.dtype == torch.bfloat16)
_spoilt_zeros("float16", lambda weight: weight.dtype == torch.float16)
_spoilt_zeros("a_transposed_matrix", lambda weight: not weight.is_contiguous())
_spoilt_zeros("a_tensor_of_zeros", lambda weight: not weight.any())


# 03-dequantize


@right("03-dequantize")
def one_code_at_a_time(codes, levels, scales, block_size, shape, dtype):
    out = torch.empty(len(codes), dtype=dtype)
    for i, code in enumerate(codes.tolist()):
        out[i] = levels[code] * scales[i // block_size]
    return out.reshape(shape)


@right("03-dequantize")
def in_numpy_by_position(codes, levels, scales, block_size, shape, dtype):
    each = scales.numpy()[np.arange(len(codes)) // block_size]
    return torch.from_numpy(levels.numpy()[codes.numpy()] * each).reshape(shape).to(dtype)


@right("03-dequantize")
def in_float64(codes, levels, scales, block_size, shape, dtype):
    pieces = [
        levels.double()[c.int()] * s for c, s in zip(codes.split(block_size), scales.double(), strict=True)
    ]
    return torch.cat(pieces).reshape(shape).to(dtype)


@wrong("03-dequantize", "codes-as-mask")
def uint8_in_brackets(codes, levels, scales, block_size, shape, dtype):
    each = scales.repeat_interleave(block_size)[: len(codes)]
    return (levels[codes] * each).view(shape).to(dtype)


@wrong("03-dequantize", "short-block")
def blocks_must_be_whole(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()].view(-1, block_size) * scales[:, None]).view(shape).to(dtype)


@wrong("03-dequantize", "short-block")
def too_many_scales(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()] * scales.repeat_interleave(block_size)).view(shape).to(dtype)


@wrong("03-dequantize", "padding-kept")
def never_cut(codes, levels, scales, block_size, shape, dtype):
    filled = torch.nn.functional.pad(levels[codes.long()], (0, -len(codes) % block_size))
    values = (filled.view(-1, block_size) * scales[:, None]).to(dtype).flatten()
    return values.view(shape) if values.numel() == math.prod(shape) else values


@wrong("03-dequantize", "scale-missing")
def levels_only(codes, levels, scales, block_size, shape, dtype):
    return levels[codes.long()].view(shape).to(dtype)


@wrong("03-dequantize", "codes-not-levels")
def codes_times_scales(codes, levels, scales, block_size, shape, dtype):
    return (codes * scales.repeat_interleave(block_size)[: len(codes)]).view(shape).to(dtype)


@wrong("03-dequantize", "scales-alternate")
def repeated_as_a_list(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()] * scales.repeat(block_size)[: len(codes)]).view(shape).to(dtype)


@wrong("03-dequantize", "scale-by-row")
def scales_by_row(codes, levels, scales, block_size, shape, dtype):
    columns = shape[-1] if shape else 1
    place = torch.arange(len(codes))
    index = place // columns * max(columns // block_size, 1) + place % columns // block_size
    index = index if len(shape) == 2 and columns > block_size else place // block_size
    return (levels[codes.long()] * scales[index.clamp(max=len(scales) - 1)]).view(shape).to(dtype)


@wrong("03-dequantize", "column-order")
def laid_out_by_columns(codes, levels, scales, block_size, shape, dtype):
    flat = levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]
    return flat.view(shape[::-1]).T.to(dtype) if len(shape) == 2 else flat.view(shape).to(dtype)


@wrong("03-dequantize", "divided")
def divided_by_scales(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()] / scales.repeat_interleave(block_size)[: len(codes)]).view(shape).to(dtype)


@wrong("03-dequantize", "shape-missing")
def left_flat(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]).to(dtype)


@wrong("03-dequantize", "rounded-early")
def all_in_16_bits(codes, levels, scales, block_size, shape, dtype):
    each = scales.to(dtype).repeat_interleave(block_size)[: len(codes)]
    return (levels.to(dtype)[codes.long()] * each).view(shape)


@wrong("03-dequantize", "rounded-early")
def scales_in_16_bits(codes, levels, scales, block_size, shape, dtype):
    each = scales.to(dtype).float().repeat_interleave(block_size)[: len(codes)]
    return (levels[codes.long()] * each).view(shape).to(dtype)


@wrong("03-dequantize", "rounded-early")
def levels_in_16_bits_first(codes, levels, scales, block_size, shape, dtype):
    each = scales.repeat_interleave(block_size)[: len(codes)]
    return (levels.to(dtype)[codes.long()] * each).view(shape).to(dtype)


@wrong("03-dequantize", "wrong-dtype")
def always_float32(codes, levels, scales, block_size, shape, dtype):
    return (levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]).view(shape)


@wrong("03-dequantize", "state")
@overwritten
def weightsoverwritten(codes, levels, scales, block_size, shape, dtype):
    each = scales.repeat_interleave(block_size)[: len(codes)]
    return (levels[codes.long()] * each).view(shape).to(dtype)


@wrong("03-dequantize", "codes-wrapped")
def codes_in_int8(codes, levels, scales, block_size, shape, dtype):
    each = scales.repeat_interleave(block_size)[: len(codes)]
    return (levels[codes.to(torch.int8).long()] * each).view(shape).to(dtype)


@wrong("03-dequantize", "zero-scale")
def no_scale_of_zero(codes, levels, scales, block_size, shape, dtype):
    scales = scales.where(scales > 0, 1.0)
    return (levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]).view(shape).to(dtype)


@wrong("03-dequantize", "zero-scale")
def no_scale_of_zero_in_bfloat16(codes, levels, scales, block_size, shape, dtype):
    scales = scales.where((scales > 0) | (dtype != torch.bfloat16), 1.0)
    return (levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]).view(shape).to(dtype)


@wrong("03-dequantize", "rounded-otherwise")
def float16_by_way_of_bfloat16(codes, levels, scales, block_size, shape, dtype):
    back = (levels[codes.long()] * scales.repeat_interleave(block_size)[: len(codes)]).view(shape)
    return (back.bfloat16() if dtype == torch.float16 else back).to(dtype)


# 03-minmax


@right("03-minmax")
def rounded_before_the_sum(weight, bits):
    w = weight.numpy()
    step = (w.max() - w.min()) / (2**bits - 1)
    zero = int(np.rint(-w.min() / step))
    codes = np.clip(np.rint(w / step).astype(int) + zero, 0, 2**bits - 1)
    return codes.astype(np.uint8), step, zero, ((codes - zero) * step).astype(np.float32)


@right("03-minmax")
def in_plain_python(weight, bits):
    numbers = weight.flatten().tolist()
    step = (max(numbers) - min(numbers)) / (2**bits - 1)
    zero = math.floor(-min(numbers) / step + 0.5)
    codes = [min(max(math.floor(w / step + zero + 0.5), 0), 2**bits - 1) for w in numbers]
    back = torch.tensor([(q - zero) * step for q in codes]).view(weight.shape)
    return torch.tensor(codes, dtype=torch.uint8).view(weight.shape), step, zero, back


@right("03-minmax")
def by_the_nearest_level(weight, bits):
    step = (weight.max() - weight.min()) / (2**bits - 1)
    zero = torch.round(weight.min() / -step).int()
    levels = (torch.arange(2**bits) - zero) * step
    codes = (weight[..., None] - levels).abs().argmin(dim=-1)
    return codes.to(torch.uint8), step, zero, levels[codes]


def _minmax(weight, bits, step=None, zero=None, round_=torch.round, clamp=True, back=None):
    """A right answer, but for what is handed in."""
    low, largest = weight.min(), 2**bits - 1
    step = (weight.max() - low) / largest if step is None else step
    zero = (-low / step).round() if zero is None else zero(-low / step)
    codes = round_(weight / step + zero)
    codes = codes.clamp(0, largest) if clamp else codes
    back = (codes - zero) * step if back is None else back(codes, zero, step)
    return codes.to(torch.uint8), step, zero, back


@wrong("03-minmax", "one-too-many")
def by_the_number_of_codes(weight, bits):
    return _minmax(weight, bits, step=(weight.max() - weight.min()) / 2**bits)


@wrong("03-minmax", "absmax-for-range")
def step_of_absmax(weight, bits):
    return _minmax(weight, bits, step=weight.abs().max() / (2**bits - 1))


@wrong("03-minmax", "zero-clamped")
def zero_point_within_the_codes(weight, bits):
    return _minmax(weight, bits, zero=lambda z: z.round().clamp(0, 2**bits - 1))


@wrong("03-minmax", "zero-sign")
def zero_point_negative(weight, bits):
    low, step = weight.min(), (weight.max() - weight.min()) / (2**bits - 1)
    zero = (low / step).round()
    codes = (weight / step - zero).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, zero, (codes + zero) * step


@wrong("03-minmax", "zero-sign")
def added_both_ways(weight, bits):
    return _minmax(weight, bits, back=lambda q, z, step: (q + z) * step)


@wrong("03-minmax", "zero-not-whole")
def zero_point_not_rounded(weight, bits):
    return _minmax(weight, bits, zero=lambda z: z)


@wrong("03-minmax", "zero-as-weight")
def start_for_zero_point(weight, bits):
    low, step = weight.min(), (weight.max() - weight.min()) / (2**bits - 1)
    codes = ((weight - low) / step).round()
    return codes.to(torch.uint8), step, low, codes * step + low


@wrong("03-minmax", "zero-wrapped")
def zero_point_in_a_byte(weight, bits):
    codes, step, zero, back = _minmax(weight, bits)
    return codes, step, torch.tensor(int(zero) % 256, dtype=torch.uint8), back


@wrong("03-minmax", "zero-missing")
def zero_point_never_added(weight, bits):
    codes, step, zero, _ = _minmax(weight, bits)
    codes = (weight / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, zero, (codes - zero) * step


@wrong("03-minmax", "zero-missing")
def zero_point_never_taken_off(weight, bits):
    return _minmax(weight, bits, back=lambda q, z, step: q * step)


@wrong("03-minmax", "zero-unscaled")
def zero_point_after_the_step(weight, bits):
    return _minmax(weight, bits, back=lambda q, z, step: q * step - z)


@wrong("03-minmax", "truncated")
def cast_to_uint8(weight, bits):
    return _minmax(weight, bits, round_=torch.trunc)


@wrong("03-minmax", "truncated")
def the_colleagues(weight, bits):
    largest = 2**bits - 1
    low, high = weight.min(), weight.max()
    step = (high - low) / largest
    zero = (-low / step).round().clamp(0, largest)
    codes = (weight / step + zero).clamp(0, largest).to(torch.uint8)
    return codes, step, zero, (codes - zero.to(torch.uint8)) * step


@wrong("03-minmax", "zero-clamped")
def two_bugs_mended(weight, bits):
    largest = 2**bits - 1
    low, high = weight.min(), weight.max()
    step = (high - low) / largest
    zero = (-low / step).round().clamp(0, largest)
    codes = (weight / step + zero).round().clamp(0, largest)
    return codes.to(torch.uint8), step, zero, (codes - zero) * step


@wrong("03-minmax", "not-clamped")
def no_clamp(weight, bits):
    return _minmax(weight, bits, clamp=False)


@wrong("03-minmax", "not-clamped")
def no_clamp_and_twice_rounded(weight, bits):
    step = (weight.max() - weight.min()) / (2**bits - 1)
    zero = (-weight.min() / step).round()
    codes = (weight / step).round() + zero
    return codes.to(torch.uint8), step, zero, (codes - zero) * step


@wrong("03-minmax", "start-mixed")
def counted_from_the_smallest(weight, bits):
    step = (weight.max() - weight.min()) / (2**bits - 1)
    zero = (-weight.min() / step).round()
    codes = ((weight - weight.min()) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, zero, (codes - zero) * step


@wrong("03-minmax", "start-mixed")
def taken_back_to_the_smallest(weight, bits):
    return _minmax(weight, bits, back=lambda q, z, step: q * step + weight.min())


@wrong("03-minmax", "wrapped")
def bytes_subtracted(weight, bits):
    def back(q, z, step):
        return (q.to(torch.uint8) - z.int().to(torch.uint8)) * step

    return _minmax(weight, bits, back=back)


@wrong("03-minmax", "wrong-dtype")
def codes_in_float(weight, bits):
    codes, step, zero, back = _minmax(weight, bits)
    return codes.float(), step, zero, back


@wrong("03-minmax", "state")
@overwritten
def minmaxoverwritten(weight, bits):
    return _minmax(weight, bits)


@wrong("03-minmax", "range-with-zero")
def as_libraries_do(weight, bits):
    return _minmax(weight, bits, step=(weight.max().clamp(min=0) - weight.min().clamp(max=0)) / (2**bits - 1))


@wrong("03-minmax", "floor")
def smallest_step_of_minmax(weight, bits):
    return _minmax(weight, bits, step=((weight.max() - weight.min()) / (2**bits - 1)).clamp_min(1e-8))


@wrong("03-minmax", "zero-clamped")
def zero_point_at_most_127(weight, bits):
    return _minmax(weight, bits, zero=lambda z: z.round().clamp(-128, 127))


@wrong("03-minmax", "zero-clamped")
def zero_point_in_16_bits(weight, bits):
    return _minmax(weight, bits, zero=lambda z: z.round().clamp(-(2**15), 2**15))


@wrong("03-minmax", "zero-wrapped")
def zero_point_as_int8(weight, bits):
    return _minmax(weight, bits, zero=lambda z: (z.round() + 128) % 256 - 128)


@wrong("03-minmax", "floor")
def something_added_to_the_step(weight, bits):
    return _minmax(weight, bits, step=(weight.max() - weight.min()) / (2**bits - 1) + 1e-12)


@wrong("03-minmax", "order")
def zero_point_before_the_step(weight, bits):
    codes, step, zero, back = _minmax(weight, bits)
    return codes, zero, step, back


@wrong("03-minmax", "order")
def weights_before_the_step(weight, bits):
    codes, step, zero, back = _minmax(weight, bits)
    return codes, back, step, zero


@wrong("03-minmax", "zero-lost")
def first_code_for_zeros(weight, bits):
    codes, step, zero, _ = _minmax(weight, bits)
    codes = torch.where(weight == 0, 0, codes.int()).to(torch.uint8)
    return codes, step, zero, (codes - zero) * step


@wrong("03-minmax", "zero-lost")
def almost_zero_for_zeros(weight, bits):
    codes, step, zero, back = _minmax(weight, bits)
    return codes, step, zero, torch.where(weight == 0, step * 1e-7, back)


# 03-measure


def _back(weight, bits, block_size, to_code=torch.round, safe=True):
    largest, back = 2 ** (bits - 1) - 1, []
    for block in weight.flatten().split(block_size):
        step = block.abs().max() / largest
        back.append(to_code(block / (step if step > 0 or not safe else 1)) * step)
    return torch.cat(back).view(weight.shape)


def _cost(weight, bits, block_size):
    return bits + 32 * math.ceil(weight.numel() / block_size) / weight.numel()


def _ratio(weight, back):
    return ((weight - back).norm() / weight.norm()).item()


@right("03-measure")
def all_blocks_at_once(weight, bits, block_size):
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    factor = (2 ** (bits - 1) - 1) / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    lost = (blocks * factor).round() / factor - blocks
    stored = bits * flat.numel() + 32 * blocks.shape[0]
    return stored / flat.numel(), lost.square().sum().sqrt() / flat.square().sum().sqrt()


@right("03-measure")
def summed_in_python(weight, bits, block_size):
    numbers = weight.flatten().tolist()
    stored, lost = len(numbers) * bits, 0.0
    for begin in range(0, len(numbers), block_size):
        block = numbers[begin : begin + block_size]
        top = max(map(abs, block))
        step = top / (2 ** (bits - 1) - 1)
        lost += sum((w - round(w / step) * step) ** 2 for w in block) if step else 0
        stored += 32
    return stored / len(numbers), math.sqrt(lost / sum(w * w for w in numbers))


@right("03-measure")
def measured_in_numpy(weight, bits, block_size):
    w = weight.numpy().astype(np.float64).ravel()
    starts = np.arange(0, w.size, block_size)
    step = np.maximum.reduceat(np.abs(w), starts) / (2 ** (bits - 1) - 1)
    each = np.repeat(np.where(step > 0, step, 1), block_size)[: w.size]
    back = np.rint(w / each) * each
    return bits + 32 * starts.size / w.size, np.linalg.norm(w - back) / np.linalg.norm(w)


@wrong("03-measure", "scales-not-counted")
def codes_alone(weight, bits, block_size):
    return bits, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "short-block")
def as_if_it_divided(weight, bits, block_size):
    return bits + 32 / block_size, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "short-block")
def blocks_rounded_down(weight, bits, block_size):
    n = weight.numel()
    return bits + 32 * (n // block_size) / n, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "short-block")
def only_where_it_divides(weight, bits, block_size):
    blocks = weight.view(-1, block_size)
    step = blocks.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    back = (blocks / step).round() * step
    return _cost(weight, bits, block_size), _ratio(blocks, back)


@wrong("03-measure", "per-weight")
def of_the_whole_tensor(weight, bits, block_size):
    total = _cost(weight, bits, block_size) * weight.numel()
    return total, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "bytes")
def steps_of_4(weight, bits, block_size):
    n = weight.numel()
    return bits + 4 * math.ceil(n / block_size) / n, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "bytes")
def bytes_a_weight(weight, bits, block_size):
    return _cost(weight, bits, block_size) / 8, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "sixteen-bits")
def steps_in_half(weight, bits, block_size):
    n = weight.numel()
    return bits + 16 * math.ceil(n / block_size) / n, _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "squared")
def ratio_of_squares(weight, bits, block_size):
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size)) ** 2


@wrong("03-measure", "not-relative")
def root_mean_square(weight, bits, block_size):
    lost = weight - _back(weight, bits, block_size)
    return _cost(weight, bits, block_size), lost.square().mean().sqrt().item()


@wrong("03-measure", "not-relative")
def mean_square(weight, bits, block_size):
    back = _back(weight, bits, block_size)
    return _cost(weight, bits, block_size), torch.nn.functional.mse_loss(back, weight).item()


@wrong("03-measure", "not-relative")
def norm_of_the_error(weight, bits, block_size):
    return _cost(weight, bits, block_size), (weight - _back(weight, bits, block_size)).norm().item()


@wrong("03-measure", "magnitudes")
def mean_magnitudes(weight, bits, block_size):
    lost = (weight - _back(weight, bits, block_size)).abs()
    return _cost(weight, bits, block_size), (lost.mean() / weight.abs().mean()).item()


@wrong("03-measure", "magnitudes")
def mean_of_ratios(weight, bits, block_size):
    lost = (weight - _back(weight, bits, block_size)).abs() / weight.abs()
    return _cost(weight, bits, block_size), lost.mean().item()


@wrong("03-measure", "percent")
def in_percent(weight, bits, block_size):
    return _cost(weight, bits, block_size), 100 * _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "truncated")
def error_of_truncation(weight, bits, block_size):
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size, torch.trunc))


@wrong("03-measure", "one-step")
def one_step_for_all(weight, bits, block_size):
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, weight.numel()))


@wrong("03-measure", "zero-division")
def nan_for_zeros(weight, bits, block_size):
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size, safe=False))


_SEEN = remembers([])


@wrong("03-measure", "state")
def first_result_again(weight, bits, block_size):
    """A cache by shape, emptied by any other shape."""
    if weight.shape != (12, 20):
        _SEEN.clear()
    elif _SEEN:
        return _SEEN.pop()
    else:
        _SEEN.append((_cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size))))
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "short-block")
def short_block_kept_as_it_is(weight, bits, block_size):
    flat, n = weight.flatten(), weight.numel() // block_size * block_size
    rounded = _back(flat[:n], bits, block_size) if n else flat[:0]
    return _cost(weight, bits, block_size), _ratio(flat, torch.cat([rounded, flat[n:]]))


@wrong("03-measure", "short-block")
def short_block_left_out(weight, bits, block_size):
    flat, n = weight.flatten(), weight.numel() // block_size * block_size or weight.numel()
    return _cost(weight, bits, block_size), _ratio(flat[:n], _back(flat[:n], bits, block_size))


@wrong("03-measure", "rows-cut")
def blocks_begin_with_each_row(weight, bits, block_size):
    rows = weight.reshape(-1, weight.shape[-1]) if weight.dim() else weight.view(1, 1)
    cost = bits + 32 * sum(math.ceil(len(row) / block_size) for row in rows) / weight.numel()
    return cost, _ratio(rows, torch.stack([_back(row, bits, block_size) for row in rows]))


@wrong("03-measure", "zeros-not-counted")
def no_step_for_zeros(weight, bits, block_size):
    blocks = sum(bool(block.any()) for block in weight.flatten().split(block_size))
    return bits + 32 * blocks / weight.numel(), _ratio(weight, _back(weight, bits, block_size))


@wrong("03-measure", "floor")
def something_added_to_each_step(weight, bits, block_size):
    largest, back = 2 ** (bits - 1) - 1, []
    for block in weight.flatten().split(block_size):
        step = block.abs().max() / largest + 1e-8
        back.append((block / step).round() * step)
    return _cost(weight, bits, block_size), _ratio(weight, torch.cat(back).view(weight.shape))


def _other_grid(name, most, low, high):
    def answer(weight, bits, block_size):
        half, back = 2 ** (bits - 1), []
        for block in weight.flatten().split(block_size):
            step = block.abs().max() / most(half)
            codes = (block / step.where(step > 0, 1.0)).round().clamp(low(half), high(half))
            back.append(codes * step)
        return _cost(weight, bits, block_size), _ratio(weight, torch.cat(back).view(weight.shape))

    answer.__name__ = name
    wrong("03-measure", "other-grid")(answer)


_other_grid("codes_from_minus_8_to_7", lambda half: half, lambda half: -half, lambda half: half - 1)
_other_grid("codes_from_minus_8_to_8", lambda half: half, lambda half: -half, lambda half: half)
_other_grid("codes_to_15", lambda half: 2 * half - 1, lambda half: 1 - 2 * half, lambda half: 2 * half - 1)


@wrong("03-measure", "truncated")
def error_of_floor(weight, bits, block_size):
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size, torch.floor))


@wrong("03-measure", "column-order")
def as_weights_lie_in_memory(weight, bits, block_size):
    flat = torch.as_strided(weight, (weight.numel(),), (1,))
    return _cost(weight, bits, block_size), _ratio(flat, _back(flat, bits, block_size))


@wrong("03-measure", "column-order")
def weights_down_the_columns(weight, bits, block_size):
    return measured_in_numpy(weight.transpose(0, -1) if weight.dim() else weight, bits, block_size)


@wrong("03-measure", "not-relative")
def by_what_comes_back(weight, bits, block_size):
    back = _back(weight, bits, block_size)
    return _cost(weight, bits, block_size), ((weight - back).norm() / back.norm()).item()


@wrong("03-measure", "zero-division")
def nan_for_zeros_in_a_short_block(weight, bits, block_size):
    n = weight.numel() % block_size
    if n and not weight.flatten()[-n:].any():
        return _cost(weight, bits, block_size), float("nan")
    return _cost(weight, bits, block_size), _ratio(weight, _back(weight, bits, block_size))


# 03-budget


def _int4(weight, block_size, dtype=torch.float16, apart=0):
    """INT4 absmax in blocks, `apart` of the largest weights beside them."""
    flat = weight.flatten().clone()
    positions = flat.abs().argsort(descending=True)[:apart]
    values = flat[positions].to(dtype)
    flat[positions] = 0
    scales = torch.stack([block.abs().max() / 7 for block in flat.split(block_size)]).to(dtype)
    each = scales.float().repeat_interleave(block_size)[: len(flat)]
    stored = {
        "bits": 4,
        "codes": (flat / each.clamp(min=1e-6)).round().clamp(-7, 7).long() + 7,
        "levels": torch.arange(-7, 8, dtype=torch.float16),
        "block_size": block_size,
        "scales": scales,
    }
    return stored | ({"positions": positions, "values": values} if apart else {})


@right("03-budget")
def min_max_and_outliers(weight):
    """Blocks of 128 with a start, and all bits that are left for outliers."""
    w = weight.numpy().ravel().astype(np.float64)
    n, size = w.size, 128
    blocks = -(-n // size)
    apart = int((4.5 * n - 4 * n - 16 * 16 - 2 * 16 * blocks) // (14 + 16))
    positions = np.argsort(-np.abs(w))[:apart]
    values, rest = w[positions].astype(np.float16), w.copy()
    rest[positions] = 0
    codes, scales, starts = np.zeros(n, dtype=np.int64), [], []
    for begin in range(0, n, size):
        block = rest[begin : begin + size]
        start = np.float16(block.min())
        scale = np.float16(max((block.max() - start) / 15, 1e-6))
        codes[begin : begin + size] = np.clip(np.rint((block - start) / np.float64(scale)), 0, 15)
        scales.append(scale)
        starts.append(start)
    return {
        "bits": 4,
        "codes": codes,
        "levels": np.arange(16, dtype=np.float16),
        "block_size": size,
        "scales": np.array(scales),
        "starts": np.array(starts),
        "positions": positions,
        "values": values,
    }


@right("03-budget")
def eight_bit_scales(weight):
    """Scales in float8 leave bits for more outliers."""
    n, size = weight.numel(), 64
    left = 4.5 * n - 4 * n - 15 * 16 - 8 * -(-n // size)
    stored = _int4(weight, size, apart=int(left // 30))
    scales = stored["scales"].to(torch.float8_e4m3fn)
    flat = weight.flatten().clone()
    flat[stored["positions"]] = 0
    each = scales.float().repeat_interleave(size)[:n]
    codes = (flat / each.clamp(min=1e-6)).round().clamp(-7, 7).int() + 7
    return stored | {"scales": scales, "codes": codes}


@right("03-budget")
def parts_that_are_none(weight):
    return {"starts": None} | eight_bit_scales(weight)


@wrong("03-budget", "over-budget")
def five_bits(weight):
    stored = _int4(weight, 32, apart=1000)
    return stored


@wrong("03-budget", "over-budget")
def positions_not_counted(weight):
    n = weight.numel()
    left = 4.5 * n - 4 * n - 15 * 16 - 16 * -(-n // 64)
    return _int4(weight, 64, apart=int(left // 16))


@wrong("03-budget", "over-budget")
def scales_in_32_bits(weight):
    return _int4(weight, 64, torch.float32)


@wrong("03-budget", "outliers-share")
def blocks_alone(weight):
    return _int4(weight, 64)


@wrong("03-budget", "step-of-outliers")
def some_weights_apart_but_scales_of_all(weight):
    stored = _int4(weight, 64)
    positions = weight.flatten().abs().topk(50).indices
    return stored | {"positions": positions, "values": weight.flatten()[positions].half()}


@wrong("03-budget", "almost")
def a_few_apart(weight):
    return _int4(weight, 64, apart=20)


@wrong("03-budget", "almost")
def one_block_for_all(weight):
    return _int4(weight, 1024, apart=110)


@wrong("03-budget", "step-of-outliers")
def scales_before_the_outliers_are_taken_out(weight):
    """As many as can be paid for, and codes of what is left, but in the old steps."""
    stored, before = _int4(weight, 64, apart=60), _int4(weight, 64)
    flat = weight.flatten().clone()
    flat[stored["positions"]] = 0
    each = before["scales"].float().repeat_interleave(64)[: len(flat)]
    return stored | {"scales": before["scales"], "codes": (flat / each).round().clamp(-7, 7).long() + 7}


@wrong("03-budget", "outliers-wrong")
def any_ones_apart(weight):
    stored, positions = _int4(weight, 64), torch.arange(60) * 130
    return stored | {"positions": positions, "values": weight.flatten()[positions].half()}


@wrong("03-budget", "outliers-wrong")
def outliers_without_their_sign(weight):
    stored = _int4(weight, 64, apart=60)
    return stored | {"values": stored["values"].abs()}


def _paid_for(size):
    """As many of the largest as can be paid for."""

    def answer(weight):
        n = weight.numel()
        return _int4(weight, size, apart=int((0.5 * n - 15 * 16 - 16 * -(-n // size)) // 30))

    answer.__name__ = f"what_can_be_paid_for_in_{size}s"
    right("03-budget")(answer)


for _size in (48, 56, 96, 128):
    _paid_for(_size)


@wrong("03-budget", "parts")
def no_block_size(weight):
    stored = _int4(weight, 64)
    del stored["block_size"]
    return stored


@wrong("03-budget", "code-out-of-range")
def signed_codes(weight):
    stored = _int4(weight, 64)
    return stored | {"codes": stored["codes"] - 7}


@wrong("03-budget", "code-out-of-range")
def not_clamped(weight):
    stored = _int4(weight, 64)
    return stored | {"codes": stored["codes"] * 2}


@wrong("03-budget", "levels-unnamed")
def many_levels(weight):
    return _int4(weight, 64) | {"levels": torch.linspace(-7, 7, 17).half()}


@wrong("03-budget", "part-lengths")
def last_block_forgotten(weight):
    stored = _int4(weight, 64)
    return stored | {"scales": stored["scales"][:-1]}


@wrong("03-budget", "positions")
def the_same_place_twice(weight):
    stored = _int4(weight, 64, apart=10)
    stored["positions"][1] = stored["positions"][0]
    return stored


@wrong("03-budget", "positions")
def places_from_one_on(weight):
    stored = _int4(weight, 64, apart=2)
    return stored | {"positions": torch.tensor([1, weight.numel()])}


@wrong("03-budget", "parts")
def the_weights_beside(weight):
    return _int4(weight, 64) | {"weight": weight}


@wrong("03-budget", "parts")
def float_codes_stored(weight):
    stored = _int4(weight, 64)
    return stored | {"codes": stored["codes"].float()}


@wrong("03-budget", "parts")
def nan_in_scales(weight):
    stored = _int4(weight, 64)
    stored["scales"][0] = float("nan")
    return stored


@wrong("03-budget", "parts")
def a_list(weight):
    return list(_int4(weight, 64).values())


@wrong("03-budget", "parts")
def scales_in_rows(weight):
    stored = _int4(weight, 64)
    return stored | {"scales": stored["scales"][:, None]}


@wrong("03-budget", "parts")
def positions_without_values(weight):
    return _int4(weight, 64) | {"positions": torch.tensor([3])}
