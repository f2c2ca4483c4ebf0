"""Attempts at the exercises of chapter 04."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch

from tests.attempts import right, wrong
from tests.attempts.quantization import kept_by_shape, overwritten

Q = NormalDist().inv_cdf

# 04-codebook


def _checked(offset):
    if offset <= 0.5 or offset >= 1:
        raise ValueError("offset must be between 0.5 and 1")


def _side(n, offset, dtype=torch.float32):
    return torch.linspace(offset, 0.5, n + 1, dtype=dtype)[:-1]


def _scaled(levels):
    levels = torch.tensor(sorted(levels), dtype=torch.float32)
    return levels / levels.max()


@right("04-codebook")
def with_ndtri(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below = -torch.special.ndtri(_side(n - 1, offset).double())
    above = torch.special.ndtri(_side(n, offset).double()).flip(0)
    levels = torch.cat([below, torch.zeros(1), above]).float()
    return levels / levels[-1]


@right("04-codebook")
def in_numpy_with_both_ends(bits, offset):
    """Both rows hold the ½; the zeros are unified. NormalDist refuses an offset of 1 with an error of its own."""
    if offset <= 0.5:
        raise ValueError(offset)
    n = 2 ** (bits - 1)
    below = [-Q(p) for p in torch.linspace(offset, 0.5, n).tolist()]
    above = [Q(p) for p in torch.linspace(offset, 0.5, n + 1).tolist()]
    levels = np.unique(np.array(below + above, dtype=np.float32) + np.float32(0))
    return levels / levels.max()


@wrong("04-codebook", "equation-4")
def equation_4_finite(bits, offset):
    _checked(offset)
    n = 2**bits
    q = [(Q(i / (n + 1)) + Q((i + 1) / (n + 1))) / 2 for i in range(1, n)]
    return torch.tensor(q) / max(q)


@wrong("04-codebook", "equation-4")
def equation_4_clipped(bits, offset):
    _checked(offset)
    n = 2**bits + 1
    q = torch.special.ndtri(torch.arange(n, dtype=torch.float64) / n)
    q = (q[:-1] + q[1:]) / 2
    return (q / q.max()).clamp(-1, 1).float()


@wrong("04-codebook", "symmetric")
def seven_and_seven(bits, offset):
    _checked(offset)
    half = [Q(p) for p in _side(2 ** (bits - 1) - 1, offset).tolist()]
    return _scaled([-q for q in half] + [0.0] + half)


@wrong("04-codebook", "symmetric")
def eight_and_eight(bits, offset):
    _checked(offset)
    half = [Q(p) for p in _side(2 ** (bits - 1), offset).tolist()]
    return _scaled([-q for q in half] + [0.0] + half)


@wrong("04-codebook", "one-step")
def the_innermost_left_out(bits, offset):
    _checked(offset)
    half = [Q(p) for p in _side(2 ** (bits - 1), offset).tolist()]
    return _scaled([-q for q in half[:-1]] + [0.0] + half)


@wrong("04-codebook", "zero-missing")
def sixteen_quantiles(bits, offset):
    _checked(offset)
    return _scaled([Q(p) for p in torch.linspace(1 - offset, offset, 2**bits).tolist()])


@wrong("04-codebook", "zero-missing")
def seven_and_eight_only(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    return _scaled([-Q(p) for p in _side(n - 1, offset).tolist()] + [Q(p) for p in _side(n, offset).tolist()])


@wrong("04-codebook", "zero-twice")
def eight_and_nine(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below, above = torch.linspace(offset, 0.5, n), torch.linspace(offset, 0.5, n + 1)
    return _scaled([-Q(p) for p in below.tolist()] + [Q(p) for p in above.tolist()])


@wrong("04-codebook", "zero-twice")
def seven_with_the_half_and_eight(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below, above = torch.linspace(offset, 0.5, n - 1), torch.linspace(offset, 0.5, n)
    return _scaled([-Q(p) for p in below.tolist()] + [0.0] + [Q(p) for p in above.tolist()])


def _levels(bits, offset):
    n = 2 ** (bits - 1)
    return [-Q(p) for p in _side(n - 1, offset).tolist()] + [0.0] + [Q(p) for p in _side(n, offset).tolist()]


@wrong("04-codebook", "not-divided")
def plain_quantiles(bits, offset):
    _checked(offset)
    return torch.tensor(sorted(_levels(bits, offset)))


@wrong("04-codebook", "sides-swapped")
def eight_below(bits, offset):
    _checked(offset)
    return _scaled([-q for q in _levels(bits, offset)])


@wrong("04-codebook", "descending")
def from_the_top(bits, offset):
    _checked(offset)
    return _scaled(_levels(bits, offset)).flip(0)


@wrong("04-codebook", "not-quantiles")
def with_the_cdf(bits, offset):
    _checked(offset)
    n, cdf = 2 ** (bits - 1), NormalDist().cdf
    below, above = _side(n - 1, offset).tolist(), _side(n, offset).tolist()
    return _scaled([-cdf(p) for p in below] + [0.0] + [cdf(p) for p in above])


@wrong("04-codebook", "offset-ignored")
def always_nf4s(bits, offset):
    _checked(offset)
    return _scaled(_levels(bits, 0.9677083))


@wrong("04-codebook", "bits-ignored")
def always_sixteen(bits, offset):
    _checked(offset)
    return _scaled(_levels(4, offset))


@wrong("04-codebook", "offset-unchecked")
def infinity_and_all(bits, offset):
    n = 2 ** (bits - 1)
    below, above = (torch.special.ndtri(_side(k, offset).double()) for k in (n - 1, n))
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values.float()
    return levels / levels.max()


@wrong("04-codebook", "offset-unchecked")
def only_one_is_refused(bits, offset):
    return _scaled(_levels(bits, offset))


@wrong("04-codebook", "spaced-in-64")
def all_in_float64(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below, above = np.linspace(offset, 0.5, n)[:-1], np.linspace(offset, 0.5, n + 1)[:-1]
    levels = np.array(sorted([-Q(p) for p in below] + [0.0] + [Q(p) for p in above]))
    return (levels / levels.max()).astype(np.float32)


@wrong("04-codebook", "spaced-in-64")
def spaced_in_float64(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below, above = (_side(k, offset, torch.float64).tolist() for k in (n - 1, n))
    return _scaled([-Q(p) for p in below] + [0.0] + [Q(p) for p in above])


@wrong("04-codebook", "quantiles-in-32")
def ndtri_of_float32(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)
    below, above = (torch.special.ndtri(_side(k, offset)) for k in (n - 1, n))
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


@wrong("04-codebook", "quantiles-in-32")
def icdf_of_float32(bits, offset):
    _checked(offset)
    n, normal = 2 ** (bits - 1), torch.distributions.Normal(0.0, 1.0)
    levels = torch.cat([-normal.icdf(_side(n - 1, offset)), torch.zeros(1), normal.icdf(_side(n, offset))])
    return levels.sort().values / levels.max()


@wrong("04-codebook", "divided-in-64")
def divided_in_float64(bits, offset):
    _checked(offset)
    levels = np.array(sorted(_levels(bits, offset)))
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


@wrong("04-codebook", "other-bits")
def spaced_by_hand(bits, offset):
    _checked(offset)
    n = 2 ** (bits - 1)

    def row(count):
        step = np.float32((np.float32(offset) - np.float32(0.5)) / np.float32(count))
        return [float(np.float32(offset) - np.float32(i) * step) for i in range(count)]

    return _scaled([-Q(p) for p in row(n - 1)] + [0.0] + [Q(p) for p in row(n)])


@wrong("04-codebook", "wrong-dtype")
def double(bits, offset):
    _checked(offset)
    return _scaled(_levels(bits, offset)).double()


@wrong("04-codebook", "bits-ignored")
def five_bits_at_most(bits, offset):
    _checked(offset)
    return _scaled(_levels(min(bits, 5), offset))


@wrong("04-codebook", "offset-ignored")
def nf4s_for_four_bits(bits, offset):
    _checked(offset)
    return _scaled(_levels(bits, 0.9677083 if bits == 4 else offset))


@wrong("04-codebook", "offset-refused")
def offsets_of_06_and_less(bits, offset):
    _checked((offset - 0.6) / 0.8 + 0.5)
    return _scaled(_levels(bits, offset))


@wrong("04-codebook", "offset-refused")
def offsets_of_099_and_more(bits, offset):
    _checked(offset)
    if offset >= 0.9997:
        raise ValueError("too close to 1")
    return _scaled(_levels(bits, offset))


@wrong("04-codebook", "no-tensor")
def a_list(bits, offset):
    _checked(offset)
    return _scaled(_levels(bits, offset)).tolist()


wrong("04-codebook", "state")(overwritten(with_ndtri))


@wrong("04-codebook", "bits-ignored")
def never_six_bits(bits, offset):
    _checked(offset)
    return _scaled(_levels(5 if bits == 6 else bits, offset))


@wrong("04-codebook", "bits-ignored")
def never_seven_bits(bits, offset):
    _checked(offset)
    return _scaled(_levels(8 if bits == 7 else bits, offset))


# 04-nearest


@right("04-nearest")
def with_all_distances(x, levels):
    return (x.unsqueeze(-1) - levels).abs().argmin(dim=-1).to(torch.uint8)


@right("04-nearest")
def in_a_loop(x, levels):
    codes = []
    for number in x.flatten().tolist():
        best = 0
        for code, level in enumerate(levels.tolist()):
            if abs(number - level) < abs(number - levels[best].item()):
                best = code
        codes.append(best)
    return torch.tensor(codes, dtype=torch.uint8).reshape(x.shape)


@right("04-nearest")
def in_numpy_search(x, levels):
    x, levels = x.numpy(), levels.numpy()
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x).astype(np.uint8)


@right("04-nearest")
def by_squares(x, levels):
    return ((x[..., None] - levels) ** 2).argmin(-1).byte()


@right("04-nearest")
def by_counting(x, levels):
    code = torch.zeros(x.shape, dtype=torch.int32)
    for a, b in pairwise(levels):
        code += x > (a + b) * 0.5
    return code.to(torch.uint8)


@wrong("04-nearest", "tie-upper")
def greater_or_equal(x, levels):
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2, right=True).to(torch.uint8)


@wrong("04-nearest", "tie-upper")
def the_last_of_the_nearest(x, levels):
    back = (x[..., None] - levels.flip(0)).abs().argmin(-1)
    return (len(levels) - 1 - back).to(torch.uint8)


@wrong("04-nearest", "level-above")
def searched_in_levels(x, levels):
    return torch.searchsorted(levels, x).clamp(max=len(levels) - 1).to(torch.uint8)


@wrong("04-nearest", "level-below")
def floored(x, levels):
    return (torch.searchsorted(levels, x, right=True) - 1).clamp(min=0).to(torch.uint8)


@wrong("04-nearest", "equal-steps")
def rounded_to_steps(x, levels):
    return ((x + 1) / 2 * (len(levels) - 1)).round().to(torch.uint8)


@wrong("04-nearest", "sign-lost")
def by_magnitude(x, levels):
    return (x.abs()[..., None] - levels.abs()).abs().argmin(-1).to(torch.uint8)


@wrong("04-nearest", "off-by-one")
def counted_from_one(x, levels):
    return (torch.bucketize(x, (levels[:-1] + levels[1:]) / 2) + 1).to(torch.uint8)


@wrong("04-nearest", "levels-returned")
def gives_levels(x, levels):
    return levels[(x[..., None] - levels).abs().argmin(-1)]


@wrong("04-nearest", "wrong-dimension")
def for_each_level(x, levels):
    return (x.reshape(-1, 1) - levels).abs().argmin(0).to(torch.uint8)


@wrong("04-nearest", "not-exact")
def in_16_bits(x, levels):
    return (x.half()[..., None] - levels.half()).abs().argmin(-1).to(torch.uint8)


@wrong("04-nearest", "not-exact")
def with_borders_of_4_digits(x, levels):
    borders = torch.tensor([round((a + b).item() / 2, 4) for a, b in pairwise(levels)])
    return torch.bucketize(x, borders).to(torch.uint8)


@wrong("04-nearest", "not-exact")
def with_borders_a_little_high(x, levels):
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2 + 1e-6).to(torch.uint8)


@wrong("04-nearest", "shape-lost")
def in_one_row(x, levels):
    return torch.bucketize(x.flatten(), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@wrong("04-nearest", "wrong-dtype")
def as_int64(x, levels):
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)


@wrong("04-nearest", "wrong-dtype")
def as_int8(x, levels):
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.int8)


@wrong("04-nearest", "tie-upper")
def ties_away_from_zero(x, levels):
    lower = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2)
    upper = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2, right=True)
    return torch.where(x > 0, upper, lower).to(torch.uint8)


@wrong("04-nearest", "tie-upper")
def ties_toward_zero(x, levels):
    lower = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2)
    upper = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2, right=True)
    return torch.where(x < 0, upper, lower).to(torch.uint8)


@wrong("04-nearest", "tie-upper")
def a_tie_at_zero_goes_up(x, levels):
    lower = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2)
    upper = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2, right=True)
    return torch.where(x == 0, upper, lower).to(torch.uint8)


@wrong("04-nearest", "not-contiguous")
def seen_as_one_row(x, levels):
    return torch.bucketize(x.view(-1), (levels[:-1] + levels[1:]) / 2).to(torch.uint8).view(x.shape)


@wrong("04-nearest", "not-exact")
def in_bfloat16(x, levels):
    return (x.bfloat16()[..., None] - levels.bfloat16()).abs().argmin(-1).to(torch.uint8)


@wrong("04-nearest", "crashed")
def without_empty_ones(x, levels):
    return torch.stack([(number - levels).abs().argmin() for number in x.reshape(-1)]).reshape(x.shape).byte()


@wrong("04-nearest", "crashed")
def without_a_dimension(x, levels):
    return torch.cat([(row[..., None] - levels).abs().argmin(-1)[None] for row in x]).byte()


@wrong("04-nearest", "no-tensor")
def nested_lists(x, levels):
    return (x[..., None] - levels).abs().argmin(-1).tolist()


wrong("04-nearest", "state")(overwritten(with_all_distances))
wrong("04-nearest", "state")(kept_by_shape(with_all_distances))


@wrong("04-nearest", "not-exact")
def with_some_slack(x, levels):
    return torch.bucketize(x.contiguous() - 1e-7, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@wrong("04-nearest", "not-exact")
def levels_that_are_close_are_one(x, levels):
    borders = (levels[:-1] + levels[1:]) / 2
    borders = torch.where(levels.diff() < 1e-4, levels[1:], borders)
    return torch.bucketize(x.contiguous(), borders).to(torch.uint8)


# 04-pack


@right("04-pack")
def in_a_list(codes, filler):
    codes = codes.tolist()
    if len(codes) % 2 == 1:
        codes.append(filler)
    return torch.tensor([codes[i] * 16 + codes[i + 1] for i in range(0, len(codes), 2)], dtype=torch.uint8)


@right("04-pack")
def in_numpy_shifts(codes, filler):
    codes = codes.numpy()
    out = np.full((len(codes) + 1) // 2, filler, dtype=np.uint8)
    out[: len(codes) // 2] = codes[1::2]
    return out | np.left_shift(codes[::2], 4)


@right("04-pack")
def by_a_product(codes, filler):
    if len(codes) % 2:
        codes = torch.cat([codes, torch.tensor([filler], dtype=codes.dtype)])
    return (codes.view(-1, 2) * torch.tensor([16, 1], dtype=torch.uint8)).sum(1).to(torch.uint8)


def _filled(codes, filler):
    return torch.cat([codes, codes.new_full((len(codes) % 2,), filler)])


@wrong("04-pack", "filled-though-even")
def an_empty_nibble_is_filled(codes, filler):
    out = _filled(codes, 0)
    out = out[::2] * 16 + out[1::2]
    if int(out[-1]) & 15 == 0:
        out[-1] += filler
    return out


@wrong("04-pack", "filled-though-even")
def a_full_nibble_is_filled(codes, filler):
    out = _filled(codes, filler)
    last = out[-1] if out[-1] < 15 else filler
    return out[::2] * 16 + torch.cat([out[1::2][:-1], out.new_full((1,), int(last))])


@wrong("04-pack", "nibbles-swapped")
def low_first(codes, filler):
    codes = _filled(codes, filler)
    return codes[::2] | (codes[1::2] << 4)


@wrong("04-pack", "halves")
def two_halves(codes, filler):
    high, low = _filled(codes, filler).chunk(2)
    return high << 4 | low


@wrong("04-pack", "odd-dropped")
def whole_pairs_only(codes, filler):
    n = len(codes) // 2 * 2
    return (codes[:n:2] << 4) | codes[1:n:2]


@wrong("04-pack", "filler-first")
def filled_in_front(codes, filler):
    if len(codes) % 2:
        codes = torch.cat([torch.tensor([filler], dtype=torch.uint8), codes])
    return (codes[::2] << 4) | codes[1::2]


@wrong("04-pack", "filler-first")
def the_last_code_low(codes, filler):
    pairs = codes[: len(codes) // 2 * 2]
    packed = (pairs[::2] << 4) | pairs[1::2]
    if len(codes) % 2:
        packed = torch.cat([packed, (filler << 4) | codes[-1:]])
    return packed


@wrong("04-pack", "filler-ignored")
def filled_with_zero(codes, filler):
    codes = _filled(codes, 0)
    return (codes[::2] << 4) | codes[1::2]


@wrong("04-pack", "filler-ignored")
def the_last_code_alone(codes, filler):
    n = len(codes) // 2 * 2
    return torch.cat([(codes[:n:2] << 4) | codes[1:n:2], codes[n:]])


@wrong("04-pack", "not-shifted")
def added(codes, filler):
    codes = _filled(codes, filler)
    return codes[::2] + codes[1::2]


@wrong("04-pack", "not-shifted")
def times_fifteen(codes, filler):
    codes = _filled(codes, filler)
    return codes[::2] * 15 + codes[1::2]


@wrong("04-pack", "one-each")
def unpacked(codes, filler):
    return codes.clone()


@wrong("04-pack", "wrong-dtype")
def wide(codes, filler):
    codes = _filled(codes, filler).long()
    return codes[::2] * 16 + codes[1::2]


@wrong("04-pack", "filler-ignored")
def zero_taken_for_none(codes, filler):
    codes = _filled(codes, filler or 7)
    return (codes[::2] << 4) | codes[1::2]


@wrong("04-pack", "filler-ignored")
def fillers_to_14(codes, filler):
    codes = _filled(codes, min(filler, 14))
    return (codes[::2] << 4) | codes[1::2]


@wrong("04-pack", "no-tensor")
def bytes_of_python(codes, filler):
    codes = _filled(codes, filler)
    return ((codes[::2] << 4) | codes[1::2]).tolist()


@wrong("04-pack", "wrong-shape")
def at_most_32_bytes(codes, filler):
    codes = _filled(codes, filler)
    return ((codes[::2] << 4) | codes[1::2])[:32]


wrong("04-pack", "state")(overwritten(in_a_list))
wrong("04-pack", "state")(kept_by_shape(in_a_list))


@wrong("04-pack", "filler-ignored")
def a_single_code_without_a_filler(codes, filler):
    return codes * 16 if len(codes) == 1 else by_a_product(codes, filler)


# 04-quantize


def _nearest(x, levels):
    return (x[..., None] - levels).abs().argmin(-1).to(torch.uint8)


def _bytes(codes, levels):
    if len(codes) % 2:
        codes = torch.cat([codes, _nearest(torch.zeros(1), levels)])
    return codes[::2] * 16 + codes[1::2]


@right("04-quantize")
def block_by_block(weight, levels, block_size):
    codes, scales = [], []
    for block in weight.reshape(-1).float().split(block_size):
        scale = block.abs().max()
        scales.append(scale)
        codes.append(_nearest(block / scale if scale > 0 else block, levels))
    return _bytes(torch.cat(codes), levels), torch.stack(scales)


@right("04-quantize")
def as_bitsandbytes(weight, levels, block_size):
    """Whole blocks times the inverse, the rest divided; the scale of a last block of zeros is 1e-38."""
    flat = weight.float().flatten()
    whole = len(flat) // block_size * block_size
    rows = flat[:whole].view(-1, block_size)
    scales = rows.abs().amax(1)
    x = (rows * (1 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()
    if whole < len(flat):
        rest = flat[whole:].abs().max().clamp(min=1e-38)
        x, scales = torch.cat([x, flat[whole:] / rest]), torch.cat([scales, rest[None]])
    borders = (levels[:-1] + levels[1:]) / 2
    x = torch.nn.functional.pad(x, (0, len(x) % 2))
    codes = torch.bucketize(x, borders).byte()
    return codes[::2] << 4 | codes[1::2], scales


@right("04-quantize")
def in_plain_python(weight, levels, block_size):
    flat, levels = weight.double().reshape(-1).tolist(), levels.tolist()
    scales, codes = [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        scale = max(abs(w) for w in block)
        scales.append(scale)
        for w in block:
            x = w / scale if scale else 0.0
            codes.append(min(range(16), key=lambda code: abs(x - levels[code])))
    if len(codes) % 2:
        codes.append(min(range(16), key=lambda code: abs(levels[code])))
    packed = [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    return torch.tensor(packed, dtype=torch.uint8), torch.tensor(scales)


@right("04-quantize")
def in_numpy_blocks(weight, levels, block_size):
    flat = weight.float().numpy().reshape(-1)
    starts = np.arange(0, len(flat), block_size)
    scales = np.maximum.reduceat(np.abs(flat), starts)
    each = np.repeat(scales, block_size)[: len(flat)]
    x = np.append(np.divide(flat, each, out=np.zeros_like(flat), where=each > 0), [0] * (len(flat) % 2))
    levels = levels.numpy()
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x.astype(np.float32)).astype(np.uint8)
    return codes[::2] * np.uint8(16) + codes[1::2], scales


def _quantize(weight, levels, block_size, **change):
    """A right answer with places where it can go wrong."""
    flat = change.get("flatten", lambda w: w.reshape(-1))(change.get("cast", torch.Tensor.float)(weight))
    n = len(flat)
    rows = torch.nn.functional.pad(flat, (0, -n % block_size)).view(-1, block_size)
    scales = change.get("scale", lambda rows: rows.abs().amax(1))(rows)
    divisors = torch.where(scales != 0, scales, 1) if change.get("guard", True) else scales
    x = (rows / divisors[:, None]).flatten()[:n].float()
    codes = change.get("nearest", _nearest)(x, levels)
    return change.get("bytes", _bytes)(codes, levels), scales.float()


@wrong("04-quantize", "scale-signed")
def largest_without_abs(weight, levels, block_size):
    return _quantize(weight, levels, block_size, scale=lambda rows: rows.amax(1))


@wrong("04-quantize", "one-scale")
def one_for_all(weight, levels, block_size):
    flat = weight.float().reshape(-1)
    scale = flat.abs().max()
    return _bytes(_nearest(flat / scale, levels), levels), scale


@wrong("04-quantize", "blocks-by-row")
def anew_in_each_row(weight, levels, block_size):
    rows = weight.float().reshape(-1, weight.shape[-1])
    parts = [part for row in rows for part in row.split(block_size)]
    scales = torch.stack([part.abs().max() for part in parts])
    codes = [_nearest(p / s if s else p, levels) for p, s in zip(parts, scales, strict=True)]
    return _bytes(torch.cat(codes), levels), scales


@wrong("04-quantize", "tail")
def whole_blocks_only(weight, levels, block_size):
    rows = weight.float().reshape(-1, block_size)
    scales = rows.abs().amax(1)
    return _bytes(_nearest((rows / scales[:, None]).flatten(), levels), levels), scales


@wrong("04-quantize", "tail")
def tail_forgotten(weight, levels, block_size):
    flat = weight.float().reshape(-1)
    whole = len(flat) // block_size * block_size
    rows = flat[:whole].view(-1, block_size)
    scales = rows.abs().amax(1)
    return _bytes(_nearest((rows / scales[:, None]).flatten(), levels), levels), scales


@wrong("04-quantize", "tail")
def padding_kept(weight, levels, block_size):
    flat = weight.float().reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    scales = rows.abs().amax(1)
    x = torch.nan_to_num(rows / scales[:, None])
    return _bytes(_nearest(x.flatten(), levels), levels), scales


@wrong("04-quantize", "odd-dropped")
def pairs_only(weight, levels, block_size):
    def packed(codes, levels):
        n = len(codes) // 2 * 2
        return codes[:n:2] * 16 + codes[1:n:2]

    return _quantize(weight, levels, block_size, bytes=packed)


@wrong("04-quantize", "not-packed")
def a_byte_each(weight, levels, block_size):
    return _quantize(weight, levels, block_size, bytes=lambda codes, levels: codes)


@wrong("04-quantize", "zero-scale")
def a_scale_of_one(weight, levels, block_size):
    def scale(rows):
        largest = rows.abs().amax(1)
        return torch.where(largest == 0, 1.0, largest)

    return _quantize(weight, levels, block_size, scale=scale)


@wrong("04-quantize", "zero-block")
def zero_by_zero(weight, levels, block_size):
    return _quantize(weight, levels, block_size, guard=False)


@wrong("04-quantize", "zero-block")
def zero_by_zero_in_borders(weight, levels, block_size):
    def nearest(x, levels):
        return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).byte()

    return _quantize(weight, levels, block_size, guard=False, nearest=nearest)


@wrong("04-quantize", "not-divided")
def without_the_division(weight, levels, block_size):
    packed, _ = _quantize(weight, levels, block_size, scale=lambda rows: torch.ones(len(rows)))
    return packed, _quantize(weight, levels, block_size)[1]


@wrong("04-quantize", "divided-in-16-bits")
def in_the_weights_dtype(weight, levels, block_size):
    return _quantize(weight, levels, block_size, cast=lambda w: w)


@wrong("04-quantize", "divided-in-16-bits")
def times_the_inverse_in_16_bits(weight, levels, block_size):
    def nearest(x, levels):
        return _nearest(x.float(), levels)

    scales = _quantize(weight, levels, block_size)[1]
    flat = weight.reshape(-1)
    each = scales.repeat_interleave(block_size)[: len(flat)].to(weight.dtype)
    return _bytes(nearest(flat * (1 / torch.where(each > 0, each, 1)), levels), levels), scales


@wrong("04-quantize", "divided-in-16-bits")
def quotients_in_float16(weight, levels, block_size):
    return _quantize(weight, levels, block_size, nearest=lambda x, levels: _nearest(x.half().float(), levels))


@wrong("04-quantize", "epsilon")
def an_epsilon_added(weight, levels, block_size):
    flat = weight.float().reshape(-1)
    scales = torch.stack([block.abs().max() for block in flat.split(block_size)])
    x = flat / (scales.repeat_interleave(block_size)[: len(flat)] + 1e-8)
    return _bytes(_nearest(x, levels), levels), scales


@wrong("04-quantize", "epsilon")
def scales_kept_above_an_epsilon(weight, levels, block_size):
    flat = weight.float().reshape(-1)
    scales = torch.stack([block.abs().max() for block in flat.split(block_size)])
    x = flat / scales.clamp(min=1e-5).repeat_interleave(block_size)[: len(flat)]
    return _bytes(_nearest(x, levels), levels), scales


@wrong("04-quantize", "one-scale")
def one_for_all_repeated(weight, levels, block_size):
    return _quantize(weight, levels, block_size, scale=lambda rows: rows.abs().max().expand(len(rows)))


@wrong("04-quantize", "filler")
def filled_with_code_7(weight, levels, block_size):
    def packed(codes, levels):
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
        return codes[::2] * 16 + codes[1::2]

    return _quantize(weight, levels, block_size, bytes=packed)


@wrong("04-quantize", "not-contiguous")
def with_view(weight, levels, block_size):
    return _quantize(weight, levels, block_size, flatten=lambda w: w.view(-1))


@wrong("04-quantize", "nibbles-swapped")
def second_code_high(weight, levels, block_size):
    def packed(codes, levels):
        codes = torch.cat([codes, _nearest(torch.zeros(len(codes) % 2), levels)])
        return codes[1::2] * 16 + codes[::2]

    return _quantize(weight, levels, block_size, bytes=packed)


@wrong("04-quantize", "tie-upper")
def ties_go_up(weight, levels, block_size):
    def nearest(x, levels):
        return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2, right=True).byte()

    return _quantize(weight, levels, block_size, nearest=nearest)


@wrong("04-quantize", "filler")
def filled_with_code_0(weight, levels, block_size):
    return _quantize(
        weight,
        levels,
        block_size,
        bytes=lambda codes, _: codes[::2] * 16 + torch.nn.functional.pad(codes, (0, len(codes) % 2))[1::2],
    )


@wrong("04-quantize", "no-pair")
def codes_only(weight, levels, block_size):
    return _quantize(weight, levels, block_size)[0]


@wrong("04-quantize", "wrong-dtype")
def scales_of_16_bits(weight, levels, block_size):
    packed, scales = _quantize(weight, levels, block_size)
    return packed, scales.to(torch.bfloat16)


@wrong("04-quantize", "changed-input")
def divides_in_place(weight, levels, block_size):
    flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
    packed, scales = _quantize(weight, levels, block_size)
    flat /= scales.repeat_interleave(block_size)[: len(flat)]
    return packed, scales


def _with_divisors(weight, levels, block_size, divisors, returned=None):
    flat = weight.float().reshape(-1)
    scales = torch.stack([block.abs().max() for block in flat.split(block_size)])
    x = flat / divisors(scales).repeat_interleave(block_size)[: len(flat)]
    return _bytes(_nearest(x, levels), levels), returned(scales) if returned else scales


def _kept(divisors, name, returned=None):
    def attempt(weight, levels, block_size):
        return _with_divisors(weight, levels, block_size, divisors, returned)

    attempt.__name__ = name
    return wrong("04-quantize", "epsilon")(attempt)


for _power in (7, 9, 12, 20, 30):
    _kept(lambda s, p=_power: s.clamp(min=10.0**-p), f"divisors_of_1e-{_power}_and_more")
for _power in (7, 9, 10, 12):
    _kept(lambda s, p=_power: s + 10.0**-p, f"divisors_plus_1e-{_power}")
_kept(lambda s: s.clamp(min=1e-8), "scales_of_1e-8_and_more", lambda s: s.clamp(min=1e-8))


@wrong("04-quantize", "divided-in-16-bits")
def float16_left_as_it_is(weight, levels, block_size):
    cast = (lambda w: w) if weight.dtype == torch.float16 else torch.Tensor.float
    return _quantize(weight, levels, block_size, cast=cast)


@wrong("04-quantize", "tie-upper")
def the_filler_of_two_is_the_higher(weight, levels, block_size):
    def packed(codes, levels):
        nearest = len(levels) - 1 - levels.flip(0).abs().argmin()
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), int(nearest))])
        return codes[::2] * 16 + codes[1::2]

    return _quantize(weight, levels, block_size, bytes=packed)


@wrong("04-quantize", "crashed")
def matrices_alone(weight, levels, block_size):
    if weight.ndim > 2:
        raise ValueError("expected a matrix or a vector")
    return _quantize(weight, levels, block_size)


@wrong("04-quantize", "crashed")
def with_a_width(weight, levels, block_size):
    assert weight.shape[-1] > 0
    return _quantize(weight, levels, block_size)


wrong("04-quantize", "state")(overwritten(block_by_block))
wrong("04-quantize", "state")(kept_by_shape(block_by_block))


def _narrow(name, mistake, x=None, levels=None, borders=None):
    """Something is rounded on the way; what comes as None is not. Each is a function of it and the weights' dtype."""
    x, levels, borders = (f or (lambda value, _: value) for f in (x, levels, borders))

    def attempt(weight, table, block_size):
        kind = weight.dtype

        def nearest(quotient, table):
            table = levels(table, kind)
            between = borders((table[:-1] + table[1:]) / 2, kind)
            return torch.bucketize(x(quotient, kind).float(), between.float()).byte()

        return _quantize(weight, table, block_size, nearest=nearest)

    attempt.__name__ = name
    wrong("04-quantize", mistake)(attempt)


