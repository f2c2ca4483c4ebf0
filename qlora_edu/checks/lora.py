"""Checks of chapter 02: the update of low rank.

Everywhere: W is `weight` (out, in), A is `a` (r, in), B is `b` (out, r), y = W x + (alpha / r) B A x.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qlora_edu.checks import expect
from qlora_edu.checks.attempt import clone, plain
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise


def _parts(draw: Draw, n_in: int, n_out: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B with entries of the usual sizes; none of them zero."""
    return (
        draw.normal(n_out, n_in) / math.sqrt(n_in),
        draw.normal(r, n_in) / math.sqrt(n_in),
        draw.normal(n_out, r) / math.sqrt(r),
    )


def _strided(matrix: Tensor) -> Tensor:
    """The same numbers, column after column in memory."""
    return matrix.mT.contiguous().mT


@exercise("02-forward")
def forward(answer: Answer, draw: Draw) -> None:
    """`f(x, weight, a, b, alpha, r)`: y (..., out) for x (..., in), float32."""
    w = draw.whole
    for leading, n_in, n_out, r, alpha, strided in (
        # Beyond r: every mistake but a bound gives other numbers here.
        ((4,), w(5, 9), w(3, 7), 2, w(3, 6) + 0.5, False),
        ((3, 2), w(6, 12), w(6, 12), 3, w(0, 2) + 0.5, False),  # below r
        ((), w(2, 9), w(2, 9), 4, w(5, 12) + 0.5, False),
        ((1,), 1, w(2, 5), 3, 3.0, False),
        ((2, 1, 3), 6, 6, w(7, 9), 0.0, False),  # a square W, and a rank beyond it
        ((5,), w(2, 9), 1, 5, -w(1, 9) - 0.5, False),
        ((3,), 5, w(6, 8), 5, w(0, 9) + 0.5, False),  # A is square
        ((2,), w(6, 9), 4, 4, w(0, 9) + 0.5, True),  # B is
        ((3, 4), w(4, 9), w(2, 9), 2, w(0, 3) + 0.5, True),
    ):
        x, (weight, a, b) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        crash = "two-dimensions-only" if len(leading) != 1 else None
        if strided:
            x, weight, a, b, crash = *map(_strided, (x, weight, a, b)), "not-contiguous"
        base, update = x.double() @ weight.double().T, x.double() @ a.double().T @ b.double().T
        y = answer(x, weight, a, b, alpha, r, crash=crash)
        rows, s = x.reshape(-1, n_in), alpha / r
        within = expect.dot_error(rows, weight.T) + (abs(alpha) + 1) * expect.dot_error(rows, a.T, b.T)
        guessed = [x.double() @ a.double() @ b.double().T] if r == n_in else []
        guessed += [x.double() @ a.double().T @ b.double()] if r == n_out else []
        expect.close(
            y,
            base + s * update,
            f"y, for x of shape {(*leading, n_in)}, r = {r}, alpha = {alpha}",
            within.reshape(*leading, n_out),
            {
                "alpha-cut": [base + cut / r * update for cut in (int(alpha), max(r, alpha), abs(alpha))],
                "scale-missing": base + update,
                "alpha-not-divided": base + alpha * update,
                "root-of-r": base + alpha / math.sqrt(r) * update,
                "scale-inverted": base + (1 / s if s else 0) * update,
                "base-missing": s * update,
                "update-missing": base,
                "base-scaled": s * (base + update),
                "side-guessed": [base + s * other for other in guessed],
            },
            torch.float32,
        )


