"""Checks of chapter 05: the scales of a layer in 8 bits.

Everywhere: n scales in second-level blocks of `size`, the last one may be short; `levels` ascend; `absmax` holds each
block's largest |scale - offset|; a scale comes back as levels[code] * absmax + offset.
"""

import json
import math
from functools import cache

import torch
from torch import Tensor

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise

EPSILON = expect.EPSILON


def _numbers(got, right: list, what: str, within: list, wrong: dict[str, list[list]], more=1e-12) -> None:
    """Refuse unless these are the right numbers. wrong: by mistake, what it gives, to a part `more` of it."""
    got = expect.parts(got, what, len(right))
    got = [math.inf if isinstance(v, int) and abs(v) > 2**1000 else v for v in got]  # no float holds it
    for value, expected in zip(got, right, strict=True):
        expect.number(value, expected, what, math.inf)  # a number, and not NaN
    got, right, within = (_double([float(v) for v in values]) for values in (got, right, within))

    def near(values: Tensor, more: float = 0.0) -> bool:
        return not ((got - values).abs() > within + more * values.abs()).any()

    if not near(right):
        fits = [name for name, lists in wrong.items() if any(near(_double(w), more) for w in lists)]
        shown = (", ".join(map(expect.show, values.tolist())) for values in (right, got))
        expect.fail(what, *shown, fits[0] if fits else None)


