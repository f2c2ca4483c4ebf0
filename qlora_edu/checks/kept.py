"""Checks of chapter 06, second part: what a 4-bit layer keeps in memory, and for how long.

`decode(stored)` gives W (out, in) in float32; the checks hand it in, count its calls, and watch what becomes of W.
"""

import gc
import math
import sys
import weakref
from contextlib import contextmanager
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise
from qlora_edu.checks.qlora import (
    adapter,
    counting_decoder,
    decoded,
    like,
    product,
    relative_error,
    stored_matrix,
)


class _Watch(TorchDispatchMode):
    """Knows the memory that torch's operations made inside it: how much is alive now, and was at most."""

    def __init__(self):
        super().__init__()
        self._alive, self._total, self.peak = {}, 0, 0  # the size of each storage, with what tells of its end
        self.left = False  # whether numbers went to NumPy or Python, whose copies this does not see
        self._single = 0

    def _note(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default and not _by_torch():
            self._single += 1  # one number for Python: a few are fine
            self.left |= self._single > 64
        given = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in given and key not in self._alive:
                    self._alive[key] = size, weakref.ref(storage, partial(self._ended, key))
                    self._total += size
        self.peak = max(self.peak, self._total)
        return result

    def _ended(self, key: int, _) -> None:
        self._total -= self._alive.pop(key)[0]

    def kept(self, *results: Tensor) -> int:
        """How many bytes are alive beside those of these results, after garbage has been collected."""
        own = {id(result.untyped_storage()) for result in results}
        if set(self._alive) - own:
            gc.collect()
        return sum(size for key, (size, _) in self._alive.items() if key not in own)


# Set afterwards: what torch finds in a new class it wraps, and would load its compiler at the first operation.
_Watch.__torch_dispatch__ = _Watch._note


def _by_torch() -> bool:
    """Whether the caller's caller, or one close above, prints a tensor, or is the check's own `decode`."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") in ("torch._tensor_str", "qlora_edu.checks.qlora"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _watching(watch: _Watch | None = None):
    """A watch that sees what goes to NumPy and to Python's lists, too."""
    watch = watch or _Watch()

    def noted(way, most: int):
        def leave(tensor, *arguments, **options):
            if tensor.numel() > most and not _by_torch():
                watch.left = True
            return way(tensor, *arguments, **options)

        return leave

    ways = {"numpy": -1, "tolist": 8, "__reduce_ex__": -1}
    with watch, patch.multiple(Tensor, **{name: noted(getattr(Tensor, name), n) for name, n in ways.items()}):
        yield watch


class _Copied(torch.autograd.Function):
    """A copy, whose backward pass hands on the very tensor that it got."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


def _use_function(student, stored, x, bias, grad_y, x_learns: bool, bias_learns: bool) -> dict:
    """Both passes through the student's Function: what came out, and what was kept between them."""
    if not (isinstance(student, type) and issubclass(student, torch.autograd.Function)):
        return {"is_function": False}
    decode, calls = counting_decoder()
    leaf = x.clone().requires_grad_(x_learns)
    bias = None if bias is None else bias.clone().requires_grad_(bias_learns)
    given = leaf * 1  # no leaf: once it is let go, only what keeps it has it
    with _watching() as watch:
        y = student.apply(given, stored, decode, bias)
    if not isinstance(y, Tensor):
        return {"is_function": True, "y": y}
    facts = {"is_function": True, "y": y.detach().clone(), "forward": len(calls), "kept": watch.kept(y)}
    held, result = weakref.ref(given.untyped_storage()), _Copied.apply(y)
    del given, y
    facts |= {"x_kept": held() is not None, "y_kept": watch.kept() > facts["kept"], "left": watch.left}
    try:
        result.backward(grad_y)
        facts["refused"] = ""
    except RuntimeError as error:
        if "returned a" not in str(error):  # what torch says of a wrong number, or of one for what takes none
            raise
        facts["refused"] = str(error)
    grad_bias = None if bias is None else bias.grad
    return facts | {"backward": len(calls) - facts["forward"], "grad_x": leaf.grad, "grad_bias": grad_bias}


def _accurate(got: Tensor, right: Tensor, what: str) -> None:
    """Refuse a bfloat16 product that is off by more, as a whole, than roundings of W and of the result make it."""
    most = 0.6 * torch.finfo(torch.bfloat16).eps  # in 100 products the two roundings made at most 0.33
    if got.dtype == torch.bfloat16 and got.numel() > 100:
        error = relative_error(got, right)
        expect.true(error <= most, f"the error of {what}, relative", "inexact", f"at most {most:.2g}", error)


@exercise("06-function", probe=_use_function)
def function(answer: Answer, draw: Draw) -> None:
    """A Function with apply(x, stored, decode, bias): x Wᵀ + bias, that keeps nothing but codes and scales."""
    for leading, n_out, n_in, dtype, with_bias, x_learns, bias_learns in (
        ((4,), 6, 6, torch.float32, True, True, True),
        ((3, 2), 5, 7, torch.float32, True, True, False),
        ((2,), 9, 4, torch.bfloat16, True, True, False),
        ((8, 6), 17, 24, torch.bfloat16, True, True, True),
        ((5,), 4, 6, torch.float32, False, True, False),
        ((3,), 8, 5, torch.float32, True, False, True),
        ((), 4, 3, torch.float32, True, True, True),
    ):
        x, grad_y = draw.normal(*leading, n_in, dtype=dtype), draw.normal(*leading, n_out, dtype=dtype)
        stored, bias = stored_matrix(draw, n_out, n_in), draw.normal(n_out, dtype=dtype)
        weight, rows, grads = decoded(stored), x.reshape(-1, n_in), grad_y.reshape(-1, n_out)
        bias, shift = (bias, bias.double()) if with_bias else (None, 0 * bias.double())
        crash = "dtypes-mixed" if dtype == torch.bfloat16 else None
        facts = answer(stored, x, bias, grad_y, x_learns, bias_learns, crash=crash)
        expect.true(facts["is_function"], "the class derives from torch.autograd.Function", "not-a-function")
        learns = " and ".join(["x"] * x_learns + ["the bias"] * bias_learns)
        case = f"for x {list(x.shape)}, {str(dtype)[6:]}, out = {n_out}, where {learns} takes a gradient"
        right, error = product(rows, weight.T, grad_y.shape, dtype, shift)
        wrong, got = {"bias-missing": right - shift}, facts["y"]
        if n_in == n_out:
            wrong["transposed"] = product(rows, weight, x.shape, dtype, shift)[0]
        expect.close(got, right, f"y, {case}", error, like(got, wrong), dtype)
        _accurate(got, right, f"y, {case}")
        kept, forward = facts["kept"], facts["forward"]
        expect.same(kept, 0, f"bytes kept that forward has made, {case}", {"weight-kept": kept})
        expect.true(not facts["left"], "no tensor goes to NumPy or to Python", "outside-torch")
        expect.true(not facts["x_kept"], f"x is not kept, {case}", "input-kept")
        expect.true(not facts["y_kept"], f"y is not kept, {case}", "output-kept")
        expect.same(forward, 1, f"decodings in forward, {case}", {"decodings": forward})
        refused = facts["refused"]
        mistake = "gradient-form" if "invalid gradient" in refused else "gradient-count"
        expect.true(not refused, f"what backward returns, {case}", mistake, "four gradients", refused)
        ones = torch.ones(1, len(grads))
        for name, asked, (right, error), mistake in (
            ("x", x_learns, product(grads, weight, x.shape, dtype), "no-gradient"),
            ("bias", bias_learns, product(ones, grads, (n_out,), dtype), "bias-gradient"),
        ):
            what, got, wrong = f"the gradient of {name}, {case}", facts[f"grad_{name}"], {mistake: 0 * right}
            if n_in == n_out:
                wrong["transposed"] = grads.double() @ weight.double().T
            if asked:
                expect.true(got is not None, what, mistake, "a tensor", "None")
                expect.close(got, right, what, error, like(got, wrong))
                if name == "x":
                    _accurate(got, right, what)
        decodings = facts["backward"]
        expect.same(decodings, int(x_learns), f"decodings in backward, {case}", {"decodings": decodings})


class _Product(torch.autograd.Function):
    """x Wᵀ, with W decoded forward and again backward: what `FastInEval` gets as `product`."""

    @staticmethod
    def forward(ctx, x, stored, decode):
        ctx.stored, ctx.decode = stored, decode
        return F.linear(x, decode(stored))

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored), None, None