def _use_init(student, n_in, n_out, r) -> dict:
    """What it gives twice in a row, and once more with the same seed; and what became of the first and of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n_in)
        came = student(n_in, n_out, r)
        facts = {"first": clone(plain(came)), "own": True}
        pair = isinstance(came, tuple | list) and len(came) == 2 and all(isinstance(t, Tensor) for t in came)
        if pair and came[1].shape == (n_out, r):
            with torch.no_grad():
                came[1][-1, -1] = 1.0  # as a step of training would
            facts["own"] = came[1].count_nonzero().item() <= 1
        facts["second"] = clone(plain(student(n_in, n_out, r)))
        facts["first_later"] = clone(plain(came))
        if pair and came[1].shape == (n_out, r):
            with torch.no_grad():
                came[1][-1, -1] = 0.0
        facts["seed"] = torch.initial_seed()
        torch.manual_seed(n_in)
        return facts | {"again": plain(student(n_in, n_out, r))}


def _begins_well(a: Tensor, n_in: int, case: str) -> None:
    """Refuse an A (r, in) that is not drawn uniformly from ±1 / sqrt(in), as far as some thousand numbers tell."""
    expect.true(bool(a.any()), f"A is not zero, {case}", "a-zero")
    bound, largest = 1 / math.sqrt(n_in), a.abs().max().item()
    lines = [
        line for way in (a, a.T) if way.shape[1] >= 60 for line in way
    ]  # rows, columns: one sign in 2⁶⁰ by chance
    for line in lines:
        both = not (line >= 0).all() and not (line <= 0).all()
        expect.true(both, f"A has both signs, {case}", "one-sided", "±", line[0].item())
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
    w = draw.whole
    for n_in, n_out, r in (
        (400, 90, 25),
        (150, 700, 60),
        (w(300, 500), w(5, 9), 31),
        (40, w(5, 9), 90),
        (1, w(2, 9), 4000),
        (4000, w(2, 9), 1),
        (w(2, 9), w(2, 9), w(10, 12)),
        (1, 1, 1),
    ):
        facts = answer(n_in, n_out, r)
        (a, b), (second, second_b), (again, _) = (
            expect.parts(facts[name], "the result", 2) for name in ("first", "second", "again")
        )
        case = f"for in = {n_in}, out = {n_out}, r = {r}"
        swapped = {(n_in, r): "shapes-swapped", (r, n_out): "shapes-swapped", (n_out, r): "shapes-swapped"}
        expect.tensor(a, f"A, {case}", (r, n_in), torch.float32, shape_mistakes=swapped)
        expect.tensor(
            b, f"B, {case}", (n_out, r), torch.float32, shape_mistakes={(r, n_out): "shapes-swapped"}
        )
        expect.true(not b.any(), f"B is zero, {case}", "b-random", 0.0, b.abs().max().item())
        if a.numel() > 1000:
            _begins_well(a, n_in, case)
        else:
            largest = a.abs().max().item()
            fits = 0 < largest <= 1.0001 / math.sqrt(n_in)
            expect.true(fits, f"the largest of |A|, {case}", "wrong-fan", 1 / math.sqrt(n_in), largest)
        expect.true(not torch.equal(a, second), f"a second call draws another A, {case}", "seed-fixed")
        same = torch.equal(a, again)
        expect.true(
            same, f"the same torch.manual_seed before the call gives the same A, {case}", "seed-ignored"
        )
        expect.true(facts["seed"] == n_in, f"torch's seed, {case}", "seed-changed", n_in, facts["seed"])
        expect.true(facts["own"], f"numbers of B that change when one is changed, {case}", "shared", 1)
        alone = torch.equal(facts["first_later"][0], a) and not second_b.any()
        expect.true(alone, f"A and B of two calls are tensors of their own, {case}", "shared")


def _merged_twice(student, weight, a, b, alpha, r) -> list:
    """The result, and a copy of it from before a second call with another W of the same kind."""
    came = student(weight, a, b, alpha, r)
    copy = clone(plain(came))
    student(-weight, a, b, alpha, r)
    return [copy, came]


@exercise("02-merge", probe=_merged_twice)
def merge(answer: Answer, draw: Draw) -> None:
    """`f(weight, a, b, alpha, r)`: W + (alpha / r) B A, summed in float32, in the weight's dtype, a new tensor."""
    w, kinds = draw.whole, (torch.float32, torch.bfloat16, torch.float16)
    # At most some 3000 numbers: float32's own error carries one sum in some thousands across the middle between two
    # 16-bit numbers. As many are allowed as five times that.
    for n_in, n_out, r, dtype, beyond in (
        (7, 7, 3, torch.float32, True),
        (w(8, 12), 5, 2, torch.float32, False),
        (w(45, 60), w(38, 50), w(3, 6), torch.bfloat16, True),
        (w(33, 50), w(45, 60), 4, torch.float16, True),
        (w(30, 50), w(30, 50), 1, torch.float16, False),
        (w(30, 50), w(30, 50), w(2, 60), torch.bfloat16, False),
        *((1, 1, 1, dtype, True) for dtype in kinds),
        *((w(1, 9), w(1, 9), w(1, 9), dtype, False) for dtype in kinds),
    ):
        weight, a, b = _parts(draw, n_in, n_out, r)
        weight, alpha = weight.to(dtype), (w(r, 4 * r) if beyond else w(0, r - 1)) + 0.5
        if not beyond:
            weight, a, b = map(_strided, (weight, a, b))
        update = alpha / r * (b.double() @ a.double())
        right = weight.double() + update
        case = (
            f"for W of shape {(n_out, n_in)}, {str(dtype).removeprefix('torch.')}, r = {r}, alpha = {alpha}"
        )
        copy, later = answer(weight, a, b, alpha, r)
        got = expect.tensor(copy, f"W merged, {case}")
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
            missed, allowed = (right.to(dtype) != got).sum().item(), 5
            what = f"sums that are not the nearest {str(dtype).removeprefix('torch.')} number, {case}"
            expect.true(missed <= allowed, what, "rounded-early", f"at most {allowed}", missed)
        expect.equal(later, copy, "W merged, after the next call", {"overwritten": later})
    for dtype in kinds:
        weight, a, b = _parts(draw, 6, 4, 2)
        weight = weight.to(dtype)
        got, _ = answer(weight, a, torch.zeros_like(b), 1.5, 2, fresh=True)
        expect.equal(got, weight, "W merged with B = 0")


