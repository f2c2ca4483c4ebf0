"""Checks of chapter 02: the update of low rank.

Everywhere: W is `weight` (out, in), A is `a` (r, in), B is `b` (out, r), y = W x + (alpha / r) B A x.
"""

import math

import torch
from torch import Tensor, nn

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
    for leading, n_in, n_out, r in (((4,), 6, 5, 2), ((3, 2), 7, 11, 3), ((), 5, 9, 4), ((1,), 13, 3, 1)):
        x, (weight, a, b) = draw.normal(*leading, n_in), _parts(draw, n_in, n_out, r)
        alpha = r * draw.choice([3, 5, 7]) + draw.choice([1, 2]) / 2  # alpha / r is neither 1 nor a root
        base, update = (
            x.double() @ weight.double().T,
            x.double() @ a.double().T @ b.double().T,
        )
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
                "base-missing": alpha / r * update,
                "update-missing": base,
                "base-scaled": alpha / r * (base + update),
            },
        )


@exercise("02-init")
def init(answer: Answer, draw: Draw) -> None:
    """`f(n_in, n_out, r)`: (a, b), float32, A uniform in ±1 / sqrt(in) and B zero."""
    for n_in, n_out, r in ((400, 90, 25), (150, 700, 60), (draw.whole(300, 500), draw.whole(5, 9), 31)):
        a, b = expect.parts(answer(n_in, n_out, r), "the result", 2)
        case = f"for in = {n_in}, out = {n_out}, r = {r}"
        swapped = {(n_in, r): "shapes-swapped", (r, n_out): "shapes-swapped", (n_out, r): "shapes-swapped"}
        expect.tensor(a, f"A, {case}", (r, n_in), torch.float32, shape_mistakes=swapped)
        expect.tensor(
            b, f"B, {case}", (n_out, r), torch.float32, shape_mistakes={(r, n_out): "shapes-swapped"}
        )
        expect.true(not b.any(), f"B is zero, {case}", "b-random", 0.0, b.abs().max().item())
        expect.true(bool(a.any()), f"A is not zero, {case}", "a-zero")
        bound, largest = 1 / math.sqrt(n_in), a.abs().max().item()
        expect.true(
            not (a >= 0).all() and not (a <= 0).all(),
            f"A has both signs, {case}",
            "one-sided",
            "±",
            a.flatten()[0].item(),
        )
        if not 0.99 * bound < largest <= bound * 1.0001:
            # A uniform sample's largest magnitude is sqrt(3) deviations; that of some thousand normal numbers above
            # 3.
            uniform = largest < 1.8 * a.double().pow(2).mean().sqrt()
            expect.fail(f"the largest of |A|, {case}", bound, largest, "wrong-fan" if uniform else "a-normal")
        # The mean square of count uniform numbers is bound² / 3, with a standard error of 0.894 of it / sqrt(count).
        spread, error = a.double().pow(2).mean().item() * 3 / bound**2, 0.8945 / math.sqrt(a.numel())
        expect.true(abs(spread - 1) < 6 * error, f"A is spread evenly, {case}", "a-normal", 1.0, spread)
        again, _ = expect.parts(answer(n_in, n_out, r), "the result", 2)
        expect.true(not torch.equal(a, again), f"a second call draws another A, {case}", "seed-fixed")


