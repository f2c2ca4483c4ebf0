"""Checks of chapter 03: from weights to codes, and back.

Everywhere: n weights are read row after row and cut into blocks, of which the last may be short. With k bits, the
largest code of a symmetric grid is 2^(k - 1) - 1, and that of a min-max grid 2^k - 1.
"""

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_edu.checks import expect
from qlora_edu.checks.calls import Calls
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise
from qlora_edu.checks.expect import EPSILON, Wrong


@contextmanager
def _otherwise(mistake: str | None):
    """In such a case, what nothing else explains looks like that mistake."""
    try:
        yield
    except Wrong as wrong:
        wrong.mistake = wrong.mistake or mistake
        raise


def _in_order(got, what: str, *single: bool) -> tuple:
    """As many parts as there are in `single`, which says what is one number; other places are named."""
    parts = expect.parts(got, what, len(single))
    came = tuple(not isinstance(part, Tensor) or part.numel() == 1 for part in parts)
    other = came != single and sorted(came) == sorted(single)
    whole = [isinstance(part, Tensor) and not part.is_floating_point() for part in parts]
    expect.true(not (other or (whole[-1] and not whole[0])), f"the order of {what}", "order")
    return parts


def _last(weight: Tensor, factor: float = 1.5) -> Tensor:
    """The same, but with the largest magnitude in the last place."""
    weight.view(-1)[-1] = -factor * weight.abs().max()
    return weight


def _doubtful(position: Tensor, slack: Tensor | float) -> Tensor:
    """1 where float32 may round a position to either neighbour, 0 elsewhere. float64."""
    return ((position % 1 - 0.5).abs() <= slack).double()


def _scalars(got, weight: Tensor) -> tuple:
    """The three parts; what NumPy makes of a single weight is a number, and a tensor is made of it."""
    codes, step, back = expect.parts(got, "the result", 3)
    if weight.dim() == 0:
        codes, back = (torch.tensor(v) if isinstance(v, int | float) else v for v in (codes, back))
        narrow = isinstance(codes, Tensor) and codes.dtype == torch.int64
        codes = codes.to(torch.int8) if narrow else codes
    return codes, step, back