def _use_layer(student, x, other_x, weight, bias, pairs, grad_y, r, alpha) -> dict:
    """Builds the student's layer around a linear layer, uses it, and returns what came of it."""

    def built(seed: int | None = None) -> tuple:
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            base.weight.copy_(weight)
            if bias is not None:
                base.bias.copy_(bias)
        if seed is not None:
            torch.manual_seed(seed)
        return student(base, r, alpha), base

    with torch.random.fork_rng(devices=[]):
        try:
            layer, base = built(seed=r)
        except AttributeError as error:
            if "__init__() call" in str(error):  # what torch says where super().__init__() is missing
                return {"is_module": False}
            raise
        if not isinstance(layer, nn.Module):
            return {"is_module": False}
        trained = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
        facts = {"is_module": True, "names": sorted(trained)}
        if not {"lora_a", "lora_b"} <= set(trained):
            return facts | {"shapes": list(trained.values())}
        facts |= {"a": layer.lora_a.clone(), "b": layer.lora_b.clone()}
        if facts["a"].shape != pairs[0][0].shape or facts["b"].shape != pairs[0][1].shape:
            return facts
        facts["other_a"], facts["seed"] = built()[0].lora_a.clone(), torch.initial_seed()
        facts["same_a"] = built(seed=r)[0].lora_a.clone()
    facts |= {"base": base(x), "start": layer(x), "start_again": layer.eval()(x)}
    facts["fresh"] = _gradients(layer.train(), x, grad_y)
    _put(layer, *pairs[0])
    facts["y"], facts["y_eval"] = layer(x), layer.eval()(x)
    facts["trained_eval"] = _gradients(layer, x, grad_y)
    facts["trained"] = _gradients(layer.train(), x, grad_y)
    facts["x_frozen"] = _gradients(layer, x, grad_y, frozen=True)
    facts["base_grad"] = any(parameter.grad is not None for parameter in base.parameters())
    layer.enabled = False
    facts["off"] = [layer(x), layer.eval()(x)]
    facts["off_gradients"] = [_gradients(layer, x, grad_y), _gradients(layer.train(), x, grad_y)]
    facts["off"].append(layer(x))
    layer.enabled = True
    facts["on"], facts["on_eval"] = layer(x), layer.eval()(x)
    with torch.no_grad():  # where an answer would keep what it computed
        layer(other_x)
    _put(layer, a=pairs[1][0])
    facts["half"] = _with_and_without_gradients(layer, other_x)
    _put(layer, b=pairs[1][1])
    facts["next_eval"] = _with_and_without_gradients(layer, other_x)
    facts["next"] = [layer.train()(other_x)]
    facts["base_changed"] = not torch.equal(base.weight, weight)
    facts["base_changed"] |= bias is not None and not torch.equal(base.bias, bias)
    return facts


def _with_and_without_gradients(layer: nn.Module, x: Tensor) -> list:
    with torch.no_grad():
        bare = layer(x)
    return [layer(x), bare]


def _put(layer: nn.Module, a: Tensor | None = None, b: Tensor | None = None) -> None:
    """As a step of an optimizer does."""
    with torch.no_grad():
        for parameter, new in ((layer.lora_a, a), (layer.lora_b, b)):
            if new is not None:
                parameter.copy_(new)


