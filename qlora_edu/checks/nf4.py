"""Checks of chapter 04: sixteen levels, the nearest of them, two codes to a byte, and blocks that share a scale.

Everywhere: `levels` are what the codes 0, 1, 2, ... stand for, a block's scale is its largest magnitude, and
x = weight / scale is in [-1, 1]. Where float32 must round, either neighbour is accepted; ties are tried on multiples
of small powers of two, with which float32 computes exactly.
"""

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_edu import formats, lloyd
from qlora_edu.checks import expect
from qlora_edu.checks.calls import Calls
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise
from qlora_edu.checks.quantization import cut

OFFSET = 0.9677083  # NF4's
LEAST = 8.852947  # % that is left with the best levels for `_real`, by a table over all x in ascending order


def _tensor(got, what: str):
    """Refuse a list or a number with words of its own; None is left to others."""
    expect.true(got is None or isinstance(got, Tensor), what, "no-tensor", "a tensor", type(got).__name__)
    return got


def _quantile(p: Tensor) -> Tensor:
    """Q(p) of N(0, 1), in the dtype of `p`: the inverse of (1 + erf(q / √2)) / 2."""
    return math.sqrt(2) * torch.erfinv(2 * p - 1)


def _row(count: int, offset: float, spacing: torch.dtype = torch.float64) -> Tensor:
    """`count` probabilities in equal steps from the offset towards one half, which is left out."""
    return torch.linspace(offset, 0.5, count + 1, dtype=spacing)[:-1]


def _join(*parts: Tensor) -> Tensor:
    """Ascending, divided by the largest."""
    levels = torch.cat(parts).sort().values
    return levels / levels.max()


def _levels(bits: int, offset: float, spacing=torch.float64, divided=torch.float64, q=_quantile) -> Tensor:
    """The definition: 2^(bits - 1) quantiles above zero, one fewer below it, and zero."""
    count = 2 ** (bits - 1)
    below, above = (q(_row(n, offset, spacing).double()).to(divided) for n in (count - 1, count))
    return _join(-below, below.new_zeros(1), above)


def _other_levels(bits: int, offset: float) -> dict[str, Tensor | list[Tensor]]:
    """What known mistakes give instead, float64."""
    count = 2 ** (bits - 1)
    n, p, zero = _row(count - 1, offset), _row(count, offset), torch.zeros(1)
    right, below, above = _levels(bits, offset), _quantile(n), _quantile(p)
    i = torch.arange(1, 2 * count + 1, dtype=torch.float64) / (2 * count + 1)
    equation = _join((_quantile(i[:-1]) + _quantile(i[1:])) / 2)  # without the first, minus infinity
    other = {
        "equation-4": [equation, torch.cat([-torch.ones(1), equation])],
        "symmetric": [_join(-half, zero, half) for half in (below, above)],
        "one-step": [_join(-above[:-1], zero, above), _join(-above[1:], zero, above)],
        "sides-swapped": -right.flip(0),
        "not-divided": right * above.max(),
        "descending": right.flip(0),
        "not-quantiles": [_join(-f(n), zero, f(p)) for f in (torch.special.ndtr, lambda p: p - 0.5)],
    }
    return other if offset == OFFSET else other | {"offset-ignored": _levels(bits, OFFSET)}


