"""What is said about the memory of fine-tuning, recomputed. The texts are in `data/claims/memory.toml`."""

from functools import cache

import torch

from qlora_edu.claims.ledger import recomputes
from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import Memory, predict, shape_of
from qlora_edu.memory.parts import adapter_sizes, optimizer, quantized

GB, MIB = 1e9, 2**20
SIZES = ("7b", "13b", "33b", "65b")

#: Falcon-40B's released config; its blocks are not LLaMA's.
FALCON_40B = {
    "model_type": "falcon",
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
}
FALCON_40B |= {"num_kv_heads": 8, "vocab_size": 65_024, "new_decoder_architecture": True, "bias": False}


@cache
def _guanaco(size: str, adapter_dtype: torch.dtype = torch.bfloat16, **changes) -> Memory:
    """A step as Guanaco was trained: rank 64 on all linear layers, one sequence of 512, checkpointing."""
    settings = {"rank": 64, "checkpointing": True} | changes
    return predict(f"llama-{size}", "qlora", adapter_dtype=adapter_dtype, **settings)


@cache
def _adamw_of_16_bits() -> list[torch.Tensor]:
    """The states of torch's AdamW after a step on a bfloat16 parameter of 1,000 numbers."""
    parameter = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    adamw = torch.optim.AdamW([parameter])
    adamw.step()
    return [state for state in adamw.state[parameter].values() if state.numel() == 1000]


@recomputes("memory-780gb")
def full_fine_tuning_65b() -> dict[str, float]:
    """2 bytes a weight, 2 a gradient, 4 each for two states."""
    real = shape_of("llama-65b").parameters
    master = optimizer([1], master=True) - optimizer([1])
    return {"total": 65 * 12, "parameters": real / GB, "real": real * 12 / GB, "master": 65.0 * (12 + master)}


@recomputes("memory-520gb")
def doubled_twice() -> dict[str, float]:
    """Weights, gradients and states as torch keeps them of bfloat16 parameters."""
    per_parameter = 2 + 2 + sum(state.nbytes for state in _adamw_of_16_bits()) / 1000
    return {"total": 65 * per_parameter, "bytes": per_parameter}


@recomputes("memory-compressed")
def size_of_the_model() -> dict[str, float]:
    """The weights alone, before and after."""
    before, after = predict("llama-65b", "lora").weights, _guanaco("65b").weights
    return {"before": before / GB, "after": after / GB}


@recomputes("memory-48gb")
def qlora_65b() -> dict[str, float]:
    """The fullest moment of a step."""
    peak, wide = _guanaco("65b").peak, _guanaco("65b", torch.float32).peak
    kept = _guanaco("65b", checkpointing=False).peak
    return {"fits": peak < 48 * GB, "peak": peak / GB, "float32": wide / GB, "kept": kept / GB}


@recomputes("memory-65b-consumer")
def qlora_65b_on_24gb() -> dict[str, float]:
    """The weights against the largest consumer cards."""
    return {"fits": _guanaco("65b").peak < 24 * GB, "weights": _guanaco("65b").weights / GB}


@recomputes("memory-33b")
def qlora_33b() -> dict[str, float]:
    """The fullest moment of a step."""
    peak, wide = _guanaco("33b").peak, _guanaco("33b", torch.float32).peak
    longer = _guanaco("33b", length=1024).peak
    found = {"peak": peak / GB, "float32": wide / GB, "longer": longer / GB, "card": 24 * 2**30 / GB}
    return {"fits": peak < 24 * GB, **found}


def _bits(double_quant: bool) -> float:
    shape = shape_of("llama-7b")
    return 8 * sum(quantized(shape, double_quant=double_quant).values()) / shape.in_linears


@recomputes("memory-75")
def smaller_by() -> dict[str, float]:
    """Bits of a weight with its share of the scales; and the whole model."""
    whole = 1 - _guanaco("7b").weights / predict("llama-7b", "lora").weights
    plain, double = (100 * (1 - _bits(double) / 16) for double in (False, True))
    return {"plain": plain, "double": double, "whole": 100 * whole, "bits": _bits(True)}


@recomputes("memory-4x")
def times_smaller() -> dict[str, float]:
    """The whole of LLaMA-7B; and its linear layers alone."""
    whole = predict("llama-7b", "lora").weights / _guanaco("7b").weights
    return {"from16": whole, "from32": 2 * whole, "linear": 16 / _bits(True)}