def _gradients(layer: nn.Module, x: Tensor, grad_y: Tensor, frozen: bool = False) -> dict:
    """The gradients of A, B and x for a given one of y; None where none arrives. frozen: x asks for none."""
    x = x.clone().requires_grad_(not frozen)
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    if isinstance(y, Tensor) and y.requires_grad:
        y.backward(grad_y)
    return {"a": layer.lora_a.grad, "b": layer.lora_b.grad, "x": x.grad}


@exercise("02-layer", probe=_use_layer)
def layer(answer: Answer, draw: Draw) -> None:
    """`LoRALinear(base, r, alpha)`: an nn.Linear with an update of parameters `lora_a`, `lora_b`; `enabled`."""
    w = draw.whole
    for n_in, n_out, r, leading, with_bias, beyond in (
        (300, 9, 20, (2,), True, True),  # wide enough to see how A begins
        (w(5, 9), w(10, 14), w(2, 3), (3, 2), True, False),
        (w(9, 12), w(4, 8), 3, (), False, True),
        (5, 5, 1, (2, 1, 3), True, True),
    ):
        x, (weight, a, b) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        bias = draw.normal(n_out) if with_bias else None
        other_x, (_, *other) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        grad_y, alpha = draw.normal(*leading, n_out), (w(r, 4 * r) if beyond else 0) + 0.5
        facts = answer(x, other_x, weight, bias, [[a, b], other], grad_y, r, alpha)
        case = f"in = {n_in}, out = {n_out}, r = {r}, alpha = {alpha}, {'a' if with_bias else 'no'} bias"
        expect.true(facts["is_module"], "the layer is an nn.Module", "not-a-module")
        names, both = facts["names"], {"lora_a", "lora_b"}
        listed = ", ".join(names) or "none"
        elsewhere = {(r, n_in), (n_out, r)} <= {tuple(shape) for shape in facts.get("shapes", ())}
        mistake = "other-names" if elsewhere else "not-parameters"
        expect.true(both <= set(names), "parameters that train", mistake, "lora_a, lora_b", listed)
        expect.true(both == set(names), "parameters that train", "base-trainable", "lora_a, lora_b", listed)
        expect.tensor(facts["a"], f"lora_a, {case}", (r, n_in), torch.float32)
        expect.tensor(facts["b"], f"lora_b, {case}", (n_out, r), torch.float32)
        expect.true(not facts["b"].any(), f"lora_b begins at zero, {case}", "start-moved")
        if n_in == 300:
            _begins_well(facts["a"], n_in, f"lora_a of a fresh layer, {case}")
        another = not torch.equal(facts["a"], facts["other_a"])
        expect.true(another, f"a second layer has another lora_a, {case}", "seed-fixed")
        what = f"the same torch.manual_seed before it is made gives the same lora_a, {case}"
        expect.true(torch.equal(facts["a"], facts["same_a"]), what, "seed-ignored")
        expect.true(facts["seed"] == r, f"torch's seed, {case}", "seed-changed", r, facts["seed"])

        expect.true(not facts["base_changed"], "the base's weight and bias stay as they are", "base-changed")
        s, rows, grads = alpha / r, x.reshape(-1, n_in), grad_y.reshape(-1, n_out)
        base, update, error = _output(x, weight, bias, a, b, s)
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
            ("on_eval", "the output in eval mode, switched on again"),
        ):
            expect.close(facts[name], base + s * update, f"{what}, {case}", error, wrong | unbiased)
        expect.equal(facts["start"], facts["base"], f"a fresh layer's output, to the last bit, {case}")
        expect.equal(facts["start_again"], facts["base"], f"a fresh layer's output in eval mode, {case}")
        for got, mode in zip(facts["off"], ("", ", then eval()", ", then eval() and train()"), strict=True):
            what = f"the output with enabled = False{mode}, {case}"
            expect.equal(got, facts["base"], what, {"switched": facts["on"]})
        for name, new, mode, changed in (
            ("half", [other[0], b], "eval", "lora_a was"),
            ("next_eval", other, "eval", "lora_b was"),
            ("next", other, "train", "lora_a and lora_b were"),
        ):
            base, update, error = _output(other_x, weight, bias, *new, s)
            old = _mixed([a, b], new)
            stale = {"stale": [base + s * _output(other_x, weight, bias, *one, s)[1] for one in old]}
            for got, under in zip(facts[name], ("", ", under torch.no_grad()"), strict=False):
                what = f"the output in {mode} mode{under}, after {changed} changed, {case}"
                expect.close(got, base + s * update, what, error, stale)

        expect.true(not facts["base_grad"], "gradients of the base", "base-trainable", "none", "some")
        fresh_a, no_b = facts["a"], torch.zeros_like(b)
        _check_gradients(facts["fresh"], rows, grads, weight, fresh_a, no_b, s, f"in a fresh layer, {case}")
        _check_gradients(facts["trained"], rows, grads, weight, a, b, s, case)
        _check_gradients(facts["trained_eval"], rows, grads, weight, a, b, s, f"in eval mode, {case}")
        what = f"for an x that needs no gradient, {case}"
        without = facts["x_frozen"] | {"x": facts["trained"]["x"]}
        _check_gradients(without, rows, grads, weight, a, b, s, what)
        for off in facts["off_gradients"]:  # A and B have none, or zeros
            off = {n: torch.zeros_like(t) if off[n] is None else off[n] for n, t in (("a", a), ("b", b))} | {
                "x": off["x"]
            }
            _check_gradients(off, rows, grads, weight, a, b, 0.0, f"with enabled = False, {case}")


