"""Checks of chapter 02: the update of low rank.

Everywhere: W is `weight` (out, in), A is `a` (r, in), B is `b` (out, r), y = W x + (alpha / r) B A x.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise


def _parts(draw: Draw, n_in: int, n_out: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B with entries of the usual sizes; none of them zero."""
    return (
        draw.normal(n_out, n_in) / math.sqrt(n_in),
        draw.normal(r, n_in) / math.sqrt(n_in),
        draw.normal(n_out, r) / math.sqrt(r),
    )


@exercise("02-forward")
def forward(answer: Answer, draw: Draw) -> None:
    """`f(x, weight, a, b, alpha, r)`: y (..., out) for x (..., in), float32."""
    w = draw.whole
    for leading, n_in, n_out, r in (
        ((4,), w(5, 9), w(3, 7), 2),
        ((3, 2), w(6, 12), w(6, 12), 3),
        ((), w(2, 9), w(2, 9), 4),
        ((1,), 1, w(2, 5), w(1, 3)),
        ((2, 1, 3), 6, 6, w(7, 9)),  # a square W, and a rank beyond it
        ((5,), w(2, 9), 1, 5),
    ):
        x, (weight, a, b) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        # Never whole, never r: in the first case beyond it, so that every mistake gives other numbers there.
        alpha = (r + w(1, 2 * r) if leading == (4,) else w(0, 3 * r)) + 0.5
        base, update = x.double() @ weight.double().T, x.double() @ a.double().T @ b.double().T
        y = answer(x, weight, a, b, alpha, r, crash="two-dimensions-only" if len(leading) != 1 else None)
        rows = x.reshape(-1, n_in)
        within = expect.dot_error(rows, weight.T) + (alpha + 1) * expect.dot_error(rows, a.T, b.T)
        expect.close(
            y,
            base + alpha / r * update,
            f"y, for x of shape {(*leading, n_in)}, r = {r}, alpha = {alpha}",
            within.reshape(*leading, n_out),
            {
                "scale-missing": base + update,
                "alpha-not-divided": base + alpha * update,
                "root-of-r": base + alpha / math.sqrt(r) * update,
                "scale-inverted": base + r / alpha * update,
                "alpha-cut": base + int(alpha) / r * update,
                "base-missing": alpha / r * update,
                "update-missing": base,
                "base-scaled": alpha / r * (base + update),
            },
            torch.float32,
        )


def _use_init(student, n_in, n_out, r) -> tuple:
    """Two results in a row, and what the first is once more when the caller sets the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n_in)
        first, second = student(n_in, n_out, r), student(n_in, n_out, r)
        torch.manual_seed(n_in)
        return first, second, student(n_in, n_out, r)


def _begins_well(a: Tensor, n_in: int, case: str) -> None:
    """Refuse an A (r, in) that is not drawn uniformly from ±1 / sqrt(in), as far as some thousand numbers tell."""
    expect.true(bool(a.any()), f"A is not zero, {case}", "a-zero")
    bound, largest = 1 / math.sqrt(n_in), a.abs().max().item()
    both = not (a >= 0).all() and not (a <= 0).all()
    expect.true(both, f"A has both signs, {case}", "one-sided", "±", a.flatten()[0].item())
    # Of thousands of uniform numbers the largest magnitude is sqrt(3) = 1.73 deviations, of normal ones above 3.
    spread = a.double().square().mean().item() * 3 / bound**2
    if not 0.99 * bound < largest <= bound * 1.0001:
        uniform = largest < 1.8 * a.double().square().mean().sqrt()
        expect.fail(f"the largest of |A|, {case}", bound, largest, "wrong-fan" if uniform else "a-normal")
    # The mean square of count uniform numbers is bound² / 3, with a standard error of 0.894 of it / sqrt(count).
    error = 0.8945 / math.sqrt(a.numel())
    expect.true(
        abs(spread - 1) < 6 * error,
        f"A is spread evenly, mean square times 3 in², {case}",
        "uneven",
        1.0,
        spread,
    )
    # torch.rand has 2**24 values: among n of them, n²/2 / 2**23 pairs of |A| are equal by chance.
    pairs = a.numel() - a.abs().unique().numel()
    chance = a.numel() ** 2 / 2**24
    what = f"numbers of A that stand there more than once, {case}"
    expect.true(pairs <= chance + 6 * math.sqrt(chance) + 4, what, "repeated", f"about {chance:.0f}", pairs)


@exercise("02-init", probe=_use_init)
def init(answer: Answer, draw: Draw) -> None:
    """`f(n_in, n_out, r)`: (a, b), float32, A uniform in ±1 / sqrt(in) and B zero; the caller's seed decides."""
    for n_in, n_out, r in ((400, 90, 25), (150, 700, 60), (draw.whole(300, 500), draw.whole(5, 9), 31)):
        results = answer(n_in, n_out, r)
        (a, b), (second, _), (again, _) = (expect.parts(result, "the result", 2) for result in results)
        case = f"for in = {n_in}, out = {n_out}, r = {r}"
        swapped = {(n_in, r): "shapes-swapped", (r, n_out): "shapes-swapped", (n_out, r): "shapes-swapped"}
        expect.tensor(a, f"A, {case}", (r, n_in), torch.float32, shape_mistakes=swapped)
        expect.tensor(
            b, f"B, {case}", (n_out, r), torch.float32, shape_mistakes={(r, n_out): "shapes-swapped"}
        )
        expect.true(not b.any(), f"B is zero, {case}", "b-random", 0.0, b.abs().max().item())
        _begins_well(a, n_in, case)
        expect.true(not torch.equal(a, second), f"a second call draws another A, {case}", "seed-fixed")
        same = torch.equal(a, again)
        expect.true(
            same, f"the same torch.manual_seed before the call gives the same A, {case}", "seed-ignored"
        )