# When, which codes they are (1: those of a second layer), whether x takes a gradient, how often W is decoded.
_VISITS = (
    ("in train mode", 0, True, 2),
    ("in eval mode after that", 0, True, 1),
    ("in eval mode for the second time", 0, True, 0),
    ("in eval mode, of a second layer,", 1, True, 1),
    ("in eval mode, of the first layer again, where x takes no gradient,", 0, False, 0),
    ("in train mode after eval mode, where x takes no gradient,", 0, False, 1),
    ("in eval mode between two steps", 0, True, 1),
    ("in train mode after eval mode", 0, True, 2),
    ("in eval mode once more", 0, True, 1),
    ("in eval mode with other codes", 2, True, 1),
    ("in eval mode with the first codes again", 0, True, 1),
    ("in train mode with other codes", 2, True, 2),
    ("in eval mode with these other codes", 2, True, 1),
    ("in eval mode after the codes changed twice", 0, True, 1),
)


def _alternate(student, codes: list, x, grad_y) -> dict:
    """Takes the student's layers through both modes and back, and returns what they gave on each visit."""
    (decode, calls), watches, layers = counting_decoder(), (_Watch(), _Watch()), []
    held = [dict(stored) for stored in codes]
    for watch, stored in zip(watches, held, strict=False):
        with _watching(watch):
            layers.append(student(stored, decode, _Product.apply))
    if not all(isinstance(layer, nn.Module) for layer in layers):
        return {"is_module": False}
    models, built = [nn.Sequential(layer) for layer in layers], len(calls)

    def visit(second: bool, training: bool, learns: bool) -> dict:
        model, watch, before = models[second], watches[second], len(calls)
        if model.training != training:
            model.train(training)
        leaf = x.clone().requires_grad_(learns)
        with _watching(watch):
            y = model(leaf)
        if not isinstance(y, Tensor):
            return {"y": y}
        kept = watch.kept(y) if training else 0
        if y.requires_grad:
            with _watching(watch):
                y.backward(grad_y.to(y.dtype))
        y, gradient = y.detach().clone(), None if leaf.grad is None else leaf.grad.clone()
        return {"y": y, "grad_x": gradient, "kept": kept, "decodings": len(calls) - before}

    visits, names, now = [], set(), 0
    for when, which, learns, _ in _VISITS:
        if "these" in when or "twice" in when:  # held by the layer alone: their id may come again
            layers[0].stored = dict(codes[1])
            layers[0].stored = dict(codes[which])
        elif which != 1 and which != now:
            layers[0].stored, now = held[which], which
        training = "train" in when
        visits.append(visit(which == 1, training, learns))
        visits[-1]["stays"] = watches[0].kept() if training else 0
        for model in models:
            names |= {*model.state_dict(), *(name for name, _ in model.named_parameters())}
    left = any(watch.left for watch in watches)
    return {"is_module": True, "visits": visits, "names": sorted(names), "left": left, "built": built}