def _output(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
) -> tuple[Tensor, ...]:
    """What the base gives, the update without its scaling, and what float32 may lose of their sum."""
    base = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    update, rows = x.double() @ a.double().T @ b.double().T, x.reshape(-1, x.shape[-1])
    error = expect.dot_error(rows, weight.T) + s * expect.dot_error(rows, a.T, b.T)
    return base, update, error.reshape(base.shape) + 8 * expect.EPSILON * (base + s * update).abs()


def _mixed(old: list[Tensor], new: list[Tensor]) -> list[list[Tensor]]:
    """A and B of which one or both are old."""
    return [old, [old[0], new[1]], [new[0], old[1]]]


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
    w = draw.whole
    smaller = w(5, 9)
    for n_in, n_out, r, rank, decay, scale in (
        (9, 9, 3, 9, 0.75, 1.0),  # singular values well apart, and of usual sizes
        (w(10, 15), w(5, 9), 2, 9, 0.75, 1.0),
        (w(4, 7), w(12, 20), 4, 7, 0.75, 1.0),
        (w(6, 12), w(6, 12), w(3, 4), 99, 0.25, 1.0),  # of those that are kept, some are small
        (w(6, 12), w(6, 12), w(1, 5), 99, 0.75, 1e-4),
        (w(6, 12), w(6, 12), w(1, 5), 99, 0.75, 1e4),
        (smaller, w(9, 14), smaller, 99, 0.25, 1e-4),  # of full rank: nothing is left
        (w(9, 14), smaller, smaller, 99, 0.9, 1.0),
        (1, w(2, 9), 1, 1, 0.75, 1.0),
        (w(2, 9), 1, 1, 1, 0.75, 1e-4),
        (1, 1, 1, 1, 0.75, 1.0),
        (7, 6, 3, 1, 0.75, 1.0),
        (4, 5, 2, 0, 0.75, 1.0),
    ):
        u, _ = torch.linalg.qr(draw.normal(n_out, min(n_in, n_out)).double())
        v, _ = torch.linalg.qr(draw.normal(n_in, min(n_in, n_out)).double())
        s = scale * draw.number(3, 5) * decay ** torch.arange(min(n_in, n_out)).double()
        s[rank:] = 0
        delta = (u * s @ v.T).float()
        delta = _strided(delta) if scale != 1 else delta
        b, a = expect.parts(answer(delta, r), "the result", 2)
        case = f"for delta of shape {(n_out, n_in)} and rank {min(rank, n_in, n_out)}, r = {r}"
        case += f", the largest singular value {s[0]:.3g}"
        swapped = {(r, n_in): "shapes-swapped", (r, n_out): "shapes-swapped", (n_in, r): "shapes-swapped"}
        expect.tensor(b, f"B, {case}", (n_out, r), torch.float32, shape_mistakes=swapped)
        expect.tensor(a, f"A, {case}", (r, n_in), torch.float32, shape_mistakes=swapped)
        got, exact = b.double() @ a.double(), delta.double()
        # What is left has at least the norm of the singular values that are left out. An SVD in float32 is the exact
        # one of a matrix that is off by some roundings of delta's norm, and so is what is left.
        least = torch.linalg.svdvals(exact)[r:].square().sum().sqrt().item()
        left, near = (exact - got).norm().item(), 25 * expect.EPSILON * exact.norm().item()
        if not left <= least + near:  # so that NaN is refused too
            some = r < min(n_in, n_out)  # else the smallest are the largest
            wrong = {
                "values-missing": [u[:, :r] @ v[:, :r].T],
                "values-twice": [u[:, :r] * s[:r] ** 2 @ v[:, :r].T],
                "smallest": [u[:, -r:] * s[-r:] @ v[:, -r:].T] if some else [],
                "too-few": [u[:, :few] * s[:few] @ v[:, :few].T for few in range(min(r, rank))],
            }
            near = [
                (m, (got - w).abs().max(), w.abs().max()) for m, matrices in wrong.items() for w in matrices
            ]
            looks = [mistake for mistake, off, size in near if off < 1e-4 * (size or s[0])]
            if some and (_same_sizes(b.T, u[:, -r:].T) or _same_sizes(a, v[:, -r:].T)):
                looks.append("smallest")
            if n_in == n_out and _same_sizes(a, torch.linalg.svd(exact).Vh[:, :r].T):
                looks.append("not-transposed")
            best = u[:, :r] * s[:r] @ v[:, :r].T
            if (got - best).abs().max() < 0.01 * s[0]:
                looks.append("inexact")
            what = f"the squared error that is left, {case}"
            expect.fail(what, f"{least**2:.9g}", f"{left**2:.9g}", looks[0] if looks else None)


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