@exercise("02-merge")
def merge(answer: Answer, draw: Draw) -> None:
    """`f(weight, a, b, alpha, r)`: W + (alpha / r) B A, summed in float32, in the weight's dtype, a new tensor."""
    for n_in, n_out, r, dtype in (
        (7, 7, 3, torch.float32),
        (12, 5, 2, torch.float32),
        (64, 48, 5, torch.bfloat16),
        (33, 70, 4, torch.float16),
    ):
        weight, a, b = _parts(draw, n_in, n_out, r)
        weight, alpha = weight.to(dtype), 2.5 * r + 1
        update = alpha / r * (b.double() @ a.double())
        right = weight.double() + update
        case = (
            f"for W of shape {(n_out, n_in)}, {str(dtype).removeprefix('torch.')}, r = {r}, alpha = {alpha}"
        )
        got = expect.tensor(answer(weight, a, b, alpha, r), f"W merged, {case}")
        if got.dtype != dtype:
            expect.fail(f"the dtype, {case}", str(dtype), str(got.dtype), "dtype-kept-wide")
        within = ((alpha / r + 1) * expect.dot_error(b, a) + 4 * expect.EPSILON * right.abs()).max()
        wrong = {
            "scale-missing": weight.double() + b.double() @ a.double(),
            "wrong-sign": weight.double() - update,
        }
        if n_in == n_out:
            wrong["order"] = weight.double() + update.T
        sizes = weight.double().abs() + alpha / r * (b.double().abs() @ a.double().abs())
        # In 16 bits a right sum is off by half a step. What is rounded on the way is off by some, and named below.
        steps = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        expect.close(got, right, f"W merged, {case}", within + steps * sizes, wrong)
        if dtype != torch.float32:
            # float32's own error carries a sum across the middle between two 16-bit numbers in a few places of
            # thousands.
            missed, allowed = (right.to(dtype) != got).sum().item(), got.numel() // 100
            kind = str(dtype).removeprefix("torch.")
            what = f"sums that are not the nearest {kind} number, {case}"
            expect.true(missed <= allowed, what, "rounded-early", f"at most {allowed}", missed)


def _use_layer(student, x, weight, bias, a, b, grad_y, r, alpha) -> dict:
    """Builds the student's layer around a frozen-to-be base, uses it, and returns what came of it."""
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
    named = dict(layer.named_parameters())
    facts = {
        "is_module": True,
        "names": sorted(name for name, p in named.items() if p.requires_grad),
        "a": layer.lora_a.detach().clone(),
        "b": layer.lora_b.detach().clone(),
        "start": layer(x),
    }
    with torch.no_grad():
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
    x = x.clone().requires_grad_()
    y = layer(x)
    facts["y"] = y
    if not y.requires_grad:
        return facts | {"grad_a": None, "grad_b": None, "grad_x": None, "base_grad": False}
    y.backward(grad_y)
    return facts | {
        "grad_a": layer.lora_a.grad,
        "grad_b": layer.lora_b.grad,
        "grad_x": x.grad,
        "base_grad": any(p.grad is not None for p in base.parameters()),
        "base_changed": not torch.equal(base.weight, weight),
    }