@exercise("06-eval", probe=_alternate)
def eval_mode(answer: Answer, draw: Draw) -> None:
    """`FastInEval(stored, decode, product)`: decodes once in eval mode, and trains as if that had not been."""
    for leading, n_out, n_in in (((4,), 6, 6), ((3, 2), 7, 5), ((), 1, 3)):
        x, grad_y = draw.normal(*leading, n_in), draw.normal(*leading, n_out)
        codes = [stored_matrix(draw, n_out, n_in) for _ in range(2)]
        codes.append(codes[0] | {"packed": codes[0]["packed"] ^ 0b01010101})  # the scales are the same
        facts = answer(codes, x, grad_y)
        expect.true(facts["is_module"], "the layer is an nn.Module", "not-a-module")
        names = facts["names"]
        expect.same(names, [], "names in state_dict() and named_parameters()", {"in-the-file": names})
        expect.true(not facts["left"], "no tensor goes to NumPy or to Python", "outside-torch")
        for (when, which, learns, count), visit in zip(_VISITS, facts["visits"], strict=True):
            weight, changed = decoded(codes[which]), "codes" in when
            mistake = "stale" if changed else "shared" if "layer" in when else "modes-differ"
            for name, given, matrix in (("y", x, weight.T), ("grad_x", grad_y, weight)):
                what, got = f"{name} {when} for x {list(x.shape)}, out = {n_out}", visit.get(name)
                if name == "grad_x" and not learns:
                    continue
                expect.true(name == "y" or got is not None, what, "gradient-lost", "a tensor", "None")
                shape = (*leading, matrix.shape[1])
                right, error = product(given.reshape(-1, len(matrix)), matrix, shape, torch.float32)
                expect.close(expect.tensor(got, what, shape), right, what, error, {mistake: got})
                expect.tensor(got, what, dtype=torch.float32)
            calls, kept, stays = (visit[name] for name in ("decodings", "kept", "stays"))
            mistake = "obvious-in-training" if calls == 1 and learns else "weight-kept"
            expect.same(kept, 0, f"bytes kept between forward and backward {when}", {mistake: kept})
            expect.same(calls, count, f"decodings {when}", {"decoded-each-time": calls})
            expect.same(stays, 0, f"bytes that stay after the passes {when}", {"weight-kept": stays})
        built = facts["built"]
        expect.same(built, 0, "decodings when the layers are made", {"decoded-each-time": built})