def _half(value, _):
    return value.half().float()


def _half_for(dtype):
    return lambda value, kind: value.half().float() if kind == dtype else value


def _as_the_weights(value, kind):
    return value.to(kind).float()


_narrow("x_in_half", "divided-in-16-bits", x=_half)
_narrow("x_in_half_for_float32", "divided-in-16-bits", x=_half_for(torch.float32))
_narrow("x_in_half_for_bfloat16", "divided-in-16-bits", x=_half_for(torch.bfloat16))
_narrow("x_as_the_weights", "divided-in-16-bits", x=_as_the_weights)
_narrow("levels_in_half", "levels-in-16-bits", levels=_half)
_narrow("levels_in_half_for_half", "levels-in-16-bits", levels=_half_for(torch.float16))
_narrow("levels_in_half_for_float32", "levels-in-16-bits", levels=_half_for(torch.float32))
_narrow("levels_as_the_weights", "levels-in-16-bits", levels=_as_the_weights)
_narrow(
    "levels_in_bfloat16_for_bfloat16",
    "levels-in-16-bits",
    levels=lambda value, kind: value.bfloat16().float() if kind == torch.bfloat16 else value,
)
_narrow("borders_in_half", "levels-in-16-bits", borders=_half)
_narrow("borders_as_the_weights", "levels-in-16-bits", borders=_as_the_weights)