@exercise("02-layer", probe=_use_layer)
def layer(answer: Answer, draw: Draw) -> None:
    """`LoRALinear(base, r, alpha)`: a module around an nn.Linear, with parameters `lora_a` and `lora_b`."""
    for n_in, n_out, r, with_bias in ((6, 9, 2, True), (11, 4, 3, False), (5, 5, 1, True)):
        x, (weight, a, b) = draw.normal(3, 2, n_in), _parts(draw, n_in, n_out, r)
        bias = draw.normal(n_out) if with_bias else None
        grad_y, alpha = draw.normal(3, 2, n_out), 3 * r + 0.5
        facts = answer(x, weight, bias, a, b, grad_y, r, alpha)
        case = f"in = {n_in}, out = {n_out}, r = {r}, alpha = {alpha}, {'a' if with_bias else 'no'} bias"
        expect.true(facts["is_module"], "the layer is an nn.Module", "not-a-module")
        names = facts["names"]
        expect.true(
            {"lora_a", "lora_b"} <= set(names),
            "parameters that train",
            "not-parameters",
            "lora_a, lora_b",
            ", ".join(names) or "none",
        )
        expect.true(
            set(names) == {"lora_a", "lora_b"},
            "parameters that train",
            "base-trainable",
            "lora_a, lora_b",
            ", ".join(names),
        )
        expect.tensor(facts["a"], f"lora_a, {case}", (r, n_in))
        expect.tensor(facts["b"], f"lora_b, {case}", (n_out, r))
        base = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        rows, grads = x.reshape(-1, n_in), grad_y.reshape(-1, n_out)
        scaling = alpha / r
        base_error = (
            expect.dot_error(rows, weight.T) + 8 * expect.EPSILON * base.reshape(-1, n_out).abs()
        ).reshape(3, 2, n_out)
        expect.close(
            facts["start"], base, f"the output of a fresh layer, {case}", base_error,
            {"bias-dropped": base - bias.double()} if with_bias else {},
        ) if not facts["b"].any() else expect.fail(
            f"lora_b begins at zero, {case}", 0.0, facts["b"].abs().max().item(), "start-moved"
        )  # fmt: skip
        update = x.double() @ a.double().T @ b.double().T
        error = base_error + scaling * expect.dot_error(rows, a.T, b.T).reshape(3, 2, n_out)
        expect.close(
            facts["y"], base + scaling * update, f"the output, {case}", error,
            {"scale-missing": base + update, "gradient-cut": base},
        )  # fmt: skip
        expect.true(not facts["base_grad"], "gradients of the base", "base-trainable", "none", "some")
        for name in ("grad_a", "grad_b"):
            expect.true(
                facts[name] is not None,
                f"the gradient of lora_{name[-1]}",
                "gradient-cut",
                "a tensor",
                "None",
            )
        expect.true(facts["grad_x"] is not None, "the gradient of x", "input-cut", "a tensor", "None")
        grad_h = scaling * grads.double() @ b.double()  # of x Aᵀ
        right_a, right_b = (
            grad_h.T @ rows.double(),
            scaling * grads.double().T @ (rows.double() @ a.double().T),
        )
        error_a = scaling * expect.dot_error(b.T, grads.T, rows) + 1e-6
        error_b = scaling * expect.dot_error(grads.T, rows, a.T) + 1e-6
        expect.close(
            facts["grad_a"],
            right_a,
            f"the gradient of lora_a, {case}",
            error_a,
            {"gradient-cut": 0 * right_a},
        )
        expect.close(
            facts["grad_b"],
            right_b,
            f"the gradient of lora_b, {case}",
            error_b,
            {"gradient-cut": 0 * right_b},
        )
        through_base = grads.double() @ weight.double()
        right_x = (through_base + grad_h @ a.double()).reshape(3, 2, n_in)
        error_x = expect.dot_error(grads, weight) + scaling * expect.dot_error(grads, b, a)
        expect.close(
            facts["grad_x"], right_x, f"the gradient of x, {case}", error_x.reshape(3, 2, n_in),
            {"input-cut": [p.reshape(3, 2, n_in) for p in (through_base, grad_h @ a.double())]},
        )  # fmt: skip
        expect.true(not facts.get("base_changed"), "the base's weight stays as it is", "base-changed")


@exercise("02-best-update")
def best_update(answer: Answer, draw: Draw) -> None:
    """`f(delta, r)`: (b, a) with B A as near to `delta` (out, in) as rank r allows, in the sum of squares."""
    for n_in, n_out, r in ((9, 9, 3), (14, 6, 2), (5, 17, 4), (8, 8, 1)):
        # Singular values that are well apart, so that float32 finds the same directions as float64.
        u, _ = torch.linalg.qr(draw.normal(n_out, min(n_in, n_out)).double())
        v, _ = torch.linalg.qr(draw.normal(n_in, min(n_in, n_out)).double())
        s = draw.number(3, 5) * 0.75 ** torch.arange(min(n_in, n_out)).double()
        delta = (u * s @ v.T).float()
        b, a = expect.parts(answer(delta, r), "the result", 2)
        case = f"for delta of shape {(n_out, n_in)}, r = {r}"
        swapped = {(r, n_in): "shapes-swapped", (r, n_out): "shapes-swapped", (n_in, r): "shapes-swapped"}
        expect.tensor(b, f"B, {case}", (n_out, r), shape_mistakes=swapped)
        expect.tensor(a, f"A, {case}", (r, n_in), shape_mistakes=swapped)
        got, near = b.double() @ a.double(), 1e-4 * s[0] ** 2  # far above float32, far below any mistake
        # The squared error cannot be below the sum of the squares left out; float32 factors come that near to it.
        least, left = s[r:].square().sum().item(), (delta.double() - got).square().sum().item()
        if not left <= least + near:  # so that NaN is refused too
            wrong = {
                "values-missing": u[:, :r] @ v[:, :r].T,
                "values-twice": u[:, :r] * s[:r] ** 2 @ v[:, :r].T,
                "smallest": u[:, -r:] * s[-r:] @ v[:, -r:].T,
            }
            looks = [mistake for mistake, w in wrong.items() if (got - w).abs().max() < near]
            if n_in == n_out and _same_sizes(a, torch.linalg.svd(delta.double()).Vh[:, :r].T):
                looks.append("not-transposed")
            expect.fail(f"the squared error that is left, {case}", least, left, looks[0] if looks else None)


