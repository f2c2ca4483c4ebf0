"""Checks of chapter 06: the 4-bit layer that gradients pass through. Those that watch its memory are in `kept`.

Everywhere: W (out, in) is stored in 4 bits, A is `a` (r, in), B is `b` (out, r), y = x Wᵀ + (alpha / r) x Aᵀ Bᵀ.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qlora_edu.checks import expect
from qlora_edu.checks.calls import once_more
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, exercise
from qlora_edu.codebooks import nf4


class Stored(dict):
    """A matrix in 4 bits: packed (uint8), scales and levels (float32), block_size, shape, dtype."""

    def __repr__(self) -> str:
        return f"4 bits {list(self['shape'])} in blocks of {self['block_size']}"


def stored_matrix(draw: Draw, n_out: int, n_in: int, block_size: int = 8, dtype=torch.float32) -> Stored:
    """A random matrix (out, in) in 4 bits, one of its blocks all zero if it has more than four."""
    count = n_out * n_in
    packed = draw.integers((count + 1) // 2, low=0, high=255, dtype=torch.uint8)
    scales = draw.uniform(math.ceil(count / block_size), low=0.2, high=1.5)
    if len(scales) > 4:
        scales[2] = 0
    fields = {"packed": packed, "scales": scales, "levels": draw.uniform(16, low=-1)}
    return Stored(fields | {"block_size": block_size, "shape": (n_out, n_in), "dtype": dtype})


def decoded(stored: dict, low_first: bool = False, blocks=None, places=None) -> Tensor:
    """W (out, in), float32, not rounded yet.

    low_first, blocks, places: what known mistakes take for the order of codes, a weight's block, its code's place.
    """
    count = math.prod(stored["shape"])
    shifts = (0, 4) if low_first else (4, 0)
    codes = [byte >> shift & 15 for byte in stored["packed"].tolist() for shift in shifts][:count]
    codes = codes if places is None else [codes[place] for place in places]
    blocks = [k // stored["block_size"] for k in range(count)] if blocks is None else blocks
    return (stored["levels"][codes] * stored["scales"][blocks]).view(stored["shape"])


def counting_decoder() -> tuple[Callable[[dict], Tensor], list]:
    """A decode for students, and a list that grows with each call of it."""
    calls = []

    def decode(stored):
        calls.append(1)
        return decoded(stored)

    return decode, calls


def adapter(draw: Draw, n_out: int, n_in: int, r: int) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha; alpha / r is neither 1 nor a root of r."""
    a, b = draw.normal(r, n_in) / math.sqrt(n_in), draw.normal(n_out, r) / math.sqrt(r)
    return a, b, r * draw.choice([3, 5, 7]) + 0.5


def relative_error(got: Tensor, right: Tensor) -> float:
    """The size of the error beside the size of the whole."""
    return ((got.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30)).item()


