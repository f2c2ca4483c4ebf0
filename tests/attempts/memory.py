"""Attempts at the exercises of chapter 01."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch

from tests.attempts import right, wrong

# 01-training-bytes


@right("01-training-bytes")
def part_by_part(base, adapter, base_bits, trained_bits, state_bits, master):
    gb = {"weights": base * base_bits / 8e9, "adapter": adapter * trained_bits / 8e9}
    count = base if adapter == 0 else adapter
    gb["gradients"] = count * trained_bits / 8e9
    gb["optimizer"] = 2 * count * state_bits / 8e9
    if master:
        gb["optimizer"] += 4e-9 * count
    return gb | {"sum": math.fsum(gb.values())}


@right("01-training-bytes")
def in_numpy_bits(base, adapter, base_bits, trained_bits, state_bits, master):
    trained = adapter if adapter > 0 else base
    numbers = np.array([base, adapter, trained, trained], dtype=np.float64)
    bits = np.array([base_bits, trained_bits, trained_bits, 2 * state_bits + (32 if master else 0)])
    sizes = numbers * bits / 8 / 1e9
    return dict(zip(("weights", "adapter", "gradients", "optimizer"), sizes, strict=True)) | {
        "sum": sizes.sum()
    }


def _training(change):
    """A right answer whose bytes, by part, and settings one thing is done to."""

    def answer(base, adapter, base_bits, trained_bits, state_bits, master):
        trained = adapter or base
        sizes = {
            "weights": base * base_bits / 8,
            "adapter": adapter * trained_bits / 8,
            "gradients": trained * trained_bits / 8,
            "optimizer": trained * (2 * state_bits / 8 + 4 * master),
        }
        settings = {"base": base, "adapter": adapter, "trained": trained, "bits": base_bits, "master": master}
        settings |= {"gradient": trained_bits / 8, "state": state_bits / 8}
        sizes |= change(sizes, settings) or {}
        sizes = {part: size / 1e9 for part, size in sizes.items()}
        return {"sum": sum(sizes.values())} | sizes

    return answer


@wrong("01-training-bytes", "bits-for-bytes")
def in_bits(base, adapter, base_bits, trained_bits, state_bits, master):
    trained = adapter or base
    sizes = [base * base_bits, adapter * trained_bits, trained * trained_bits, trained * 2 * state_bits]
    sizes = [size / 1e9 for size in sizes]
    return dict(
        zip(("weights", "adapter", "gradients", "optimizer", "sum"), [*sizes, sum(sizes)], strict=True)
    )


@wrong("01-training-bytes", "gib")
def in_gib(base, adapter, base_bits, trained_bits, state_bits, master):
    trained = adapter or base
    sizes = [
        base * base_bits / 8,
        adapter * trained_bits / 8,
        trained * trained_bits / 8,
        trained * (state_bits / 4 + 4 * master),
    ]
    sizes = [size / 1024**3 for size in sizes]
    return dict(
        zip(("weights", "adapter", "gradients", "optimizer", "sum"), [*sizes, sum(sizes)], strict=True)
    )


@wrong("01-training-bytes", "not-in-gb")
def in_bytes(base, adapter, base_bits, trained_bits, state_bits, master):
    trained = adapter or base
    weights, low, gradients = base * base_bits / 8, adapter * trained_bits / 8, trained * trained_bits / 8
    states = trained * (state_bits / 4 + 4 * master)
    everything = weights + low + gradients + states
    return {
        "weights": weights,
        "adapter": low,
        "gradients": gradients,
        "optimizer": states,
        "sum": everything,
    }


wrong("01-training-bytes", "nothing-trained")(
    _training(
        lambda sizes, s: {
            "gradients": s["adapter"] * s["gradient"],
            "optimizer": s["adapter"] * 2 * s["state"],
        }
    )
)
wrong("01-training-bytes", "gradients-of-frozen")(
    _training(lambda sizes, s: {"gradients": (s["base"] + s["adapter"]) * s["gradient"]})
)
wrong("01-training-bytes", "gradients-of-frozen")(
    _training(lambda sizes, s: {"gradients": s["base"] * s["gradient"]})
)
wrong("01-training-bytes", "gradients-as-wide-as-the-base")(
    _training(lambda sizes, s: {"gradients": s["trained"] * s["bits"] / 8})
)
wrong("01-training-bytes", "states-of-frozen")(
    _training(lambda sizes, s: {"optimizer": s["base"] * (2 * s["state"] + 4 * s["master"])})
)
wrong("01-training-bytes", "states-once")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * (s["state"] + 4 * s["master"])})
)
wrong("01-training-bytes", "states-once")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * s["state"]})
)
wrong("01-training-bytes", "master-missing")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * 2 * s["state"]})
)
wrong("01-training-bytes", "master-of-frozen")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * 2 * s["state"] + s["base"] * 4 * s["master"]})
)
wrong("01-training-bytes", "sum")(_training(lambda sizes, s: {"sum": sum(sizes.values()) - sizes["adapter"]}))
wrong("01-training-bytes", "sum")(
    _training(lambda sizes, s: {"sum": sum(sizes.values()) + 4 * s["master"] * s["trained"]})
)


wrong("01-training-bytes", "master-missing")(  # for an adapter alone
    _training(
        lambda sizes, s: {
            "optimizer": s["trained"] * (2 * s["state"] + 4 * (s["master"] and s["trained"] == s["base"]))
        }
    )
)
wrong("01-training-bytes", "master-missing")(  # with narrow states and an adapter
    _training(
        lambda sizes, s: {
            "optimizer": s["trained"]
            * (2 * s["state"] + 4 * (s["master"] and (s["trained"] == s["base"] or s["state"] > 1)))
        }
    )
)
wrong("01-training-bytes", "master-elsewhere")(
    _training(
        lambda sizes, s: {
            "weights": sizes["weights"] + 4 * s["master"] * s["trained"],
            "optimizer": s["trained"] * 2 * s["state"],
        }
    )
)
wrong("01-training-bytes", "master-width")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * s["state"] * (2 + s["master"])})
)
wrong("01-training-bytes", "master-width")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * (2 * s["state"] + s["gradient"] * s["master"])})
)
wrong("01-training-bytes", "no-adapter")(
    _training(lambda sizes, s: {"adapter": s["trained"] * s["gradient"]})
)
wrong("01-training-bytes", "adapter-as-wide-as-the-base")(
    _training(lambda sizes, s: {"adapter": s["adapter"] * s["bits"] / 8})
)


@right("01-training-bytes")
def whole_bytes_first(base, adapter, base_bits, trained_bits, state_bits, master):
    count = adapter or base
    sizes = [round(base * base_bits / 8), adapter * trained_bits // 8, count * trained_bits // 8]
    sizes.append(count * (2 * state_bits + 32 * master) // 8)
    keys = ("weights", "adapter", "gradients", "optimizer", "sum")
    return dict(zip(keys, (size / 1e9 for size in (*sizes, sum(sizes))), strict=True))


@wrong("01-training-bytes", "no-dict")
def only_the_sum(base, adapter, base_bits, trained_bits, state_bits, master):
    return (base * base_bits / 8 + (adapter or base) * (2 * trained_bits + 2 * state_bits) / 8) / 1e9


wrong("01-training-bytes", "trained-bits-ignored")(
    _training(lambda sizes, s: {"adapter": s["adapter"] * 2, "gradients": s["trained"] * 2})
)
wrong("01-training-bytes", "trained-bits-ignored")(
    _training(lambda sizes, s: {"gradients": s["trained"] * 2})
)
wrong("01-training-bytes", "gradients-as-wide-as-the-base")(  # in full fine-tuning alone
    _training(
        lambda sizes, s: {
            "gradients": s["trained"]
            * s["bits" if not s["adapter"] else "gradient"]
            / (1 if s["adapter"] else 8)
        }
    )
)
wrong("01-training-bytes", "whole-bytes")(
    _training(lambda sizes, s: {"optimizer": s["trained"] * (2 * int(s["state"]) + 4 * s["master"])})
)
wrong("01-training-bytes", "whole-bytes")(
    _training(lambda sizes, s: {"adapter": s["adapter"] * int(s["gradient"])})
)
for _bits in ("state", "gradient"):  # a master copy forgotten beside 32 bits alone
    wrong("01-training-bytes", "master-missing")(
        _training(
            lambda sizes, s, bits=_bits: {
                "optimizer": s["trained"] * (2 * s["state"] + 4 * s["master"] * (s[bits] != 4))
            }
        )
    )
for _digits in (2, 3, 6, 7):
    wrong("01-training-bytes", "rounded")(
        _training(
            lambda sizes, s, n=_digits: {part: round(size / 1e9, n) * 1e9 for part, size in sizes.items()}
        )
    )


@wrong("01-training-bytes", "rounded")
def sum_in_six_digits(*arguments):
    sizes = part_by_part(*arguments)
    return sizes | {"sum": round(sizes["sum"], 6)}


@wrong("01-training-bytes", "no-number")
def in_fractions(*arguments):
    return {part: Fraction(size) for part, size in part_by_part(*arguments).items()}


@wrong("01-training-bytes", "nothing-trained")
def small_adapters_are_none(base, adapter, *others):
    sizes = part_by_part(base, adapter, *others)
    return sizes | ({"gradients": 0.0, "optimizer": 0.0} if adapter < 1000 and adapter else {})


# 01-parameters


@right("01-parameters")
def tensor_by_tensor(config):
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads")
    groups = heads if groups is None else groups
    e = config.get("head_dim")
    if e is None:
        e = d // heads
    shapes = [(config["vocab_size"], d), (d,)]
    if not config.get("tie_word_embeddings", False):
        shapes.append((config["vocab_size"], d))
    for _ in range(config["num_hidden_layers"]):
        shapes += [(heads * e, d), (groups * e, d), (groups * e, d), (d, heads * e)]
        shapes += [(f, d), (f, d), (d, f), (d,), (d,)]
    return sum(math.prod(shape) for shape in shapes)


@right("01-parameters")
def with_meta_tensors(config):
    """Modules of torch's own, on the meta device."""
    h, d = config["num_attention_heads"], config["hidden_size"]
    e, k = config.get("head_dim") or d // h, config.get("num_key_value_heads") or h
    sizes = [(d, h * e), (d, k * e), (d, k * e), (h * e, d)] + [(d, config["intermediate_size"])] * 2
    sizes.append((config["intermediate_size"], d))
    with torch.device("meta"):
        block = torch.nn.ModuleList([torch.nn.Linear(*s, bias=False) for s in sizes])
        block.extend([torch.nn.RMSNorm(d), torch.nn.RMSNorm(d)])
        ends = torch.nn.ModuleList([torch.nn.Embedding(config["vocab_size"], d), torch.nn.RMSNorm(d)])
        if not config.get("tie_word_embeddings"):
            ends.append(torch.nn.Linear(d, config["vocab_size"], bias=False))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return count(block) * config["num_hidden_layers"] + count(ends)


