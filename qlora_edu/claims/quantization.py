"""What is said about scales, 8-bit and 4-bit integers, recomputed. The texts are in `data/claims/quantization.toml`."""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import models, perplexity, reference, rounding
from qlora_edu.claims.ledger import recomputes

#: MMLU after fine-tuning on Alpaca and on FLAN v2, at 7B, 13B, 33B and 65B: table 4 of arXiv 2305.14314.
MMLU_BF16 = (38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5)
MMLU_FP4 = (37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3)
TOKENS = 64  # of each of the twelve passages, as in the chapter


@cache
def _model():
    return models.load(dtype=torch.float32, progress=False)


def _matrix(name: str) -> Tensor:
    return _model()[0].get_parameter(name).detach()


@cache
def _perplexity(bits: int | None = None, granularity: str = "row") -> float:
    """Of the model with its linear weights rounded to absmax integers; in float32, to be the same everywhere."""
    model, tokenizer = _model()

    def change(weight: Tensor) -> Tensor:
        return weight if bits is None else rounding.round_trip(weight, bits, granularity)

    with perplexity.rounded_weights(model, change):
        return perplexity.perplexity(perplexity.token_nll(model, tokenizer, perplexity.passages(), TOKENS))


@recomputes("quantization-64-per-scale")
def weights_per_scale() -> dict[str, float]:
    """From what bitsandbytes stores when it is not told a block size."""
    weight = _matrix("model.layers.7.mlp.up_proj.weight")
    _, state = reference.bitsandbytes().functional.quantize_4bit(weight)
    scales = state.absmax
    return {"weights": weight.numel() / scales.numel(), "scale_bits": 8 * scales.element_size()}


@recomputes("quantization-half-bit")
def bits_for_scales() -> dict[str, float]:
    """From the bytes that bitsandbytes makes of a matrix of the model."""
    weight = _matrix("model.layers.7.mlp.up_proj.weight")
    packed, state = reference.quantize(weight)
    scales = 8 * state.absmax.nbytes / weight.numel()
    return {"bits": scales, "total": 8 * packed.nbytes / weight.numel() + scales}


@recomputes("quantization-1b-scales")
def scales_of_65b() -> dict[str, float]:
    """Arithmetic."""
    scales = 65e9 / 64
    return {"scales": scales, "gb": scales * 4 / 1e9}


@recomputes("quantization-outlier-bins")
def codes_in_use() -> dict[str, float]:
    """The codes of layer 0's output projection, one step for the matrix: how many occur, and the most frequent ones."""
    weight = _matrix("model.layers.0.self_attn.o_proj.weight")
    codes = rounding.quantize(weight, 8, "tensor").codes
    counts = codes.flatten().unique(return_counts=True)[1].sort(descending=True).values
    half = int((counts.cumsum(0) < codes.numel() / 2).sum()) + 1
    return {
        "most_unused": len(counts) < 255 / 2,
        "largest": (weight.abs().max() / weight.double().std()).item(),
        "used": len(counts),
        "half": half,
    }


@recomputes("quantization-int8-lossless")
def int8_per_row() -> dict[str, float]:
    """Perplexity with INT8 over perplexity without; the error of all linear weights together."""
    weights = [w for name, w in _model()[0].named_parameters() if name.endswith("proj.weight")]
    lost = sum((rounding.round_trip(w, 8, "row") - w).double().square().sum().item() for w in weights)
    size = sum(w.detach().double().square().sum().item() for w in weights)
    return {"ratio": _perplexity(8) / _perplexity(), "error": 100 * (lost / size) ** 0.5}


@recomputes("quantization-near-full-precision")
def int4_in_blocks() -> dict[str, float]:
    """The means of the paper's table; perplexity with INT4 over perplexity without."""
    gap = (sum(MMLU_BF16) - sum(MMLU_FP4)) / len(MMLU_BF16)
    return {"gap": gap, "ratio": _perplexity(4, "block") / _perplexity()}


@recomputes("quantization-slower-inference")
def one_report() -> dict[str, float]:
    """Tokens a second in 16 bits over those in NF4, from the issue."""
    return {"longer": 48.6 / 36.5 - 1}


@recomputes("quantization-not-for-pretraining")
def update_in_steps() -> dict[str, float]:
    """The median over all blocks of all linear layers of the 4-bit step, and one update as a share of it."""
    steps = [
        rounding.groups(w.detach(), "block", 64).abs().amax(dim=1) / 7
        for name, w in _model()[0].named_parameters()
        if name.endswith("proj.weight")
    ]
    step = torch.cat(steps).median().item()
    return {"step": step, "share": 1e-4 / step}