LAYERS, ROWS, WIDTH, RANK, LIMIT = 24, 64, 16, 2, 16


def _stack(draw: Draw) -> tuple:
    weights = [0.5 * draw.normal(WIDTH, WIDTH) / math.sqrt(WIDTH) for _ in range(LAYERS)]
    adapters = [adapter(draw, WIDTH, WIDTH, RANK)[:2] for _ in range(LAYERS)]
    return weights, draw.normal(ROWS, WIDTH), adapters, draw.number(0.05, 0.2), draw.normal(ROWS, WIDTH)


def _train_stack(student, weights, x, adapters, scaling, grad_y) -> dict:
    """Both passes through the student's stack: gradients, decodings, and memory at its fullest."""
    calls = []

    def decode(i):
        calls.append(i)
        return weights[i].clone()

    leaf = x.clone().requires_grad_()
    leaves = [tuple(t.clone().requires_grad_() for t in pair) for pair in adapters]
    with _watching() as watch:
        y = student(leaf, leaves, scaling, decode)
        if not isinstance(y, Tensor) or not y.requires_grad:
            return {"y": y, "gradients": None}
        y.backward(grad_y)
    gradients = [t.grad for t in (leaf, *(t for pair in leaves for t in pair))]
    facts = {"y": y, "gradients": gradients, "decodings": len(calls), "peak": watch.peak / x.nbytes}
    return facts | {"left": watch.left, "changed": not torch.equal(leaf, x)}


@cache
def _rivals() -> dict[str, float]:
    """What known ways need."""

    def some(x, adapters, scaling, decode, first=0, last=LAYERS, obvious=False):
        for i, (a, b) in enumerate(adapters[first:last], first):
            base = F.linear(x, decode(i)) if obvious else _Product.apply(x, i, decode)
            x = x + F.silu(base + scaling * F.linear(F.linear(x, a), b))
        return x

    def in_pieces(x, *rest, size):
        for i in range(0, LAYERS, size):
            x = checkpoint(some, x, *rest, i, i + size, use_reentrant=False)
        return x

    ways = {
        "the obvious layer": partial(some, obvious=True),
        "decoded twice, by hand": some,
        "a checkpoint a layer": partial(in_pieces, size=1),
        "6 checkpoints": partial(in_pieces, size=4),
    }
    return {name: _train_stack(way, *_stack(Draw(6)))["peak"] for name, way in ways.items()}


@exercise("06-stack", probe=_train_stack, seconds=30)
def stack(answer: Answer, draw: Draw) -> Score:
    """`f(x, adapters, scaling, decode)`: what all layers give, with little memory at the fullest moment."""
    rivals = _rivals()
    weights, x, adapters, scaling, grad_y = inputs = _stack(draw)
    facts = answer(*inputs)
    y, *rest = free = [t.double().requires_grad_() for t in (x, *(t for pair in adapters for t in pair))]
    for weight, a, b in zip(weights, rest[::2], rest[1::2], strict=True):
        y = y + F.silu(y @ weight.double().T + scaling * y @ a.T @ b.T)
    right = torch.autograd.grad(y, free, grad_y.double())
    # Beside its whole, no gradient of 300 draws was off by more than 5e-6 in float32; with the inputs kept in
    # float16, the worst of each draw was off by 6e-4 or more.
    size, most = "the size of the error, relative", 3e-5
    error = relative_error(expect.tensor(facts["y"], "y", y.shape), y.detach())
    expect.true(error < most, f"y: {size}", "layers-wrong", f"below {most}", error)
    connected = facts["gradients"] is not None and all(g is not None for g in facts["gradients"])
    expect.true(connected, "x and every a and b get a gradient", "not-connected")
    expect.true(not facts["changed"], "x stays as it is", "changed-input")
    expect.true(not facts["left"], "no tensor goes to NumPy or to Python", "outside-torch")
    names = ["x", *(f"{letter} of layer {i}" for i in range(LAYERS) for letter in "ab")]
    for name, got, true in zip(names, facts["gradients"], right, strict=True):
        error = relative_error(got, true)
        expect.true(error < most, f"gradient of {name}: {size}", "gradient-wrong", f"below {most}", error)
    limit, count, peak = 3 * LAYERS, facts["decodings"], facts["peak"]
    expect.true(count <= limit, "decodings", "too-many-decodings", f"at most {limit}", count)
    expect.true(peak <= LIMIT, "layer inputs in memory at once", "too-much-kept", f"at most {LIMIT}", peak)
    return Score(peak, "layer inputs in memory at the fullest moment", rivals)