@exercise("02-merge")
def merge(answer: Answer, draw: Draw) -> None:
    """`f(weight, a, b, alpha, r)`: W + (alpha / r) B A, summed in float32, in the weight's dtype, a new tensor."""
    for n_in, n_out, r, dtype in (
        (7, 7, 3, torch.float32),
        (draw.whole(8, 12), 5, 2, torch.float32),
        (64, 48, draw.whole(3, 6), torch.bfloat16),
        (33, 70, 4, torch.float16),
    ):
        weight, a, b = _parts(draw, n_in, n_out, r)
        weight, alpha = weight.to(dtype), draw.whole(r, 4 * r) + 0.5
        update = alpha / r * (b.double() @ a.double())
        right = weight.double() + update
        case = (
            f"for W of shape {(n_out, n_in)}, {str(dtype).removeprefix('torch.')}, r = {r}, alpha = {alpha}"
        )
        got = expect.tensor(answer(weight, a, b, alpha, r), f"W merged, {case}")
        if got.dtype != dtype:
            expect.fail(f"the dtype, {case}", str(dtype), str(got.dtype), "dtype-kept-wide")
        wrong = {
            "scale-missing": weight.double() + update * r / alpha,
            "alpha-not-divided": weight.double() + update * r,
            "wrong-sign": weight.double() - update,
        }
        if n_in == n_out:
            wrong["order"] = weight.double() + update.T
        within = ((alpha / r + 1) * expect.dot_error(b, a) + 4 * expect.EPSILON * right.abs()).max()
        sizes = weight.double().abs() + alpha / r * (b.double().abs() @ a.double().abs())
        # In 16 bits a right sum is off by half a step. What is rounded on the way is off by some, and named below.
        steps = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        expect.close(got, right, f"W merged, {case}", within + steps * sizes, wrong)
        if dtype != torch.float32:
            # float32's own error carries a sum across the middle between two 16-bit numbers in one of some thousands.
            missed, allowed = (right.to(dtype) != got).sum().item(), 5
            what = f"sums that are not the nearest {str(dtype).removeprefix('torch.')} number, {case}"
            expect.true(missed <= allowed, what, "rounded-early", f"at most {allowed}", missed)
    weight, a, b = _parts(draw, 6, 4, 2)
    got = answer(weight, a, torch.zeros_like(b), 1.5, 2, fresh=True)
    expect.equal(got, weight, "W merged with B = 0")


