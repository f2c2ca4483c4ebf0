"""Checks of chapter 06, second part: what a 4-bit layer keeps in memory, and for how long.

`decode(stored)` gives W (out, in) in float32; the checks hand it in, count its calls, and watch what becomes of W.
"""

import gc
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_edu.checks import expect
from qlora_edu.checks.attempt import unchanged
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
    """Knows the memory that torch's operations read or write inside it: how much is alive now, and was at most.

    What was there before counts nothing (`knows`). Whatever else an operation meets does, wherever it comes from: a
    `torch.tensor` of a list, too, or a buffer that was made long before. Not seen is what no operation meets.
    """

    def __init__(self, *known):
        super().__init__()
        self._alive, self._total, self.peak = (
            {},
            0,
            0,
        )  # by storage: what counts nothing, what counts, its end
        self.left = False  # whether numbers went where this does not see them: to NumPy, to Python
        self._single, self._hopeless = 0, False
        self.knows(*known)

    def knows(self, *values) -> None:
        """The memory of these tensors, and of those in dicts and lists, counts nothing unless it grows."""
        for storage in _storages(values):
            self._enter(storage, storage.nbytes())

    def _enter(self, storage, free: int) -> None:
        key = id(storage)
        self._total -= self._alive.get(key, (0, 0))[1]
        self._alive[key] = free, 0, weakref.ref(storage, partial(self._ended, key))

    def _note(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default and not _by_torch():
            self._single += 1  # one number for Python: a few are fine
            self.left |= self._single > 64
        result = operation(*args, **(kwargs or {}))
        for storage in _storages((args, kwargs, result)):
            if storage is None:  # sparse and other tensors, whose memory is out of sight
                self.left = True
                continue
            key, size = id(storage), storage.nbytes()
            if key not in self._alive:
                self._enter(storage, 0)
                self.left |= not storage.resizable()  # the memory of an array or of bytes
            free, counted, end = self._alive[key]
            if size - free != counted:  # new, or it has grown
                self._alive[key] = free, size - free, end
                self._total += size - free - counted
        self.peak = max(self.peak, self._total)
        return result

    def _ended(self, key: int, _) -> None:
        self._total -= self._alive.pop(key)[1]

    def kept(self, *results: Tensor | None, free: int = 0) -> int:
        """How many bytes are alive beside those of these results. Garbage is collected if they are more than `free`."""
        own = {id(storage) for storage in _storages(results)}

        def count() -> int:
            alive = [(free, end()) for key, (free, _, end) in list(self._alive.items()) if key not in own]
            return sum(storage.nbytes() - free for free, storage in alive if storage is not None)

        if count() > free and not self._hopeless:
            gc.collect()
            self._hopeless = count() > free  # refused; to collect takes long, so once is enough
        return count()


def _storages(values) -> Iterator:
    """The memory of the tensors among these values; None for that of a tensor which does not tell."""
    if isinstance(values, Tensor):
        strided = values.layout == torch.strided
        yield values.untyped_storage() if strided else None
    elif isinstance(values, dict):
        yield from _storages(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _storages(value)


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
            if (most < 0 or tensor.numel() > most) and not _by_torch():
                watch.left = True
            return way(tensor, *arguments, **options)

        return leave

    ways = {"numpy": -1, "tolist": 8, "__reduce_ex__": -1, "__dlpack__": -1}
    with watch, ExitStack() as stack:
        for kind, names in ((Tensor, ways), (torch.UntypedStorage, {"tolist": -1, "__getitem__": -1})):
            new = {name: noted(getattr(kind, name), most) for name, most in names.items()}
            stack.enter_context(patch.multiple(kind, **new))
        yield watch


class _Copied(torch.autograd.Function):
    """A copy, whose backward pass hands on the very tensor that it got."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


def _use_function(student, products: list[tuple]) -> list[dict] | None:
    """All forward passes, then all backward passes, in the same order: what came out, and what was kept.

    products: (stored, x, bias, grad_y, whether x takes a gradient, whether the bias does).
    """
    if not (isinstance(student, type) and issubclass(student, torch.autograd.Function)):
        return None
    begun = [_forward(student, *asked) for asked in products]
    return [found if back is None else found | back() for found, back in begun]


def _forward(student, stored, x, bias, grad_y, x_learns: bool, bias_learns: bool) -> tuple:
    """What came of a forward pass, and a function that makes the backward pass."""
    decode, calls = counting_decoder()
    leaf = x.clone().requires_grad_(x_learns)
    bias = None if bias is None else bias.clone().requires_grad_(bias_learns)
    given = leaf * 1  # no leaf: once it is let go, only what keeps it has it
    handed = grad_y.clone()
    with _watching(_Watch(given, dict(stored), bias, handed)) as watch:
        y = student.apply(given, stored, decode, bias)
    if not isinstance(y, Tensor):
        return {"y": y}, None
    forward = len(calls)
    facts = {"y": y.detach().clone(), "forward": forward, "kept": watch.kept(y), "left": watch.left}
    held, result = weakref.ref(given.untyped_storage()), _Copied.apply(y)
    del given, y
    facts |= {"x_kept": held() is not None, "y_kept": watch.kept() > facts["kept"]}

    def backward() -> dict:
        refused = ""
        try:
            with _watching(watch):
                result.backward(handed)
        except RuntimeError as error:
            if "returned a" not in str(
                error
            ):  # what torch says of a wrong number, or of one for what takes none
                raise
            refused = str(error)
        grads = {"grad_x": leaf.grad, "grad_bias": None if bias is None else bias.grad}
        later = watch.kept(*grads.values())
        changed = not unchanged(grad_y, handed)
        found = {"refused": refused, "backward": len(calls) - forward, "later": later, "left": watch.left}
        return grads | found | {"changed": changed}

    return facts, backward


#: Relative to the whole; in 100 products the two roundings made at most 0.33 of this epsilon.
_MOST = 0.6 * torch.finfo(torch.bfloat16).eps


def _accurate(got: Tensor, right: Tensor, what: str, most: float = _MOST) -> None:
    """Refuse a bfloat16 product that is off by more, as a whole, than roundings of W and of the result make it."""
    if got.dtype == torch.bfloat16 and got.numel() > 100:
        error = relative_error(got, right)
        expect.true(error <= most, f"the error of {what}, relative", "inexact", f"at most {most:.2g}", error)


@exercise("06-function", probe=_use_function)
def function(answer: Answer, draw: Draw) -> None:
    """A Function with apply(x, stored, decode, bias): x Wᵀ + bias, that keeps nothing but codes and scales."""
    single, half, many = torch.float32, torch.bfloat16, [draw.whole(1, 3) for _ in range(draw.whole(4, 6))]
    # Leading dimensions, out, in, dtype, whether there is a bias, whether x and the bias take a gradient.
    for case in (
        ((4,), 6, 6, single, True, True, True),
        ((3, 2), 5, 7, single, True, True, False),
        ((2,), 9, 4, half, True, True, False),
        ((8, 6), 17, 24, half, True, True, True),
        ((5,), 4, 6, single, False, True, False),
        ((3,), 8, 5, single, True, False, True),
        ((), 4, 3, single, True, True, True),
        ((2, 1, 3), 9, 11, half, False, True, False),
        ((5, 2), 8, 7, half, True, False, True),
        ((2, 3, 2), 5, 1, single, True, True, True),
        (many, draw.whole(1, 9), draw.whole(1, 9), single, True, True, True),
        (many, 8, 12, half, draw.choice([True, False]), True, False),
    ):
        _check_products(answer, [_drawn(draw, *case)])
    # Two at a time, of one size.
    for asked in (((True, True), (True, True)), ((False, True), (True, False))):
        _check_products(answer, [_drawn(draw, (3,), 5, 4, single, True, *learns) for learns in asked])


def _drawn(draw: Draw, leading, n_out, n_in, dtype, with_bias, x_learns, bias_learns) -> tuple:
    x, grad_y = draw.normal(*leading, n_in, dtype=dtype), draw.normal(*leading, n_out, dtype=dtype)
    bias = draw.normal(n_out, dtype=dtype)
    return stored_matrix(draw, n_out, n_in), x, bias if with_bias else None, grad_y, x_learns, bias_learns


def _check_products(answer: Answer, products: list[tuple]) -> None:
    """Refuse unless all is right with these products, whose backward passes come after all forward passes."""
    several = len(products) > 1
    crash = "dtypes-mixed" if products[0][1].dtype == torch.bfloat16 else "shared" if several else None
    found = answer(products, crash=crash)
    expect.true(found is not None, "the class derives from torch.autograd.Function", "not-a-function")
    for asked, facts in zip(products, found, strict=True):
        try:
            _check_product(facts, *asked)
        except expect.Wrong as wrong:
            if several:  # one of this size has been right alone
                wrong.what += ", two forward passes before the two backward passes"
                wrong.mistake = "shared"
            raise


def _check_product(facts: dict, stored, x, bias, grad_y, x_learns: bool, bias_learns: bool) -> None:
    (n_out, n_in), dtype = stored["shape"], x.dtype
    weight, rows, grads = decoded(stored), x.reshape(-1, n_in), grad_y.reshape(-1, n_out)
    shift = torch.zeros(n_out).double() if bias is None else bias.double()
    learns = " and ".join(["x"] * x_learns + ["the bias"] * bias_learns)
    learns += " take a gradient" if x_learns and bias_learns else " takes a gradient"
    case = f"for x {list(x.shape)}, {str(dtype)[6:]}, out = {n_out}, where {learns}"
    right, error = product(rows, weight.T, grad_y.shape, dtype, shift)
    wrong, got = {"bias-missing": right - shift}, facts["y"]
    if n_in == n_out:
        wrong["transposed"] = product(rows, weight, x.shape, dtype, shift)[0]
    inexact = {"inexact": got} if dtype == torch.bfloat16 and isinstance(got, Tensor) else {}
    expect.close(got, right, f"y, {case}", error, like(got, wrong) or inexact, dtype)
    _accurate(got, right, f"y, {case}")
    kept, forward = facts["kept"], facts["forward"]
    expect.true(not facts["left"], "all tensors are torch's own, and no numbers leave them", "outside-torch")
    expect.same(kept, 0, f"bytes kept that forward has made, {case}", {"weight-kept": kept})
    expect.true(not facts["x_kept"], f"x is not kept, {case}", "input-kept")
    expect.true(not facts["y_kept"], f"y is not kept, {case}", "output-kept")
    expect.same(forward, 1, f"decodings in forward, {case}", {"decodings": forward})
    refused = facts["refused"]
    mistake = "gradient-form" if "invalid gradient" in refused else "gradient-count"
    expect.true(not refused, f"what backward returns, {case}", mistake, "four gradients", refused)
    expect.true(not facts["changed"], f"backward has written into grad_y, {case}", "changed-input")
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
            expect.close(got, right, what, error, like(got, wrong) or ({"inexact": got} if inexact else {}))
            # A sum over rows, one after the other, in bfloat16: its roundings made 1% of 48 rows.
            _accurate(got, right, what, *([0.05] if name == "bias" else []))
    decodings, later = facts["backward"], facts["later"]
    expect.same(decodings, int(x_learns), f"decodings in backward, {case}", {"decodings": decodings})
    expect.same(later, 0, f"bytes kept after backward, beside the gradients, {case}", {"kept-later": later})


class _Product(torch.autograd.Function):
    """x Wᵀ, with W decoded forward and again backward: what `FastInEval` gets as `product`."""

    @staticmethod
    def forward(ctx, x, stored, decode):
        ctx.stored, ctx.decode = stored, decode
        return F.linear(x, decode(stored))

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.decode(ctx.stored), None, None


# When, which codes they are (1: those of a second layer), whether x takes a gradient, how often W is decoded, and what
# comes between the forward and the backward pass: a call with other codes, or one in train mode.
_VISITS = (
    ("in train mode", 0, True, 2, ""),
    ("in eval mode after that, where x takes no gradient,", 0, False, 1, ""),
    ("in eval mode for the second time", 0, True, 0, ""),
    ("in eval mode, of a second layer,", 1, True, 1, ""),
    ("in eval mode, of the first layer again, where x takes no gradient,", 0, False, 0, ""),
    ("in train mode after eval mode, where x takes no gradient,", 0, False, 1, ""),
    ("in eval mode between two steps", 0, True, 1, ""),
    ("in train mode after eval mode", 0, True, 2, ""),
    ("in eval mode once more", 0, True, 1, ""),
    ("in eval mode, under no_grad,", 0, True, 0, ""),
    ("in train mode after eval mode, under no_grad,", 0, True, 1, ""),
    ("in train mode again, under no_grad,", 0, True, 1, ""),
    ("in eval mode after that, under no_grad,", 0, True, 1, ""),
    ("in eval mode with other codes", 2, True, 1, ""),
    ("in eval mode with the first codes again", 0, True, 1, ""),
    ("in train mode with other codes", 2, True, 2, ""),
    ("in eval mode with these other codes", 2, True, 1, ""),
    ("in eval mode after the codes changed twice", 0, True, 1, ""),
    ("in eval mode with other codes, under no_grad,", 2, True, 1, ""),
    ("in eval mode, with a call with other codes before the backward pass,", 0, True, 2, "codes"),
    ("in train mode, with a call with other codes before the backward pass,", 0, True, 3, "codes"),
    ("in eval mode, with a call in train mode before the backward pass,", 0, True, 2, "mode"),
)


def _alternate(student, codes: list, x, grad_y) -> dict:
    """Takes the student's layers through both modes and back, and returns what they gave on each visit."""
    (decode, calls), watches, layers = counting_decoder(), (_Watch(), _Watch()), []
    held = [dict(stored) for stored in codes]
    for watch, stored in zip(watches, held, strict=False):
        watch.knows(held, grad_y)
        with _watching(watch):
            layers.append(student(stored, decode, _Product.apply))
    if not all(isinstance(layer, nn.Module) for layer in layers):
        return {"is_module": False}
    models, built = [nn.Sequential(layer) for layer in layers], len(calls)

    def visit(second: bool, when: str, learns: bool, between: str) -> dict:
        model, watch, before, training = (
            models[second],
            watches[second],
            len(calls),
            "in train mode" in when[:13],
        )
        if model.training != training:
            model.train(training)
        leaf, refused = x.clone().requires_grad_(learns), ""
        watch.knows(leaf)
        with _watching(watch), torch.set_grad_enabled("no_grad" not in when):
            y = model(leaf)
        if not isinstance(y, Tensor):
            return {"y": y}
        came, takes = y.detach().clone(), y.requires_grad
        kept = watch.kept(y) if training and not between else 0
        with _watching(watch):
            if between == "codes":
                layers[0].stored = held[2]
            if between == "mode":
                model.train()
            if between:
                model(leaf.detach())
            try:
                if takes:
                    y.backward(grad_y.to(y.dtype))
            except RuntimeError as error:
                if not between:
                    raise
                refused = str(error)
        if between == "codes":
            layers[0].stored = held[0]
        gradient = None if leaf.grad is None else leaf.grad.clone()
        facts = {"y": came, "grad_x": gradient, "kept": kept, "decodings": len(calls) - before}
        return facts | {"takes": takes, "refused": refused, "training": training}

    visits, names, now, was = [], set(), 0, None
    for when, which, learns, _, between in _VISITS:
        if "these" in when or "twice" in when:  # held by the layer alone: their id comes again
            layers[0].stored, others = held[1], []
            new = dict(codes[which])
            while "twice" in when and id(new) != was and len(others) < 1000:
                others.append(new)
                new = dict(codes[which])
            layers[0].stored, now, was = new, None, id(new)
            del new
        elif which != 1 and which != now:
            layers[0].stored, now = held[which], which
        visits.append(visit(which == 1, when, learns, between))
        visits[-1]["stays"] = watches[0].kept(
            free=0 if "in train" in when else x.shape[-1] * grad_y.shape[-1] * 4
        )
        for model in models:
            names |= {*model.state_dict(), *(name for name, _ in model.named_parameters())}
    left = any(watch.left for watch in watches)
    return {"is_module": True, "visits": visits, "names": sorted(names), "left": left, "built": built}


@exercise("06-eval", probe=_alternate)
def eval_mode(answer: Answer, draw: Draw) -> None:
    """`FastInEval(stored, decode, product)`: decodes once in eval mode, and trains as if that had not been."""
    for leading, n_out, n_in in (((4,), 6, 6), ((3, 2), 7, 5), ((), 1, 3), ((2, 1, 2, 2), 4, 1)):
        x, grad_y = draw.normal(*leading, n_in), draw.normal(*leading, n_out)
        codes = [stored_matrix(draw, n_out, n_in) for _ in range(2)]
        codes.append(codes[0] | {"packed": codes[0]["packed"] ^ 0b01010101})  # the scales are the same
        facts = answer(codes, x, grad_y)
        expect.true(facts["is_module"], "the layer is an nn.Module", "not-a-module")
        names = facts["names"]
        expect.same(names, [], "names in state_dict() and named_parameters()", {"in-the-file": names})
        expect.true(
            not facts["left"], "all tensors are torch's own, and no numbers leave them", "outside-torch"
        )
        for (when, which, learns, count, _), visit in zip(_VISITS, facts["visits"], strict=True):
            weight, changed = decoded(codes[which]), "codes" in when
            case = f"{when} for x {list(x.shape)}, out = {n_out}"
            mistake = "stale" if changed else "shared" if "layer" in when else "modes-differ"
            learns, refused = learns and "no_grad" not in when, visit.get("refused", "")
            expect.true(not refused, f"the backward pass {case}", "overwritten", "a gradient", refused)
            for name, given, matrix in (("y", x, weight.T), ("grad_x", grad_y, weight)):
                what, got = f"{name} {case}", visit.get(name)
                if name == "grad_x" and not learns:
                    continue
                expect.true(name == "y" or got is not None, what, "gradient-lost", "a tensor", "None")
                shape = (*leading, matrix.shape[1])
                right, error = product(given.reshape(-1, len(matrix)), matrix, shape, torch.float32)
                known = "overwritten" if name == "grad_x" and "before" in when else mistake
                expect.close(expect.tensor(got, what, shape), right, what, error, {known: got})
                expect.tensor(got, what, dtype=torch.float32)
            expect.true(learns or not visit["takes"], f"y takes no gradient {case}", "asks-for-a-gradient")
            calls, kept, stays = (visit[name] for name in ("decodings", "kept", "stays"))
            mistake = "obvious-in-training" if calls == 1 and learns else "weight-kept"
            expect.same(kept, 0, f"bytes kept between forward and backward {case}", {mistake: kept})
            expect.same(calls, count, f"decodings {case}", {"decoded-each-time": calls})
            most, mistake = (0, "weight-kept") if visit["training"] else (4 * n_out * n_in, "more-than-one")
            most = 0 if "before" in when and "call in train" in when else most
            what = f"bytes that stay after the passes {case}"
            expect.true(stays <= most, what, mistake, f"at most {most}", stays)
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
    given, grad_y = grad_y, grad_y.clone()
    with _watching(_Watch(leaf, leaves, weights, grad_y)) as watch:
        y = student(leaf, leaves, scaling, decode)
        if not isinstance(y, Tensor) or not y.requires_grad:
            return {"y": y, "gradients": None}
    came = y.detach().clone()
    with _watching(watch):
        y.backward(grad_y)
    gradients = [t.grad for t in (leaf, *(t for pair in leaves for t in pair))]
    facts = {"y": came, "gradients": gradients, "decodings": len(calls), "peak": watch.peak / x.nbytes}
    changed = {"x": (leaf, x), "y": (y, came), "grad_y": (grad_y, given), "an adapter": (leaves, adapters)}
    changed = [name for name, (now, before) in changed.items() if not unchanged(before, now)]
    return facts | {"left": watch.left, "changed": changed}


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
    for name in facts.get("changed", ()):
        expect.fail(f"{name} stays as it is, in both passes", mistake="changed-input")
    connected = facts["gradients"] is not None and all(g is not None for g in facts["gradients"])
    expect.true(connected, "x and every a and b get a gradient", "not-connected")
    expect.true(not facts["left"], "all tensors are torch's own, and no numbers leave them", "outside-torch")
    names = ["x", *(f"{letter} of layer {i}" for i in range(LAYERS) for letter in "ab")]
    for name, got, true in zip(names, facts["gradients"], right, strict=True):
        error = relative_error(got, true)
        mistake = "gradient-inexact" if error < 0.02 else "gradient-wrong"
        expect.true(error < most, f"gradient of {name}: {size}", mistake, f"below {most}", error)
    limit, count, peak = 3 * LAYERS, facts["decodings"], facts["peak"]
    expect.true(count <= limit, "decodings", "too-many-decodings", f"at most {limit}", count)
    expect.true(peak <= LIMIT, "layer inputs in memory at once", "too-much-kept", f"at most {LIMIT}", peak)
    return Score(peak, "layer inputs in memory at the fullest moment", rivals)