def like(got, wrong: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those wrong results that `got` is, as a whole: its roundings may be larger than those of a right one."""
    fits = isinstance(got, Tensor) and got.is_floating_point()
    return {
        m: got for m, w in wrong.items() if fits and got.shape == w.shape and relative_error(got, w) < 1e-4
    }


def product(left: Tensor, right: Tensor, shape, dtype=torch.float32, shift=0.0) -> tuple[Tensor, Tensor]:
    """left @ right + shift in float64, and what arithmetic in that dtype may be off by."""
    error = expect.dot_error(left, right) + 4 * expect.EPSILON * abs(shift)
    error = error * (torch.finfo(dtype).eps / expect.EPSILON)
    return (left.double() @ right.double() + shift).reshape(shape), error.reshape(shape)


@exercise("06-forward")
def forward(answer: Answer, draw: Draw) -> None:
    """`f(x, stored, a, b, alpha, r, bias)`: y (..., out), float32; W is decoded, and rounded to stored["dtype"]."""
    many, half = [draw.whole(1, 2) for _ in range(draw.whole(4, 6))], (torch.bfloat16, torch.float16)
    odd = [2 * draw.whole(1, 5) + 1 for _ in range(3)]
    any_two = [[draw.choice(some), *(draw.whole(1, 9) for _ in range(3))] for some in ([7, 9], [2, 10, 12])]
    # No two have the same sizes and dtype: what is remembered is seen at the end, and called so.
    cases = [
        ((4,), 8, 8, 4, 2, torch.float32, False),
        ((4,), 6, 6, 4, 2, torch.float32, False),  # blocks reach into the next row
        ((4,), 4, 5, 4, 2, torch.float32, True),  # a byte belongs to two rows
        ((3, 2), 4, 10, 8, 3, torch.float32, True),
        ((6,), 4, 6, 3, 2, torch.float32, True),  # a byte belongs to two blocks
        ((5,), 5, 7, 4, 3, torch.float32, False),  # half a byte is left over, and the last block is short
        ((3,), 5, 7, 16, 2, torch.float32, True),  # the last block is much shorter
        ((2,), 1, 1, 1, 1, torch.float32, True),
        ((3,), *any_two[0], torch.float32, True),
        ((9,), 8, 24, 16, 2, torch.bfloat16, True),
        ((), 8, 6, 16, 4, torch.float16, True),
        ((1,), 3, 13, 64, 1, torch.bfloat16, False),
        ((2, 1, 3), 4, 6, 8, 2, torch.float32, True),
        *(((4,), *odd, 2, dtype, True) for dtype in half),
        (many, *any_two[1], draw.choice([torch.float32, *half]), True),
    ]
    for case in cases:
        _check_forward(answer, draw, *case)
    for case in (cases[1], cases[9]):
        with once_more():
            _check_forward(answer, draw, *case)


def _check_forward(answer: Answer, draw: Draw, leading, n_out, n_in, block_size, r, dtype, with_bias) -> None:
    x, stored = draw.normal(*leading, n_in), stored_matrix(draw, n_out, n_in, block_size, dtype)
    (a, b, alpha), bias = adapter(draw, n_out, n_in, r), draw.normal(n_out) if with_bias else None
    count = n_out * n_in
    reasons = {
        "two-dimensions-only": len(leading) > 2,
        "dtypes-mixed": len(leading) == 1 and dtype != torch.float32,
        "tail": count % 2 or count % block_size,
        "odd-block": block_size % 2,
        "not-two": len(leading) != 1,
        "byte-rows": n_in % 2,
        "blocks-by-row": n_in % block_size,
    }
    crash = next((mistake for mistake, there in reasons.items() if there), None)
    crash = "two-dimensions-only" if crash == "not-two" else crash
    y = answer(x, stored, a, b, alpha, r, bias, crash=crash)
    rows, s, shift = x.reshape(-1, n_in).double(), alpha / r, bias.double() if with_bias else 0
    exact, low_rank = decoded(stored), s * (b.double() @ a.double())
    weight, update, shape = exact.to(dtype).double(), rows @ low_rank.T, (*leading, n_out)

    def output(weight, update=update, rows=rows, shift=shift, shape=shape):
        return (rows @ weight.double().T + update + shift).reshape(shape)

    last, places = len(stored["scales"]) - 1, [(i, j) for i in range(n_out) for j in range(n_in)]
    by_row = [
        [min(i * in_row + j // block_size, last) for i, j in places]
        for in_row in (n_in // block_size, math.ceil(n_in / block_size))
    ]
    row_bytes = math.ceil(n_in / 2)
    at = [
        min(2 * i * row_bytes + j, count - 1) for i, j in places
    ]  # of the code, if each row begins with a byte
    own = stored | {"levels": nf4()}
    guessed = [k // math.ceil(n_out * n_in / (last + 1)) for k in range(n_out * n_in)]
    wrong = {
        "nibbles-swapped": output(decoded(stored, low_first=True).to(dtype)),
        "one-scale": output(decoded(stored, blocks=[0] * n_out * n_in)),
        "blocks-by-row": [output(decoded(stored, blocks=blocks).to(dtype)) for blocks in by_row],
        "byte-rows": output(decoded(stored, places=at).to(dtype)),
        "levels-own": output(decoded(own).to(dtype)),
        "size-guessed": output(decoded(stored, blocks=guessed).to(dtype)),
        "transposed": output(weight.reshape(n_in, n_out).T if n_in != n_out else weight.T),
        "scale-missing": output(weight, update / s),
        "alpha-not-divided": output(weight, update * r),
        "update-missing": output(weight, 0),
        "base-missing": output(0 * weight),
        "bias-missing": output(weight) - shift,
        "floor-divided": output(weight, update / s * (alpha // r)),
        "bias-scaled": output(weight) + (s - 1) * shift,
    }
    what = f"y, for x {list(x.shape)}, W {[n_out, n_in]} in {str(dtype)[6:]}, r = {r}, alpha = {alpha}"
    within = expect.dot_error(rows, weight.T) + (s + 1) * expect.dot_error(rows, a.T, b.T)
    within = (within + 4 * expect.EPSILON * abs(shift)).reshape(shape)
    # First whatever no rounding explains, wherever it is done; then the roundings.
    sizes = (rows.abs() @ (exact.double().abs() + low_rank.abs()).T).reshape(shape)
    coarse = within + 4 * torch.finfo(torch.float16 if dtype == torch.float32 else dtype).eps * sizes
    right, fits = output(weight), []
    for mistake, some in wrong.items():
        for one in some if isinstance(some, list) else [some]:
            differs = relative_error(one, right) > 1e-3  # else it explains nothing here
            fits += [mistake] if differs and like(y, {mistake: one}) else []
    expect.close(y, right, what, coarse, dict.fromkeys(fits, y))
    expect.tensor(y, what, dtype=torch.float32)
    early = stored | {name: stored[name].to(dtype) for name in ("levels", "scales")}
    half = rows.to(dtype)
    base, all_half = half @ weight.to(dtype).T, s * (half @ a.to(dtype).T @ b.to(dtype).T)
    wrong = (
        ("not-rounded", output(exact)),
        ("update-rounded", output((exact + low_rank).to(dtype), 0)),
        ("rounded-early", output(decoded(early))),
        ("16-bit-product", (base.double() + update + shift).reshape(shape)),
        ("16-bit-product", (base + all_half).double().reshape(shape) + shift),
    )
    nearest, known = min(wrong, key=lambda pair: relative_error(y, pair[1]))
    fits = relative_error(y, known) < relative_error(y, output(weight)) / 2
    expect.close(y, output(weight), what, within, {nearest if fits else "other-rounding": y})


@exercise("06-backward")
def backward(answer: Answer, draw: Draw) -> None:
    """`f(grad_y, x, weight, a, b, alpha, r)`: the gradients (grad_x, grad_a, grad_b), shaped as x, a and b."""
    many = [draw.whole(1, 3) for _ in range(draw.whole(4, 5))]
    cases = [((6,), 4, 4, 4), ((5,), 7, 3, 2), ((3, 2), 5, 8, 3), ((), 6, 5, 1), ((2, 3, 5), 3, 6, 2)]
    cases += [(many, draw.choice([1, 2, 8, 9]), draw.whole(1, 9), draw.whole(1, 9))]  # as none above
    for case in cases:
        _check_backward(answer, draw, *case)
    with once_more():
        _check_backward(answer, draw, *draw.choice(cases[:2]))


def _check_backward(answer: Answer, draw: Draw, leading, n_out: int, n_in: int, r: int) -> None:
    x, grad_y = draw.normal(*leading, n_in), draw.normal(*leading, n_out)
    weight, (a, b, alpha) = draw.normal(n_out, n_in), adapter(draw, n_out, n_in, r)
    crash = "batch-not-summed" if len(leading) != 1 else None
    got = expect.parts(answer(grad_y, x, weight, a, b, alpha, r, crash=crash), "the result", 3)
    free = [t.double().requires_grad_() for t in (x, a, b)]
    y = free[0] @ weight.double().T + alpha / r * (free[0] @ free[1].T @ free[2].T)
    right = torch.autograd.grad(y, free, grad_y.double())
    rows, grads, s = x.reshape(-1, n_in), grad_y.reshape(-1, n_out), alpha / r
    wrong = _wrong_gradients(*(t.double() for t in (rows, grads, weight, a, b)), s, r)
    errors = {
        "grad_x": expect.dot_error(grads, weight) + (s + 1) * expect.dot_error(grads, b, a),
        "grad_a": (s + 1) * expect.dot_error(b.T, grads.T, rows),
        "grad_b": (s + 1) * expect.dot_error(grads.T, rows, a.T),
    }
    for (name, error), mine, true in zip(errors.items(), got, right, strict=True):
        what = f"{name}, for x of shape {tuple(x.shape)}, out = {n_out}, r = {r}, alpha = {alpha}"
        shape = expect.tensor(mine, what).shape
        mistake = "batch-not-summed" if name != "grad_x" and len(shape) > 2 else "gradient-shape"
        expect.tensor(mine, what, true.shape, mistake=mistake)
        if not leading and name != "grad_x":
            wrong[name]["batch-not-summed"] = 0 * true  # of the one row
        fits = {m: w.reshape(shape) for m, w in wrong[name].items() if w.numel() == mine.numel()}
        expect.close(mine, true, what, error.reshape(shape), like(mine, fits))
        expect.tensor(mine, what, dtype=torch.float32)


def _wrong_gradients(x, grad_y, weight, a, b, s: float, r: int) -> dict[str, dict[str, Tensor]]:
    """What known mistakes give, for the rows of x."""
    base, update, outer = grad_y @ weight, grad_y @ b @ a, grad_y.T @ x  # outer: the gradient of B A, over s
    of_a, of_b = s * b.T @ outer, s * outer @ a.T
    found = {"grad_x": {"scale-missing": base + update, "alpha-not-divided": base + s * r * update}}
    found["grad_x"] |= {
        "update-missing": base,
        "base-missing": s * update,
        "base-scaled": s * (base + update),
        "scale-twice": base + s * s * update,
    }
    for name, own, other, missing in (("a", of_a, of_b, "b-missing"), ("b", of_b, of_a, "a-missing")):
        wrong = {"scale-missing": own / s, "alpha-not-divided": own * r, "averaged": own / len(x)}
        wrong["scale-twice"] = s * own
        found[f"grad_{name}"] = wrong | {missing: s * outer, "gradient-shape": own.T, "order": other}
    if weight.shape == (r, r):  # all square: every transpose fits
        found["grad_x"]["weight-transposed"] = s * update + grad_y @ weight.T
        found["grad_x"]["update-transposed"] = base + s * grad_y @ b.T @ a.T
        found["grad_a"]["update-transposed"] = s * b @ outer
        found["grad_b"]["update-transposed"] = s * outer @ a
    return found


def _prepare(student, entries: list) -> dict:
    """Builds a model of parameters (name, tensor, shape of what is packed, trains, name of its twin), has the
    student's function prepare it, and returns what came of each."""
    model, made = nn.Module(), {}
    for name, tensor, packed_shape, trains, twin in entries:
        *path, last = name.split(".")
        place = model
        for part in path:
            place.add_module(part, getattr(place, part, nn.Module()))
            place = getattr(place, part)
        made[name] = made[twin] if twin else nn.Parameter(tensor.clone(), requires_grad=trains)
        if packed_shape:
            made[name].packed_shape = tuple(packed_shape)
        place.register_parameter(last, made[name])
    buffer = entries[0][1].sum(dim=1)
    model.register_buffer("frequencies", buffer.clone())
    counts = student(model)
    after = {name: (str(p.dtype), p.requires_grad, p.detach()) for name, p in model.named_parameters()}
    marks = {name: getattr(p, "packed_shape", None) for name, p in model.named_parameters()}
    kept = torch.equal(model.frequencies, buffer) and model.frequencies.dtype == buffer.dtype
    first, places = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places[name] = first.setdefault(id(p), name)
    return {"counts": counts, "after": after, "marks": marks, "buffer": kept, "places": places}


def _entries(draw: Draw, n_out: int, n_in: int, r: int, storage: torch.dtype, tied: bool) -> list[tuple]:
    """A model of two layers as `_prepare` builds it; its first adapter comes frozen."""
    shapes = {"model.embed.weight": (13, n_in)}
    for path in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{path}.proj.base.weight": None, f"{path}.proj.base.bias": (n_out,)}
        shapes |= {f"{path}.proj.lora_a": (r, n_in), f"{path}.proj.lora_b": (n_out, r)}
        shapes |= {f"{path}.norm.weight": (n_in,)}
    # At the root, too; and names that only look like an adapter's.
    shapes |= {"lora_a": (r, n_in), "lora_b": (n_out, r), "lora_a_scale": (r,), "lora.weight": (3, n_in)}
    shapes |= {f"model.layers.{i}.proj.{name}": (r, 3) for i, name in ((0, "lora_c"), (1, "old_lora_b"))}
    shapes |= {"model.layers.1.lora_a.norm.weight": (r,), "my_lora_a": (r, n_in)}
    shapes |= {"model.norm.weight": (n_in,), "head.weight": (13, n_in), "other.lora_a": (r, n_in)}
    twins = {"head.weight": "model.embed.weight", "other.lora_a": "model.layers.1.proj.lora_a"}
    entries = []
    for name, shape in shapes.items():
        twin = twins.get(name, "") if tied else ""
        if shape:
            sizes = 10 ** draw.uniform(*shape, low=-8, high=6)  # also what float16 does not hold
            tensor = (draw.normal(*shape) * sizes).to(torch.bfloat16)
            entries.append((name, tensor, None, "0.proj.lora" not in name, twin))
        else:  # bytes that no float dtype takes for NaN
            packed = draw.integers((n_in * n_out + 1) // 2, low=60, high=63, dtype=torch.uint8)
            entries.append((name, packed.view(storage), (n_out, n_in), False, twin))
    return entries


@exercise("06-trains", probe=_prepare)
def trains(answer: Answer, draw: Draw) -> None:
    """`f(model)`: adapters train, in float32; all else is frozen, as it was. Returns (trained, all) numbers."""
    for n_out, n_in, r, storage, tied in (
        (draw.choice([4, 6, 10]), 8, 3, torch.uint8, False),
        (5, 9, 2, torch.uint8, True),
        (draw.choice([4, 6, 10]), 8, 3, torch.bfloat16, False),
    ):
        entries = _entries(draw, n_out, n_in, r, storage, tied)
        twins = {name: twin for name, *_, twin in entries if twin}
        adapters = [name for name, *_ in entries if name.split(".")[-1] in ("lora_a", "lora_b")]
        adapters = [name for name in adapters if name not in twins]
        before = {name: tensor for name, tensor, _, _, twin in entries if not twin}
        facts = answer(entries)
        case = f"codes in {str(storage)[6:]}, W {(n_out, n_in)}, {'tied' if tied else 'untied'} head"
        for name in twins:
            other, one = facts["places"].get(name), f"{name} is the tensor at {twins[name]}, {case}"
            expect.true(other == twins[name], one, "untied", "one tensor", "two")
        expect.same(sorted(facts["after"]), sorted(before), f"names of the parameters, {case}")
        special = {name: ("lora" in name) != (name in adapters) or "." not in name for name in before}
        for name in sorted(before, key=special.get):  # the plain names first
            dtype, learns, now = facts["after"][name]
            is_adapter = name in adapters
            right = torch.float32 if is_adapter else before[name].dtype
            mistakes = ("adapter-frozen", "adapter-16-bit") if is_adapter else ("base-trains", "upcast")
            mistakes = ("base-trains", "codes-cast") if "base.weight" in name else mistakes
            mistakes = ("name-alike", "name-alike") if "lora" in name and not is_adapter else mistakes
            mistakes = ("adapter-at-root", "adapter-at-root") if is_adapter and "." not in name else mistakes
            expect.same(learns, is_adapter, f"requires_grad of {name}, {case}", {mistakes[0]: not is_adapter})
            expect.same(dtype, str(right), f"the dtype of {name}, {case}", {mistakes[1]: dtype})
            expect.equal(now, before[name].to(right), f"{name}, {case}", {"values-changed": now})
        expect.true(facts["buffer"], f"a buffer stays as it was, {case}", "upcast")
        for name, mark in facts["marks"].items():
            right = (n_out, n_in) if "base.weight" in name else None
            expect.true(mark == right, f"packed_shape of {name}, {case}", "mark-lost", right, mark)
        trained, total = expect.parts(facts["counts"], "the counts", 2)
        sizes = {name: tensor.numel() for name, tensor in before.items()}
        low = sum(size for name, size in sizes.items() if name in adapters)
        packed = sum(size for name, size in sizes.items() if "base.weight" in name)
        rest = sum(sizes.values()) - packed
        right = rest + 2 * n_out * n_in
        wrong = {"halved": low // 2, "trained-bytes": 4 * low, "twin-counted": low + r * n_in}
        expect.number(trained, low, f"how many numbers train, {case}", looks_like=wrong)
        wrong = {"halved": rest + packed, "codes-left-out": rest, "by-entries": rest + 2 * packed}
        wrong["twin-counted"] = [right + more for more in (13 * n_in, r * n_in, (13 + r) * n_in)]
        wrong["buffers-counted"] = right + 13
        expect.number(total, right, f"how many numbers there are, {case}", looks_like=wrong)