def _use_layer(student, x, weight, bias, a, b, grad_y, r, alpha) -> dict:
    """Builds the student's layer around a linear layer, uses it, and returns what came of it."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        base.weight.copy_(weight)
        if bias is not None:
            base.bias.copy_(bias)
    try:
        layer = student(base, r, alpha)
    except AttributeError as error:
        if "__init__() call" in str(error):  # what torch says where super().__init__() is missing
            return {"is_module": False}
        raise
    if not isinstance(layer, nn.Module):
        return {"is_module": False}
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    facts = {"is_module": True, "names": sorted(trained)}
    if not {"lora_a", "lora_b"} <= set(trained):
        return facts
    facts |= {"a": layer.lora_a.clone(), "b": layer.lora_b.clone()}
    if layer.lora_a.shape != a.shape or layer.lora_b.shape != b.shape:
        return facts
    facts |= {"base": base(x), "start": layer(x), "start_again": layer.eval()(x)}
    facts["fresh"] = _gradients(layer.train(), x, grad_y)
    with torch.no_grad():
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
    facts["y"], facts["y_eval"] = layer(x), layer.eval()(x)
    facts["trained"] = _gradients(layer.train(), x, grad_y)
    facts["base_grad"] = any(parameter.grad is not None for parameter in base.parameters())
    facts["base_changed"] = not torch.equal(base.weight, weight)
    layer.enabled = False
    facts["off"] = layer(x)
    layer.enabled = True
    facts["on"] = layer(x)
    return facts


def _gradients(layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict:
    """The gradients of A, B and x for a given one of y; None where none arrives."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    if isinstance(y, Tensor) and y.requires_grad:
        y.backward(grad_y)
    return {"a": layer.lora_a.grad, "b": layer.lora_b.grad, "x": x.grad}


@exercise("02-layer", probe=_use_layer)
def layer(answer: Answer, draw: Draw) -> None:
    """`LoRALinear(base, r, alpha)`: an nn.Linear with an update of parameters `lora_a`, `lora_b`; `enabled`."""
    w = draw.whole
    for n_in, n_out, r, leading, with_bias in (
        (300, 9, 20, (2,), True),  # wide enough to see how A begins
        (w(5, 9), w(10, 14), w(2, 3), (3, 2), True),
        (w(9, 12), w(4, 8), 3, (), False),
        (5, 5, 1, (2, 1, 3), True),
    ):
        x, (weight, a, b) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        bias = draw.normal(n_out) if with_bias else None
        grad_y, alpha = draw.normal(*leading, n_out), w(r, 4 * r) + 0.5
        facts = answer(x, weight, bias, a, b, grad_y, r, alpha)
        case = f"in = {n_in}, out = {n_out}, r = {r}, alpha = {alpha}, {'a' if with_bias else 'no'} bias"
        expect.true(facts["is_module"], "the layer is an nn.Module", "not-a-module")
        names, both = facts["names"], {"lora_a", "lora_b"}
        listed = ", ".join(names) or "none"
        expect.true(both <= set(names), "parameters that train", "not-parameters", "lora_a, lora_b", listed)
        expect.true(both == set(names), "parameters that train", "base-trainable", "lora_a, lora_b", listed)
        expect.tensor(facts["a"], f"lora_a, {case}", (r, n_in), torch.float32)
        expect.tensor(facts["b"], f"lora_b, {case}", (n_out, r), torch.float32)
        expect.true(not facts["b"].any(), f"lora_b begins at zero, {case}", "start-moved")
        if n_in == 300:
            _begins_well(facts["a"], n_in, f"lora_a of a fresh layer, {case}")

        expect.true(not facts["base_changed"], "the base's weight stays as it is", "base-changed")
        s, rows, grads = alpha / r, x.reshape(-1, n_in), grad_y.reshape(-1, n_out)
        base = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        update = x.double() @ a.double().T @ b.double().T
        error = expect.dot_error(rows, weight.T) + s * expect.dot_error(rows, a.T, b.T)
        error = (error + 8 * expect.EPSILON * (base + s * update).abs().reshape(-1, n_out)).reshape(
            base.shape
        )
        unbiased = {"bias-dropped": base - bias.double() + s * update} if with_bias else {}
        wrong = {"scale-missing": base + update, "alpha-not-divided": base + alpha * update, "switched": base}
        dropped = {"bias-dropped": base - bias.double()} if with_bias else {}
        expect.close(
            facts["start"],
            facts["base"],
            f"a fresh layer's output, {case}",
            0.0 if not dropped else error,
            dropped,
        )
        for name, what in (
            ("y", "the output"),
            ("y_eval", "the output in eval mode"),
            ("on", "the output, switched on again"),
        ):
            expect.close(facts[name], base + s * update, f"{what}, {case}", error, wrong | unbiased)
        expect.equal(facts["start"], facts["base"], f"a fresh layer's output, to the last bit, {case}")
        expect.equal(facts["start_again"], facts["base"], f"a fresh layer's output in eval mode, {case}")
        expect.equal(
            facts["off"], facts["base"], f"the output with enabled = False, {case}", {"switched": facts["on"]}
        )
        expect.true(not facts["base_grad"], "gradients of the base", "base-trainable", "none", "some")
        fresh_a, no_b = facts["a"], torch.zeros_like(b)
        _check_gradients(facts["fresh"], rows, grads, weight, fresh_a, no_b, s, f"in a fresh layer, {case}")
        _check_gradients(facts["trained"], rows, grads, weight, a, b, s, case)


