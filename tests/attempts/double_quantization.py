"""Attempts at the exercises of chapter 05."""

import json
import math
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F

from tests.attempts import right, wrong

# 05-bits


@right("05-bits")
def in_bytes(n, first, second):
    scales = math.ceil(n / first)
    size = math.ceil(n / 2) + scales + 4 * math.ceil(scales / second) + 4
    return size / n * 8


@right("05-bits")
def one_after_the_other(n, first, second):
    total = Fraction(32)
    for start in range(0, n, first * second):
        group = min(first * second, n - start)
        total += 32 + 8 * len(range(0, group, first))
    return float((total + 8 * len(range(0, n, 2))) / n)


@right("05-bits")
def of_tensors(n, first, second):
    scales = torch.empty(n, device="meta").split(first)
    groups = torch.empty(len(scales), device="meta").split(second)
    return torch.tensor(4 * (n + n % 2) + 8 * len(scales) + 32 * len(groups) + 32, dtype=torch.float64) / n


def _counted(n, first, second, **other):
    """All counts, which the wrong ones change in one place."""
    facts = {"codes": (n + 1) // 2 * 8, "blocks": (n + first - 1) // first, "scale": 8, "offsets": 1} | other
    groups = other.get("groups", (facts["blocks"] + second - 1) // second)
    return facts["codes"] + facts["scale"] * facts["blocks"] + 32 * groups + 32 * facts["offsets"]


@wrong("05-bits", "per-block")
def for_a_block(n, first, second):
    return _counted(n, first, second) / math.ceil(n / first)


@wrong("05-bits", "per-block")
def for_the_matrix(n, first, second):
    return float(_counted(n, first, second))


@wrong("05-bits", "bytes")
def bytes_for_a_weight(n, first, second):
    return _counted(n, first, second) / 8 / n


@wrong("05-bits", "second-level-missing")
def first_level_only(n, first, second):
    return _counted(n, first, second, groups=0) / n


@wrong("05-bits", "scales-in-32-bits")
def scales_and_more(n, first, second):
    return _counted(n, first, second, scale=32) / n


@wrong("05-bits", "groups-of-weights")
def cut_from_weights(n, first, second):
    return _counted(n, first, second, groups=math.ceil(n / second)) / n


@wrong("05-bits", "offset-per-block")
def an_offset_for_each_group(n, first, second):
    return _counted(n, first, second, offsets=math.ceil(math.ceil(n / first) / second)) / n


@wrong("05-bits", "offset-per-block")
def an_offset_for_each_block(n, first, second):
    return _counted(n, first, second, offsets=math.ceil(n / first)) / n


@wrong("05-bits", "offset-missing")
def no_offset(n, first, second):
    return _counted(n, first, second, offsets=0) / n


@wrong("05-bits", "offset-missing")
def as_in_the_chapter(n, first, second):
    return 4 + 8 / first + 32 / (first * second)


@wrong("05-bits", "tail-dropped")
def floors(n, first, second):
    return _counted(n, first, second, blocks=n // first, groups=n // first // second) / n


@wrong("05-bits", "tail-dropped")
def a_floor_on_the_second_level(n, first, second):
    return _counted(n, first, second, groups=math.ceil(n / first) // second) / n


@wrong("05-bits", "tail-dropped")
def a_floor_on_the_first_level(n, first, second):
    return _counted(n, first, second, blocks=n // first) / n


@wrong("05-bits", "formula")
def formula_and_offset(n, first, second):
    return 4 + 8 / first + 32 / (first * second) + 32 / n


@wrong("05-bits", "half-byte")
def four_bits_each(n, first, second):
    return _counted(n, first, second, codes=4 * n) / n


# 05-map


@right("05-map")
def as_the_chapter_has_it(bits):
    found = [0.0, 1.0]
    for f in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2**f + 1, dtype=torch.float32)
        midpoints = (edges[:-1] + edges[1:]) / 2
        found += (10 ** (f - bits + 2) * midpoints).tolist()
        found += (-(10 ** (f - bits + 2)) * midpoints).tolist()
    return torch.tensor(sorted(found))


@right("05-map")
def from_the_top_down_in_numpy(bits):
    parts, top = [np.zeros(1), np.ones(1)], 1.0
    for i in reversed(range(bits - 1)):
        step = 0.9 * top / 2**i
        midpoints = top / 10 + step * (np.arange(2**i) + 0.5)
        parts += [midpoints, -midpoints]
        top /= 10
    return np.sort(np.concatenate(parts)).astype(np.float32)


@right("05-map")
def in_exact_fractions(bits):
    positive = [
        (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 ** (i + 1))) / 10 ** (bits - 2 - i)
        for i in range(bits - 1)
        for j in range(2**i)
    ]
    levels = [-p for p in reversed(positive)] + [Fraction(0), *positive, Fraction(1)]
    return torch.tensor([float(level) for level in levels])


def _levels(bits, points, top=0, ends=(0.0, 1.0), signs=(1, -1)):
    """A map whose decades hold other points: points(edges) of the decade from 0.1 to 1."""
    found = list(ends)
    for i in range(bits - 1):
        here = points(np.linspace(0.1, 1, 2**i + 1)) * 10.0 ** (i - bits + 2 + top)
        for sign in signs:
            found += (sign * here).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32)


def _between(edges):
    return (edges[1:] + edges[:-1]) / 2


@wrong("05-map", "linear")
def linspace(bits):
    return torch.linspace(-1, 1, 2**bits)


@wrong("05-map", "linear")
def signed_integers(bits):
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) / 2 ** (bits - 1)


@wrong("05-map", "edges")
def lower_edges(bits):
    return _levels(bits, lambda edges: edges[:-1])


@wrong("05-map", "edges")
def upper_edges(bits):
    return _levels(bits, lambda edges: edges[1:])


@wrong("05-map", "edges")
def all_edges(bits):
    return _levels(bits, lambda edges: edges).unique()


@wrong("05-map", "zero-missing")
def no_zero(bits):
    return _levels(bits, _between, ends=[1.0])


@wrong("05-map", "one-missing")
def no_one(bits):
    return _levels(bits, _between, ends=[0.0])


@wrong("05-map", "minus-one-added")
def symmetric(bits):
    return _levels(bits, _between, ends=[-1.0, 0.0, 1.0])


@wrong("05-map", "decades-shifted")
def ten_times_larger(bits):
    return _levels(bits, _between, top=1)


@wrong("05-map", "decades-shifted")
def ten_times_smaller(bits):
    return _levels(bits, _between, top=-1)


@wrong("05-map", "unsigned")
def no_negative_levels(bits):
    return _levels(bits, _between, signs=[1])


@wrong("05-map", "unsigned")
def twice_as_fine_instead(bits):
    found = [0.0, 1.0]
    for i in range(bits - 1):
        found += (_between(np.linspace(0.1, 1, 2 ** (i + 1) + 1)) * 10.0 ** (i - bits + 2)).tolist()
    return torch.tensor(sorted(found))


@wrong("05-map", "fine-below")
def finest_at_the_bottom(bits):
    found = [0.0, 1.0]
    for i in range(bits - 1):
        here = _between(np.linspace(0.1, 1, 2**i + 1)) * 10.0**-i
        found += [*here, *-here]
    return torch.tensor(sorted(found), dtype=torch.float32)


@wrong("05-map", "not-sorted")
def in_order_of_magnitude(bits):
    levels = _levels(bits, _between)
    return levels[levels.abs().argsort()]


@wrong("05-map", "wrong-dtype")
def in_double(bits):
    return _levels(bits, _between).double()


# 05-quantize-scales


@right("05-quantize-scales")
def block_by_block(scales, levels, size):
    offset, codes, absmax = scales.mean(), [], []
    for block in (scales - offset).split(size):
        absmax.append(block.abs().max())
        x = block / absmax[-1] if absmax[-1] > 0 else torch.zeros_like(block)
        codes.append((x[:, None] - levels).abs().argmin(dim=1).to(torch.uint8))
    return torch.cat(codes), torch.stack(absmax), offset


@right("05-quantize-scales")
def in_rows(scales, levels, size):
    offset = scales.mean()
    rows = F.pad(scales - offset, (0, -len(scales) % size)).view(-1, size)
    absmax = rows.abs().amax(dim=1)
    x = rows * (1 / absmax.where(absmax > 0, 1.0))[:, None]
    codes = torch.bucketize(x.flatten()[: len(scales)], (levels[1:] + levels[:-1]) / 2)
    return codes.byte(), absmax, offset.item()


@right("05-quantize-scales")
def in_plain_numbers(scales, levels, size):
    scales, levels = scales.tolist(), levels.tolist()
    offset = math.fsum(scales) / len(scales)
    codes, absmax = [], []
    for start in range(0, len(scales), size):
        block = [s - offset for s in scales[start : start + size]]
        absmax.append(max(abs(b) for b in block))
        for b in block:
            x = b / absmax[-1] if absmax[-1] else 0.0
            codes.append(min(range(len(levels)), key=lambda i: abs(x - levels[i])))
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(absmax), offset


@right("05-quantize-scales")
def with_numpy(scales, levels, size):
    scales, levels = scales.numpy().astype(np.float64), levels.numpy().astype(np.float64)
    offset = scales.mean()
    absmax = np.maximum.reduceat(np.abs(scales - offset), np.arange(0, len(scales), size))
    each = np.repeat(absmax, size)[: len(scales)]
    x = np.divide(scales - offset, each, out=np.zeros_like(scales), where=each > 0)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    return codes.astype(np.uint8), absmax.astype(np.float32), np.float32(offset)


def _nearest(x, levels):
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def _quantized(scales, levels, size, offset=None, absmax=None, choose=_nearest):
    """A right answer, which the wrong ones change in one place."""
    offset = scales.mean() if offset is None else offset
    centred = scales - offset
    largest = torch.stack([b.abs().max() for b in centred.split(size)]) if absmax is None else absmax
    each = largest.repeat_interleave(size)[: len(scales)]
    x = torch.where(each > 0, centred / each, 0.0)
    return choose(x, levels).to(torch.uint8), largest, offset


@wrong("05-quantize-scales", "offset-missing")
def never_subtracted(scales, levels, size):
    return _quantized(scales, levels, size, offset=torch.tensor(0.0))


@wrong("05-quantize-scales", "offset-missing")
def returned_but_not_subtracted(scales, levels, size):
    codes, absmax, _ = _quantized(scales, levels, size, offset=torch.tensor(0.0))
    return codes, absmax, scales.mean()


@wrong("05-quantize-scales", "offset-late")
def absmax_first(scales, levels, size):
    absmax = torch.stack([b.max() for b in scales.split(size)])
    return _quantized(scales, levels, size, absmax=absmax)


@wrong("05-quantize-scales", "one-absmax")
def one_for_all(scales, levels, size):
    offset = scales.mean()
    absmax = (scales - offset).abs().max()
    x = (scales - offset) / absmax if absmax > 0 else scales - offset
    return _nearest(x, levels).byte(), absmax, offset


@wrong("05-quantize-scales", "one-absmax")
def one_for_all_repeated(scales, levels, size):
    largest = (scales - scales.mean()).abs().max()
    return _quantized(scales, levels, size, absmax=largest.expand(-(-len(scales) // size)))


@wrong("05-quantize-scales", "one-absmax")
def blocks_for_the_absmax_alone(scales, levels, size):
    _, absmax, offset = _quantized(scales, levels, size)
    x = (scales - offset) / absmax.max() if absmax.any() else scales - offset
    return _nearest(x, levels).byte(), absmax, offset


@wrong("05-quantize-scales", "abs-missing")
def largest_number(scales, levels, size):
    absmax = torch.stack([b.max() for b in (scales - scales.mean()).split(size)])
    return _quantized(scales, levels, size, absmax=absmax)


@wrong("05-quantize-scales", "block-mean")
def means_of_blocks(scales, levels, size):
    results = [block_by_block(b, levels, size) for b in scales.split(size)]
    return tuple(torch.cat([torch.atleast_1d(r[k]) for r in results]) for k in range(3))


@wrong("05-quantize-scales", "block-mean")
def means_of_blocks_subtracted(scales, levels, size):
    codes, absmax, _ = means_of_blocks(scales, levels, size)
    return codes, absmax, scales.mean()


@wrong("05-quantize-scales", "tail-dropped")
def views(scales, levels, size):
    offset = scales.mean()
    rows = (scales - offset).view(-1, size)
    absmax = rows.abs().amax(dim=1)
    x = (rows / absmax[:, None]).nan_to_num().flatten()
    return _nearest(x, levels).byte(), absmax, offset


@wrong("05-quantize-scales", "tail-dropped")
def whole_blocks_only(scales, levels, size):
    offset, whole = scales.mean(), len(scales) // size * size
    codes, absmax, _ = _quantized(scales[:whole], levels, size, offset=offset)
    return codes, absmax, offset


@wrong("05-quantize-scales", "padding-kept")
def padded_codes(scales, levels, size):
    offset = scales.mean()
    rows = F.pad(scales - offset, (0, -len(scales) % size))
    return (*_quantized(rows, levels, size, offset=torch.tensor(0.0))[:2], offset)


@wrong("05-quantize-scales", "padding-in-mean")
def padded_first(scales, levels, size):
    padded = F.pad(scales, (0, -len(scales) % size))
    codes, absmax, offset = _quantized(padded, levels, size)
    return codes[: len(scales)], absmax, offset


@wrong("05-quantize-scales", "padding-in-absmax")
def padded_then_subtracted(scales, levels, size):
    padded = F.pad(scales, (0, -len(scales) % size))
    codes, absmax, offset = _quantized(padded, levels, size, offset=scales.mean())
    return codes[: len(scales)], absmax, offset


@wrong("05-quantize-scales", "absmax-repeated")
def for_each_scale(scales, levels, size):
    codes, absmax, offset = _quantized(scales, levels, size)
    return codes, absmax.repeat_interleave(size)[: len(scales)], offset


@wrong("05-quantize-scales", "zero-block")
def zero_by_zero(scales, levels, size):
    offset = scales.mean()
    rows = F.pad(scales - offset, (0, -len(scales) % size)).view(-1, size)
    absmax = rows.abs().amax(dim=1)
    codes = ((rows / absmax[:, None]).flatten()[: len(scales), None] - levels).abs().argmin(dim=1)
    return codes.byte(), absmax, offset


@wrong("05-quantize-scales", "zero-block")
def zero_by_zero_bucketized(scales, levels, size):
    offset = scales.mean()
    blocks = (scales - offset).split(size)
    codes = [_nearest(b / b.abs().max(), levels) for b in blocks]
    return torch.cat(codes).byte(), torch.stack([b.abs().max() for b in blocks]), offset


@wrong("05-quantize-scales", "zero-block")
def clamped(scales, levels, size):
    offset = scales.mean()
    absmax = torch.stack([b.abs().max().clamp(min=1e-8) for b in (scales - offset).split(size)])
    return _quantized(scales, levels, size, absmax=absmax)


@wrong("05-quantize-scales", "tie-up")
def upper_of_two(scales, levels, size):
    return _quantized(
        scales, levels, size, choose=lambda x, v: torch.bucketize(x, (v[1:] + v[:-1]) / 2, right=True)
    )


@wrong("05-quantize-scales", "not-nearest")
def without_midpoints(scales, levels, size):
    return _quantized(scales, levels, size, choose=lambda x, v: torch.bucketize(x, v))


@wrong("05-quantize-scales", "not-nearest")
def level_below(scales, levels, size):
    return _quantized(scales, levels, size, choose=lambda x, v: torch.bucketize(x, v, right=True) - 1)


@wrong("05-quantize-scales", "even-levels")
def rounds_to_integers(scales, levels, size):
    return _quantized(scales, levels, size, choose=lambda x, v: ((x + 1) / 2 * (len(v) - 1)).round())


@wrong("05-quantize-scales", "table")
def with_a_table(scales, levels, size):
    positions = torch.linspace(-1, 1, 65_536, dtype=torch.float64)
    table = torch.bucketize(positions, ((levels[:-1] + levels[1:]) / 2).double())
    return _quantized(scales, levels, size, choose=lambda x, v: table[((x + 1) * 0.5 * 65_535 + 0.5).int()])


@wrong("05-quantize-scales", "wrong-dtype")
def codes_of_64_bits(scales, levels, size):
    codes, absmax, offset = _quantized(scales, levels, size)
    return codes.long(), absmax, offset


# 05-read-scales


@right("05-read-scales")
def mended(stored):
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    level = stored[".nested_quant_map"][stored[".absmax"].int()]
    absmax = stored[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(level)]
    return level * absmax + state["nested_offset"]


@right("05-read-scales")
def scale_by_scale(stored):
    text = stored[".quant_state.bitsandbytes__nf4"].numpy().tobytes().decode()
    state = json.loads(text)
    levels, absmax = stored[".nested_quant_map"].tolist(), stored[".nested_absmax"].tolist()
    size, offset = state["nested_blocksize"], state["nested_offset"]
    found = [levels[c] * absmax[i // size] + offset for i, c in enumerate(stored[".absmax"].tolist())]
    return torch.tensor(found)


@right("05-read-scales")
def with_numpy_arrays(stored):
    arrays = {key: tensor.numpy() for key, tensor in stored.items()}
    state = json.loads(arrays[".quant_state.bitsandbytes__nf4"].tobytes())
    codes = arrays[".absmax"]
    block = np.arange(len(codes)) // state["nested_blocksize"]
    found = arrays[".nested_quant_map"][codes] * arrays[".nested_absmax"][block]
    return found + np.float32(state["nested_offset"])


@wrong("05-read-scales", "dtype-of-the-weights")
def buggy(stored):
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    level = stored[".nested_quant_map"][stored[".absmax"].int()]
    absmax = stored[".nested_absmax"].repeat(state["nested_blocksize"])[: len(level)]
    return (level * absmax).to(getattr(torch, state["dtype"]))


def _read(stored, size=None, combine=lambda level, absmax, offset: level * absmax + offset, turn=False):
    """A right answer, which the wrong ones change in one place."""
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    level = stored[".nested_quant_map"][stored[".absmax"].long()]
    size, absmax = size or state["nested_blocksize"], stored[".nested_absmax"]
    each = (absmax.repeat(size) if turn else absmax.repeat_interleave(size))[: len(level)]
    return combine(level, each, state["nested_offset"])


@wrong("05-read-scales", "offset-missing")
def equation_6(stored):
    return _read(stored, combine=lambda level, absmax, offset: level * absmax)


@wrong("05-read-scales", "offset-scaled")
def offset_before(stored):
    return _read(stored, combine=lambda level, absmax, offset: (level + offset) * absmax)


@wrong("05-read-scales", "offset-subtracted")
def offset_again(stored):
    return _read(stored, combine=lambda level, absmax, offset: level * absmax - offset)


@wrong("05-read-scales", "absmax-in-turn")
def repeated(stored):
    return _read(stored, turn=True)


@wrong("05-read-scales", "one-absmax")
def first_absmax(stored):
    return _read(stored, combine=lambda level, absmax, offset: level * absmax[0] + offset)


@wrong("05-read-scales", "wrong-blocksize")
def always_256(stored):
    return _read(stored, size=256)


@wrong("05-read-scales", "wrong-blocksize")
def block_size_of_the_weights(stored):
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    level = stored[".nested_quant_map"][stored[".absmax"].long()]
    block = (torch.arange(len(level)) // state["blocksize"]) % len(stored[".nested_absmax"])
    return level * stored[".nested_absmax"][block] + state["nested_offset"]


@wrong("05-read-scales", "dtype-of-the-weights")
def rounded_to_bfloat16(stored):
    return _read(stored).bfloat16().float()


@wrong("05-read-scales", "codes-as-numbers")
def codes_are_signed(stored):
    signed = stored[".absmax"].int() - 128
    return _read(stored, combine=lambda level, absmax, offset: signed / 127 * absmax + offset)


@wrong("05-read-scales", "codes-as-numbers")
def codes_times_absmax(stored):
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    absmax = stored[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(stored[".absmax"])]
    return stored[".absmax"] / 255 * absmax + state["nested_offset"]


@wrong("05-read-scales", "index-is-mask")
def byte_index(stored):
    state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"].tolist()))
    level = stored[".nested_quant_map"][stored[".absmax"]]
    absmax = stored[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(level)]
    return level * absmax + state["nested_offset"]


# 05-mean


@right("05-mean")
def twice(scales, levels, size):
    def error(offset):
        codes, absmax, _ = _quantized(scales, levels, size, offset=offset)
        back = levels[codes.long()] * absmax.repeat_interleave(size)[: len(scales)] + offset
        return ((back - scales).norm() / scales.norm()).item()

    return error(torch.tensor(0.0)), error(scales.mean())


@right("05-mean")
def in_numpy_and_double(scales, levels, size):
    s, levels = scales.numpy().astype(np.float64), levels.numpy().astype(np.float64)
    errors = []
    for offset in (0, s.mean()):
        squares = 0.0
        for start in range(0, len(s), size):
            block = s[start : start + size] - offset
            largest = np.abs(block).max()
            nearest = levels[np.abs(block[:, None] / largest - levels).argmin(axis=1)]
            squares += ((nearest * largest - block) ** 2).sum()
        errors.append((squares / (s**2).sum()) ** 0.5)
    return errors


def _back(scales, levels, size, offset):
    codes, absmax, _ = _quantized(scales, levels, size, offset=torch.as_tensor(offset))
    return levels[codes.long()] * absmax.repeat_interleave(size)[: len(scales)] + offset


def _both(scales, levels, size, measure):
    return tuple(measure(_back(scales, levels, size, m), scales).item() for m in (0.0, scales.mean()))


@wrong("05-mean", "swapped")
def with_it_first(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: (back - s).norm() / s.norm())[::-1]


@wrong("05-mean", "squared")
def sums_of_squares(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: (back - s).square().sum() / s.square().sum())


@wrong("05-mean", "not-relative")
def norms(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: (back - s).norm())


@wrong("05-mean", "not-relative")
def mean_squares(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: F.mse_loss(back, s))


@wrong("05-mean", "wrong-norm")
def against_what_is_left(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: (back - s).norm() / (s - s.mean()).norm())


@wrong("05-mean", "wrong-norm")
def each_against_its_own(scales, levels, size):
    def error(s):
        return ((_back(s, levels, size, 0.0) - s).norm() / s.norm()).item()

    return error(scales), error(scales - scales.mean())


@wrong("05-mean", "mean-of-quotients")
def quotients(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: ((back - s) / s).abs().mean())


@wrong("05-mean", "offset-missing")
def never_added(scales, levels, size):
    mean = scales.mean()
    without, centred = _back(scales, levels, size, 0.0), _back(scales, levels, size, mean) - mean
    return tuple(((back - scales).norm() / scales.norm()).item() for back in (without, centred))


@wrong("05-mean", "percent")
def hundredths(scales, levels, size):
    return _both(scales, levels, size, lambda back, s: 100 * (back - s).norm() / s.norm())


@wrong("05-mean", "one-absmax")
def one_block(scales, levels, size):
    return _both(scales, levels, len(scales), lambda back, s: (back - s).norm() / s.norm())


@wrong("05-mean", "abs-missing")
def largest_left(scales, levels, size):
    errors = []
    for offset in (0.0, scales.mean()):
        back = []
        for block in (scales - offset).split(size):
            absmax = block.max()
            back.append(levels[_nearest(block / absmax, levels)] * absmax + offset)
        errors.append(((torch.cat(back) - scales).norm() / scales.norm()).item())
    return errors


@wrong("05-mean", "wrong-type")
def how_many_times(scales, levels, size):
    without, with_it = twice(scales, levels, size)
    return without / with_it


# 05-budget


def _min_max(scales, bits, size, dtype=torch.float16):
    blocks = scales.split(size)
    start = torch.stack([b.min() for b in blocks]).to(dtype)
    step = torch.stack([(b.max() - b.min()) / (2**bits - 1) for b in blocks]).to(dtype)
    each = [t.float().repeat_interleave(size)[: len(scales)] for t in (start, step)]
    codes = ((scales - each[0]) / each[1]).round().clamp(0, 2**bits - 1)
    return codes.nan_to_num().to(torch.uint8), bits, size, "even", step, start


@right("05-budget")
def seven_bits(scales, budget):
    return _min_max(scales, 7, 32)


@right("05-budget")
def fitted(scales, budget):
    """Steps and starts by least squares, again and again."""
    codes, bits, size, levels, _, _ = _min_max(scales, 7, 32)
    for _ in range(5):
        steps, starts = [], []
        for c, s in zip(codes.double().split(size), scales.double().split(size), strict=True):
            varied = (c - c.mean()).square().sum()
            slope = ((c - c.mean()) * (s - s.mean())).sum()
            steps.append(slope / varied if varied > 0 else torch.tensor(1e-4).double())
            starts.append(s.mean() - steps[-1] * c.mean())
        step, start = torch.stack(steps).half(), torch.stack(starts).half()
        each = [t.double().repeat_interleave(size)[: len(scales)] for t in (step, start)]
        codes = ((scales - each[1]) / each[0]).round().clamp(0, 127).to(torch.uint8)
    return codes, bits, size, levels, step, start


@right("05-budget")
def recipe_or_even(scales, budget):
    """QLoRA's recipe where there are far outliers, even levels elsewhere."""
    if scales.max() < 8 * scales.median():
        return _min_max(scales, 8, 256)
    codes, absmax, offset = _quantized(scales, in_exact_fractions(8), 256)
    return codes, 8, 256, "dynamic", absmax, offset.view(1)


@wrong("05-budget", "over-budget")
def eight_bits_in_small_blocks(scales, budget):
    return _min_max(scales, 8, 64)


@wrong("05-budget", "over-budget")
def starts_not_counted(scales, budget):
    return _min_max(scales, 8, 256, torch.float32)


@wrong("05-budget", "code-too-large")
def seven_bits_promised(scales, budget):
    codes, _, *rest = _min_max(scales, 8, 32)
    return codes, 7, *rest


@wrong("05-budget", "wrong-count")
def tail_left_out(scales, budget):
    codes, bits, size, levels, step, start = _min_max(scales, 7, 32)
    whole = len(scales) // size
    return codes, bits, size, levels, step[:whole], start[:whole]


@wrong("05-budget", "not-finite")
def reciprocal_in_16_bits(scales, budget):
    codes, bits, size, levels, step, start = _min_max(scales, 7, 32)
    return codes, bits, size, levels, (1e3 / step.float()).half(), start


@wrong("05-budget", "not-better")
def one_for_the_layer(scales, budget):
    return _min_max(scales, 8, len(scales), torch.float32)


@wrong("05-budget", "not-better")
def the_recipe(scales, budget):
    codes, absmax, offset = _quantized(scales, in_exact_fractions(8), 256)
    return codes, 8, 256, "dynamic", absmax, offset.view(1)


@wrong("05-budget", "not-better")
def blocks_of_512(scales, budget):
    return _min_max(scales, 8, 512, torch.float32)


@wrong("05-budget", "not-better")
def five_bits(scales, budget):
    return _min_max(scales, 5, 16)


@wrong("05-budget", "wrong-dtype")
def codes_as_floats(scales, budget):
    codes, *rest = _min_max(scales, 7, 32)
    return codes.float(), *rest


@wrong("05-budget", "wrong-type")
def what_comes_back(scales, budget):
    codes, _, size, _, step, start = _min_max(scales, 7, 32)
    each = [t.float().repeat_interleave(size)[: len(scales)] for t in (step, start)]
    return codes * each[0] + each[1]
