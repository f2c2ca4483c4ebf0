"""What is said about double quantization, recomputed. The texts are in `data/claims/double.toml`."""

from functools import cache

import torch
from torch import Tensor

from qlora_edu import (
    blockwise,
    codebooks,
    double_quantization,
    format_losses,
    models,
    reference,
    scale_losses,
    second_level,
)
from qlora_edu.claims.ledger import recomputes
from qlora_edu.memory import shape_of
from qlora_edu.memory.parts import quantized
from qlora_edu.rounded_weights import linear_layers

GB = 1e9
MATRIX = "model.layers.7.mlp.up_proj"


@cache
def _weights() -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in linear_layers(format_losses.base()[0]).items()}


@cache
def _scales(model: str) -> list[Tensor]:
    """The scales of each matrix in blocks of 64."""
    weights = _weights() if model == "smollm2" else models.load_minilm(progress=False)
    return [weight.reshape(-1, 64).abs().amax(dim=1) for weight in weights.values()]


@cache
def _error(model: str, grid: str = "dynamic", offset: bool = True) -> float:
    """‖s - ŝ‖ / ‖s‖ over the scales of all matrices, in %."""
    scales = _scales(model)
    lost = sum(
        (second_level.store(s, grid, offset=offset) - s).double().square().sum().item() for s in scales
    )
    return 100 * (lost / sum(s.double().square().sum().item() for s in scales)) ** 0.5


@recomputes("double-3gb")
def saved_at_65b() -> dict[str, float]:
    """Arithmetic, and the matrices of LLaMA-65B one by one."""
    saved = 4.5 - second_level.bits_per_weight(64)
    shape = shape_of("llama-65b")
    counted = sum(quantized(shape, double_quant=False).values()) - sum(quantized(shape).values())
    return {"bits": saved, "gb": saved * 65e9 / 8 / GB, "counted": counted / GB}


@recomputes("double-0127")
def bits_of_a_matrix() -> dict[str, float]:
    """From the bytes that bitsandbytes makes of a matrix of the model, with and without."""
    weight = _weights()[MATRIX]
    _, before = reference.quantize(weight)
    _, after = reference.quantize(weight, double_quant=True)
    left = after.absmax.nbytes + after.state2.absmax.nbytes
    extra = sum(tensor.nbytes for name, tensor in after.as_dict(packed=True).items() if "absmax" not in name)
    return {
        "before": 8 * before.absmax.nbytes / weight.numel(),
        "after": 8 * left / weight.numel(),
        "weights": weight.numel(),
        "extra": 8 * extra / weight.numel(),
    }


@recomputes("double-integer")
def gaps() -> dict[str, float]:
    """From bitsandbytes' own table."""
    gap = reference.bitsandbytes().functional.create_dynamic_map().diff()
    return {"ratio": (gap.max() / gap.min()).item()}


@recomputes("double-fp8")
def as_e4m3() -> dict[str, float]:
    """Levels in common with torch's float8_e4m3fn, both scaled to 1, and the error of the scales with either."""
    ours, theirs = codebooks.dynamic_map(), second_level.levels("e4m3")
    common = sum((theirs == level).any().item() for level in ours)
    return {"common": common, "dynamic": _error("smollm2"), "e4m3": _error("smollm2", "e4m3")}


@recomputes("double-no-degradation")
def loss_of_the_model() -> dict[str, float]:
    """The loss of SmolLM2-135M with 8-bit scales minus that with 32-bit scales, same codes, same 756 tokens."""
    difference, deviation = scale_losses.measure("dynamic").added_to(scale_losses.measure("32 bits"))
    return {
        "seen": abs(difference) > 2.2 * deviation,
        "difference": 1000 * difference,
        "deviation": 1000 * deviation,
    }


@recomputes("double-no-loss")
def error_of_the_weights() -> dict[str, float]:
    """The weights of all linear layers with and without; the share of one matrix's weights that change."""
    weight = _weights()[MATRIX]
    plain, double = (blockwise.quantize(weight, double_quant=twice).dequantize() for twice in (False, True))
    before, after = (scale_losses.measure(name).error ** 2 for name in ("32 bits", "dynamic"))
    changed = (plain != double).double().mean().item()
    return {"changed": 100 * changed, "before": before, "after": after, "more": 100 * (after / before - 1)}


@recomputes("double-centre")
def with_and_without_the_mean() -> dict[str, float]:
    """The error of SmolLM2's scales, and that of 256 even levels from zero up."""
    centred, plain = _error("smollm2"), _error("smollm2", offset=False)
    unsigned = _error("smollm2", "unsigned uniform", offset=False)
    return {"helps": centred < plain, "centred": centred, "plain": plain, "unsigned": unsigned}


@recomputes("double-dynamic-better")
def two_grids() -> dict[str, float]:
    """The error of the scales of two models on the dynamic map and on 255 even levels, mean subtracted."""
    found = {}
    for model in ("smollm2", "minilm"):
        found[model] = _error(model)
        found[f"{model}_uniform"] = _error(model, "uniform")
    found["always"] = all(found[model] < found[f"{model}_uniform"] for model in ("smollm2", "minilm"))
    return found


@recomputes("double-equation-6")
def taken_literally() -> dict[str, float]:
    """NF4 weights of a matrix decoded with level * c1, and with the mean added again."""
    weight = _weights()[MATRIX]
    stored = blockwise.quantize(weight, double_quant=True)
    right = stored.dequantize()
    scales = stored.scales()
    literal = (right.view(-1, 64) * (1 - stored.stored_scales.offset / scales)[:, None]).view(weight.shape)
    size = weight.double().norm()
    return {
        "equal": torch.equal(literal, right),
        "literal": 100 * ((literal - weight).double().norm() / size).item(),
        "right": 100 * ((right - weight).double().norm() / size).item(),
    }


def cuda_search(x: Tensor) -> Tensor:
    """The codes that bitsandbytes' CUDA kernel searches for (dQuantize in its source), uint8, on any device.

    x: float32, scale / largest of its block. A binary search among the 256 levels, then halfway between two.
    """
    levels = codebooks.dynamic_map().to(x.device)
    pivot = torch.full(x.shape, 127, device=x.device)
    lower, upper = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = x > levels[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    value = levels[pivot]
    up = torch.where(x > (levels[upper] + value) * 0.5, upper, pivot)
    down = torch.where(x < (levels[lower] + value) * 0.5, lower, pivot)
    return torch.where(x > value, up, down).to(torch.uint8)


@recomputes("double-same-codes")
def searched_and_looked_up() -> dict[str, float]:
    """All scales of SmolLM2: the table that a CPU uses against the CUDA kernel's search, repeated on this CPU."""
    differ = 0
    for scales in _scales("smollm2"):
        stored = double_quantization.quantize_scales(scales)
        rows = double_quantization.to_blocks(scales - stored.offset, double_quantization.BLOCK_SIZE)
        x = (rows * (1 / stored.absmax)[:, None]).flatten()[: len(scales)]
        differ += int((cuda_search(x) != stored.codes).sum())
    return {"differ": differ, "scales": sum(map(len, _scales("smollm2")))}


@recomputes("double-fit")
def weights_of_33b_and_65b() -> dict[str, float]:
    """The linear layers, matrix by matrix, without and with."""
    found = {}
    for size in ("33b", "65b"):
        shape = shape_of(f"llama-{size}")
        found[f"plain_{size}"] = sum(quantized(shape, double_quant=False).values()) / GB
        found[f"double_{size}"] = sum(quantized(shape).values()) / GB
    return found