def _matrix(draw: Draw, n_out: int, n_in: int, values: list[float]) -> Tensor:
    """A matrix with these singular values, and zeros for the others."""
    u, v = (torch.linalg.qr(draw.normal(n, len(values)))[0] for n in (n_out, n_in))
    return u * torch.tensor(values) @ v.T


def _corners(draw: Draw) -> list[tuple[list[Tensor], int]]:
    """Updates and budgets at the edges of what there is."""
    w = draw.whole
    few = [_matrix(draw, 9, 7, [draw.number(3, 4) * 0.9**i for i in range(7)]) for _ in range(w(2, 4))]
    dear = _matrix(draw, 60, 40, [10.5, 1.0])  # worth most for each number, and beyond the budget
    at = w(0, len(few))
    none = torch.zeros(w(3, 6), w(3, 6))
    close = [_matrix(draw, 9, 7, [3.0, 3.0, 3.0]) for _ in range(2)]
    return [
        ([*few[:at], dear, *few[at:]], w(68, 99)),
        ([none, *few], w(70, 90)),
        ([*few, none], 0),
        (few, _cost(few, [7] * len(few))),  # for everything
        (few, _cost(few, [7] * len(few)) + w(1, 15)),
        (few, _cost(few, [7] * len(few)) + w(40, 60)),  # and for two ranks more, which there are not
        # Six ranks of 9 for 16 numbers each, or two of 25 for 48.
        ([*close[:at], _matrix(draw, 30, 18, [5.0, 5.0]), *close[at:]], 96 + w(0, 9)),
    ]


@exercise("02-share")
def share(answer: Answer, draw: Draw) -> Score:
    """`f(deltas, budget)`: a rank for each matrix. The best updates of these ranks cost `budget` numbers at most,
    and lose as little of the squared size as they can."""
    board, cases = None, [_updates(Draw(2))]  # those of the scoreboard, then fresh ones
    for _ in range(2):
        deltas = _updates(draw)[0][draw.whole(0, 2) :]  # any number of matrices
        cases.append((deltas, _cost(deltas, [6] * len(deltas))))
    for deltas, budget in cases + _corners(draw):
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
        same = [min(budget // _cost(deltas, [1] * count), *(min(d.shape) for d in deltas))] * count
        left, equal, best = (100 * _left(deltas, r) for r in (ranks, same, _best(deltas, budget)))
        what = f"% of the squared size lost, over {count} matrices"
        useful = [min(r, torch.linalg.matrix_rank(d).item()) for d, r in zip(deltas, ranks, strict=True)]
        unspent = budget - _cost(deltas, useful)
        fits = any(sum(d.shape) <= unspent and r < min(d.shape) for d, r in zip(deltas, ranks, strict=True))
        mistake = (
            "budget-left" if fits else "equal-ranks" if any(same) and list(ranks) == same else "size-ignored"
        )
        most = WITHIN * best + 1e-6  # where nothing need be lost, a float32 rounding may be
        expect.true(left <= most, what, mistake, f"at most {most:.3f}", left)
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