@recomputes("memory-inference")
def without_training() -> dict[str, float]:
    """Weights and adapter, with nothing that only training needs."""
    found = {}
    for size in ("7b", "65b"):
        memory = _guanaco(size)
        found[f"q{size}"] = (memory.weights + memory.parts["adapter"]) / GB
        found[f"w{size}"] = predict(f"llama-{size}", "lora").weights / GB
    return {"only": found["q7b"] >= found["w7b"], **found}


@recomputes("memory-deployed")
def deployed() -> dict[str, float]:
    """The same numbers against those of the paper, and Vicuna-13B's weights in 16 bits."""
    found = {name: without_training()[name] for name in ("q7b", "q65b")}
    plain = _guanaco("65b", double_quant=False)
    found["plain"] = (plain.weights + plain.parts["adapter"]) / GB
    return {"vicuna": predict("llama-13b", "lora").weights / GB, **found}


@recomputes("memory-falcon")
def falcon_40b() -> dict[str, float]:
    """Weights, a rank-64 adapter in 16 bits on all linear layers, its gradients and 32-bit states."""
    shape = shape_of(FALCON_40B)
    names = {name.split(".")[-1] for name, _, _ in shape.linears}
    trained = adapter_sizes(shape, 64, names)
    weights = sum(quantized(shape).values()) + 2 * sum(shape.other)
    total = weights + 4 * sum(trained) + optimizer(trained)
    return {"two": total >= 48 * GB, "weights": weights / GB, "total": total / GB}


@recomputes("memory-adam")
def states_of_adam() -> dict[str, float]:
    """Counted in torch's AdamW after a step."""
    return {"states": len(_adamw_of_16_bits())}


@recomputes("memory-lora-base")
def lora_alone() -> dict[str, float]:
    """LLaMA-7B in 16 bits with a rank-64 adapter."""
    memory = predict("llama-7b", "lora", rank=64, checkpointing=True, adapter_dtype=torch.bfloat16)
    whole = 2 * shape_of("llama-7b").parameters
    share = 100 * memory.weights / memory.peak
    return {"all": memory.weights == whole, "weights": memory.weights / GB, "share": share}


@recomputes("memory-26mb")
def adapter_7b() -> dict[str, float]:
    """Rank 8 on LLaMA-7B's layers; and on 13 d numbers a layer."""
    shape = shape_of("llama-7b")
    real, pairs = (2 * sum(adapter_sizes(shape, 8, names)) for names in (LLAMA_LINEARS, ("q_proj", "v_proj")))
    ideal = 2 * 8 * 13 * shape.d * shape.layers
    return {"ideal": ideal / MIB, "all": real / 1e6, "qv": pairs / 1e6}


@recomputes("memory-567mb")
def input_gradients_7b() -> dict[str, float]:
    """One layer's share; and what autograd keeps for a rank-8 adapter and one sequence of 512."""
    kept, stored = (
        predict("llama-7b", "qlora", checkpointing=again).moments["loss"]["activations"]
        for again in (False, True)
    )
    layers = shape_of("llama-7b").layers
    return {"share": 567 / layers, "kept": kept / 1e6, "stored": stored / 1e6, "layers": layers}


@recomputes("memory-5048mb")
def base_7b() -> dict[str, float]:
    """Codes, scales, the rest in 16 bits; then without double quantization and the rest in 32 bits."""
    shape = shape_of("llama-7b")
    rest = sum(shape.other)
    base = sum(quantized(shape).values()) + 2 * rest
    most = sum(quantized(shape, double_quant=False).values()) + 4 * rest
    return {"base": base / 1e6, "gap": 5048 - base / 1e6, "most": most / 1e6}


@recomputes("memory-figure")
def adapters_of_the_figure() -> dict[str, float]:
    """MiB of rank 64 in 16 bits: on LLaMA's layers, and on 18 d numbers a layer."""
    found = {}
    for size in SIZES:
        shape = shape_of(f"llama-{size}")
        found[f"real{size}"] = 2 * sum(adapter_sizes(shape, 64, LLAMA_LINEARS)) / MIB
        found[f"ideal{size}"] = 2 * 64 * 18 * shape.d * shape.layers / MIB
    return found


@recomputes("memory-activations")
def longer_sequences() -> dict[str, float]:
    """The fullest moment of QLoRA at 7B without checkpointing, and with it."""
    short, long = (_guanaco("7b", checkpointing=False, length=n) for n in (512, 2048))
    again = _guanaco("7b", length=2048)
    found = {"short": short.peak / GB, "long": long.peak / GB, "again": again.peak / GB}
    return {"cost": long.peak > short.peak, **found}