@wrong("04-quantize", "zero-block")
def zero_by_zero_in_16_bits(weight, levels, block_size):
    return _quantize(weight, levels, block_size, guard=weight.dtype == torch.float32)


@wrong("04-quantize", "zero-block")
def zero_by_zero_in_a_number(weight, levels, block_size):
    return _quantize(weight, levels, block_size, guard=weight.dim() > 0)


@wrong("04-quantize", "odd-dropped")
def pairs_only_in_bfloat16(weight, levels, block_size):
    packed, scales = _quantize(weight, levels, block_size)
    cut = weight.numel() % 2 and weight.dtype == torch.bfloat16
    return packed[:-1] if cut else packed, scales


# 04-dequantize


@right("04-dequantize")
def weight_by_weight(packed, scales, levels, block_size, shape, dtype):
    n = int(np.prod(shape))
    out = torch.empty(n, dtype=torch.float32)
    for i in range(n):
        byte = int(packed[i // 2])
        code = byte % 16 if i % 2 else byte // 16
        out[i] = levels[code] * scales[i // block_size]
    return out.to(dtype).reshape(shape)


@right("04-dequantize")
def in_float64_with_rows(packed, scales, levels, block_size, shape, dtype):
    codes = torch.empty(2 * len(packed), dtype=torch.long)
    codes[0::2], codes[1::2] = (packed // 16).long(), (packed % 16).long()
    n = torch.Size(shape).numel()
    values = torch.nn.functional.pad(levels.double()[codes[:n]], (0, -n % block_size))
    return (values.view(-1, block_size) * scales.double()[:, None]).flatten()[:n].view(shape).to(dtype)


@right("04-dequantize")
def in_numpy_take(packed, scales, levels, block_size, shape, dtype):
    packed, n = packed.numpy(), int(np.prod(shape))
    codes = np.stack([np.right_shift(packed, 4), np.bitwise_and(packed, 15)], axis=-1).ravel()[:n]
    values = levels.numpy()[codes] * np.repeat(scales.numpy(), block_size)[:n]
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def _dequantize(packed, scales, levels, block_size, shape, dtype, **change):
    """A right answer with places where it can go wrong."""
    n = int(np.prod(shape))
    unpack = change.get("unpack", lambda p: torch.stack([p >> 4, p & 15], dim=1).flatten())
    spread = change.get("spread", lambda s: s.repeat_interleave(block_size))
    values = levels[unpack(packed)[:n].long()]
    return change.get("product", torch.mul)(values, spread(scales)[:n]).to(dtype).view(shape)


@wrong("04-dequantize", "nibbles-swapped")
def low_nibble_first(*inputs):
    return _dequantize(*inputs, unpack=lambda p: torch.stack([p & 15, p >> 4], dim=1).flatten())


@wrong("04-dequantize", "halves")
def all_high_ones_first(*inputs):
    return _dequantize(*inputs, unpack=lambda p: torch.cat([p >> 4, p & 15]))


@wrong("04-dequantize", "scales-in-turn")
def repeated(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(
        packed, scales, levels, block_size, shape, dtype, spread=lambda s: s.repeat(block_size)
    )


@wrong("04-dequantize", "rounded-early")
def both_in_16_bits(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(packed, scales.to(dtype), levels.to(dtype), block_size, shape, dtype)


@wrong("04-dequantize", "rounded-early")
def levels_in_16_bits(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(packed, scales, levels.to(dtype), block_size, shape, dtype)


@wrong("04-dequantize", "rounded-early")
def scales_in_16_bits(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(packed, scales.to(dtype), levels, block_size, shape, dtype)


@wrong("04-dequantize", "scale-missing")
def levels_only(*inputs):
    return _dequantize(*inputs, product=lambda values, scales: values)


@wrong("04-dequantize", "scale-divided")
def divided(*inputs):
    return _dequantize(*inputs, product=torch.div)


@wrong("04-dequantize", "tail")
def only_whole_blocks(packed, scales, levels, block_size, shape, dtype):
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    return (levels[codes].view(-1, block_size) * scales[:, None]).view(shape).to(dtype)


@wrong("04-dequantize", "filler-kept")
def with_the_filler(packed, scales, levels, block_size, shape, dtype):
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    return (levels[codes] * scales.repeat_interleave(block_size)[: len(codes)]).to(dtype).view(shape)


@wrong("04-dequantize", "filler-kept")
def with_the_filler_in_one_row(packed, scales, levels, block_size, shape, dtype):
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    weights = (levels[codes] * scales.repeat_interleave(block_size)[: len(codes)]).to(dtype)
    return weights.view(shape) if len(codes) == np.prod(shape) else weights


@wrong("04-dequantize", "shape-lost")
def in_a_row(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(packed, scales, levels, block_size, (int(np.prod(shape)),), dtype)


@wrong("04-dequantize", "wrong-dtype")
def always_float32(packed, scales, levels, block_size, shape, dtype):
    return _dequantize(packed, scales, levels, block_size, shape, torch.float32)


@wrong("04-dequantize", "rounded-otherwise")
def float16_by_way_of_bfloat16(packed, scales, levels, block_size, shape, dtype):
    full = _dequantize(packed, scales, levels, block_size, shape, torch.float32)
    return (full.bfloat16() if dtype == torch.float16 else full).to(dtype)


@wrong("04-dequantize", "rounded-otherwise")
def bfloat16_by_cutting_off(packed, scales, levels, block_size, shape, dtype):
    full = _dequantize(packed, scales, levels, block_size, shape, torch.float32)
    if dtype == torch.bfloat16:
        full = (full.view(torch.int32) >> 16 << 16).view(torch.float32)
    return full.to(dtype)


def _product_in(narrow, packed, scales, levels, block_size, shape, dtype):
    if dtype == narrow:
        levels, scales = levels.to(dtype), scales.to(dtype)
    return _dequantize(packed, scales, levels, block_size, shape, dtype)


@wrong("04-dequantize", "rounded-early")
def product_in_float16(*inputs):
    return _product_in(torch.float16, *inputs)


@wrong("04-dequantize", "rounded-early")
def product_in_bfloat16(*inputs):
    return _product_in(torch.bfloat16, *inputs)


@wrong("04-dequantize", "crashed")
def float16_refused(*inputs):
    if inputs[-1] == torch.float16:
        raise ValueError("float16")
    return _dequantize(*inputs)


@wrong("04-dequantize", "no-tensor")
def numbers_in_lists(*inputs):
    return _dequantize(*inputs).tolist()


wrong("04-dequantize", "state")(overwritten(weight_by_weight))
wrong("04-dequantize", "state")(kept_by_shape(weight_by_weight))


@wrong("04-dequantize", "crashed")
def even_blocks_only(*inputs):
    assert inputs[3] % 2 == 0
    return _dequantize(*inputs)


# 04-place


def _x_and_scale(weights, block_size):
    rows = weights.double().view(-1, block_size)
    scale = rows.abs().amax(1, keepdim=True).expand_as(rows)
    return (rows / scale).flatten(), scale.flatten()


def _nf4():
    return _scaled(_levels(4, 0.9677083)).double()


def _turns(x, importance, levels, rounds=60):
    for _ in range(rounds):
        codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
        for code in range(16):
            mine = codes == code
            if mine.any() and levels[code] != 0:
                levels[code] = (importance[mine] * x[mine]).sum() / importance[mine].sum()
    return levels


@right("04-place")
def lloyd_in_numpy(weights, block_size):
    x, scale = (t.numpy() for t in _x_and_scale(weights, block_size))
    levels = _nf4().numpy()
    for _ in range(300):
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        mass = np.bincount(codes, scale**2, 16)
        new = np.bincount(codes, scale**2 * x, 16) / np.maximum(mass, 1e-30)
        levels = np.where((mass > 0) & (levels != 0), new, levels)
    return levels.astype(np.float32)


@right("04-place")
def best_of_some_starts(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    starts = [_nf4(), torch.cat([-(torch.arange(7, 0, -1) / 7), torch.arange(9) / 8]).double()]
    tried = [_turns(x, scale**2, start) for start in starts]

    def lost(levels):
        return ((levels[torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)] - x) * scale).square().sum()

    return min(tried, key=lost)


@right("04-place")
def by_dynamic_programming(weights, block_size):
    """The least there is, once x is put into 300 bins that are finer near zero."""
    x, scale = (t.numpy() for t in _x_and_scale(weights, block_size))
    _, where = np.unique(np.sign(x) * np.round(np.sqrt(np.abs(x)) * 150), return_inverse=True)
    sums = [np.append(0, np.bincount(where, scale**2 * x**power).cumsum()) for power in range(3)]
    mass, first, second = (s[None, :] - s[:, None] for s in sums)  # of the bins from i to j
    piece = np.triu(np.ones_like(mass), 1) > 0
    with np.errstate(all="ignore"):
        free, at_zero = np.where(piece, second - first**2 / mass, np.inf), np.where(piece, second, np.inf)
    without, with_zero = np.full(len(mass), np.inf), np.full(len(mass), np.inf)
    without[0], steps = 0, []
    for _ in range(16):
        ways = without[:, None] + free, with_zero[:, None] + free, without[:, None] + at_zero
        zero_here = ways[2].min(0) < ways[1].min(0)
        steps.append((*(way.argmin(0) for way in ways), zero_here))
        without, with_zero = ways[0].min(0), np.minimum(ways[1].min(0), ways[2].min(0))
    end, has_zero, levels = len(mass) - 1, True, []
    for before, before_with_zero, before_zero, zero_here in reversed(steps):
        if has_zero and zero_here[end]:
            start, has_zero, level = before_zero[end], False, 0.0
        else:
            start = (before_with_zero if has_zero else before)[end]
            level = first[start, end] / mass[start, end]
        levels.append(level)
        end = start
    return torch.tensor(levels).clamp(-1, 1)


@wrong("04-place", "no-better")
def nf4_again(weights, block_size):
    return _nf4()


@wrong("04-place", "no-better")
def equal_use(weights, block_size):
    x, _ = _x_and_scale(weights, block_size)
    levels = torch.quantile(x, (torch.arange(16) + 0.5).double() / 16)
    levels[levels.abs().argmin()] = 0
    return levels


@wrong("04-place", "no-better")
def equal_steps(weights, block_size):
    return torch.cat([torch.arange(-7, 0) / 7, torch.arange(9) / 8])


@wrong("04-place", "scales-ignored")
def all_x_alike(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, torch.ones_like(scale), _nf4(), rounds=100)


@wrong("04-place", "not-settled")
def one_round(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, scale**2, _nf4(), rounds=1)


@wrong("04-place", "outside")
def of_the_weights(weights, block_size):
    return _turns(weights.double(), torch.ones(len(weights)).double(), _nf4() * 3)


@wrong("04-place", "zero-missing")
def zero_moved_too(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    levels = _nf4()
    for _ in range(50):
        codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
        mass = torch.zeros(16).double().index_add(0, codes, scale**2)
        levels = torch.zeros(16).double().index_add(0, codes, scale**2 * x) / mass
    return levels


@wrong("04-place", "not-sixteen")
def seventeen(weights, block_size):
    return torch.arange(-8, 9) / 8


@wrong("04-place", "not-sixteen")
def a_number(weights, block_size):
    return 0.5


@wrong("04-place", "scales-once")
def weighted_with_the_scale(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, scale, _nf4(), rounds=100)


def _weighted(name, power):
    def attempt(weights, block_size):
        x, scale = _x_and_scale(weights, block_size)
        return _turns(x, scale**power, _nf4(), rounds=100)

    attempt.__name__ = name
    wrong("04-place", "scales-too-often")(attempt)


_weighted("squared_twice", 4)


def _medians(name, power):
    def attempt(weights, block_size):
        x, scale = _x_and_scale(weights, block_size)
        x, order = x.sort()
        mass, levels = scale[order] ** power, _nf4()
        for _ in range(100):
            codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
            for code in {*range(16)} - {7}:
                mine = codes == code
                if mine.any():
                    upto = mass[mine].cumsum(0)
                    levels[code] = x[mine][torch.searchsorted(upto, upto[-1] / 2)]
        return levels

    attempt.__name__ = name
    wrong("04-place", "medians")(attempt)


_medians("plain_medians", 0)
_medians("medians_weighted_with_the_square", 2)


@right("04-place")
def from_8_steps_below_zero(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, scale**2, torch.cat([torch.arange(-8, 0) / 8, torch.arange(8) / 7]).double(), rounds=100)


AF4 = """-1 -0.69441008 -0.51243739 -0.3736951 -0.25607552 -0.14982478 -0.04934812 0
0.04273164 0.12934483 0.21961274 0.31675666 0.42563882 0.55496234 0.72424863 1"""


@wrong("04-place", "ready-made")
def af4(weights, block_size):
    return torch.tensor([float(level) for level in AF4.split()])


@wrong("04-place", "not-settled")
def three_rounds(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, scale**2, _nf4(), rounds=3)


@wrong("04-place", "not-settled")
def five_rounds(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    return _turns(x, scale**2, _nf4(), rounds=5)


@wrong("04-place", "ends-kept")
def three_stay(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    levels = _nf4()
    for _ in range(60):
        codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
        for code in {*range(1, 15)} - {7}:
            mine = codes == code
            levels[code] = (scale[mine] ** 2 * x[mine]).sum() / (scale[mine] ** 2).sum()
    return levels


@wrong("04-place", "no-mean")
def a_mean_of_nothing(weights, block_size):
    x, scale = _x_and_scale(weights, block_size)
    levels = 4 * _nf4()
    for _ in range(60):
        codes = torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)
        for code in {*range(16)} - {7}:
            mine = codes == code
            levels[code] = (scale[mine] ** 2 * x[mine]).sum() / (scale[mine] ** 2).sum()
    return levels
