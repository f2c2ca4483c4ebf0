"""Checks of chapter 01: bytes of a training step.

Everywhere: a GB is 10⁹ bytes, a GiB 2³⁰. `config` holds what a model's config.json holds: d is "hidden_size", f is
"intermediate_size", L is "num_hidden_layers", h is "num_attention_heads", k is "num_key_value_heads", e is "head_dim",
V is "vocab_size". What is counted is judged by transformers' own model on the meta device.
"""

from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate, combinations, product

import torch
from torch import Tensor, nn

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise

SEVEN = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
GB, GIB = 10**9, 2**30
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}


def _number(
    got, right: float, what: str, wrong: Iterable[tuple[str, float]] = (), within: float = 0.0
) -> None:
    """Refuse unless `got` is that close to the right number. wrong: mistakes, each with what it would have given."""
    got = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
    if isinstance(got, str):  # a text, or the name of what is no plain value
        expect.fail(f"{what}: expected a number", right, got, "no-number")
    plain = isinstance(got, int | float) and not isinstance(got, bool)
    if plain and abs(got) > 2**60:  # more than a float may hold
        expect.fail(what, right, "more than 2⁶⁰, or less than its negative")
    close = plain and abs(got - right) <= within
    named = {m for m, n in wrong if abs(got - n) <= within} if plain and not close else set()
    named = named.pop() if len(named) == 1 else None  # two that fit say nothing
    if plain and not close and expect.show(float(right)) == expect.show(float(got)):
        expect.fail(what, f"{float(right):.17g}", f"{float(got):.17g}", named)
    expect.number(got, right, what, within, {named: got} if named else None)


def _count(got, right: int, what: str, off: Iterable[tuple[str, int]], most: int = 1) -> None:
    """The same for a whole number. off: mistakes, each with what it adds; up to `most` at once are recognised."""
    off = [(mistake, added) for mistake, added in off if added]
    wrong = []
    if isinstance(got, int | float):
        for size in range(1, most + 1):
            sums = [(c[0][0], right + sum(n for _, n in c)) for c in combinations(off, size)]
            if wrong := [(mistake, number) for mistake, number in sums if number == got]:
                break
    _number(got, right, what, wrong)


def _rounded(got, right: float, parts: int) -> bool:
    """Whether `got` is the right number, or the sum of so many, rounded to 1 to 7 digits after the point."""
    plain = isinstance(got, int | float) and 0 < abs(got) < 2**60
    short = (n for n in range(1, 8) if plain and abs(got - round(got, n)) < 1e-10)
    return any(abs(got - right) <= 0.51 * parts * 10**-n for n in short)