@exercise("04-codebook")
def codebook(answer: Answer, draw: Draw) -> None:
    """`f(bits, offset)`: the NormalFloat levels, ascending, float32 (2**bits,)."""
    # 4 bits twice: for another offset there are other levels. The last two are near the limits, and allowed.
    cases = [(4, OFFSET), (2, 0.9), (3, draw.number(0.8, 0.95)), (4, draw.number(0.8, 0.95))]
    cases += [(5, draw.number(0.97, 0.999)), (6, 0.95), (7, 0.95), (8, draw.number(0.9, 0.99))]
    limits = [(4, draw.number(0.501, 0.51)), (3, draw.number(0.9998, 0.9999))]
    calls = Calls()
    for bits, offset in cases + limits:
        case, count = f"for bits = {bits}, offset = {offset:.7g}", 2**bits
        got = answer(bits, offset, crash="offset-refused" if (bits, offset) in limits else None)
        calls.add(got, case, right="")  # the same levels again are no sign of a memory
        _tensor(got, f"the levels, {case}")
        if isinstance(got, Tensor) and got.ndim == 1 and len(got):
            what, zeros = f"the levels that are zero, {case}", int((got == 0).sum())
            expect.true(zeros < 2, what, "zero-twice", 1, zeros)
            expect.true(zeros > 0 or len(got) not in (count - 1, count), what, "zero-missing", 1, 0)
            ignored = len(got) != count and len(got) in (4, 8, 16, 32, 64, 128, 256)
            expect.true(not ignored, f"the number of levels, {case}", "bits-ignored", count, len(got))
        # In float32 a probability is off by eps, a quantile by eps / φ(q) and roundings of its own. That is most at the
        # ends, and all are divided by one of those.
        q = _quantile(torch.tensor(offset, dtype=torch.float64)).item()
        off = expect.EPSILON * (2 * math.sqrt(2 * math.pi) * math.exp(q**2 / 2) + 4 * q)
        right, wrong = _levels(bits, offset), _other_levels(bits, offset)
        expect.close(got, right, f"the levels, {case}", 2 * off / q, wrong, torch.float32)
    single, narrow = torch.float32, (_quantile, torch.special.ndtri)
    # bitsandbytes' 16 numbers, to the last bit
    right, got = _levels(4, OFFSET, single, single), answer(4, OFFSET)
    wrong = {
        "spaced-in-64": [_levels(4, OFFSET).float(), _levels(4, OFFSET, divided=single)],
        "divided-in-64": _levels(4, OFFSET, single).float(),
        "quantiles-in-32": [_levels(4, OFFSET, single, single, lambda p, q=q: q(p.float())) for q in narrow],
        "other-bits": got,
    }
    expect.close(got, right, f"the last bits, for bits = 4, offset = {OFFSET}", 0.0, wrong)
    for offset in (1.0, 0.5, draw.number(0.1, 0.4), 1.5):
        answer.raises(ValueError, 4, offset, what="½ < offset < 1", mistake="offset-unchecked")


def _codes(x: Tensor, levels: Tensor, upper: bool = False) -> Tensor:
    """The code of the nearest level, of two equally near ones the lower (or upper). x: any shape."""
    distance = (x.double()[..., None] - levels.double()).abs()
    return len(levels) - 1 - distance.flip(-1).argmin(-1) if upper else distance.argmin(-1)