def _same_sizes(rows: Tensor, others: Tensor) -> bool:
    """Whether rows have the same magnitudes, each up to a factor (the signs of singular vectors are free)."""
    a, b = (torch.nn.functional.normalize(t.double(), dim=1).abs() for t in (rows, others))
    return bool((a - b).abs().max() < 1e-3)


def _left(deltas: list[Tensor], ranks: list[int]) -> float:
    """Part of the squared size of all updates that is lost at these ranks."""
    values = [torch.linalg.svdvals(d.double()).square() for d in deltas]
    return sum(v[r:].sum().item() for v, r in zip(values, ranks, strict=True)) / sum(
        v.sum().item() for v in values
    )


def _cost(deltas: list[Tensor], ranks: list[int]) -> int:
    return sum(r * sum(d.shape) for d, r in zip(deltas, ranks, strict=True))


@exercise("02-share")
def share(answer: Answer, draw: Draw) -> Score:
    """`f(deltas, budget)`: a rank for each matrix. The best updates of these ranks cost `budget` numbers at most,
    and lose as little of the squared size as they can."""
    for source in (draw, Draw(2)):  # fresh ones for validity, then those of the scoreboard
        shapes = [(40, 12), (12, 40), (64, 64), (20, 20), (90, 10), (30, 50)]
        deltas = [
            source.normal(*s) * source.number(0.5, 2) * torch.linspace(1, 0.05, s[1]) ** source.whole(1, 4)
            for s in shapes
        ]
        budget = _cost(deltas, [3] * len(deltas))
        ranks = answer(deltas, budget)
        ranks = ranks.tolist() if isinstance(ranks, Tensor) else ranks
        expect.true(
            isinstance(ranks, list | tuple) and len(ranks) == len(deltas),
            "one rank for each matrix",
            "wrong-type",
            len(deltas),
            ranks,
        )
        for r, delta in zip(ranks, deltas, strict=True):
            possible = isinstance(r, int) and not isinstance(r, bool) and 0 <= r <= min(delta.shape)
            expect.true(
                possible,
                f"a rank for a matrix of shape {tuple(delta.shape)}",
                "impossible-rank",
                f"0 to {min(delta.shape)}",
                r,
            )
        expect.true(
            _cost(deltas, ranks) <= budget,
            "the numbers that the ranks cost",
            "over-budget",
            budget,
            _cost(deltas, ranks),
        )
        left, equal, best = (
            _left(deltas, ranks),
            _left(deltas, [3] * len(deltas)),
            _left(deltas, _greedy(deltas, budget)),
        )
        even = list(ranks) == [3] * len(deltas)
        expect.true(not even, "the part that is lost", "equal-ranks", f"less than {equal:.4f}", left)
        expect.true(
            left <= 1.02 * best, "the part that is lost", "size-ignored", f"at most {1.02 * best:.4f}", left
        )
    return Score(
        100 * left,
        "% of the updates lost",
        {"equal ranks": 100 * equal, "gain per number, greedily": 100 * best},
    )


def _greedy(deltas: list[Tensor], budget: int) -> list[int]:
    """Directions in the order of what they save per number, as long as they fit."""
    gains = [
        (v.item() / sum(d.shape), i)
        for i, d in enumerate(deltas)
        for v in torch.linalg.svdvals(d.double()).square()
    ]
    ranks = [0] * len(deltas)
    for _, i in sorted(gains, reverse=True):
        if (cost := sum(deltas[i].shape)) <= budget:
            ranks[i], budget = ranks[i] + 1, budget - cost
    return ranks