def _double(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@exercise("05-bits")
def bits(answer: Answer, draw: Draw) -> None:
    """`f(n, first, second)`: bits per weight of the codes, the scales, their scales and the offset."""
    sizes = [(49_152, 64, 256), (100_003, 64, 256), (5, 64, 256), (draw.whole(10**5, 10**6), 32, 100)]
    for n, first, second in [*sizes, (draw.whole(10**4, 10**5) * 2 + 1, draw.whole(7, 90), draw.whole(3, 9))]:
        blocks = -(-n // first)
        groups, codes = -(-blocks // second), 8 * -(-n // 2)  # two codes a byte
        right = codes + 8 * blocks + 32 * groups + 32
        short = [(n // first, n // first // second), (n // first, -(-(n // first) // second))]
        wrong = {
            "per-block": [right * n, right * n / blocks, right * n / groups],
            "bytes": [right / 8],
            "second-level-missing": [right - 32 * groups],
            "scales-in-32-bits": [right + 24 * blocks],
            "groups-of-weights": [right + 32 * (-(-n // second) - groups)],
            "offset-per-block": [right - 32 + 32 * groups, right - 32 + 32 * blocks],
            "tail-dropped": [codes + 8 * b + 32 * g + 32 for b, g in [*short, (blocks, blocks // second)]],
            "offset-missing": [right - 32],
            "formula": [c + 8 * n / first + 32 * n / first / second + 32 for c in (codes, 4 * n)],
            "half-byte": [right + 4 * n - codes],
        }
        lists = {name: [[w / n] for w in values] for name, values in wrong.items()}
        what = f"bits per weight, for n = {n}, first = {first}, second = {second}"
        # Only divisions are not exact, and each one keeps 16 digits.
        _numbers((answer(n, first, second),), [right / n], what, [1e-14 * right / n], lists)


def _map(bits: int, points=None, top: int = 0) -> Tensor:
    """The signed dynamic map, float64: decade i ends at 10**(i - bits + 2); 0 and 1 are added.

    points: those of decade i as parts of its end, by default the midpoints of 2**i intervals. top: decades higher.
    """
    points = points or (lambda i: [0.1 + 0.9 * (2 * j + 1) / 2 ** (i + 1) for j in range(2**i)])
    levels = [10.0 ** (i - bits + 2 + top) * float(p) for i in range(bits - 1) for p in points(i)]
    return _double(sorted([0.0, 1.0, *levels, *(-p for p in levels)]))


def _edges(i: int) -> Tensor:
    return torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)


def _middles(i: int) -> Tensor:
    return (_edges(i)[1:] + _edges(i)[:-1]) / 2


@exercise("05-map")
def dynamic_map(answer: Answer, draw: Draw) -> None:
    """`f(bits)`: the signed dynamic map, float32 (2**bits,), ascending."""
    edges = (_edges, lambda i: _edges(i)[:-1], lambda i: _edges(i)[1:])
    for bits in (4, 8, 2, 3, draw.whole(5, 7)):
        right, half, what = _map(bits), 2 ** (bits - 1), f"the map of {bits} bits"
        even = [torch.arange(-half, half) / most for most in (half, half - 1)]
        between = [e for cut in edges for e in (_map(bits, cut), _map(bits, cut).float().unique())]
        finer = _map(bits, lambda i: _middles(i + 1))
        wrong = {
            "linear": [torch.linspace(-1, 1, 2 * half), *even],
            "edges": between,
            "zero-missing": right[right != 0],
            "one-missing": right[right != 1],
            "minus-one-added": torch.cat([_double([-1.0]), right]),
            "decades-shifted": [_map(bits, top=1), _map(bits, top=-1)],
            "unsigned": [finer[finer >= 0], right[right >= 0]],
            "fine-below": _map(bits, lambda i, bits=bits: _middles(bits - 2 - i)),
        }
        got = expect.tensor(answer(bits), what, dtype=torch.float32)
        ordered = got.flatten().sort().values
        if ordered.shape == right.shape and torch.allclose(ordered.double(), right, atol=1e-9):
            expect.true(torch.equal(ordered, got), f"{what}: ascending", "not-sorted")
        expect.close(got, right, what, 8 * EPSILON, wrong)
        # An edge, a middle and a power of ten are rounded once or twice each, whatever the order.
        expect.close(got, right, what, 8 * EPSILON * right.abs())


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest level: how many middles lie below x. Of two that are as near, that is the lower."""
    levels = levels.double()
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def _magnitude(block: Tensor) -> Tensor:
    return block.abs().max()


def _stored(centred: Tensor, levels: Tensor, size: int, largest=_magnitude) -> tuple[Tensor, Tensor]:
    """Codes and absmax, one block after the other; a block of zeros has quotients of 0."""
    blocks = centred.double().split(size)
    absmax = torch.stack([largest(block) for block in blocks])
    quotients = torch.cat([b / m if m else 0 * b for b, m in zip(blocks, absmax, strict=True)])
    return _nearest(quotients, levels), absmax


def _each(absmax: Tensor, size: int, n: int) -> Tensor:
    """For each scale the number of its block."""
    return absmax.repeat_interleave(size)[:n]


def _error(s: Tensor, levels: Tensor, size: int, mean: Tensor | float, largest=_magnitude) -> Tensor:
    """What comes back, less what was stored; float64 (n,)."""
    codes, absmax = _stored(s - mean, levels, size, largest)
    return levels.double()[codes] * _each(absmax, size, len(s)) + mean - s


def _exact_scales(draw: Draw, size: int) -> Tensor:
    """3 blocks and a tail of 3, whose mean, differences and quotients are exact in float32, in any order.

    The differences are whole numbers / 1024, the largest a power of 2. The second block is the first with other
    signs, the third equals the mean, the tail adds up to nothing.
    """
    ties = 64 * torch.tensor([16, -5, -1, 2, 6, 12, -12, 0])  # between levels that are multiples of 1/8
    first = torch.cat([ties, draw.integers(size - 8, low=-1023, high=1023)])[draw.permutation(size)]
    pair = draw.choice([1, 2]) * torch.cat([first, -first[draw.permutation(size)]])
    differences = torch.cat([pair, 0 * first, torch.tensor([192, -512, 320])])
    return draw.choice([2.5, 3.0, 4.0]) + differences / 1024


@exercise("05-quantize-scales")
def quantize_scales(answer: Answer, draw: Draw) -> None:
    """`f(scales, levels, size)`: codes, uint8 (n,); absmax, float32 (blocks,); the offset, a number."""
    coarse = torch.tensor([-1, -0.5, -0.125, 0, 0.25, 0.5, 1])
    fine = ((_map(8) * 2048).round() / 2048).unique().float()  # 230 levels, of few binary digits
    scales, more, equal = _exact_scales(draw, 16), _exact_scales(draw, 256), torch.full((5,), 0.75)
    cases = [(more[:512], fine, 256), (scales, coarse, 16), (more, fine, 256), (scales[-3:], coarse, 64)]
    for scales, levels, size in [cases[0], (equal, coarse[[0, 2, 4]], 5), *cases[1:], (equal[:1], fine, 256)]:
        n, blocks = len(scales), -(-len(scales) // size)
        case = f"for {n} scales in blocks of {size}"
        offset = scales.double().mean()
        centred = scales.double() - offset
        right, absmax = _stored(centred, levels, size)
        dead = absmax == 0
        crash = "tail-dropped" if n % size else "zero-block" if dead.any() else None
        got = expect.parts(answer(scales, levels, size, crash=crash), f"the result, {case}", 3)

        lengths = {(n // size * size,): "tail-dropped", (blocks * size,): "padding-kept"}
        codes = expect.tensor(got[0], f"codes, {case}", (n,), torch.uint8, shape_mistakes=lengths)
        lengths = {(): "one-absmax", (1,): "one-absmax", (n // size,): "tail-dropped"}
        lengths |= {(n,): "absmax-repeated"}
        largest = expect.tensor(got[1], f"absmax, {case}", (blocks,), torch.float32, shape_mistakes=lengths)
        if isinstance(got[2], Tensor) and got[2].numel() > 1:
            expect.fail(f"the offset, {case}", "one number", got[2], "block-mean")
        looks = {"offset-missing": [[0.0]], "padding-in-mean": [[scales.double().sum() / (blocks * size)]]}
        _numbers((got[2],), [offset], f"the offset, {case}", [0.0], looks)

        split = scales.double().split(size)
        plain = torch.stack([_magnitude(block) for block in split])
        late = torch.equal(codes.long(), _nearest(centred / _each(plain, size, n), levels))
        wrong = {
            "offset-late" if late else "offset-missing": plain,
            "one-absmax": absmax.max().expand(blocks),
            "abs-missing": torch.stack([block.max() - offset for block in split]),
            "block-mean": torch.stack([_magnitude(block - block.mean()) for block in split]),
            "padding-in-absmax": torch.cat([absmax[:-1], absmax[-1:].clamp(min=offset)]),
        }
        live = {name: w[~dead] for name, w in wrong.items()}
        expect.equal(largest[~dead], absmax[~dead], f"absmax, {case}", live)
        what = f"absmax of a block whose scales all equal the offset, {case}"
        expect.true(not largest[dead].any(), what, "zero-block", 0.0, largest)

        each, most = _each(absmax, size, n), len(levels) - 1
        middles = ((levels[1:] + levels[:-1]) / 2).double()
        x = torch.where(each > 0, centred / each, 0.0)
        place = ((x + 1) * 0.5 * 65_535 + 0.5).floor() / 65_535 * 2 - 1  # in bitsandbytes' table for CPUs
        above, below = (torch.bucketize(x, levels.double(), right=right) for right in (False, True))
        wrong = {
            "zero-block": torch.where(each > 0, right, codes.long()),
            "block-mean": torch.cat([_stored(block - block.mean(), levels, size)[0] for block in split]),
            "tie-up": torch.bucketize(x, middles, right=True),
            "not-nearest": [
                code for c in (above, above - 1, below, below - 1) for code in (c.clamp(0, most), c % 256)
            ],
            "even-levels": [((x + 1) / 2 * most).round(), (most // 2 * x).round() + most // 2],
            "one-absmax": _nearest(centred / absmax.max(), levels) if absmax.any() else right + 1,
            "table": torch.bucketize(place, middles),
        }
        expect.equal(codes, right, f"codes, {case}", wrong)


_STATE = ".quant_state.bitsandbytes__nf4"


@exercise("05-read-scales")
def read_scales(answer: Answer, draw: Draw) -> None:
    """`f(stored)`: the scales, float32 (blocks,), from the tensors of a matrix in a bitsandbytes checkpoint."""
    cases = [((64, 192), 64, 256), ((300, 128), 64, 256), ((700, 100), 64, 128), ((37, 333), 32, 64)]
    for shape, size, nested in [*cases, ((draw.whole(5, 9), 11), 64, 256)]:
        blocks, offset = -(-math.prod(shape) // size), draw.uniform(1, low=0.5).item()
        facts = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": shape}
        facts |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        stored = {
            "": draw.integers((math.prod(shape) + 1) // 2, 1, low=0, high=255, dtype=torch.uint8),
            ".absmax": draw.integers(blocks, low=0, high=255, dtype=torch.uint8),
            ".nested_absmax": draw.uniform(-(-blocks // nested), low=0.1, high=0.6),
            ".nested_quant_map": _map(8).float(),
            ".quant_map": draw.uniform(16, low=-1).sort().values,
            _STATE: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        }
        numbers, absmax = stored[".absmax"].double(), stored[".nested_absmax"].double()
        each = _each(absmax, nested, blocks)
        level = stored[".nested_quant_map"].double()[stored[".absmax"].long()]
        right = level * each + offset
        by_256, by_first = (absmax[torch.arange(blocks) // fixed % len(absmax)] for fixed in (256, size))
        ways = ((0, 1), (0, 255), (-127.5, 127.5), (-127, 127), (-128, 127), (-128, 128))
        wrong = {
            "offset-missing": level * each,
            "offset-scaled": (level + offset) * each,
            "offset-subtracted": level * each - offset,
            "absmax-in-turn": level * absmax.repeat(blocks)[:blocks] + offset,
            "one-absmax": [level * a + offset for a in (absmax[0], absmax.max())],
            "wrong-blocksize": [level * a + offset for a in (by_256, by_first)],
            "codes-as-numbers": [(numbers + a) / b * each + offset for a, b in ways],
            "dtype-of-the-weights": [right.bfloat16(), (level * each).bfloat16().double() + offset],
        }
        case = f"for shape {shape}, blocksize {size}, nested_blocksize {nested}"
        try:
            got = answer(stored, crash="wrong-blocksize" if nested != 256 else None)
        except expect.Wrong as refused:  # torch takes a uint8 index for a mask
            refused.mistake = "index-is-mask" if "mask" in refused.got else refused.mistake
            raise
        kept = "dtype-of-the-weights" if getattr(got, "dtype", None) == torch.bfloat16 else None
        expect.tensor(got, f"the scales, {case}", (blocks,))
        expect.tensor(got, f"the scales, {case}", dtype=torch.float32, mistake=kept)
        # A product and a sum are rounded; that of the offset to float32 loses nothing.
        within = 2 * EPSILON * ((level * each).abs() + offset)
        expect.close(got, right, f"the scales, {case}", within, wrong)


@exercise("05-mean")
def mean(answer: Answer, draw: Draw) -> None:
    """`f(scales, levels, size)`: the errors |s - s'| / |s| without the mean and with it."""
    ordinary = 1 + 0.2 * draw.normal(700).abs()
    outlier, pruned = ordinary.clone(), ordinary * torch.where(draw.uniform(700) < 0.8, 1e-3, 1.0)
    outlier[draw.whole(0, 699)] = 30.0
    layers = [(ordinary, _map(8), 256), (outlier, _map(6), 100), (pruned, _map(8), 256)]
    for layer, levels, size in [*layers, (3 - ordinary, _map(7), 64)]:
        scales = (1024 * layer).round() / 1024  # their sums are exact in float32, in any order
        s, m = scales.double(), scales.double().mean()
        left = [_error(s, levels, size, offset) for offset in (0.0, m)]
        one = [_error(s, levels, len(s), offset) for offset in (0.0, m)]
        signed = [_error(s, levels, size, offset, torch.max) for offset in (0.0, m)]
        right, part = [e.norm() / s.norm() for e in left], [e / s for e in left]
        centred = [(s.norm(), (s - m).norm()), 2 * [(s - m).norm()]]
        wrong = {
            "swapped": [right[::-1]],
            "squared": [[r**2 for r in right]],
            "not-relative": [[f(e) for e in left] for f in (torch.norm, _size, lambda e: _size(e) ** 2)],
            "wrong-norm": [[e.norm() / n for e, n in zip(left, norms, strict=True)] for norms in centred],
            "mean-of-quotients": [[e.abs().mean() for e in part], [_size(e) for e in part]],
            "offset-missing": [[right[0], (left[1] - m).norm() / s.norm()]],
            "percent": [[100 * r for r in right]],
            "one-absmax": [[e.norm() / s.norm() for e in one]],
            "abs-missing": [[e.norm() / s.norm() for e in signed]],
        }
        # Mean, absmax and what comes back are rounded some times, and a sum of n squares at most n times.
        within = [8 * EPSILON + len(s) * EPSILON * r for r in right]
        what = f"the errors without the mean and with it, for {len(s)} scales in blocks of {size}"
        _numbers(answer(scales, levels.float(), size), right, what, within, wrong, more=1e-4)


def _size(e: Tensor) -> Tensor:
    return e.square().mean().sqrt()


def _layers(draw: Draw, n: int) -> list[Tensor]:
    """Scales of three layers: an ordinary one, one whose rows differ in size, one with a few far outliers."""
    layers = [0.02 * draw.normal(n, 64).abs().amax(dim=1) for _ in range(3)]
    layers[1] = layers[1] * torch.exp(0.4 * draw.normal(-(-n // 64))).repeat_interleave(64)[:n]
    layers[2][draw.permutation(n)[: n // 1000 + 1]] *= 12
    return layers


def _opened(got, n: int) -> tuple[Tensor, int]:
    """The scales that come back, float64 (n,), and the bits that all numbers in them take."""
    codes, bits, size, levels, step, start = expect.parts(got, "the result", 6)
    for name, value, least, most in (("bits", bits, 2, 8), ("size", size, 1, n)):
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        expect.true(fits, f"{name}, a whole number", "wrong-type", f"{least} to {most}", value)
    known = levels in ("even", "dynamic")
    expect.true(known, "the name of the levels", "wrong-type", "even or dynamic", levels)
    expect.tensor(codes, "codes", (n,), torch.uint8)
    most, largest = 2**bits - 1, int(codes.max())
    expect.true(largest <= most, "the largest code", "code-too-large", most, largest)
    spent, blocks, each = n * bits, -(-n // size), []
    for name, numbers in (("step", step), ("start", start)):
        kind, shapes = expect.tensor(numbers, name).dtype, ((1,), (blocks,))
        kinds = (torch.float32, torch.float16)
        expect.true(kind in kinds, f"{name}: the dtype", "wrong-dtype", "float32 or float16", str(kind))
        came = tuple(numbers.shape)
        expect.true(came in shapes, f"{name}: the shape", "wrong-count", f"(1,) or ({blocks},)", came)
        expect.true(bool(numbers.isfinite().all()), f"{name}: finite numbers", "not-finite", "", numbers)
        spent += 8 * numbers.nbytes
        each.append(_each(numbers.double().expand(blocks), size, n))
    table = _map(bits) if levels == "dynamic" else torch.arange(2.0**bits).double()
    return table[codes.long()] * each[0] + each[1], spent


@cache
def _rivals() -> tuple[list[Tensor], list[dict[str, float]]]:
    """The layers of the scoreboard, and what known ways lose on each, as a norm."""
    layers, even = [s.double() for s in _layers(Draw(5), 4096)], torch.arange(-127, 128) / 127
    ways = {_RECIPE: (_map(8), 1), "dynamic map, no mean": (_map(8), 0), "255 even levels, mean": (even, 1)}
    lost = [
        {name: _error(s, levels, 256, m * s.mean()).norm().item() for name, (levels, m) in ways.items()}
        for s in layers
    ]
    return layers, [known | {"the best of these": min(known.values())} for known in lost]


_RECIPE = "QLoRA: dynamic map, mean"


@exercise("05-budget")
def budget(answer: Answer, draw: Draw) -> Score:
    """`f(scales, budget)`: (codes, bits, size, levels, step, start) in `budget` bits at most, with little error."""
    fixed, lost = _rivals()
    errors = []
    prime = draw.choice([701, 719, 743, 761, 787, 809, 839])  # no size divides it
    for s in [*_layers(draw, prime), *fixed]:  # fresh ones for validity, then those of the scoreboard
        n = len(s)
        most = 8 * n + 32 * -(-n // 256) + 32  # what QLoRA's recipe takes
        back, spent = _opened(answer(s.float(), most), n)
        what = f"the bits for {n} scales"
        expect.true(spent <= most, what, "over-budget", f"at most {most:,}", f"{spent:,}")
        errors.append((back - s).norm().item())
    lost = [{"you": e, **known} for e, known in zip(errors[-len(fixed) :], lost, strict=True)]
    board = {name: 100 * sum(known[name] / known[_RECIPE] for known in lost) / len(lost) for name in lost[0]}
    score, unit = board.pop("you"), "% of the error of QLoRA's recipe"
    expect.true(score <= 90, unit, "not-better", "at most 90", score)
    return Score(score, unit, board)