@exercise("03-absmax")
def absmax(answer: Answer, draw: Draw) -> None:
    """`f(weight, bits)`: (codes int8, step, what comes back, float32), one absmax step for the whole tensor."""
    ties = torch.tensor([3, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * 2.0 ** draw.whole(-3, 3)
    # Among 500 weights and 255 codes, arithmetic in 16 bits shows.
    shapes = ((5, 7), 4), ((5, 7), 4), ((500,), 8), ((3, 2, 11), 8), ((1,), 5), ((), 3)
    cases = [(100 * draw.normal(*shape), k, None) for shape, k in shapes]
    cases += [(_last(draw.normal(4, 8)), 4, None), (_last(draw.normal(13)), 2, None)]
    cases += [
        (1e7 * draw.normal(3, 6), draw.whole(3, 8), None),
        (1e15 * draw.normal(2, 7), draw.whole(3, 8), None),
        (1e-15 * draw.normal(4, 9), 6, "floor"),
        (ties, 3, "ties"),
    ]
    cases += [(draw.normal(70, 30) * 1e6, 7, None)] * draw.hidden
    calls = Calls()
    for weight, bits, mistake in cases:
        top = weight.abs().max().item()
        if weight.max() == top:
            weight = -weight  # so that the largest magnitude is a negative weight's
        largest, every = 2 ** (bits - 1) - 1, 2**bits
        right = top / largest
        case = f"for a weight of shape {tuple(weight.shape)}, {bits} bits"
        with _otherwise(mistake):
            got = answer(weight, bits)
            if weight.numel() > 1:
                got = _in_order(got, f"the result {case}", False, True, False)
            codes, step, back = _scalars(got, weight)
            calls.add((codes, step, back), case)
            many = isinstance(step, Tensor) and step.numel() > 1
            expect.true(not many, f"the step, {case}", "many-steps", "one number", step)
            half = [torch.tensor(right).to(d).item() or right for d in (torch.float16, torch.bfloat16)]
            wrong = {
                "one-too-many": top / (largest + 1),
                "both-signs": [top / (every - 1), 2 * top / (every - 1), top / every],
                "abs-missing": weight.max().item() / largest,
                "step-inverted": 1 / right,
                "absmax-for-step": top,
                "sixteen-bits": half,
            }
            expect.number(step, right, f"the step, {case}", 4 * EPSILON * right, wrong)
            position = weight.double() / right
            exact = position.round() + 0.0  # an int8 has no -0
            # The step and the quotient are rounded once each; with 1 / step on the way there are three roundings.
            unsure = 0.0 if mistake == "ties" else _doubtful(position, 2 * EPSILON * position.abs())
            cut = weight / right  # in float32, where absmax / step may be less than the largest code
            wrong = {
                "truncated": [cut.trunc(), cut.floor(), position.trunc()],
                "unsigned": [exact + largest, exact + largest + 1, exact % 256],
            }
            expect.close(codes, exact, f"the codes, {case}", unsure, wrong, torch.int8)
            meant = codes.double() * right
            wrong = {"step-missing": codes.double(), "absmax-for-step": codes.double() * top}
            within = 4 * EPSILON * meant.abs()
            expect.close(back, meant, f"what comes back, {case}", within, wrong, torch.float32)
    for shape in ((2, 3), (), (1,), (4, 1, 5)):
        zeros, case = torch.zeros(shape), f"zeros of shape {shape}"
        with _otherwise("zero-division"):
            got = answer(zeros, draw.whole(2, 8), crash="zero-division")
            codes, step, back = _scalars(got, zeros)
            expect.close(codes, zeros, f"the codes of {case}", 0.0, {}, torch.int8)
            expect.close(back, zeros, f"what comes back for {case}", 0.0, {}, torch.float32)
            expect.number(step, 0.0, f"the step of {case}, which must be finite", within=3.4e38)


def _levels(draw: Draw, count: int, ends: bool = True) -> Tensor:
    """Ascending levels from -1 to 1, not symmetric, none of them twice; ends: with both. float32 (count,)."""
    if not ends:
        return (draw.permutation(1499)[:count] - 799).sort().values / 1000
    inner = (draw.permutation(1999)[: count - 2] - 999).sort().values / 1000
    return torch.cat([torch.tensor([-1.0]), inner, torch.tensor([1.0])])


def _nearest(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the definition, in float64: codes (n,), 1 where float32 cannot tell (n,), scales (blocks,), w / scale (n,).

    In a block of zeros float32 can always tell.
    """
    codes, unsure, scales, positions = [], [], [], []
    for block in weight.double().reshape(-1).split(block_size):
        scale = block.abs().max()
        position = block / scale if scale > 0 else block
        gaps = (position[:, None] - levels.double()).abs()  # (size, levels)
        margin = (
            gaps.topk(2, dim=1, largest=False).values.diff().flatten()
        )  # twice the distance from a border
        codes.append(gaps.argmin(dim=1))  # the first of equals is the lower level
        unsure.append((margin < 8 * EPSILON).double() * (scale > 0))
        scales.append(scale)
        positions.append(position)
    return torch.cat(codes), torch.cat(unsure), torch.stack(scales), torch.cat(positions)


@exercise("03-blocks")
def blocks(answer: Answer, draw: Draw) -> None:
    """`f(weight, levels, block_size)`: (codes uint8 (n,), scales float32 (blocks,)), one absmax scale a block."""
    dyadic, unit = torch.tensor([-1, -0.5, 0, 0.25, 1]), 2.0 ** draw.whole(-3, 3)
    ties = torch.tensor([1, -0.75, -0.25, 0.125, 0.625, -1, -0.4375, -0.0625]) * unit
    holes = draw.normal(51)
    holes[8:16] = holes[40:] = 0  # a whole block, and two at the end, the last of which is short
    early, late = draw.normal(12), _last(draw.normal(3, 7))
    early[0] = 3 * early.abs().max()
    near_zero = torch.tensor(
        [-0.9, -0.05 - draw.number(0, 0.1), 0.3, 0.6, 0.8]
    )  # below zero, not in the middle
    least = draw.whole(1, 300) / 512
    beside = torch.tensor([-1, -(1 + least) / 2, -least, least, (1 + least) / 2])  # zero lies halfway
    bf16, fp16 = draw.normal(9, 40, dtype=torch.bfloat16), draw.normal(900, dtype=torch.float16)
    pruned = draw.normal(6, 9)
    pruned[:, 4:6] = 0  # row after row of the transposed matrix: places 24 to 35 of 54
    cases = [  # weight, levels, block size, what a crash looks like, what else may be wrong
        (draw.normal(6, 8), _levels(draw, 5), 16, None, None),
        (draw.normal(6, 8), _levels(draw, 5), 16, None, None),
        (draw.normal(4, 12), _levels(draw, 7, ends=False), 12, None, None),
        (early, _levels(draw, 3), 4, None, None),
        (draw.normal(24), _levels(draw, draw.whole(3, 40), ends=False), 1, None, None),
        (draw.normal(10, 50), _levels(draw, 256), 50, None, None),
        (draw.normal(8, 6).T, _levels(draw, 16), 16, "not-contiguous", None),
        (draw.normal(5, 7), _levels(draw, 16), 8, "short-block", None),
        (draw.normal(3, 2, 5), _levels(draw, 9), 64, "short-block", None),
        (late, _levels(draw, 16), 8, "short-block", None),
        (draw.normal(1), _levels(draw, 4), 4, "short-block", None),
        (draw.normal(), _levels(draw, 4), 4, None, None),
        (holes, dyadic[dyadic != 0], 8, "zero-division", "zero-division"),
        (holes * 2, near_zero, 8, "zero-division", "zero-division"),
        (torch.zeros(3, 5), near_zero, 4, "zero-division", "zero-division"),
        (torch.zeros(()), near_zero, 4, "zero-division", "zero-division"),
        (holes * 4, beside, 8, None, None),
        (1e-15 * draw.normal(7, 4), _levels(draw, 16), 16, None, "floor"),
        (1e15 * draw.normal(3, 11), _levels(draw, 16), 7, None, None),
        (ties, dyadic, 4, None, "ties"),
        # Below 1, bfloat16 has steps of 0.004 and float16 of 0.0005: among so many levels either would show.
        (bf16, _levels(draw, 200), 32, "sixteen-bits", "sixteen-bits"),
        (fp16, _levels(draw, 250), 128, "sixteen-bits", "sixteen-bits"),
        (pruned.T, near_zero, 5, "not-contiguous", None),
        (pruned.to(torch.bfloat16).T * 3, _levels(draw, 200), 12, "not-contiguous", None),
        (pruned.half().T * 2, near_zero, 5, "not-contiguous", None),
        (draw.normal(5, 130).T, _levels(draw, 16), 300, "not-contiguous", None),
        (draw.normal(2, 3, 8), _levels(draw, 16), 3, None, None),
    ]
    cases += [(draw.normal(65, 33), _levels(draw, 256), 64, None, None)] * draw.hidden
    calls = Calls()
    for weight, levels, size, crash, mistake in cases:
        n, count = weight.numel(), -(-weight.numel() // size)
        kind = str(weight.dtype).removeprefix("torch.")
        case = f"for a weight of shape {tuple(weight.shape)}, {kind}, {len(levels)} levels, blocks of {size}"
        right, unsure, scale, position = _nearest(weight, levels, size)
        across = weight.transpose(0, -1) if weight.dim() else weight
        columns = _nearest(across, levels, size)
        with _otherwise(mistake):
            codes, scales = expect.parts(answer(weight, levels, size, crash=crash), "the result", 2)
            calls.add((codes, scales), case)
            counts = {(): "one-scale", (1,): "one-scale"} if count > 1 else {}
            if weight.dim():
                counts[(weight[..., 0].numel() * -(-weight.shape[-1] // size),)] = "rows-cut"
            if n % size and n > size:
                counts[(n // size,)] = "short-block"
            expect.tensor(scales, f"the scales, {case}", (count,), shape_mistakes=counts)
            wrong = {
                "one-scale": scale.max().expand(count),
                "abs-missing": torch.stack([b.max() for b in weight.double().reshape(-1).split(size)]),
                "column-order": columns[2],
                "level-in-scale": [scale.float() / levels[-1], scale.float() / levels.abs().max()],
                "zero-scale": [scale.where(scale > 0, other) for other in (1.0, scales[1:2].double().sum())],
            }
            expect.close(scales, scale, f"the scales, {case}", 1e-30, wrong, torch.float32)
            lengths = {(count * size,): "padding-kept", (count, size): "padding-kept"}
            lengths[(n // size * size,)] = "short-block"
            expect.tensor(codes, f"the codes, {case}", (n,), shape_mistakes=lengths if n % size else {})
            above = torch.searchsorted(levels.double(), position)
            each = scale.repeat_interleave(size)[:n]
            last = len(levels) - 1 - levels.flip(0).abs().argmin()  # the upper one of two nearest to 0
            zeros = codes.where(each == 0, right) if codes.dtype == torch.uint8 else right  # wrong only there
            wrong = {
                "ties": right.where(each > 0, last),
                "zero-division": zeros,
                "level-values": levels[right],
                "evenly-spaced": ((position + 1) / 2 * (len(levels) - 1)).round(),
                "not-nearest": [above, torch.searchsorted(levels.double(), position, right=True) - 1],
                "one-scale": _nearest(weight / scale.max(), levels, n)[0],
                "column-order": [columns[0], columns[0].view(across.shape).transpose(0, -1).flatten()],
            }
            within = 0.0 if mistake == "ties" else unsure
            expect.close(codes, right, f"the codes, {case}", within, wrong, torch.uint8)


def cut(x: Tensor) -> Tensor:
    """float32 without its lower 16 bits: bfloat16, not rounded."""
    return (x.float().view(torch.int32) & -65536).view(torch.float32)


@exercise("03-dequantize")
def dequantize(answer: Answer, draw: Draw) -> None:
    """`f(codes, levels, scales, block_size, shape, dtype)`: level times scale, in float32, rounded once."""
    cases = [  # shape, block size, levels, dtype, what a crash looks like
        ((4, 8), 8, 16, torch.float32, "codes-as-mask"),
        ((4, 8), 8, 16, torch.float32, None),
        ((6, 9), 6, draw.whole(17, 100), torch.float32, None),
        ((10, 60), 50, 256, torch.float32, None),
        ((10, 60), 50, 200, torch.float32, None),  # codes above 127, and fewer than 256 levels
        ((3, 5), 1, 3, torch.float32, None),
        ((5, 7), 8, 16, torch.float32, "short-block"),
        ((3, 1, 5), 64, 16, torch.float32, "short-block"),
        ((), 4, 4, torch.float32, None),
        ((33, 13), 32, 16, torch.bfloat16, None),
        ((400,), 128, 16, torch.float16, None),
        ((), 4, 9, torch.bfloat16, None),
        ((), 1, 9, torch.float16, None),
        ((7, 3), 5, 256, torch.float16, None),
    ]
    cases += [((2, 17, 31), 64, 200, torch.bfloat16, None)] * draw.hidden
    calls = Calls()
    for shape, size, many, dtype, crash in cases:
        n, rows = math.prod(shape), shape if len(shape) == 2 else (1, math.prod(shape))
        count = -(-n // size)
        codes, levels = draw.integers(n, low=0, high=many - 1, dtype=torch.uint8), _levels(draw, many)
        scales = draw.uniform(count, low=0.1, high=3)
        if many == 256 and dtype == torch.float32:
            scales *= 10.0 ** torch.linspace(-15, 15, count).round()[draw.permutation(count)]
        scales[1:2] = 0
        if dtype == torch.bfloat16:
            scales[2:4] *= 1e-12
        level, place = levels[codes.long()], torch.arange(n)
        scale = scales[place // size]
        by_row = place // rows[1] * (rows[1] // size) + place % rows[1] // size
        right = (level * scale).to(dtype).view(shape)
        short = level.to(dtype), scale.to(dtype)
        exact = level.double() * scale.double()
        wrong = {
            "scale-missing": level,
            "codes-not-levels": codes * scale,
            "codes-wrapped": levels[codes.to(torch.int8).long().clamp(min=-many)] * scale,
            "zero-scale": level * scale.where(scale > 0, 1.0),
            "rounded-early": [short[0] * short[1], short[0] * scale, level * short[1]],
            "rounded-otherwise": [exact.bfloat16(), exact.half(), cut(exact)],
            "scales-alternate": level * scales[place % count],
            "scale-by-row": level * scales[by_row.clamp(max=count - 1)],
            "divided": level / scale,
            "column-order": (level * scale).view(rows[::-1]).T.flatten(),
        }
        # Two float32 numbers multiply exactly in float64; to round that at once may differ from rounding it twice.
        at_once = (level.double() * scale.double()).to(dtype).view(shape)
        case = f"for shape {shape}, blocks of {size}, {str(dtype).removeprefix('torch.')}"
        got = answer(codes, levels, scales, size, shape, dtype, crash=crash)
        calls.add(got, case)
        lengths = {(count * size,): "padding-kept", (count, size): "padding-kept", (n,): "shape-missing"}
        expect.tensor(got, f"the weights, {case}", shape, dtype, shape_mistakes=lengths)
        several = ((name, ts if isinstance(ts, list) else [ts]) for name, ts in wrong.items())
        wrong = {name: [t.to(dtype).view(shape) for t in tensors] for name, tensors in several}
        within = (right.double() - at_once.double()).abs().nan_to_num()  # where both are infinite
        expect.close(got, right, f"the weights, {case}", within, wrong)


@exercise("03-minmax")
def minmax(answer: Answer, draw: Draw) -> None:
    """`f(weight, bits)`: (codes uint8, step, zero point, what comes back): a min-max grid on which 0 is a level."""

    def spread(low: float, high: float, *shape: int) -> Tensor:
        """Weights from low to high, both of which occur, times a power of two: the step is exact."""
        inner = draw.uniform(math.prod(shape) - 2, low=low, high=high)
        return torch.cat([torch.tensor([low, high]), inner]).view(shape) * 2.0 ** draw.choice([-3, -2, 2, 3])

    thousand = torch.cat([draw.uniform(40, low=1000, high=1001), torch.tensor([1000, 1001])])
    pruned = spread(-4.25, 10.75, 5, 8)
    pruned[2:4] = 0
    cases = [  # where zero lies a quarter of a step beside a code, the ways of rounding differ
        (spread(-4.25, 10.75, 6, 7), 4),
        (spread(-4.25, 10.75, 6, 7), 4),
        (spread(-4.25, 10.75, 6, 7).flip(0, 1), 4),  # both ends of the range at the end
        (spread(30.75, 45.75, 23), 4),
        (spread(-140.75, -109.75, 3, 2, 6), 5),
        (spread(-7.5, 7.5, 32), 4),  # zero lies halfway between two codes
        (draw.normal(500) - 2, 8),
        (spread(-1.25, 1.75, 9), 2),
        (-(2.0 ** draw.whole(-2, 2)) * thousand, 8),  # the zero point needs 18 bits
        (thousand, 8),
        (1e15 * draw.normal(3, 9), 5),
        (pruned, 4),
        (spread(0, 15, 4, 6), 4),  # as after a ReLU
        (spread(-15, 0, 21), 4),
        (1e-15 * draw.normal(20), 4),
    ]
    cases += [(draw.uniform(2, low=0, high=1) + 5, 2), (draw.normal(50, 30) + 30, 6)] * draw.hidden
    calls = Calls()
    for weight, bits in cases:
        w, largest = weight.double(), 2**bits - 1
        low, high = w.min().item(), w.max().item()
        right = (high - low) / largest
        case = f"for weights from {low:.3g} to {high:.3g}, {bits} bits"
        got = _in_order(answer(weight, bits), f"the result {case}", False, True, True, False)
        codes, step, zero, back = calls.add(got, case)
        wide = (max(high, 0) - min(low, 0)) / largest
        wrong = {"one-too-many": (high - low) / 2**bits, "range-with-zero": wide}
        wrong["absmax-for-range"] = max(high, -low) / largest
        wrong["order"] = [math.floor(-low / right), math.ceil(-low / right)]
        with _otherwise("floor" if high < 1e-12 else None):
            expect.number(step, right, f"the step, {case}", 4 * EPSILON * right, wrong)
        # Step and quotient are rounded twice each; the sum with the zero point once more.
        exact = -low / right
        slack = 4 * EPSILON * (abs(exact) + largest + 1)
        clamps = (0, largest), (-largest, largest), (-128, 127), (0, 255), (-(2**15), 2**15)
        wrong = {
            "zero-clamped": [min(max(exact, a), b) for a, b in clamps],
            "zero-sign": -exact,
            "zero-as-weight": low,
            "zero-wrapped": [exact % 256, (exact + 128) % 256 - 128],
            "truncated": math.trunc(exact),
        }
        try:
            expect.number(zero, exact, f"the zero point, {case}", 0.5 + slack, wrong)
        except Wrong as refused:  # a whole number is meant, of which there may be two
            both = exact % 1 == 0.5
            refused.expected = f"{math.floor(exact)} or {math.ceil(exact)}" if both else str(round(exact))
            raise
        zero = float(zero)
        whole = f"the zero point is whole, {case}"
        expect.true(zero == round(zero), whole, "zero-not-whole", round(exact), zero)
        unclamped = w / right + zero
        position = unclamped.clamp(0, largest)
        unsure = _doubtful(position, slack)
        wrong = {
            "not-clamped": [n for m in (unclamped.round(), (w / right).round() + zero) for n in (m, m % 256)],
            "truncated": [position.trunc(), ((w / right).trunc() + zero).clamp(0, largest)],
            "zero-missing": [(w / right).round().clamp(0, largest), (w / right).round() % 256],
            "start-mixed": ((w - low) / right).round(),
        }
        with _otherwise("floor" if high < 1e-12 else "zero-lost" if weight is pruned else None):
            expect.close(codes, position.round(), f"the codes, {case}", unsure, wrong, torch.uint8)
        q = codes.double()
        wrong = {
            "wrapped": ((q - zero) % 256).float() * float(step),
            "zero-missing": q * right,
            "zero-sign": (q + zero) * right,
            "zero-unscaled": [q * right - zero, q * right + zero],
            "start-mixed": q * right + low,
        }
        within = 4 * EPSILON * right * (q + abs(zero) + 1)
        with _otherwise("zero-lost" if weight is pruned else None):
            expect.close(back, (q - zero) * right, f"what comes back, {case}", within, wrong, torch.float32)
            lost = int((back[weight == 0] != 0).sum()) if low < 0 < high else 0
            expect.true(lost == 0, f"zeros that come back as something else, {case}", "zero-lost", 0, lost)


def _round_trip(weight: Tensor, bits: int, block_size: int, rounding=torch.round) -> Tensor:
    """Absmax integers in blocks, by the definition, in the weight's dtype. (n,)."""
    back = []
    for block in weight.reshape(-1).split(block_size):
        step = block.abs().max() / (2 ** (bits - 1) - 1)
        back.append(rounding(block / step) * step if step > 0 else block)
    return torch.cat(back)


def _on_grid(weight: Tensor, block_size: int, most: int, low: int, high: int) -> Tensor:
    """The same with steps of absmax / most, and codes from low to high."""
    back = []
    for block in weight.reshape(-1).split(block_size):
        step = block.abs().max() / most
        back.append((block / step).round().clamp(low, high) * step if step > 0 else block)
    return torch.cat(back)


@exercise("03-measure")
def measure(answer: Answer, draw: Draw) -> None:
    """`f(weight, bits, block_size)`: (bits a weight with steps of 32 bits, |w - back| / |w|) of absmax integers."""
    pruned = draw.normal(9, 16)
    pruned[3:5] = 0
    cases = [(3 * draw.normal(12, 20), 4, 16, None), (3 * draw.normal(12, 20), 4, 16, None)]
    cases += [(draw.normal(12, 16), 8, 16, None)]
    cases += [
        (draw.normal(8, 9), 2, 12, None),
        (draw.normal(5, 3), 3, 1, None),
        (draw.uniform(low=3, high=9), 5, 1, None),
    ]
    cases += [(3 * draw.normal(7, 13), 3, 8, "short-block")]  # 3 weights in the last block
    cases += [(_last(draw.normal(5, 19)), 2, 8, "short-block"), (draw.normal(11, 3), 8, 64, "short-block")]
    cases += [(3 * draw.normal(16, 12).T, 4, 8, None)]
    cases += [(pruned, 4, 16, "zero-division"), (1e-15 * draw.normal(9, 16), 4, 16, "floor")]
    ended = draw.normal(3, 5, 4)
    ended.view(-1)[-4:] = 0
    cases += [(ended, 3, 8, "zero-division"), (1e15 * draw.normal(5, 2, 7), 4, 16, None)]
    cases += [(draw.normal(100), draw.whole(2, 8), 32, "short-block"), (draw.normal(6, 15).T, 4, 8, None)]
    cases += [(draw.normal(61, 35) * draw.uniform(61, 1), 5, 128, None)] * draw.hidden
    calls = Calls()
    for weight, bits, size, mistake in cases:
        w = weight.double().reshape(-1)
        n, scales = len(w), 32 * -(-len(w) // size)  # weights, and bits of all steps
        case = f"for a weight of shape {tuple(weight.shape)}, {bits} bits, blocks of {size}"
        with _otherwise(mistake):
            cost, error = expect.parts(answer(weight, bits, size, crash=mistake), "the result", 2)
            calls.add((cost, error) if n > 20 else (case, cost, error), case)
            rows = weight[..., 0].numel() * -(-weight.shape[-1] // size) if weight.dim() else 1
            zeros = sum(not block.any() for block in w.split(size))
            right = bits + scales / n
            wrong = {
                "scales-not-counted": bits,
                "short-block": [bits + 32 / size, bits + 32 * (n // size) / n],
                "per-weight": bits * n + scales,
                "bytes": [bits + scales / 8 / n, right / 8],
                "sixteen-bits": bits + scales / 2 / n,
                "rows-cut": bits + 32 * rows / n,
                "zeros-not-counted": right - 32 * zeros / n,
            }
            expect.number(cost, right, f"bits a weight, {case}", 1e-6 * right, wrong)
            lost, single = w - _round_trip(w, bits, size), w.float()
            squares = lost.square()
            exact = (lost.norm() / w.norm()).item()
            whole = n - n % size  # weights in whole blocks
            without = [lost[:whole].norm() / part.norm() for part in (w, w[:whole]) if whole]
            back, down = (
                _round_trip(w, bits, size),
                weight.double().transpose(0, -1) if weight.dim() else weight,
            )
            means = [
                lost.norm(),
                squares.sum(),
                squares.mean().sqrt(),
                squares.mean(),
                lost.norm() / back.norm(),
            ]
            most = 2 ** (bits - 1)  # in the place of the largest code; 2^k - 1 is another
            grids = [(most, -most, most - 1), (most, -most, most), (2 * most - 1, 1 - 2 * most, 2 * most - 1)]
            sizes = [lost.abs().sum() / w.abs().sum(), (lost.abs() / w.abs()).nanmean()]
            wrong = {
                "column-order": ((down.reshape(-1) - _round_trip(down, bits, size)).norm() / w.norm()).item(),
                "squared": exact**2,
                "not-relative": [m.item() for m in means],
                "magnitudes": [s.item() for s in sizes],
                "percent": 100 * exact,
                "short-block": [v.item() for v in without] or [exact],
                # In float32, an absmax divided by its step may be less than the largest code, and lose a whole step.
                "truncated": [
                    ((w - _round_trip(v, bits, size, rounding)).norm() / w.norm()).item()
                    for v in (single, w)
                    for rounding in (torch.trunc, torch.floor)
                ],
                "other-grid": [
                    ((w - _on_grid(w, size, *grid)).norm() / w.norm()).item() for grid in grids if size > 1
                ],
                "one-step": ((w - _round_trip(w, bits, n)).norm() / w.norm()).item(),
            }
            # What comes back is off by some roundings of its own size, and a sum of n squares by n roundings.
            expect.number(error, exact, f"the error, {case}", EPSILON * (8 + n * exact), wrong)


_FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# Of 120 draws, with absmax, and as many outliers apart as can be paid for: in blocks of 48 to 128 weights no error was
# above 1.1, in blocks of 256 the mean was 1.07; 20 outliers in the place of 60 gave 1.31, 30 of them 1.11.
MOST = 1.1  # times the error of outliers apart
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _row(part, name: str, count: int | None, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A part that is stored, if it is one row of `count` finite numbers of such a dtype."""
    part = expect.tensor(part, name, mistake="parts")
    fits = part.dim() == 1 and part.dtype in dtypes and bool(part.double().isfinite().all())
    kind = "one row of " + ("finite floats" if dtypes is _FLOATS else "integers")
    expect.true(fits, name, "parts", kind, f"{part.dtype}, shape {tuple(part.shape)}")
    expect.true(count in (None, len(part)), f"{name}: how many", "part-lengths", count, len(part))
    return part.long() if dtypes is _INTEGERS else part


def _unpacked(stored, n: int) -> tuple[Tensor, int]:
    """What a challenger has stored for n weights: the weights that it stands for, float64 (n,), and all its bits."""
    needed, optional = {"bits", "codes", "levels", "block_size", "scales"}, {"starts", "positions", "values"}
    if isinstance(stored, dict):  # None for a part that is not wanted
        stored = {key: part for key, part in stored.items() if part is not None or key not in optional}
    keys = set(stored) if isinstance(stored, dict) else set()
    named = ", ".join(sorted(map(str, keys))) or type(stored).__name__
    expect.true(isinstance(stored, dict), "what is stored", "parts", "a dict", named)
    missing, unknown = (
        ", ".join(sorted(map(str, names))) for names in (needed - keys, keys - needed - optional)
    )
    expect.true(
        not missing, f"what is stored: missing is {missing}", "parts", "the parts of the table", named
    )
    expect.true(
        not unknown, f"what is stored: unknown is {unknown}", "parts", "the parts of the table", named
    )
    bits, size = stored["bits"], stored["block_size"]
    for name, number, most in (("bits", bits, 8), ("block_size", size, n)):
        fits = type(number) is int and 1 <= number <= most
        expect.true(fits, name, "parts", f"a whole number from 1 to {most}", str(number)[:50])
    blocks, block = -(-n // size), torch.arange(n) // size
    codes = _row(stored["codes"], "codes", n, _INTEGERS)
    levels = _row(stored["levels"], "levels", None, _FLOATS)
    expect.true(len(levels) <= 2**bits, "levels", "levels-unnamed", f"at most {2**bits}", len(levels))
    low, high = codes.min().item(), codes.max().item()
    inside = low >= 0 and high < len(levels)
    expect.true(inside, "codes", "code-out-of-range", f"0 to {len(levels) - 1}", f"{low} to {high}")
    floats = [levels, _row(stored["scales"], "scales", blocks, _FLOATS)]
    weights = levels.double()[codes] * floats[1].double()[block]
    if "starts" in keys:
        floats.append(_row(stored["starts"], "starts", blocks, _FLOATS))
        weights += floats[-1].double()[block]
    used = bits * n
    if keys & {"positions", "values"}:
        expect.true({"positions", "values"} <= keys, "positions and values", "parts", "both", "one of them")
        positions = _row(stored["positions"], "positions", None, _INTEGERS)
        floats.append(_row(stored["values"], "values", len(positions), _FLOATS))
        inside = ((positions >= 0) & (positions < n)).all() and len(positions.unique()) == len(positions)
        expect.true(
            bool(inside), "positions", "positions", f"different whole numbers from 0 to {n - 1}", positions
        )
        weights[positions] = floats[-1].double()
        used += len(positions) * math.ceil(math.log2(n))
    return weights, used + sum(8 * part.element_size() * part.numel() for part in floats)


def _rival(weight: Tensor, size: int, min_max: bool = False, apart: int = 0) -> dict:
    """4-bit integers in blocks as a challenger would store them; `apart`: so many of the largest beside them."""
    flat = weight.reshape(-1).clone()
    positions = flat.abs().topk(apart).indices
    values, flat[positions] = flat[positions].half(), 0
    first, last = (0, 15) if min_max else (-7, 7)
    stored = {"bits": 4, "levels": torch.arange(first, last + 1).half(), "block_size": size}
    pieces = flat.split(size)
    starts = torch.stack([piece.min() if min_max else 0 * piece[0] for piece in pieces]).half()
    tops = torch.stack([piece.max() if min_max else piece.abs().max() for piece in pieces])
    stored["scales"] = ((tops - starts.float()) / last).half()
    block = torch.arange(len(flat)) // size
    position = (flat - starts.float()[block]) / stored["scales"].float().clamp(min=1e-30)[block]
    stored["codes"] = position.round().clamp(first, last).long() - first
    stored |= {"starts": starts} if min_max else {}
    return stored | ({"positions": positions, "values": values} if apart else {})


def _missed(stored: dict, weight: Tensor, ratio: float) -> str:
    """What an answer looks like whose error is `ratio` times that of outliers apart."""
    positions, size = stored.get("positions"), stored["block_size"]
    if positions is None or not len(positions):
        return "outliers-share"
    blocks, rest = torch.arange(weight.numel()) // size, weight.double().flatten().clone()
    positions = positions.long()
    rest[positions] = 0
    pieces, levels = rest.split(size), stored["levels"].double()
    if stored.get("starts") is None:
        spans = torch.stack([2 * piece.abs().max() for piece in pieces])
    else:
        spans = torch.stack([piece.max() - piece.min() for piece in pieces])
    wide = stored["scales"].double() * (levels.max() - levels.min()) > 1.3 * spans
    # Many of the blocks of which a weight is apart span much more than what is left in them.
    if wide[blocks[positions].unique()].double().mean() > 0.3:
        return "step-of-outliers"
    return "almost" if ratio < 1.7 else "outliers-wrong"


def _spiked(draw: Draw) -> Tensor:
    """Rows of different size, and some outliers."""
    weight = draw.normal(53, 157) * draw.uniform(53, 1, low=0.5, high=2)
    spikes = draw.uniform(53, 157) < 0.006
    return weight * torch.where(spikes, draw.uniform(53, 157, low=6, high=20), 1.0)


def _lost(stored, weight: Tensor) -> tuple[float, int]:
    """The relative error in %, and all bits that are stored."""
    w = weight.double().flatten()
    decoded, bits = _unpacked(stored, len(w))
    return 100 * ((decoded - w).norm() / w.norm()).item(), bits


@exercise("03-budget")
def budget(answer: Answer, draw: Draw) -> Score:
    """`f(weight)`: a dict that stands for the weights in 4.5 bits each at most, all counted; decoded here."""
    rivals = {
        "absmax in 128s": {"size": 128},
        "absmax in 64s": {"size": 64},
        "absmax in 32s": {"size": 32},
        "min-max in 64s": {"size": 64, "min_max": True},
        "outliers apart": {"size": 64, "apart": 59},
        "min-max, apart": {"size": 157, "min_max": True, "apart": 73},
    }
    ratios = []
    # Fresh weights for validity, three times because luck decides much; then those of the scoreboard.
    for weight in (*(_spiked(draw) for _ in range(3)), _spiked(Draw(3))):
        n, stored = weight.numel(), answer(weight)
        mine, bits = _lost(stored, weight)
        expect.true(
            bits <= 4.5 * n, "bits that are stored", "over-budget", f"at most {4.5 * n:,.0f}", f"{bits:,}"
        )
        ratios.append(mine / _lost(_rival(weight, **rivals["outliers apart"]), weight)[0])
        if len(ratios) == 3:
            ratio = sum(ratios) / 3
            what = "the error, divided by that of outliers apart, on average over three matrices"
            if not ratio <= MOST:
                expect.fail(what, f"at most {MOST}", f"{ratio:.3f}", _missed(stored, weight, ratio))
    board = {}
    for name, rival in rivals.items():
        error, bits = _lost(_rival(weight, **rival), weight)
        board[f"{name}: {bits / n:.2f} bits"] = error
    return Score(mine, "% error", board)