def _borders(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


@exercise("04-nearest")
def nearest(answer: Answer, draw: Draw) -> None:
    """`f(x, levels)`: the code of the level nearest to each x, uint8, in the shape of x."""
    nf, cases = _levels(4, draw.number(0.95, 0.98)).float(), []
    # Further from the border than float32 rounds, and nearer than 16 bits or four decimals tell.
    close = torch.cat([_borders(nf) - 2**-21, _borders(nf) + 2**-21])
    coarse, between = (
        draw.permutation(513)[:16].sort().values / 256 - 1,
        draw.integers(80, low=-512, high=511),
    )
    cases.append(
        ((2 * between + 1) / 1024, coarse, "for x of shape (80,), 16 levels")
    )  # no border among them
    cases.append((close, nf, "for x close to a border"))
    # Pairs of levels 2^-16 apart, and numbers beside their borders: float32 has all of them, and their distances.
    low = (draw.permutation(8) * 2 + draw.integers(8, low=16, high=17)).sort().values / 32
    low = torch.where(draw.permutation(8) < 4, low, -low).sort().values
    pairs = torch.stack([low, low + 2**-16], dim=1).flatten()
    beside = (_borders(pairs)[::2, None] + torch.tensor([-(2**-20), -(2**-24), 2**-24, 2**-20])).flatten()
    wide, many = (draw.whole(2, 9), draw.whole(10, 20)), draw.whole(20, 255)
    shapes = [
        ((61,), 16),
        ((7, 9), 5),
        ((7, 9), 5),
        ((1,), 3),
        ((13, 4), 3),
        ((2, 3, 5), 2),
        ((300,), 256),
        (wide, many),
    ]
    for shape, count in [*shapes, ((), 4), ((0, 3), 5)]:
        # Multiples of 1/256 and 1/512: borders, distances and their squares are exact in float32, and ties abound.
        levels = draw.permutation(513)[:count].sort().values / 256 - 1
        x = draw.integers(math.prod(shape), low=-512, high=512) / 512
        # Of a single number neither the first nor the last code is right.
        x[::3] = _borders(levels)[draw.integers(len(x[::3]), low=int(len(x) == 1), high=count - 2)]
        x[1:4] = torch.tensor([-1.0, 1.0, -0.0])[: len(x[1:4])]
        cases.append((x.view(shape), levels, f"for x of shape {shape}, {count} levels"))
    cases.append((beside, pairs, "for x close to a border, some levels close together"))
    zero, calls = _split(draw), Calls()
    x = torch.cat([torch.tensor([0.0, -0.0, 0.5, -0.5, 1, -1]), (2 * between[:30] + 1) / 1024])
    cases.append((x, zero, "for x = 0 halfway between two levels"))
    turned = (draw.integers(6, 11, low=-512, high=512) / 512).T
    cases.append((turned, zero, "for x of shape (11, 6), a transposed matrix"))
    for x, levels, case in cases:
        right, upper, top = _codes(x, levels), _codes(x, levels, upper=True), len(levels) - 1
        got = answer(x, levels, crash=None if x.is_contiguous() else "not-contiguous")
        if x.ndim == 0 and isinstance(got, int) and not isinstance(got, bool) and 0 <= got <= top:
            got = torch.tensor(got, dtype=torch.uint8)  # a NumPy scalar
        calls.add(got, case, right)
        _tensor(got, f"the codes, {case}")
        wrong = {
            "level-above": torch.searchsorted(levels, x.contiguous()).clamp(max=top),
            "level-below": (torch.searchsorted(levels, x.contiguous(), right=True) - 1).clamp(min=0),
            "equal-steps": ((x + 1) / 2 * top).round(),
            "sign-lost": (x.double().abs()[..., None] - levels.double().abs()).abs().argmin(-1),
            "off-by-one": right + 1,
            "levels-returned": levels[right],
            "tie-upper": upper,
        }
        if x.numel() == 1 and not torch.equal(right, upper):
            del wrong["level-above"]  # would have been seen before; at one number it looks like the other
        if x.numel():
            wrong["wrong-dimension"] = (x.reshape(-1, 1).double() - levels.double()).abs().argmin(0)
        wrong["shape-lost"] = right.flatten() if x.ndim > 1 else []
        if isinstance(got, Tensor) and not got.is_floating_point() and got.shape == x.shape:
            expect.tensor(got, f"the codes, {case}", None, torch.uint8)
            if x is cases[0][0]:
                small, few = x.bfloat16()[:, None], levels.bfloat16()
                wrong["not-exact"] = [(small - few).abs().argmin(-1), _codes(small[:, 0], few)]
            elif x is close or x is beside:  # the neighbour's code, and not at all of them
                wrong = {"not-exact": torch.where((got.long() - right).abs() == 1, got, right)}
            else:  # the upper one of two, at some ties or at all
                wrong["tie-upper"] = torch.where(got == upper, upper, right)
        place = lambda index, x=x: f"first at {list(index)}, for x = {x[index].item():.9g}"  # noqa: E731
        expect.close(got, right, f"the codes, {case}", 0.0, wrong, torch.uint8, place)


def _split(draw: Draw) -> Tensor:
    """16 levels, multiples of 1/128, none of them zero, the two beside it equally near."""
    least = draw.whole(1, 20)
    others = (draw.permutation(100)[:14] + least + 1) * (2 * draw.integers(14, low=0, high=1) - 1)
    return torch.cat([torch.tensor([-least, least]), others]).sort().values / 128


def _packed(codes: Tensor, filler: int) -> Tensor:
    """The definition: byte = 16 · first + second; `filler` stands in for a missing second one."""
    codes = codes.tolist() + [filler] * (len(codes) % 2)
    return torch.tensor([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)


def _same_bytes(got, right: Tensor, what: str, looks_like: Mapping) -> None:
    """Refuse other bytes, and draw the first one that differs: its two codes, and the byte in hexadecimal."""
    place = lambda index: f"first byte {index[0]}, codes {2 * index[0]} and {2 * index[0] + 1}"  # noqa: E731
    try:
        expect.close(got, right, what, 0.0, looks_like, torch.uint8, place)
    except expect.Wrong as wrong:
        if isinstance(got, Tensor) and got.dtype == right.dtype and got.shape == right.shape:
            first = (got != right).nonzero()[0]
            pair = [int(right[first]), int(got[first])]
            wrong.expected, wrong.got = (f"[{b >> 4:>3} |{b & 15:>3} ] = 0x{b:02x}" for b in pair)
        raise


@exercise("04-pack")
def pack(answer: Answer, draw: Draw) -> None:
    """`f(codes, filler)`: two codes to a byte, the first in the high nibble, uint8 (ceil(n / 2),)."""
    odds = [(7, draw.whole(1, 14)), (1, 15), (3, 0), (2 * draw.whole(40, 150) + 1, draw.whole(0, 15))]
    calls = Calls()
    evens = [(2, 15), (2 * draw.whole(2, 30), 0), (2 * draw.whole(40, 150), 3)]
    cases = [(n, filler, None) for n, filler in ((6, 9), (6, 9), *odds, *evens)]
    for n, filler, final in [*cases, (8, 9, 0), (4, 7, 15)]:  # the last of an even number may be any
        codes, odd = draw.integers(n, low=0, high=15), n % 2
        codes[0] = draw.whole(8, 15)  # the highest bit of the byte
        codes[-1] = draw.choice({*range(8, 16)} - {filler}) if final is None else final
        full, right = torch.cat([codes, codes.new_full((odd,), filler)]), _packed(codes, filler)
        first, second = full[::2], full[1::2]
        wrong = {
            "nibbles-swapped": first + 16 * second,
            "halves": 16 * full[: len(right)] + full[len(right) :],
            "not-shifted": [first + second, first | second, 10 * first + second, 15 * first + second],
            "one-each": [codes, 16 * codes] if n > 1 else [],
        }
        if odd:
            last = [torch.cat([right[:-1], end]) for end in (first[-1:] + 16 * filler, codes[-1:])]
            wrong["odd-dropped"] = right[:-1]
            wrong["filler-first"] = [_packed(torch.cat([full[n:], codes]), 0), last[0]]
            wrong["filler-ignored"] = [*(_packed(codes, other) for other in range(16)), last[1]]
        else:
            wrong["filled-though-even"] = torch.cat([right[:-1], 16 * first[-1:] + filler])
        what = f"the bytes, for n = {n}" + f", filler = {filler}" * (odd or final is not None)
        got = _tensor(answer(codes.to(torch.uint8), filler), what)
        _same_bytes(calls.add(got, what.removeprefix("the bytes, "), right), right, what, wrong)


def _parts(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x = weight / scale, float64 (n,), 0 where the scale is 0; and the scales, float64 (blocks,)."""
    blocks = weight.reshape(-1).double().split(block_size)
    scales = [block.abs().max() for block in blocks]
    return torch.cat([b / s if s else b for b, s in zip(blocks, scales, strict=True)]), torch.stack(scales)


def _rounded(x: Tensor, levels: Tensor) -> dict[str, list[Tensor]]:
    """The codes if x, or the levels, or the borders between them are rounded to 16 bits."""
    narrow = torch.half, torch.bfloat16
    borders = [_borders(levels), *(_borders(levels.to(dtype).double()) for dtype in narrow)]
    borders += [_borders(levels).to(dtype) for dtype in narrow]
    quotients = [torch.bucketize(x.to(dtype).double(), borders[0].double()) for dtype in narrow]
    others = [torch.bucketize(x.double(), b.double()) for b in borders[1:]]
    return {"divided-in-16-bits": quotients, "levels-in-16-bits": others}


def _awkward(draw: Draw, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs of weights, many codes of which change if anything that they depend on is rounded to 16 bits."""
    rows = draw.normal(800, 64, dtype=dtype)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    scale = largest.abs()
    exact = rows.double() / scale.double()
    codes, found = torch.bucketize(exact, _borders(levels).double()), []
    clear = torch.ones_like(exact, dtype=torch.bool)  # float32 does not mistake them
    for border in _borders(levels).double():
        clear &= (exact - border).abs() > 1e-5
    narrow = [
        torch.bucketize(x.double(), _borders(levels).double()) for x in (rows / scale, rows * (1 / scale))
    ]
    for other in (*narrow, *chain(*_rounded(exact, levels).values())):
        differ = (other != codes) & clear
        found.append(torch.stack([largest.expand_as(rows)[differ], rows[differ]], dim=1)[:16])
    return torch.cat(found).flatten()


@exercise("04-quantize")
def quantize(answer: Answer, draw: Draw) -> None:
    """`f(weight, levels, block_size)`: packed codes, uint8 (ceil(n / 2),), and scales, float32 (blocks,)."""
    nf, dyadic = _levels(4, 0.97).float(), draw.permutation(257)[:16].sort().values / 128 - 1
    ties = draw.integers(6, 16, low=-256, high=256) / 256
    ties[:, 0], ties[:, 1:9] = 1, _borders(dyadic)[draw.permutation(15)[:8]]
    ties = ties * 2.0 ** draw.integers(6, 1, low=-3, high=3)  # dividing by a power of two rounds nothing
    low = draw.permutation(140)[:16].sort().values / 128 - 1  # few levels above zero
    zeros, split = draw.normal(4, 24), _split(draw)
    zeros[1, 8:], zeros[2] = 0, 0
    easy = draw.normal(300, 32, dtype=torch.float16)
    x = easy.double() / easy.double().abs().amax(dim=1, keepdim=True)
    distance = (x[..., None] - _borders(nf)).abs().amin((1, 2))
    easy = easy[distance.argsort(descending=True)[:2]]  # no x is near to a border
    pruned = draw.normal(6, 8)
    pruned[:, 3:6] = 0
    calls = Calls()
    # Down to where 1 / scale is still a float32 number.
    tiny = draw.normal(8, 64) * 10.0 ** -torch.tensor([0, 4, 6, 7, 9, 12, 20, 33])[:, None]
    for name, weight, levels, size in (
        ("one block", easy[0], nf, 32),
        ("one block", easy[1], nf, 32),
        ("bfloat16 weights", _awkward(draw, nf, torch.bfloat16), nf, 2),
        ("float16 weights", _awkward(draw, nf, torch.float16), nf, 2),
        ("float32 weights", _awkward(draw, nf, torch.float32), nf, 2),
        ("whole blocks, some of tiny weights", tiny, nf, 64),
        ("a short last block", draw.normal(5, 14), nf, 32),
        ("an odd number of weights", draw.normal(7, 11), nf, 16),
        ("one weight", draw.normal(1) - 5, low, 64),
        ("ties", ties, dyadic, 16),
        ("blocks of zeros", zeros, nf, 16),
        ("a transposed matrix", draw.normal(6, 20).T, nf, 8),
        ("a last block of zeros", torch.cat([draw.normal(8), torch.zeros(3)]), low, 8),
        ("zero halfway between two levels", torch.cat([draw.normal(8), torch.zeros(3)]), split, 8),
        ("three dimensions", draw.normal(4, draw.whole(2, 5), 6), nf, 12),
        ("any size of blocks", draw.normal(draw.whole(2, 9), draw.whole(2, 40)), nf, 2 * draw.whole(1, 30)),
        ("no dimension", draw.normal() - 5, nf, 2),
        ("an odd number, transposed", draw.normal(9, 7).T, nf, 16),
        ("blocks of zeros in bfloat16", zeros.bfloat16(), low, 16),
        ("blocks of zeros in float16, transposed", pruned.half().T, low, 6),
        ("an odd number in bfloat16", draw.normal(7, 5, dtype=torch.bfloat16), low, 8),
        ("an odd number in float16", draw.normal(9, dtype=torch.float16), nf, 4),
        ("nothing but zeros", torch.zeros(3, 7), low, 4),
        ("a single zero", torch.zeros(()), low, 2),
        ("large weights", 1e15 * draw.normal(4, 10), nf, 8),
    ):
        case = f"{name}: shape {tuple(weight.shape)}, blocks of {size}"
        n, (x, right), width = weight.numel(), _parts(weight, size), ([1, *weight.shape])[-1]
        blocks, odd = len(right), n % 2
        crash = "not-contiguous" if not weight.is_contiguous() else "tail" if n % size and n > 1 else None
        got = answer(weight, levels, size, crash=crash)
        pair = isinstance(got, tuple | list) and len(got) == 2
        came = f"{len(got)} values" if isinstance(got, tuple | list) else type(got).__name__
        expect.true(pair or got is None, f"the result, {case}", "no-pair", "2 values", came)
        packed, scales = calls.add(expect.parts(got, "the result", 2), case)
        shapes = {(n // size,): "tail", (): "one-scale", (1,): "one-scale"}
        shapes |= {(n // width * -(-width // size),): "blocks-by-row"} if width % size else {}
        expect.tensor(scales, f"the scales, {case}", (blocks,), torch.float32, shape_mistakes=shapes)
        flat, each = weight.reshape(-1), right.repeat_interleave(size)[:n]
        signed = torch.stack([block.max() for block in flat.split(size)])
        wrong = {"scale-signed": signed, "zero-scale": torch.where(right == 0, 1.0, right)}
        wrong["one-scale"] = right.max().expand(blocks)
        limits = [10.0**-power for power in range(4, 34)]
        wrong["epsilon"] = [f(right.float(), least) for least in limits for f in (torch.add, torch.clamp)]
        # A scale of zero may be kept from being zero by the smallest of numbers, as bitsandbytes does in a tail.
        expect.close(scales, right, f"the scales, {case}", 1e-37, wrong)
        shapes = {(blocks * size // 2,): "tail", (n // 2,): "odd-dropped", (n,): "not-packed"}
        expect.tensor(packed, f"the bytes, {case}", ((n + 1) // 2,), torch.uint8, shape_mistakes=shapes)
        got = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n].long()
        # float32 makes x at most eps another number, and a border half of that; with ties it rounds nothing.
        distance = (x[:, None] - levels.double()).abs()
        near = distance.gather(1, got[:, None])[:, 0] <= distance.amin(1) + 3 * expect.EPSILON
        codes, none = _codes(x, levels), int(_codes(torch.zeros(1), levels))
        exact = (x * 256 == (x * 256).round()) & (name in ("ties", "zero halfway between two levels"))
        codes = torch.where(near & ~exact, got, codes)
        narrow, right = each.to(flat.dtype), _packed(codes, none)
        if torch.equal(packed, right):
            continue
        rounded = _rounded(x, levels)
        rounded["divided-in-16-bits"] += [
            _codes(q.nan_to_num(), levels) for q in (flat / narrow, flat * (1 / narrow))
        ]
        # The one that fits almost everywhere: where float32 rounds too, it may be off by one.
        off = {mistake: min(int((got != c).sum()) for c in codes) for mistake, codes in rounded.items()}
        nearest, differ = min(off, key=off.get), int((got != codes).sum())
        like = packed if off[nearest] < differ / 8 else right
        upper, last = _codes(x, levels, upper=True), int(_codes(torch.zeros(1), levels, upper=True))
        wrong = {
            "tie-upper": [_packed(c, end) for c in (upper, codes) for end in (none, last)],
            "not-divided": _packed(_codes(flat, levels), none),
            nearest: like,
            "zero-block": _packed(torch.where(each == 0, got, codes), none),
        }
        kept = [f(each, least) for least in limits for f in (torch.add, torch.clamp)]
        wrong["epsilon"] = [_packed(_codes(flat / divisor, levels), none) for divisor in kept]
        wrong["nibbles-swapped"] = right // 16 + right % 16 * 16
        wrong["filler"] = [_packed(codes, filler) for filler in range(16 * odd)]
        _same_bytes(packed, right, f"the bytes, {case}", wrong)


@exercise("04-dequantize")
def dequantize(answer: Answer, draw: Draw) -> None:
    """`f(packed, scales, levels, block_size, shape, dtype)`: level times scale, rounded once more to the dtype."""
    full, brain, half = torch.float32, torch.bfloat16, torch.float16
    # The first ones show one bug of the exercise each.
    cases = [
        ((8, 8), 64, full),
        ((8, 8), 64, full),
        ((5, 12), 20, full),
        ((24, 16), 32, brain),
        ((24, 16), 32, half),
    ]
    cases += [
        ((3, 14), 16, full),
        ((5, 7), 8, full),
        ((1,), 32, brain),
        ((), 2, half),
        ((3, 11, 3), 16, half),
        ((6, 7), 7, full),
        ((25,), 3, brain),
        ((3, 5), 1, half),
    ]
    calls = Calls()
    cases += [((draw.whole(2, 9), draw.whole(2, 40)), draw.whole(1, 40), draw.choice([full, brain, half]))]
    for shape, size, dtype in cases:
        n = math.prod(shape)
        levels, scales = draw.uniform(16, low=-1), draw.uniform(-(-n // size), low=0.5, high=3)
        scales[2:3] = 0
        codes, which = draw.integers(n + n % 2, low=0, high=15), torch.arange(n)
        values, spread = levels[codes[:n]], scales[which // size]
        exact = values.double() * spread.double()  # of two float32 numbers: nothing is rounded
        right, at_once = exact.float().to(dtype), exact.to(dtype)
        halves, swapped = torch.cat([codes[::2], codes[1::2]]), codes.view(-1, 2).flip(1).flatten()
        narrow = values.to(dtype), spread.to(dtype)
        wrong = {
            "nibbles-swapped": [levels[swapped[:n]] * spread],
            "halves": [levels[halves[:n]] * spread],
            "scales-in-turn": [values * scales[which % len(scales)]],
            "rounded-early": [narrow[0] * narrow[1], narrow[0] * spread, values * narrow[1]],
            "rounded-otherwise": [exact.bfloat16(), exact.half(), cut(exact)],
            "scale-missing": [values],
            "scale-divided": [values / spread],
        }
        case = f"for shape {shape}, blocks of {size}, {str(dtype).removeprefix('torch.')}"
        crash = "filler-kept" if n % 2 else "tail" if n % size else None
        # The last low nibble of an odd number may be anything.
        got = calls.add(answer(_packed(codes, 0), scales, levels, size, shape, dtype, crash=crash), case)
        _tensor(got, f"the weights, {case}")
        shapes = {(n,): "shape-lost", (n + 1,): "filler-kept"}
        got = expect.tensor(got, f"the weights, {case}", shape, dtype, shape_mistakes=shapes)
        # From float32 to 16 bits, or at once: in rare places these are two neighbours, and both are right.
        within = (right.double() - at_once.double()).abs()
        wrong = {mistake: [w.to(dtype) for w in instead] for mistake, instead in wrong.items()}
        expect.close(got.reshape(-1), right, f"the weights, {case}", within, wrong)


def _loss(levels: Tensor, weights: Tensor, block_size: int) -> float:
    """Root-mean-square error of the weights that come back, in % of the weights'. Encodes with any levels."""
    (x, scales), levels = _parts(weights, block_size), levels.double().sort().values
    error = (levels[_codes(x, levels)] - x) * scales.repeat_interleave(block_size)
    return 100 * (error.square().sum() / weights.double().square().sum()).sqrt().item()


def _lloyd(weights: Tensor, block_size: int, start: Tensor) -> Tensor:
    """Levels after 200 rounds from `start`, zero kept: each the mean of its x, weighted with scale²."""
    x, scales = _parts(weights, block_size)
    (x, order), levels, end = x.sort(), start, torch.tensor([len(x)])
    mass = scales.repeat_interleave(block_size)[order] ** 2
    sums = torch.nn.functional.pad(torch.stack([mass, mass * x]).cumsum(1), (1, 0))
    for _ in range(200):
        ends = torch.cat([0 * end, torch.searchsorted(x, _borders(levels), right=True), end])
        mass, total = sums[:, ends].diff()
        levels = torch.where((levels == 0) | (mass == 0), levels, total / mass)
    return levels


def _settled(levels: Tensor, weights: Tensor, block_size: int) -> str:
    """What the levels are a resting place of, other than of Lloyd's rounds; "" if none is known."""
    x, scales = _parts(weights, block_size)
    x, order = x.sort()
    scales, codes = scales.repeat_interleave(block_size)[order], torch.bucketize(x, _borders(levels))
    used = [i for i in range(16) if levels[i] != 0 and (codes == i).any()]

    def centre(i: int, power: float, median: bool) -> Tensor:
        mine, mass = x[codes == i], scales[codes == i] ** power
        if median:
            return mine[torch.searchsorted(mass.cumsum(0), mass.sum() / 2)]
        return (mass * mine).sum() / mass.sum()

    def moves(power: float, median: bool = False) -> float:
        """How far a round would move a level, at most."""
        return max((float((centre(i, power, median) - levels[i]).abs()) for i in used), default=0.0)

    found = {
        "scales-ignored": moves(0),
        "scales-once": moves(1),
        "scales-too-often": min(moves(3), moves(4)),
        # Not far from means: five times as close is asked.
        "medians": 5 * min(moves(power, median=True) for power in range(3)),
    }
    name = min(found, key=found.get)
    return name if found[name] < min(0.005, moves(2) / 2) else ""


def _placed(answer: Answer, weights: Tensor, block_size: int) -> Tensor:
    """The answer's levels, if they are sixteen in [-1, 1] and one is zero."""
    got = expect.tensor(answer(weights, block_size), "the levels", (16,), mistake="not-sixteen")
    expect.true(got.is_floating_point(), "the dtype of the levels", "wrong-dtype", "floating", got.dtype)
    unknown = int(got.isnan().sum())
    expect.true(unknown == 0, "the levels that are NaN", "no-mean", 0, unknown)
    largest = got.abs().max().item()
    expect.true(largest <= 1, "the largest of the levels' magnitudes", "outside", "at most 1", largest)
    expect.true(bool((got == 0).any()), "the levels that are zero", "zero-missing", 1, 0)
    return got.double().sort().values


@exercise("04-place", seconds=60)
def place(answer: Answer, draw: Draw) -> Score:
    """`f(weights, block_size)`: 16 levels in [-1, 1], zero among them, with the least squared error it can find."""
    nf, count = _levels(4, OFFSET), 32_000
    steps = torch.cat([torch.arange(-7, 0) / 7, torch.arange(9) / 8]).double()
    kinds, found = ((12.0, 100, 32), (0.1, 3, 64)), []
    for factor, one_in, size in kinds:
        for _ in range(3):  # luck decides much in one of them
            weights = draw.normal(count)
            weights[draw.permutation(count)[: count // one_in]] *= factor
            found.append((_placed(answer, weights, size), weights, size))
    for i, (factor, one_in, size) in enumerate(kinds):
        shares = []
        for got, weights, _ in found[3 * i : 3 * i + 3]:
            known = _loss(nf, weights, size)
            best = min(_loss(_lloyd(weights, size, start), weights, size) for start in (nf, steps))
            shares.append(100 * (known - _loss(got, weights, size)) / (known - best))
        share = sum(shares) / 3
        if not share >= 90:
            draws = found[3 * i : 3 * i + 3]
            name = next(filter(None, (_settled(*one) for one in draws)), None) or (
                "no-better" if share < 10
                else "ready-made" if torch.equal(found[0][0], found[3][0])
                else "ends-kept" if all({-1.0, 1.0} <= set(got.tolist()) for got, *_ in draws)
                else "not-settled"
            )  # fmt: skip
            way = "the way from NF4's error to that of a good method, on average over three draws"
            kind = f"1 weight in {one_in} times {factor:g}, blocks of {size}"
            expect.fail(f"{way}, {kind}", "at least 90%", f"{share:.0f}%", name)
    weights, size = _real(), 64
    left = _loss(_placed(answer, weights, size), weights, size)
    rivals = {"NF4": formats.levels("nf4"), "FP4": formats.levels("fp4"), "INT4": formats.levels("int4")}
    rivals["best for N(0, 1), with 0"] = lloyd.best_levels(size, pinned=(0,))
    reached = {name: _loss(levels, weights, size) for name, levels in rivals.items()}
    return Score(left, "% root-mean-square error", reached | {"the least there is": LEAST})


def _real() -> Tensor:
    """4,096 weights of SmolLM2: the corners of four matrices of its layer 15, float32."""
    stored = load_file(Path(__file__).parents[1] / "data" / "spectra.safetensors")
    corners = [stored[f"weight.{name}_proj.corner"] for name in ("q", "v", "up", "down")]
    return torch.cat([corner.flatten() for corner in corners])