@exercise("01-training-bytes")
def training_bytes(answer: Answer, draw: Draw) -> None:
    """`f(base, adapter, base_bits, trained_bits, state_bits, master)`: GB of each part, and their sum."""
    some, few, tiny = draw.whole(10**9, 10**11), draw.whole(10**6, 10**9), draw.whole(100, 999)
    for base, adapter, base_bits, trained_bits, state_bits, master in (
        (65 * 10**9, 0, 16, 16, 32, False),
        (some + 1, 0, 32, 16, 8, True),
        (some, few, 4.127, 16, 32, False),
        (some, few + 1, 4.5, 32, 8, False),
        # Before those with 32-bit states, where a copy is as large as a state.
        (some, few, 4.127, 16, 8, True),
        (some, few, 4.127, 32, 16, True),
        (some, 0, 16, 32, 8, True),
        (some, few, 4.5, 16, 32, True),
        (some, few, 16, 32, 32, True),
        (some, 0, 32, 32, 32, True),
        (some, few, 16, 12, 10, False),  # half bytes
        (some, few, 8, 4, 4, True),
        (10 * tiny, tiny, 4.5, 16, 8, True),
        (tiny, 10 * tiny, 16, 16, 32, False),
        (65 * 10**9, 0, 16, 16, 32, True),
        (7 * 10**9, 0, 16, 16, 32, True),
        (7 * 10**9, 20 * 10**6, 4.5, 16, 32, False),
    ):
        trained, every = adapter or base, base + adapter
        gradient, state, copy = trained_bits / 8, state_bits / 8, 4 * master  # bytes for each trained number
        right = {
            "weights": base * base_bits / 8 / GB,
            "adapter": adapter * trained_bits / 8 / GB,
            "gradients": trained * gradient / GB,
            "optimizer": trained * (2 * state + copy) / GB,
        }
        right["sum"] = sum(right.values())
        wrong = [
            ("weights", "master-elsewhere", base * base_bits / 8 + trained * copy),
            ("adapter", "no-adapter", trained * gradient),
            ("adapter", "adapter-as-wide-as-the-base", adapter * base_bits / 8),
            *(
                (part, "trained-bits-ignored", n * 2)
                for part, n in (("adapter", adapter), ("gradients", trained))
            ),
            ("adapter", "whole-bytes", adapter * (trained_bits // 8)),
            ("gradients", "whole-bytes", trained * (trained_bits // 8)),
            ("optimizer", "whole-bytes", trained * (2 * (state_bits // 8) + copy)),
            ("gradients", "nothing-trained", 0),
            *(("gradients", "gradients-of-frozen", numbers * gradient) for numbers in (base, every)),
            ("gradients", "gradients-as-wide-as-the-base", trained * base_bits / 8),
            ("optimizer", "nothing-trained", 0),
            *(("optimizer", "states-of-frozen", numbers * (2 * state + copy)) for numbers in (base, every)),
            *(("optimizer", "states-once", trained * (state + more)) for more in {copy * (state != copy), 0}),
            ("optimizer", "master-missing", trained * 2 * state),
            *(("optimizer", "master-width", trained * (2 * state + n * master)) for n in (state, gradient)),
            *(("optimizer", "master-of-frozen", trained * 2 * state + n * copy) for n in (base, every)),
        ]
        arguments = (base, adapter, base_bits, trained_bits, state_bits, master)
        got = answer(*arguments)
        keys = sorted(map(str, got)) if isinstance(got, dict) else got
        mistake = "wrong-type" if got is None else "no-dict"
        expect.true(keys == sorted(right), "the result: a dict", mistake, sorted(right), keys)
        for part, size in right.items():
            named = [("bits-for-bytes", 8 * size), ("gib", size * GB / GIB), ("not-in-gb", size * GB)]
            named += [(mistake, number / GB) for where, mistake, number in wrong if where == part]
            rounded = [("rounded", got[part])] if _rounded(got[part], size, 4 if part == "sum" else 1) else []
            named = rounded or [("sum", got[part])] if part == "sum" else named + rounded
            # Whole bytes for each part are right too: ten bytes, as the statement says.
            _number(got[part], size, f'"{part}" in GB, for {arguments}', named, 1e-8)


def _model(config: dict) -> nn.Module:
    """transformers' own model, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


def _config(draw: Draw, shared: int, other: int = 0, tied: bool = False) -> dict:
    """A small config with all settings. shared: h / k, so 1 without grouping. other: d / h less e, usually 0."""
    k, e = draw.whole(2, 3), 2 * draw.whole(2, 5)
    d = k * shared * (e + other)
    return {
        "hidden_size": d,
        "intermediate_size": 3 * d + draw.whole(5, 60),
        "num_hidden_layers": draw.whole(2, 4),
        "num_attention_heads": k * shared,
        "num_key_value_heads": k,
        "head_dim": e,
        "vocab_size": draw.whole(50, 90),
        "tie_word_embeddings": tied,
    }


def _configs(draw: Draw) -> list[tuple[dict, str | None]]:
    """Configs, after the first four with settings that are missing or None; and the mistake that this looks like."""
    grouped, alike = _config(draw, shared=3), _config(draw, shared=1, tied=True)
    full = [grouped, alike, _config(draw, 3, -2), _config(draw, 2, 6, True)]
    optional = []
    for keys, size in product(("given", "missing", "None"), repeat=2):
        if keys == size == "given":
            continue
        config = (full[3] if size == "given" else grouped).copy()  # where it is given, it is not d / h
        for key, how in {"num_key_value_heads": keys, "head_dim": size}.items():
            if how == "None":
                config[key] = None
            elif how == "missing":
                del config[key]
        if size == "missing" and keys != "None":
            del config["tie_word_embeddings"]
        optional.append((config, "optional-settings"))
    return [(config, None) for config in full] + optional


def _letters(config: dict) -> tuple[int, ...]:
    """d, f, L, h, k, e, V of a config."""
    d, h = config["hidden_size"], config["num_attention_heads"]
    k, e = config.get("num_key_value_heads") or h, config.get("head_dim") or d // h
    return d, config["intermediate_size"], config["num_hidden_layers"], h, k, e, config["vocab_size"]


@exercise("01-parameters")
def parameters(answer: Answer, draw: Draw) -> None:
    """`f(config)`: the number of parameters of a LLaMA model."""
    configs = _configs(draw)
    grouped, alike = configs[0][0], configs[1][0]
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 10, "tie_word_embeddings": True}
    wide = {"hidden_size": 3 * 5461, "intermediate_size": 40_000 + draw.whole(0, 99), "num_hidden_layers": 3}
    wide |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 100_003}
    others = [
        grouped | {"num_hidden_layers": 1},  # same d and V as another
        grouped | {"num_key_value_heads": 1},
        alike | {"num_key_value_heads": 1, "num_hidden_layers": 1},
        small,
        SMOLLM2,
        wide,  # more than 2³¹, and more digits than float32 has
    ]
    for config, optional in configs + [(config, None) for config in others]:
        right = sum(parameter.numel() for parameter in _model(config).parameters())
        d, f, layers, h, k, e, v = _letters(config)
        query, key = 2 * d * (d - h * e), 2 * d * k * (d // h - e)  # d / h for e: in q and o, in k and v
        tied = config.get("tie_word_embeddings", False)
        off = {  # what shows in later configs alone comes first
            "head-dim-ignored": [layers * added for added in (query + key, query, query // 2, key)],
            "norms-missing": [-2 * layers * d, -layers * d],
            "last-norm-missing": [-d],
            "tied-twice": [v * d if tied else 0],
            "output-missing": [0 if tied else -v * d],
            "third-matrix-missing": [-layers * f * d],
            # The second: as if all four matrices were d × d.
            "heads-not-grouped": [layers * 2 * (h - k) * e * d, layers * (query + 2 * d * (d - k * e))],
        }
        got = answer(config, crash=optional)
        what = f"the number of parameters, for {config}"
        near = isinstance(got, int | float) and 0 < abs(got - right) < 1e-6 * right
        near = near or (isinstance(got, int) and got != right and (got - right) % 2**32 == 0)
        if near and right > 2**24:
            expect.fail(what, f"{right:,}", f"{got:,}", "too-large")
        if optional:  # with all settings it was right
            _number(got, right, what, [(optional, got)])
        else:
            _count(got, right, what, [(m, n) for m, numbers in off.items() for n in numbers], 3)


@exercise("01-adapter")
def adapter(answer: Answer, draw: Draw) -> None:
    """`f(config, targets, r, bits)`: (numbers, bytes) of a LoRA adapter; ValueError for a name that fits no matrix."""
    configs = _configs(draw)
    choices = [SEVEN, ("q_proj", "v_proj"), ("down_proj", "o_proj"), ("k_proj",)]
    cases = [(c, None, targets) for (c, _), targets in zip(configs, choices, strict=False)]
    cases += [(configs[0][0] | {"num_hidden_layers": 1}, None, targets) for targets in (SEVEN, ("up_proj",))]
    cases += [
        (c, optional, t) for c, optional in configs[4:] for t in (SEVEN, ("k_proj",), ("q_proj", "v_proj"))
    ]
    cases += [(c, None, (name,)) for c in (cases[0][0], cases[2][0]) for name in SEVEN]  # each of them alone
    cases += [(SMOLLM2, None, ("q_proj", "v_proj")), (SMOLLM2, None, SEVEN)]
    shapes_of = {}
    for number, (config, optional, targets) in enumerate(cases):
        bits = [16, 32][number % 2] if number < 6 else draw.choice([16, 32])
        r = 8 if config is SMOLLM2 else [1, 70][number % 2] if number > 30 else draw.whole(2, 9)
        if id(config) not in shapes_of:
            modules = _model(config).named_modules()
            shapes_of[id(config)] = [
                (last, m.weight.shape) for n, m in modules if (last := n.split(".")[-1]) in SEVEN
            ]
        shapes = [shape for name, shape in shapes_of[id(config)] if name in targets]
        d, f, layers, h, k, e, _ = _letters(config)

        def as_if(keys: int, size: int, d=d, f=f, h=h, count=layers * r, targets=targets) -> int:
            """The numbers with other heads of keys and values, or another size of a head."""
            heads = {"q_proj": h, "k_proj": keys, "v_proj": keys, "o_proj": h}
            return count * sum(d + (heads[name] * size if name in heads else f) for name in targets)

        right = sum(r * (out + inn) for out, inn in shapes)
        wrong = {
            "heads-not-grouped": as_if(h, e),
            "head-dim-ignored": as_if(k, d // h),
            "all-square": layers * r * 2 * d * len(targets),
            "one-block": right // layers,
            "a-alone": sum(r * inn for _, inn in shapes),
            "b-alone": sum(r * out for out, _ in shapes),
            "full-matrices": sum(out * inn for out, inn in shapes),
        }
        got = answer(config, list(targets), r, bits, crash=optional)
        got = got.tolist() if isinstance(got, Tensor) else got
        numbers, size = expect.parts(got, "the result", 2)
        case = f"for r = {r}, {', '.join(targets)}, {config}"
        swapped = numbers == right * bits // 8 and size == right
        named = [(optional, numbers)] if optional else wrong.items()
        named = [("swapped", numbers)] if swapped else named
        _number(numbers, right, f"the numbers, {case}", named)
        wrong = [("bits-for-bytes", right * bits), ("dtype-ignored", 2 * right), ("dtype-ignored", 4 * right)]
        _number(size, right * bits // 8, f"the bytes, in {bits} bits, {case}", wrong)
    for targets in (
        ["q_proj", "query"],
        ["query", "q_proj"],
        ["k_proj", "query", "v_proj"],
        ["lm_head"],
        ["q_proj", "lm_head", "down_proj"],
        ["x_proj"],
        ["q_proj", "embed_tokens"],
        ["self_attn.q_proj", "v_proj"],
        ["v"],
        ["q_proj", "qkv_proj"],
        ["gate_up_proj", "down_proj"],
        ["Q_proj"],
        ["v_proj", " q_proj"],
        ["down_proj", "UP_PROJ", "q_proj"],
        [],
    ):
        what = "a name that fits no matrix of a block" if targets else "no name at all"
        answer.raises(ValueError, cases[0][0], targets, 8, 16, what=what, mistake="unknown-target")


def _kept(config: dict, rows: int, length: int, rank: int, itemsize: int, targets: Iterable[str]) -> int:
    """What autograd itself says: bytes kept in transformers' model with three blocks, less those with two."""
    from qlora_edu.memory.activations import Work
    from qlora_edu.memory.trace import kept_on_meta

    work = Work(rows, length, itemsize, rank=rank, targets=frozenset(targets))
    models = (config | {"model_type": "llama", "num_hidden_layers": layers} for layers in (2, 3))
    two, three = (sum(kept_on_meta(model, work).values()) for model in models)
    return three - two


def _what_mistakes_add(
    config: dict, rows: int, length: int, rank: int, itemsize: int, targets: tuple[str, ...]
) -> dict[str, list[int]]:
    """Bytes that known mistakes of `kept` add, by name; several where it can be made in several ways."""
    d, f, _, h, k, e, _ = _letters(config)
    tokens, one = rows * length, rows * length * itemsize
    readers = {SEVEN[:3]: one * d, SEVEN[3:4]: one * h * e, SEVEN[4:6]: one * d, SEVEN[6:]: one * f}
    trained = [(sum(name in targets for name in names), size) for names, size in readers.items()]
    frozen = [size for count, size in trained if not count]
    again = [(count - 1) * size for count, size in trained if count > 1 and targets == SEVEN]
    heads = one * h * e * sum(name not in targets for name in SEVEN[:3])
    wide = one * f * sum(name not in targets for name in SEVEN[4:6])
    without = [size for (count, _), size in zip(trained, (one * d, 0, one * d, 0), strict=True) if count]
    of_f = [-one * f] if "down_proj" in targets else []  # silu(gate) forgotten, or the input of down
    return {
        "tokens-squared": [(4 if itemsize == 4 else 6) * h * tokens * (tokens - length)],
        "norm-narrow": [2 * (itemsize - 4) * tokens * width for width in (d, d + 1)],
        "root-missing": [-2 * 4 * tokens],
        "frozen-inputs": [sum(frozen), *frozen],
        "inputs-repeated": [sum(again), *again],
        "softmax-copies": [(4 if itemsize == 4 else -2) * tokens * h * length],
        "heads-not-repeated": [2 * one * (k - h) * e],
        "low-rank": [one * rank * (count - len(targets)) for count in (0, 1, 7)],
        "factors-missing": [n for n in (-heads - wide, -heads, -wide, -one * f) if n not in of_f],
        "f-missing": of_f,
        "input-missing": [-size for size in without],
        "input-of-o": [one * (d - h * e)] if "o_proj" in targets else [],
    }


@exercise("01-kept")
def kept(answer: Answer, draw: Draw) -> None:
    """`f(config, rows, length, rank, itemsize, targets)`: bytes that a block with LoRA keeps for its backward pass."""
    some = tuple(SEVEN[i] for i in draw.permutation(7)[: draw.whole(2, 5)].tolist())
    for rows, length, itemsize, targets in (
        (1, draw.whole(5, 9), 4, SEVEN),
        (3, draw.whole(5, 9), 4, SEVEN),
        (1, draw.whole(5, 9), 2, SEVEN),
        (1, draw.whole(5, 9), 4, ("q_proj", "v_proj")),
        (2, draw.whole(5, 9), 2, ("down_proj", "o_proj")),
        (4, draw.whole(2, 4), 2, ("up_proj",)),
        (3, 1, 4, ("k_proj", "gate_proj")),
        (2, draw.whole(3, 9), 2, ("v_proj",)),
        (1, draw.whole(3, 9), 4, ("o_proj",)),
        (2, draw.whole(3, 9), 4, ("down_proj",)),
        (2, draw.whole(3, 9), 2, ("q_proj",)),
        (1, draw.whole(3, 9), 4, ("k_proj",)),
        (1, draw.whole(3, 9), 2, ("gate_proj",)),
        (2, draw.whole(3, 9), 2, ("q_proj", "gate_proj")),
        (2, draw.whole(3, 9), 2, ("gate_proj", "up_proj")),
        (1, draw.whole(101, 130), 2, ("v_proj", "k_proj")),
        (draw.whole(2, 4), draw.whole(3, 9), 2, some),
    ):
        for _ in range(50):  # until no two mistakes add the same; h · e is never d
            config = _config(draw, 3, draw.choice([-2, 4]))
            rank = 1 if len(targets) == 1 else draw.whole(2, 13)
            off = _what_mistakes_add(config, rows, length, rank, itemsize, targets)
            added = [number for numbers in off.values() for number in {*numbers} - {0}]
            if len(added) == len({*added}):
                break
        right = _kept(config, rows, length, rank, itemsize, targets)
        _keeping(answer, right, config, rows, length, rank, itemsize, targets)
    for right, *work in (  # what autograd says of the statement's examples
        (13_428_736, 1, 256, 8, 4, SEVEN),
        (26_857_472, 2, 256, 8, 4, SEVEN),
        (9_664_512, 1, 256, 8, 2, SEVEN),
        (10_635_264, 1, 256, 8, 4, ("q_proj", "v_proj")),
        (19_329_024, 2, 256, 8, 2, SEVEN),
    ):
        _keeping(answer, right, SMOLLM2, *work)


def _keeping(answer: Answer, right: int, config: dict, rows: int, length: int, *others) -> None:
    """Refuse a wrong number of bytes kept. others: rank, itemsize, targets."""
    rank, itemsize, targets = others
    off = _what_mistakes_add(config, rows, length, rank, itemsize, targets)
    got = answer(config, rows, length, rank, itemsize, list(targets))
    case = f"{rows} × {length} tokens, rank {rank}, {itemsize} bytes, {', '.join(targets)}, {config}"
    _count(got, right, f"the bytes kept, for {case}", [(m, n) for m, ns in off.items() for n in ns])


@exercise("01-fits")
def fits(answer: Answer, draw: Draw) -> None:
    """`f(card, reserve, base_bits, share, trained_bits, state_bits)`: the most base weights whose training fits."""
    usual = (0.002, 0.09)
    cases = (  # base_bits, None or the range of the share, trained_bits, state_bits
        (16, None, 32, 8),
        (16, usual, 16, 32),
        (4.127, usual, 32, 8),
        (32, None, 16, 32),
        (4.127, usual, 16, 32),
        (32, usual, 16, 8),
        (32, None, 32, 8),
        (16, None, 16, 32),
        (16, usual, 12, 12),
        (16, None, 16, 8),
        (4.127, (1e-5, 9e-4), 32, 32),
        (16, (1e-9, 1e-7), 16, 32),
        (8, (1.1, 2.5), 16, 8),
        (8, None, 4, 4),
    )
    for number, (base_bits, beside, trained_bits, state_bits) in enumerate(cases):
        while True:  # rounding up must show, and no rounding of float64 may
            share = draw.number(*beside) if beside else 0
            card = draw.whole(1, 4) if number > 5 else draw.choice([8, 16, 24, 40, 48, 80])
            reserve = 0 if number in (1, 7) else draw.number(0.5, 1 if card < 5 else 6)
            arguments = (card, reserve, base_bits, share, trained_bits, state_bits)
            budget, each = _room(*arguments)
            if 0.6 < budget / each % 1 < 0.95:
                break
        _fitting(answer, arguments)
    _fitting(answer, (24, 24.5, 16, 0, 16, 32))  # 24 GiB are 25.8 GB
    _fitting(answer, (24, 0, 16, 0, 16, 32))  # full to the last byte
    got = answer(1, 3.5, 16, 0, 16, 32)
    _number(got, 0, "the most weights, if the reserve is larger than the card", [("negative", got)])


def _room(
    card: int, reserve: float, base_bits: float, share: float, trained_bits: int, state_bits: int
) -> tuple[Fraction, Fraction]:
    """Bytes that may be used, and bytes for each weight of the base, both exact."""
    own = trained_bits if share else 0  # the adapter's own numbers
    each = Fraction(base_bits) + Fraction(share or 1) * (own + trained_bits + 2 * state_bits)
    return card * GIB - Fraction(reserve) * GB, each / 8


def _fitting(answer: Answer, arguments: tuple) -> None:
    """Refuse a wrong number of weights."""
    card, reserve, base_bits, share, trained_bits, state_bits = arguments
    budget, each = _room(*arguments)
    t, states, spare = Fraction(share or 1), Fraction(2 * state_bits, 8), Fraction(reserve)
    weight, gradient = Fraction(base_bits) / 8, Fraction(trained_bits, 8)
    own = gradient if share else 0
    wrong = {
        "gb-for-gib": (card - spare) * GB / each,
        "reserve-in-gib": (card - spare) * GIB / each,
        "reserve-ignored": card * GIB / each,
        "adapter-itself-missing": budget / (weight + t * (gradient + states)),
        "base-twice": budget / (weight + t * (2 * gradient + states)),
        "nothing-trained": budget / weight,
        "frozen-trained": budget / (weight + gradient + states),
        "states-once": budget / (weight + t * (own + gradient + states / 2)),
        "trained-bits-ignored": budget / (weight + t * ((4 if share else 2) + states)),
        "bits-for-bytes": budget / each / 8,
        "whole-bytes": budget
        / (weight + t * ((trained_bits // 8) * (1 + bool(share)) + 2 * (state_bits // 8))),
    }
    right = int(budget / each)
    got = answer(*arguments)
    if isinstance(got, float) and got % 1:
        named = [("not-whole", got)]
    else:
        named = [("rounded-up", right + 1), ("one-less", right - 1)]
        other = {m: int(quotient) for m, quotient in wrong.items() if quotient > 0}
        named += [(m, n + up) for m, n in other.items() if n != right for up in (0, 1)]
        named += [("compared-in-gb", 0)] if reserve > card else []
    _number(got, right, f"the most weights, for {arguments}", named)


def _chain(draw: Draw) -> tuple[list[int], list[int]]:
    """MB of the inputs of blocks and of what they keep, in four stages of different width."""
    inputs, kept = [], []
    for _ in range(4):
        width = draw.whole(20, 90)
        for _ in range(draw.whole(6, 11)):
            inputs.append(width + draw.whole(0, 9))
            kept.append(width * draw.whole(3, 9) + draw.whole(0, 99))
    return inputs, kept


def _peak(inputs: list[int], kept: list[int], plan: list[int]) -> int:
    """What lives at the fullest moment: the inputs of this segment and those before it, and all that this one keeps."""
    ends = [*plan[1:], len(kept)]
    stored = accumulate(inputs[first] for first in plan)
    return max(s + sum(kept[first:end]) for s, first, end in zip(stored, plan, ends, strict=True))


def _least(inputs: list[int], kept: list[int]) -> int:
    """The least peak there is: of all plans within a limit up to some block, the one that stores least goes on best."""
    sums = [0, *accumulate(kept)]

    def possible(limit: int) -> bool:
        stored = [0.0]  # by block: the least that is stored before it, infinite where the limit leaves no way
        for end in range(1, len(sums)):
            ways = ((stored[j] + inputs[j], sums[end] - sums[j]) for j in range(end))
            stored.append(min((s for s, now in ways if s + now <= limit), default=float("inf")))
        return stored[-1] < float("inf")

    low, high = 0, inputs[0] + sums[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return high


@exercise("01-cuts")
def cuts(answer: Answer, draw: Draw) -> Score:
    """`f(inputs, kept)`: the first block of each segment, so that the fullest moment is as small as can be."""
    few = [([draw.whole(20, 40) for _ in range(n)], [draw.whole(30, 150) for _ in range(n)]) for n in (2, 3)]
    most = [draw.whole(20, 29) for _ in range(44)], [draw.whole(30, 150) for _ in range(44)]
    by_hand = [3, 3, 3, 3], [2, 6, 4, 3]
    first_alone = (
        [draw.whole(40, 60), draw.whole(20, 30)],
        [draw.whole(3, 5), draw.whole(30, 60)],
    )  # no cut is best
    for inputs, kept in (
        _chain(draw),
        by_hand,
        ([7], [30]),
        *few,
        first_alone,
        most,
        _chain(Draw(1)),
    ):  # the board's is last
        blocks, plan = len(kept), answer(inputs, kept)
        plan = plan.tolist() if isinstance(plan, Tensor) else plan
        mistake = "wrong-type" if plan is None else "no-list"
        expect.true(isinstance(plan, list | tuple), "the plan: a list", mistake, "a list", plan)
        whole = all(type(first) is int for first in plan)
        expect.true(whole, "the plan: a list of ints", "not-whole", "[0, ...]", str(plan))
        plan, what = list(plan), f"the first blocks of the segments, of {blocks} block{'s'[: blocks > 1]}"
        ascends = plan == sorted(set(plan)) and plan[-1:] <= [blocks]
        lengths = blocks > 1 and plan and plan[0] > 0 and sum(plan) == blocks
        expect.true(not (lengths and not (ascends and plan[0] == 1)), what, "lengths", "0, ...", plan)
        expect.true(not (blocks > 1 and ascends and plan[:1] == [1]), what, "one-based", "0, ...", plan)
        right = plan[:1] == [0] and ascends and plan[-1] < blocks
        expect.true(right, what, "no-segments", "0, then ascending", plan)
        least, peak = _least(inputs, kept), _peak(inputs, kept, plan)
        count, length = len(plan), [*plan, blocks][1]
        equal = [list(range(0, blocks, length)), [i * blocks // count for i in range(count)]]
        equal += [[i * (blocks // count) + min(i, blocks % count) for i in range(count)]]
        looks_like = "equal-segments" if plan in equal else "one-moment"
        extremes = {1: "keep-all", blocks: "every-block"}
        if blocks == 3:  # each alone may be the best of equal segments
            del extremes[3]
        mistake = extremes.get(count, looks_like)
        what = f"MB at the fullest moment, for {blocks} block{'s'[: blocks > 1]}"
        expect.true(10 * peak <= 11 * least, what, mistake, f"at most {1.1 * least:.1f}", peak)
    equal = (list(range(0, blocks, length)) for length in range(1, blocks + 1))
    rivals = {
        "all in one segment": _peak(inputs, kept, [0]),
        "a segment for every block": _peak(inputs, kept, list(range(blocks))),
        "the best equal length": min(_peak(inputs, kept, plan) for plan in equal),
        "the least there is": least,
    }
    return Score(peak, "MB at the fullest moment", rivals)