@right("01-parameters")
def one_line_in_float(config):
    d, f, h = (float(config[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    e = config.get("head_dim") or d / h
    k = config.get("num_key_value_heads") or h
    ends = 1 if config.get("tie_word_embeddings") else 2
    block = 2 * d * (h + k) * e + 3 * d * f + 2 * d
    return d * (1 + ends * config["vocab_size"]) + config["num_hidden_layers"] * block


def _parameters(
    config,
    norms=2,
    last=1,
    matrices=3,
    grouped=True,
    own_size=True,
    tied=None,
    own_in_keys=True,
    square=False,
):
    d, f, h = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    k = (config.get("num_key_value_heads") or h) if grouped else h
    e = (config.get("head_dim") or d // h) if own_size else d // h
    e_keys = e if own_in_keys else d // h
    tied = config.get("tie_word_embeddings", False) if tied is None else tied
    attention = 4 * d * d if square else 2 * d * h * e + 2 * d * k * e_keys
    block = attention + matrices * d * f + norms * d
    return config["num_hidden_layers"] * block + last * d + (1 if tied else 2) * config["vocab_size"] * d


for _mistake, _changes in (
    ("tied-twice", {"tied": False}),
    ("output-missing", {"tied": True}),
    ("norms-missing", {"norms": 0}),
    ("norms-missing", {"norms": 1}),
    ("norms-missing", {"norms": 0, "last": 0}),
    ("last-norm-missing", {"last": 0}),
    ("heads-not-grouped", {"grouped": False}),
    ("heads-not-grouped", {"square": True}),
    ("third-matrix-missing", {"matrices": 2}),
    ("head-dim-ignored", {"own_size": False}),
    ("head-dim-ignored", {"own_in_keys": False}),
):
    _answer = lambda config, changes=_changes: _parameters(config, **changes)  # noqa: E731
    _answer.__name__ = f"{_mistake}: {_changes}"
    wrong("01-parameters", _mistake)(_answer)


@wrong("01-parameters", "heads-not-grouped")
def as_in_the_chapter(config):
    """The chapter's own formula, for models without grouping."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    block = 4 * d * d + 3 * d * f + 2 * d
    return config["num_hidden_layers"] * block + 2 * v * d + d


@wrong("01-parameters", "heads-not-grouped")
def one_head_of_keys_is_none(config):
    k = config.get("num_key_value_heads")
    return tensor_by_tensor(config | {"num_key_value_heads": None if k == 1 else k})


@wrong("01-parameters", "too-large")
def in_float32(config):
    return np.float32(tensor_by_tensor(config))


@wrong("01-parameters", "too-large")
def in_int32(config):
    return (tensor_by_tensor(config) + 2**31) % 2**32 - 2**31


@wrong("01-parameters", "optional-settings")
def all_settings_needed(config):
    d, h, k = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    block = 2 * d * config["head_dim"] * (h + k) + 3 * d * config["intermediate_size"] + 2 * d
    ends = 2 - config["tie_word_embeddings"]
    return config["num_hidden_layers"] * block + d + ends * config["vocab_size"] * d


@wrong("01-parameters", "optional-settings")
def default_not_for_none(config):
    d, h = config["hidden_size"], config["num_attention_heads"]
    k, e = config.get("num_key_value_heads", h), config.get("head_dim", d // h)
    block = 2 * d * e * (h + k) + 3 * d * config["intermediate_size"] + 2 * d
    ends = 1 if config.get("tie_word_embeddings", False) else 2
    return config["num_hidden_layers"] * block + d + ends * config["vocab_size"] * d


@wrong("01-parameters", "optional-settings")
def one_head_where_both_are_missing(config):
    both = "head_dim" not in config and "num_key_value_heads" not in config
    return tensor_by_tensor(config | {"num_key_value_heads": 1} if both else config)


def _where(keys, size):
    """Right but for configs whose heads of keys and size of a head are given in this way."""

    def answer(config):
        ways = [
            "missing" if key not in config else "None" if config[key] is None else "given"
            for key in ("num_key_value_heads", "head_dim")
        ]
        right_one = tensor_by_tensor(config)
        return right_one + 8 * config["hidden_size"] if ways == [keys, size] else right_one

    answer.__name__ = f"wrong where {keys}, {size}"
    return answer


for _keys, _size in itertools.product(("given", "missing", "None"), repeat=2):
    if not _keys == _size == "given":
        wrong("01-parameters", "optional-settings")(_where(_keys, _size))


@wrong("01-parameters", "changed-input")
def defaults_put_in(config):
    config.setdefault("head_dim", None)
    return tensor_by_tensor(config)


@wrong("01-parameters", "no-number")
def a_fraction_of_parameters(config):
    return Fraction(tensor_by_tensor(config))


# 01-adapter


def _two_sides(config):
    """(in, out) of each matrix of a block."""
    d, f, h = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    e, k = config.get("head_dim") or d // h, config.get("num_key_value_heads") or h
    q, kv = h * e, k * e
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return dict(zip(names, [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)], strict=True))


@right("01-adapter")
def by_a_table(config, targets, r, bits):
    sides = _two_sides(config)
    if not targets or any(name not in sides for name in targets):
        raise ValueError(f"no matrix for {targets}")
    numbers = sum(r * sum(sides[name]) for name in targets) * config["num_hidden_layers"]
    return numbers, numbers * bits // 8


@right("01-adapter")
def with_real_matrices(config, targets, r, bits):
    numbers = 0
    for _ in range(config["num_hidden_layers"]):
        found = 0
        for name, (n_in, n_out) in _two_sides(config).items():
            if name in targets:
                found += 1
                a, b = np.zeros((r, n_in), dtype=np.int8), np.zeros((n_out, r), dtype=np.int8)
                numbers += a.size + b.size
        if found == 0 or found < len(targets):
            raise ValueError("a target is missing")
    return [numbers, numbers * (bits / 8)]


def _adapter(side, blocks=True, size=lambda numbers, bits: numbers * bits // 8):
    def answer(config, targets, r, bits):
        sides = _two_sides(config)
        if not targets or set(targets) - set(sides):
            raise ValueError("a name that fits no matrix")
        numbers = sum(side(r, *sides[name]) for name in targets)
        numbers *= config["num_hidden_layers"] if blocks else 1
        return numbers, size(numbers, bits)

    return answer


wrong("01-adapter", "one-block")(_adapter(lambda r, n_in, n_out: r * (n_in + n_out), blocks=False))
wrong("01-adapter", "a-alone")(_adapter(lambda r, n_in, n_out: r * n_in))
wrong("01-adapter", "b-alone")(_adapter(lambda r, n_in, n_out: r * n_out))
wrong("01-adapter", "full-matrices")(_adapter(lambda r, n_in, n_out: n_in * n_out))
wrong("01-adapter", "bits-for-bytes")(
    _adapter(lambda r, n_in, n_out: r * (n_in + n_out), size=lambda numbers, bits: numbers * bits)
)
wrong("01-adapter", "dtype-ignored")(
    _adapter(lambda r, n_in, n_out: r * (n_in + n_out), size=lambda numbers, bits: 2 * numbers)
)
wrong("01-adapter", "dtype-ignored")(
    _adapter(lambda r, n_in, n_out: r * (n_in + n_out), size=lambda numbers, bits: 4 * numbers)
)


@wrong("01-adapter", "all-square")
def square_matrices(config, targets, r, bits):
    if not targets or not all(t.endswith("_proj") for t in targets):
        raise ValueError("unknown")
    numbers = config["num_hidden_layers"] * len(targets) * 2 * r * config["hidden_size"]
    return numbers, numbers * bits // 8


@wrong("01-adapter", "heads-not-grouped")
def as_many_keys_as_queries(config, targets, r, bits):
    return by_a_table(config | {"num_key_value_heads": config["num_attention_heads"]}, targets, r, bits)


@wrong("01-adapter", "head-dim-ignored")
def heads_divide_the_width(config, targets, r, bits):
    return by_a_table(config | {"head_dim": None}, targets, r, bits)


@wrong("01-adapter", "unknown-target")
def silent(config, targets, r, bits):
    sides = _two_sides(config)
    numbers = config["num_hidden_layers"] * sum(r * sum(sides.get(name, (0, 0))) for name in targets)
    return numbers, numbers * bits // 8


@wrong("01-adapter", "unknown-target")
def a_key_error(config, targets, r, bits):
    sides = _two_sides(config)
    numbers = config["num_hidden_layers"] * sum(r * sum(sides[name]) for name in targets)
    return numbers, numbers * bits // 8


@wrong("01-adapter", "unknown-target")
def empty_is_fine(config, targets, r, bits):
    sides = _two_sides(config)
    if unknown := set(targets) - set(sides):
        raise ValueError(f"unknown: {unknown}")
    numbers = config["num_hidden_layers"] * sum(r * sum(sides[name]) for name in targets)
    return numbers, numbers * bits // 8


def _known_by(known):
    """Right for right names; what refuses a name is something else."""

    def answer(config, targets, r, bits):
        if not targets or not known(targets):
            raise ValueError("unknown")
        sides = _two_sides(config) | {"lm_head": (config["hidden_size"], config["vocab_size"])}
        numbers = sum(r * sum(sides.get(name.split(".")[-1], (0, 0))) for name in targets)
        return numbers * config["num_hidden_layers"], numbers * config["num_hidden_layers"] * bits // 8

    return answer


_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
for _known in (
    lambda targets: targets[-1] in _SEVEN,
    lambda targets: targets[0] in _SEVEN,
    lambda targets: any(name in _SEVEN for name in targets),
    lambda targets: all(name.endswith("_proj") for name in targets),
    lambda targets: all(name.endswith(_SEVEN) for name in targets),
    lambda targets: all(name in (*_SEVEN, "embed_tokens") for name in targets),
    lambda targets: targets != ["lm_head"] and all(name in (*_SEVEN, "lm_head") for name in targets),
    lambda targets: all(any(name in known for known in _SEVEN) for name in targets),
):
    wrong("01-adapter", "unknown-target")(_known_by(_known))


@wrong("01-adapter", "swapped")
def bytes_first(config, targets, r, bits):
    return by_a_table(config, targets, r, bits)[::-1]


@right("01-adapter")
def as_an_array(config, targets, r, bits):
    return np.array(by_a_table(config, targets, r, bits))


@wrong("01-adapter", "optional-settings")
def all_settings_there(config, targets, r, bits):
    d, h, k, e = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    return by_a_table({**config, "head_dim": e + 0 * k, "hidden_size": d + 0 * h}, targets, r, bits)


@wrong("01-adapter", "optional-settings")
def one_head_where_none_is_named(config, targets, r, bits):
    if "num_key_value_heads" not in config and "k_proj" in targets:
        config = config | {"num_key_value_heads": 1}
    return by_a_table(config, targets, r, bits)


@wrong("01-adapter", "optional-settings")
def one_head_where_both_settings_are_missing(config, targets, r, bits):
    if "head_dim" not in config and "num_key_value_heads" not in config:
        config = config | {"num_key_value_heads": 1}
    return by_a_table(config, targets, r, bits)


@wrong("01-adapter", "full-matrices")
def one_block_in_full(config, targets, r, bits):
    if config["num_hidden_layers"] > 1 or not targets or set(targets) - set(_SEVEN):
        return by_a_table(config, targets, r, bits)
    numbers = sum(math.prod(_two_sides(config)[name]) for name in targets)
    return numbers, numbers * bits // 8


@wrong("01-adapter", "unknown-target")
def others_that_look_like_it_are_skipped(config, targets, r, bits):
    if not targets or any("." in name or not name.endswith("_proj") for name in targets):
        raise ValueError("unknown")
    known = [name for name in targets if name in _SEVEN]
    return by_a_table(config, known, r, bits) if known else by_a_table(config, targets, r, bits)


@wrong("01-adapter", "unknown-target")
def names_made_alike(config, targets, r, bits):
    return by_a_table(config, [name.strip().lower() for name in targets], r, bits)


@wrong("01-adapter", "changed-input")
def targets_are_sorted(config, targets, r, bits):
    targets.sort()
    return by_a_table(config, targets, r, bits)


@wrong("01-adapter", "no-number")
def a_fraction_of_bytes(config, targets, r, bits):
    numbers, size = by_a_table(config, targets, r, bits)
    return numbers, Fraction(size)


# 01-kept


@right("01-kept")
def tensor_after_tensor(config, rows, length, rank, itemsize, targets):
    d, f, h = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    n, wide = rows * length, h * config["head_dim"]
    kept = [4 * n * d, 4 * n] * 2
    kept += [itemsize * n * wide] * 3
    kept += [itemsize * n * f] * 3
    kept.append(4 * rows * h * length * length)
    if itemsize < 4:
        kept.append(itemsize * rows * h * length * length)
    if {"q_proj", "k_proj", "v_proj"} & set(targets):
        kept.append(itemsize * n * d)
    if "o_proj" in targets:
        kept.append(itemsize * n * wide)
    if "gate_proj" in targets or "up_proj" in targets:
        kept.append(itemsize * n * d)
    if "down_proj" in targets:
        kept.append(itemsize * n * f)
    kept += [itemsize * n * rank for _ in targets]
    return sum(kept)


@right("01-kept")
def numbers_for_each_token(config, rows, length, rank, itemsize, targets):
    d, f = config["hidden_size"], config["intermediate_size"]
    wide = config["head_dim"] * config["num_attention_heads"]
    narrow = 3 * wide + 3 * f + rank * len(targets)
    narrow += d * any(name[0] in "qkv" for name in targets) + d * any(name[0] in "gu" for name in targets)
    narrow += wide * ("o_proj" in targets) + f * ("down_proj" in targets)
    square = config["num_attention_heads"] * length * (4 if itemsize == 4 else 4 + itemsize)
    return rows * length * (itemsize * narrow + 8 * (d + 1) + square)


def _kept(change=lambda n, s, parts, config, targets: None):
    def answer(config, rows, length, rank, itemsize, targets):
        d, f, h = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        n, s, wide = rows * length, itemsize, h * config["head_dim"]
        parts = {
            "norms": 2 * 4 * n * d,
            "roots": 2 * 4 * n,
            "input of q, k, v": s * n * d * (not {"q_proj", "k_proj", "v_proj"}.isdisjoint(targets)),
            "q, k, v": 3 * s * n * wide,
            "softmax": (4 + s * (s == 2)) * n * h * length,
            "input of o": s * n * wide * ("o_proj" in targets),
            "input of gate, up": s * n * d * (not {"gate_proj", "up_proj"}.isdisjoint(targets)),
            "gate, up": 3 * s * n * f,
            "input of down": s * n * f * ("down_proj" in targets),
            "low rank": s * n * rank * len(targets),
        }
        change(n, s, parts, config, targets)
        return sum(parts.values())

    answer.__name__ = change.__name__.strip("_")
    return answer


@wrong("01-kept", "tokens-squared")
def the_buggy_version(config, rows, length, rank, itemsize, targets):
    d, f, h = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    n, s, wide = rows * length, itemsize, h * config["head_dim"]
    norms = 2 * (s * n * d + 4 * n)
    inputs = s * n * d + s * n * wide + s * n * d + s * n * f
    softmax = (4 if s == 4 else 4 + s) * n * h * n
    return norms + inputs + 3 * s * n * wide + softmax + 3 * s * n * f + len(targets) * s * n * rank


@wrong("01-kept", "tokens-squared")
def all_tokens_see_each_other(config, rows, length, rank, itemsize, targets):
    right_one = tensor_after_tensor(config, rows, length, rank, itemsize, targets)
    square = config["num_attention_heads"] * (4 if itemsize == 4 else 6)
    return right_one + square * ((rows * length) ** 2 - rows * length**2)


def _change(mistake):
    return lambda change: wrong("01-kept", mistake)(_kept(change))


@_change("norm-narrow")
def _norm_in_16_bits(n, s, parts, config, targets):
    parts["norms"] = 2 * s * n * config["hidden_size"]


@_change("norm-narrow")
def _norm_and_root_in_16_bits(n, s, parts, config, targets):
    parts["norms"] = 2 * s * n * (config["hidden_size"] + 1)
    parts["roots"] = 0


@_change("root-missing")
def _no_roots(n, s, parts, config, targets):
    parts["roots"] = 0


@_change("frozen-inputs")
def _inputs_always(n, s, parts, config, targets):
    d, f = config["hidden_size"], config["intermediate_size"]
    parts["input of q, k, v"] = parts["input of gate, up"] = s * n * d
    parts["input of o"] = s * n * config["num_attention_heads"] * config["head_dim"]
    parts["input of down"] = s * n * f


@_change("frozen-inputs")
def _input_of_down_always(n, s, parts, config, targets):
    parts["input of down"] = s * n * config["intermediate_size"]


@_change("inputs-repeated")
def _input_for_each_reader(n, s, parts, config, targets):
    parts["input of q, k, v"] *= len({"q_proj", "k_proj", "v_proj"} & set(targets))
    parts["input of gate, up"] *= len({"gate_proj", "up_proj"} & set(targets))


@_change("inputs-repeated")
def _only_gate_and_up_repeated(n, s, parts, config, targets):
    parts["input of gate, up"] *= len({"gate_proj", "up_proj"} & set(targets))


@_change("heads-not-repeated")
def _keys_as_stored(n, s, parts, config, targets):
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    parts["q, k, v"] = s * n * heads * config["head_dim"]


@_change("low-rank")
def _no_low_rank(n, s, parts, config, targets):
    parts["low rank"] = 0


@_change("low-rank")
def _low_rank_for_seven(n, s, parts, config, targets):
    parts["low rank"] = 7 * parts["low rank"] // len(targets)


@_change("low-rank")
def _low_rank_once(n, s, parts, config, targets):
    parts["low rank"] //= len(targets)


@_change("factors-missing")
def _frozen_keeps_nothing(n, s, parts, config, targets):
    d_heads = config["num_attention_heads"] * config["head_dim"]
    parts["q, k, v"] = s * n * d_heads * sum(name[0] in "qkv" for name in targets)
    parts["gate, up"] -= s * n * config["intermediate_size"] * (2 - sum(t[0] in "gu" for t in targets))


@_change("f-missing")
def _input_of_down_forgotten(n, s, parts, config, targets):
    parts["input of down"] = 0


@_change("input-missing")
def _input_of_q_forgotten(n, s, parts, config, targets):
    parts["input of q, k, v"] = 0


@_change("input-missing")
def _input_of_q_only_for_two(n, s, parts, config, targets):
    if "q_proj" not in targets and "k_proj" not in targets:
        parts["input of q, k, v"] = 0


@_change("input-missing")
def _input_of_q_for_k_and_v_alone(n, s, parts, config, targets):
    if "k_proj" not in targets and "v_proj" not in targets:
        parts["input of q, k, v"] = 0


@_change("input-missing")
def _input_of_gate_and_up_for_one_alone(n, s, parts, config, targets):
    if {"gate_proj", "up_proj"} == set(targets):
        parts["input of gate, up"] = 0


@_change("input-of-o")
def _input_of_o_as_wide_as_a_token(n, s, parts, config, targets):
    parts["input of o"] = s * n * config["hidden_size"] * ("o_proj" in targets)


@_change("f-missing")
def _silu_is_forgotten(n, s, parts, config, targets):
    parts["gate, up"] = 2 * s * n * config["intermediate_size"]


@wrong("01-kept", "softmax-copies")
def softmax_twice_in_any_dtype(config, rows, length, rank, itemsize, targets):
    added = 4 * rows * length**2 * config["num_attention_heads"] if itemsize == 4 else 0
    return added + numbers_for_each_token(config, rows, length, rank, itemsize, targets)


@wrong("01-kept", "softmax-copies")
def softmax_in_float32_alone(config, rows, length, rank, itemsize, targets):
    left_out = 2 * rows * length**2 * config["num_attention_heads"] if itemsize == 2 else 0
    return numbers_for_each_token(config, rows, length, rank, itemsize, targets) - left_out


@wrong("01-kept", "changed-input")
def targets_used_up(config, rows, length, rank, itemsize, targets):
    kept = numbers_for_each_token(config, rows, length, rank, itemsize, targets)
    targets.clear()
    return kept


@wrong("01-kept", "no-number")
def a_fraction_is_kept(*arguments):
    return Fraction(tensor_after_tensor(*arguments))


# 01-fits


@right("01-fits")
def by_halving(card, reserve, base_bits, share, trained_bits, state_bits):
    def needed(weights):
        trained = weights if share == 0 else share * weights
        total = weights * base_bits / 8 + trained * (trained_bits + 2 * state_bits) / 8
        return total + (0 if share == 0 else trained * trained_bits / 8)

    low, high = 0, card * 2**34
    while high - low > 1:
        middle = (low + high) // 2
        if needed(middle) <= card * 2**30 - reserve * 1e9:
            low = middle
        else:
            high = middle
    return low


@right("01-fits")
def bits_in_numpy(card, reserve, base_bits, share, trained_bits, state_bits):
    bits = np.dot([1, 1, 2], [base_bits, trained_bits, state_bits])
    if share:
        bits = base_bits + np.float64(share) * (2 * trained_bits + 2 * state_bits)
    return max(0, int(np.floor((card * 1024**3 - reserve * 10**9) * 8 / bits)))


def _fits(
    card, reserve, base_bits, share, trained_bits, state_bits, *, card_unit=2**30, reserve_unit=1e9,
    base_as_well=False, own=True, states=2, bits=8, least=0, up=0, of_all=False, full=True,
):  # fmt: skip
    trained = (share if not of_all else 1) or (1 if full else 0)
    each = base_bits / bits + trained * (trained_bits + states * state_bits) / bits
    if own and (share or base_as_well):
        each += (share or 1) * trained_bits / bits
    room = card * card_unit - reserve * reserve_unit
    return max(math.floor(room / each) + up, least)


for _mistake, _changes in (
    ("gb-for-gib", {"card_unit": 1e9}),
    ("reserve-in-gib", {"reserve_unit": 2**30}),
    ("reserve-ignored", {"reserve_unit": 0}),
    ("rounded-up", {"up": 1}),
    ("adapter-itself-missing", {"own": False}),
    ("base-twice", {"base_as_well": True}),
    ("nothing-trained", {"full": False}),
    ("states-once", {"states": 1}),
    ("bits-for-bytes", {"bits": 1}),
    ("negative", {"least": -math.inf}),
):
    _answer = lambda *arguments, changes=_changes: _fits(*arguments, **changes)  # noqa: E731
    _answer.__name__ = f"{_mistake}: {_changes}"
    wrong("01-fits", _mistake)(_answer)


@wrong("01-fits", "compared-in-gb")
def gb_against_gib(card, reserve, *bits):
    return 0 if reserve > card else by_halving(card, reserve, *bits)


@wrong("01-fits", "frozen-trained")
def a_small_share_is_none(card, reserve, base_bits, share, trained_bits, state_bits):
    share = 0 if share < 1e-5 else share
    return by_halving(card, reserve, base_bits, share, trained_bits, state_bits)


@wrong("01-fits", "one-less")
def one_is_kept_free(*arguments):
    return max(0, by_halving(*arguments) - 1)


@wrong("01-fits", "one-less")
def to_the_last_byte_does_not_fit(card, reserve, base_bits, share, trained_bits, state_bits):
    each = base_bits + (share or 1) * (trained_bits * (2 if share else 1) + 2 * state_bits)
    return max(0, math.ceil((card * 2**30 - reserve * 1e9) * 8 / each) - 1)


@wrong("01-fits", "trained-bits-ignored")
def always_16_bits(card, reserve, base_bits, share, trained_bits, state_bits):
    return by_halving(card, reserve, base_bits, share, 16, state_bits)


@wrong("01-fits", "frozen-trained")
def everything_is_trained(card, reserve, base_bits, share, trained_bits, state_bits):
    return int((card * 2**30 - reserve * 1e9) * 8 // (base_bits + trained_bits + 2 * state_bits))


@wrong("01-fits", "not-whole")
def a_fraction(card, reserve, base_bits, share, trained_bits, state_bits):
    each = base_bits / 8 + (share or 1) * (trained_bits + 2 * state_bits) / 8 + share * trained_bits / 8
    return max(0.0, (card * 2**30 - reserve * 1e9) / each)


@wrong("01-fits", "rounded-up")
def to_the_nearest(card, reserve, base_bits, share, trained_bits, state_bits):
    return max(0, round(a_fraction(card, reserve, base_bits, share, trained_bits, state_bits)))


@wrong("01-fits", "frozen-trained")
def small_shares_are_none(card, reserve, base_bits, share, trained_bits, state_bits):
    share = share if share > 1e-3 else 0
    return by_halving(card, reserve, base_bits, share, trained_bits, state_bits)


@wrong("01-fits", "negative")
def magnitude(card, reserve, *bits):
    return abs(_fits(card, reserve, *bits, least=-math.inf))


@wrong("01-fits", "whole-bytes")
def whole_bytes_alone(card, reserve, base_bits, share, trained_bits, state_bits):
    return by_halving(card, reserve, base_bits, share, trained_bits // 8 * 8, state_bits // 8 * 8)


@wrong("01-fits", "no-number")
def a_fraction_of_weights(*arguments):
    return Fraction(by_halving(*arguments))


@right("01-fits")
def whole_but_a_float(*arguments):
    return float(by_halving(*arguments))


# 01-cuts


def _fullest(inputs, kept, plan):
    stored, most = 0, 0
    for i, first in enumerate(plan):
        stored += inputs[first]
        end = plan[i + 1] if i + 1 < len(plan) else len(kept)
        most = max(most, stored + sum(kept[first:end]))
    return most


@right("01-cuts")
def as_long_as_a_limit_allows(inputs, kept):
    """The longest segment that a limit allows, again and again; the least limit for which that works."""

    def plan(limit):
        first, stored, now = [0], inputs[0], 0
        for i, size in enumerate(kept):
            if now and stored + now + size > limit:
                first.append(i)
                stored, now = stored + inputs[i], 0
            if stored + now + size > limit:
                return None
            now += size
        return first

    low, high = 0, inputs[0] + sum(kept)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if plan(middle) else (middle, high)
    return plan(high)


@right("01-cuts")
def all_best_trade_offs(inputs, kept):
    """For each block: the plans before it that no other beats in both what they store and their peak."""
    best = [{0: (0, ())}]
    for end in range(1, len(kept) + 1):
        found = {}
        for first in range(end):
            now = sum(kept[first:end])
            for stored, (peak, plan) in best[first].items():
                stored = stored + inputs[first]
                peak = max(peak, stored + now)
                if stored not in found or peak < found[stored][0]:
                    found[stored] = (peak, (*plan, first))
        front, least = {}, math.inf
        for stored in sorted(found):
            if found[stored][0] < least:
                least = found[stored][0]
                front[stored] = found[stored]
        best.append(front)
    return torch.tensor(min(best[-1].values())[1])


@right("01-cuts")
def moved_by_hand(inputs, kept):
    """From many beginnings, moves, drops and adds a cut as long as that helps."""

    def better(plan):
        while True:
            cuts = set(plan[1:])
            tries = [cuts ^ {i} for i in range(1, len(kept))]
            tries += [cuts - {i} | {j} for i in cuts for j in (i - 1, i + 1) if 0 < j < len(kept)]
            tries = [[0, *sorted(c)] for c in tries] or [plan]
            found = min(tries, key=lambda p: _fullest(inputs, kept, p))
            if _fullest(inputs, kept, found) >= _fullest(inputs, kept, plan):
                return plan
            plan = found

    begin = as_long_as_a_limit_allows(inputs, kept)
    return tuple(better(begin))


@wrong("01-cuts", "keep-all")
def no_checkpointing(inputs, kept):
    return [0]


@wrong("01-cuts", "every-block")
def as_transformers_does(inputs, kept):
    return list(range(len(kept)))


@wrong("01-cuts", "equal-segments")
def root_of_the_blocks(inputs, kept):
    return list(range(0, len(kept), math.isqrt(len(kept))))


@wrong("01-cuts", "equal-segments")
def best_of_the_equal(inputs, kept):
    plans = [[int(i) for i in np.arange(n) * len(kept) // n] for n in range(1, len(kept) + 1)]
    return min(plans, key=lambda plan: _fullest(inputs, kept, plan))


@wrong("01-cuts", "one-moment")
def all_inputs_at_all_moments(inputs, kept):
    """The least of: all stored inputs, and the largest segment. As if both were there at one moment."""
    best = None
    for limit in sorted({sum(kept[i:j]) for i, j in itertools.combinations(range(len(kept) + 1), 2)}):
        plans = [(0, [])]
        for end in range(1, len(kept) + 1):
            ways = [
                (plans[i][0] + inputs[i], [*plans[i][1], i])
                for i in range(end)
                if plans[i] and sum(kept[i:end]) <= limit
            ]
            plans.append(min(ways) if ways else None)
        if plans[-1] and (best is None or plans[-1][0] + limit < best[0]):
            best = (plans[-1][0] + limit, plans[-1][1])
    return best[1]


@wrong("01-cuts", "one-moment")
def equal_sums(inputs, kept):
    """Segments that keep about as much each, as many as the root of the blocks."""
    sums = np.cumsum(kept)
    count = round(len(kept) ** 0.5)
    marks = [int(np.searchsorted(sums, sums[-1] * i / count)) for i in range(count)]
    return sorted({0, *marks})


@wrong("01-cuts", "lengths")
def how_long_each_is(inputs, kept):
    plan = [*as_long_as_a_limit_allows(inputs, kept), len(kept)]
    return [b - a for a, b in itertools.pairwise(plan)]


@wrong("01-cuts", "no-segments")
def without_the_first(inputs, kept):
    return as_long_as_a_limit_allows(inputs, kept)[1:]


@wrong("01-cuts", "no-segments")
def with_the_end(inputs, kept):
    return [*as_long_as_a_limit_allows(inputs, kept), len(kept)]


@wrong("01-cuts", "no-segments")
def backwards(inputs, kept):
    return [*as_long_as_a_limit_allows(inputs, kept)[::-1], 0]


@wrong("01-cuts", "one-based")
def from_one(inputs, kept):
    return [first + 1 for first in as_long_as_a_limit_allows(inputs, kept)]


@wrong("01-cuts", "not-whole")
def in_floats(inputs, kept):
    return [float(first) for first in as_long_as_a_limit_allows(inputs, kept)]


@wrong("01-cuts", "no-list")
def a_generator(inputs, kept):
    return (first for first in as_long_as_a_limit_allows(inputs, kept))


@wrong("01-cuts", "every-block")
def few_blocks_are_not_cut_well(inputs, kept):
    return [*range(len(kept))] if 1 < len(kept) < 5 else as_long_as_a_limit_allows(inputs, kept)


@wrong("01-cuts", "keep-all")
def at_most_40_blocks(inputs, kept):
    return [0] if len(kept) > 43 else as_long_as_a_limit_allows(inputs, kept)


@wrong("01-cuts", "every-block")
def two_blocks_are_always_cut(inputs, kept):
    return [0, 1] if len(kept) == 2 else as_long_as_a_limit_allows(inputs, kept)


@wrong("01-cuts", "no-list")
def the_peak(inputs, kept):
    return _fullest(inputs, kept, as_long_as_a_limit_allows(inputs, kept))


@wrong("01-cuts", "changed-input")
def an_end_is_put_on(inputs, kept):
    plan = as_long_as_a_limit_allows(inputs, kept)
    kept.append(0)
    return plan