def _check_gradients(
    got: dict, x: Tensor, grad_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float, case: str
) -> None:
    """Refuse other gradients than those of y = W x + s B A x. x (rows, in), grad_y (rows, out)."""
    h, grad_h = x.double() @ a.double().T, s * grad_y.double() @ b.double()  # both (rows, r)
    through_base, through_update = grad_y.double() @ weight.double(), grad_h @ a.double()
    right = {"a": grad_h.T @ x.double(), "b": s * grad_y.double().T @ h, "x": through_base + through_update}
    error = {
        "a": s * expect.dot_error(b.T, grad_y.T, x),
        "b": s * expect.dot_error(grad_y.T, x, a.T),
        "x": expect.dot_error(grad_y, weight) + s * expect.dot_error(grad_y, b, a),
    }
    for name, what in (("a", "lora_a"), ("b", "lora_b"), ("x", "x")):
        mistake = "input-cut" if name == "x" else "gradient-cut"
        expect.true(got[name] is not None, f"the gradient of {what}, {case}", mistake, "a tensor", "None")
        halves = [through_base, through_update] if name == "x" else [0 * right[name]]
        gradient = expect.tensor(got[name], f"the gradient of {what}").reshape(right[name].shape)
        expect.close(
            gradient, right[name], f"the gradient of {what}, {case}", error[name] + 1e-6, {mistake: halves}
        )


@exercise("02-best-update")
def best_update(answer: Answer, draw: Draw) -> None:
    """`f(delta, r)`: (b, a) with B A as near to `delta` (out, in) as rank r allows, in the sum of squares."""
    for n_in, n_out, r, rank in (
        (9, 9, 3, 9),
        (14, 6, 2, 6),
        (5, 17, 4, 5),
        (8, 8, 1, 8),
        (7, 6, 3, 1),
        (4, 5, 2, 0),
    ):
        # Singular values that are well apart, so that float32 finds the same directions as float64.
        u, _ = torch.linalg.qr(draw.normal(n_out, min(n_in, n_out)).double())
        v, _ = torch.linalg.qr(draw.normal(n_in, min(n_in, n_out)).double())
        s = draw.number(3, 5) * 0.75 ** torch.arange(min(n_in, n_out)).double()
        s[rank:] = 0
        delta = (u * s @ v.T).float()
        b, a = expect.parts(answer(delta, r), "the result", 2)
        case = f"for delta of shape {(n_out, n_in)} and rank {rank}, r = {r}"
        swapped = {(r, n_in): "shapes-swapped", (r, n_out): "shapes-swapped", (n_in, r): "shapes-swapped"}
        expect.tensor(b, f"B, {case}", (n_out, r), torch.float32, shape_mistakes=swapped)
        expect.tensor(a, f"A, {case}", (r, n_in), torch.float32, shape_mistakes=swapped)
        got = b.double() @ a.double()
        # The squared error cannot be below the squares left out. A product of float32 factors is off by some ten
        # roundings of s[0], which moves it by twice that times what is left, at most s[0].
        near = 20 * expect.EPSILON * s[0] ** 2
        least, left = s[r:].square().sum().item(), (delta.double() - got).square().sum().item()
        if not left <= least + near:  # so that NaN is refused too
            wrong = {
                "values-missing": u[:, :r] @ v[:, :r].T,
                "values-twice": u[:, :r] * s[:r] ** 2 @ v[:, :r].T,
                "smallest": u[:, -r:] * s[-r:] @ v[:, -r:].T,
            }
            looks = [mistake for mistake, w in wrong.items() if (got - w).abs().max() < 1e-4 * s[0] ** 2]
            if _same_sizes(b.T, u[:, -r:].T) or _same_sizes(a, v[:, -r:].T):
                looks.append("smallest")
            if n_in == n_out and _same_sizes(a, torch.linalg.svd(delta.double()).Vh[:, :r].T):
                looks.append("not-transposed")
            expect.fail(f"the squared error that is left, {case}", least, left, looks[0] if looks else None)


def _same_sizes(rows: Tensor, others: Tensor) -> bool:
    """Whether rows have the same magnitudes, each up to a factor (the signs of singular vectors are free)."""
    a, b = (normalize(t.double(), dim=1).abs() for t in (rows, others))
    return bool((a - b).abs().max() < 1e-3)


