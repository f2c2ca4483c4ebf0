"""What is said about NF4, recomputed. The texts are in `data/claims/nf4.toml`."""

import math
from statistics import NormalDist

import torch

from qlora_edu import blockwise, format_losses, formats, lloyd, normalised, reference, rounding
from qlora_edu.claims.ledger import recomputes
from qlora_edu.parity import stored_weights
from qlora_edu.stored import normals as stored_normals


def _mse(name: str) -> float:
    """Relative mean squared error on normal weights in blocks of 64, by integration."""
    return normalised.error(formats.levels(name), 64)


def _ratio(name: str) -> float:
    return format_losses.measure(name).perplexity / format_losses.measure().perplexity


@recomputes("nf4-optimal")
def better_levels() -> dict[str, float]:
    """Squared and absolute error of NF4 and of the best 16 levels, by integration."""
    nf4, least = formats.levels("nf4"), lloyd.best_levels(64)
    best_l1 = lloyd.best_levels(64, 1, (-1, 0, 1), of_weights=False)
    excess = normalised.error(nf4, 64, 1, False) / normalised.error(best_l1, 64, 1, False) - 1
    return {
        "optimal": normalised.error(nf4, 64) <= normalised.error(least, 64),
        "nf4": normalised.error(nf4, 64),
        "least": normalised.error(least, 64),
        "excess": 100 * excess,
    }


@recomputes("nf4-equal-use")
def use_of_each_level() -> dict[str, float]:
    """The share of normal weights in blocks that is nearest to each level, by integration."""
    small, large = (normalised.usage(formats.levels("nf4"), size) for size in (64, 4096))
    return {
        "least": 100 * small.min().item(),
        "most": 100 * small.max().item(),
        "bits": normalised.entropy(small),
        "bits_4096": normalised.entropy(large),
    }


@recomputes("nf4-where-weights-are")
def gaps() -> dict[str, float]:
    """The distances between neighbouring levels, from zero outwards on either side."""
    gaps = formats.levels("nf4").double().diff()
    growing = bool((gaps[7:].diff() > 0).all() and (gaps[:7].flip(0).diff() > 0).all())
    return {"growing": growing, "inner": gaps[7].item(), "outer": gaps[-1].item()}


@recomputes("nf4-beats-int4-fp4")
def perplexity_with_each() -> dict[str, float]:
    """Perplexity of SmolLM2 with weights in each format over that without rounding."""
    names = {"nf4": "NF4", "e2m1": "E2M1", "fp4": "FP4", "int4": "INT4 absmax"}
    ratios = {key: _ratio(name) for key, name in names.items()}
    return {"best": min(ratios, key=ratios.get) == "nf4"} | ratios


@recomputes("nf4-beats-any-int4")
def integers_with_a_zero() -> dict[str, float]:
    """The loss with min-max INT4 on a grid that holds zero, minus that with NF4; two standard errors over passages."""
    nf4, int4 = format_losses.measure("NF4"), format_losses.measure("INT4 min-max with 0")
    difference, deviation = int4.added_to(nf4)
    without, _ = format_losses.measure("INT4 min-max").added_to(nf4)
    return {
        "clear": difference > 2.2 * deviation,
        "difference": difference,
        "deviation": deviation,
        "without": without,
    }


@recomputes("nf4-least-error")
def squared_errors() -> dict[str, float]:
    """Integration; min-max INT4 on the stored normal numbers, since its grid has no fixed levels."""
    weight = stored_normals()
    min_max = rounding.relative_rmse(weight, rounding.round_trip(weight, 4, symmetric=False)) ** 2
    nf4 = rounding.relative_rmse(weight, formats.round_trip(weight, formats.levels("nf4"))) ** 2
    return {
        "least": nf4 < min_max,
        "nf4": _mse("nf4"),
        "int4": _mse("int4"),
        "fp4": _mse("fp4"),
        "e3m0": _mse("e3m0"),
        "min_max": min_max,
        "nf4_there": nf4,
    }


@recomputes("nf4-fp4-uniform")
def distances_in_fp4() -> dict[str, float]:
    """The largest distance between neighbouring levels over the smallest: 1 for a uniform grid."""
    gaps = formats.levels("fp4").double().diff()
    return {"ratio": (gaps.max() / gaps.min()).item()}


@recomputes("nf4-fp4-e2m1")
def smallest_of_fp4() -> dict[str, float]:
    """bitsandbytes' table against the values of the standard, largest = 1; errors by integration."""
    table = reference.bitsandbytes().functional.get_4bit_type("fp4", device="cpu")
    return {
        "smallest": table[table > 0].min().item(),
        "standard": formats.levels("e2m1")[8].item(),
        "fp4": _mse("fp4"),
        "e2m1": _mse("e2m1"),
    }


@recomputes("nf4-float-order")
def e3m0_and_e2m1() -> dict[str, float]:
    """Perplexity of SmolLM2 over that without rounding; errors by integration."""
    e2m1, e3m0 = _ratio("E2M1"), _ratio("E3M0")
    return {
        "e3m0_better": e3m0 < e2m1,
        "e2m1": e2m1,
        "e3m0": e3m0,
        "times": _mse("e3m0") / _mse("e2m1"),
    }


@recomputes("nf4-near-full-precision")
def rise() -> dict[str, float]:
    """Perplexity with NF4 over perplexity without."""
    return {"rise": 100 * (_ratio("NF4") - 1), "error": 100 * math.sqrt(_mse("nf4"))}


@recomputes("nf4-equation-4")
def equation_4() -> dict[str, float]:
    """q_i = ½(Q(i/17) + Q((i+1)/17)) with the standard library's quantile function."""
    quantile = NormalDist().inv_cdf
    q = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(1, 16)]  # i = 0 needs Q(0)
    return {"levels": len(q), "second": q[-2] / q[-1], "released": formats.levels("nf4")[-2].item()}


@recomputes("nf4-offset")
def from_the_offset() -> dict[str, float]:
    """Quantiles of 8 and of 7 probabilities from 0.9677083 to one half, against bitsandbytes' table, bit for bit."""
    theirs = reference.bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    quantile = NormalDist().inv_cdf
    halves = [torch.linspace(0.9677083, 0.5, n + 1, dtype=torch.float32)[:-1].tolist() for n in (7, 8)]
    levels = [-quantile(p) for p in halves[0]] + [0.0] + [quantile(p) for p in halves[1]]
    ours = torch.tensor(levels, dtype=torch.float32).sort().values
    return {"equal": int((ours / ours.max() == theirs).sum()), "mean": 1 - (1 / 32 + 1 / 30) / 2}


@recomputes("nf4-8-and-9")
def on_each_side() -> dict[str, float]:
    """Levels of bitsandbytes' table at most zero, and at least zero."""
    theirs = reference.bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    return {"negative": int((theirs <= 0).sum()), "positive": int((theirs >= 0).sum())}


@recomputes("nf4-same-everywhere")
def four_decimals() -> dict[str, float]:
    """Codes by torchao's definition (levels with four decimals, division, argmin) against this course's."""
    weight = stored_weights(2**20)
    blocks = weight.view(-1, 64)
    x = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
    table = torch.tensor([round(level, 4) for level in formats.levels("nf4").tolist()])
    theirs = torch.cat([(piece[:, None] - table).abs().argmin(dim=1) for piece in x.split(2**15)])
    ours = blockwise.unpack(blockwise.quantize(weight).packed)
    return {"differ": int((ours != theirs).sum()), "codes": weight.numel()}
