"""Turning a model into a QLoRA model, and back into an ordinary one."""

from collections.abc import Collection

import torch
from torch import nn

from qlora_edu.lora import LLAMA_LINEARS, add_lora, check_options, find_targets, lora_layers
from qlora_edu.qlora.layers import NF4Linear, QLoRALinear


def quantize_model(
    model: nn.Module,
    compute_dtype: torch.dtype | None = None,
    block_size: int = 64,
    codebook: str = "nf4",
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
) -> list[str]:
    """Put an `NF4Linear` in the place of each `nn.Linear` whose name does not end in one of `skip`, in place.

    The layers compute in `compute_dtype`, by default in the dtype that their weights have now.

    Returns:
        The names of the layers that were quantized.

    Raises:
        TypeError: if `skip` is no list of names, or `model` no model.
        ValueError: if there is no such layer, a layer cannot be quantized, or the model has LoRA layers already.
            Nothing is changed then.
    """
    if isinstance(skip, str) or not isinstance(skip, Collection) or not all(isinstance(s, str) for s in skip):
        raise TypeError(f"skip: expected a list of names, such as ['lm_head'], or []; got {skip!r}")
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model: expected a model that contains linear layers; got one layer. Use NF4Linear.of."
        )
    if lora_layers(model):
        raise ValueError("model: has LoRA layers already; quantize a model before LoRA is added to it")
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] not in set(skip):
            try:
                layers[name] = NF4Linear.of(
                    module, compute_dtype or module.weight.dtype, block_size, codebook, double_quant
                )
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: cannot be quantized. {error}") from error
    if not layers:
        if any(isinstance(module, NF4Linear) for module in model.modules()):
            raise ValueError("model: is in 4 bits already; lora.add_lora puts an adapter on it")
        raise ValueError("model: has no nn.Linear to quantize")
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def add_qlora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Collection[str] = LLAMA_LINEARS,
    rank_stabilized: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """The whole of QLoRA: quantize a model's linear layers to NF4 with double quantization, and add LoRA to them.

    Arguments, result and errors are those of `lora.add_lora`; where that would refuse, nothing is quantized either.
    """
    find_targets(model, targets)
    check_options(r, alpha, dropout, compute_dtype, rank_stabilized)
    quantize_model(model)
    return add_lora(model, r, alpha, dropout, targets, rank_stabilized, compute_dtype)


def merge_into_dense(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every QLoRA layer, in place, by an ordinary linear layer: decoded base plus update. Returns the model.

    Args:
        dtype: of the new layers; by default that of each weight before it was quantized, which the rest of the model
            has as a rule. Another one makes two dtypes meet in the forward pass, unless `model.to(dtype)` follows.

    Raises:
        ValueError: if the model has no QLoRA layers, or the dtype is none of blockwise.FLOATS.
        RuntimeError: if a layer is merged, or switched off. Nothing is changed then.
    """
    layers = lora_layers(model)
    if not layers or not all(isinstance(layer, QLoRALinear) for layer in layers.values()):
        raise ValueError(
            "model: expected QLoRA layers; call add_qlora, or use LoRALinear.merge for a dense base"
        )
    dense = {name: layer.merged_linear(dtype) for name, layer in layers.items()}
    for name, layer in dense.items():
        model.set_submodule(name, layer)
    return model