SHAPES = ((60, 20), (20, 60), (96, 96), (24, 24), (120, 12), (40, 80))
WITHIN = 1.03  # of the best there is


def _updates(draw: Draw) -> tuple[list[Tensor], int]:
    """Six updates and a budget. The large ones hold more in each direction, the small ones more in each number."""
    deltas = []
    for n_out, n_in in SHAPES:
        k = min(n_out, n_in)
        u, v = (torch.linalg.qr(draw.normal(n, k))[0] for n in (n_out, n_in))
        s = math.sqrt(n_out + n_in) ** draw.number(0.4, 0.7) * draw.number(0.88, 0.94) ** torch.arange(k)
        deltas.append(u * s @ v.T)
    return deltas, _cost(deltas, [6] * len(deltas))


@exercise("02-share")
def share(answer: Answer, draw: Draw) -> Score:
    """`f(deltas, budget)`: a rank for each matrix. The best updates of these ranks cost `budget` numbers at most,
    and lose as little of the squared size as they can."""
    board = None
    for source in (Draw(2), draw, draw):  # those of the scoreboard, then fresh ones
        deltas, budget = _updates(source)
        if board:  # any number of matrices
            deltas = deltas[source.whole(0, 3) :]
            budget = _cost(deltas, [6] * len(deltas))
        ranks = answer(deltas, budget)
        ranks = ranks.tolist() if isinstance(ranks, Tensor) else ranks
        count = len(deltas)
        expect.true(
            isinstance(ranks, list | tuple) and len(ranks) == count,
            "a list of ranks",
            "wrong-type",
            f"{count} of them",
            ranks,
        )
        for r, delta in zip(ranks, deltas, strict=True):
            possible = isinstance(r, int) and not isinstance(r, bool) and 0 <= r <= min(delta.shape)
            asked = f"an int from 0 to {min(delta.shape)}"
            expect.true(
                possible, f"a rank for a matrix of shape {tuple(delta.shape)}", "impossible-rank", asked, r
            )
        expect.true(
            _cost(deltas, ranks) <= budget,
            "the numbers that the ranks cost",
            "over-budget",
            budget,
            _cost(deltas, ranks),
        )
        left, equal, best = (100 * _left(deltas, r) for r in (ranks, [6] * count, _best(deltas, budget)))
        what = f"% of the squared size lost, over {count} matrices"
        unspent = budget - _cost(deltas, ranks)
        fits = any(sum(d.shape) <= unspent and r < min(d.shape) for d, r in zip(deltas, ranks, strict=True))
        mistake = "equal-ranks" if list(ranks) == [6] * count else "budget-left" if fits else "size-ignored"
        expect.true(left <= WITHIN * best, what, mistake, f"at most {WITHIN * best:.3f}", left)
        board = board or Score(
            left, "% of the squared size lost", {"equal ranks": equal, "the best there is": best}
        )
    return board


def _left(deltas: list[Tensor], ranks: list[int]) -> float:
    """Part of the squared size of all updates that is lost at these ranks."""
    values = [torch.linalg.svdvals(d.double()).square() for d in deltas]
    return sum(v[r:].sum().item() for v, r in zip(values, ranks, strict=True)) / sum(
        v.sum().item() for v in values
    )


def _cost(deltas: list[Tensor], ranks: list[int]) -> int:
    return sum(r * sum(d.shape) for d, r in zip(deltas, ranks, strict=True))


def _best(deltas: list[Tensor], budget: int) -> list[int]:
    """The ranks that lose least: for every budget, the best of the matrices so far (dynamic programming)."""
    unit = math.gcd(*(sum(d.shape) for d in deltas))
    width = budget // unit + 1
    least, choices = torch.zeros(width, dtype=torch.float64), []
    for delta in deltas:
        lost = [*torch.linalg.svdvals(delta.double()).square().flip(0).cumsum(0).flip(0).tolist(), 0.0]
        price = sum(delta.shape) // unit
        options = torch.full((len(lost), width), math.inf, dtype=torch.float64)
        for r, loss in enumerate(lost):
            if r * price < width:
                options[r, r * price :] = least[: width - r * price] + loss
        least, choice = options.min(dim=0)
        choices.append((choice, price))
    ranks, at = [], width - 1
    for choice, price in reversed(choices):
        ranks.append(int(choice[at]))
        at -= ranks[-1] * price
    return ranks[::-1]
