"""A whole 4-bit model on disk, in the layout that transformers and bitsandbytes use.

What is saved here loads with `AutoModelForCausalLM.from_pretrained`; a 4-bit model that transformers saved loads here.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from qlora_edu import reference
from qlora_edu.adapters import write_whole
from qlora_edu.lora import lora_layers
from qlora_edu.models.convert import quiet_transformers
from qlora_edu.qlora import NF4Linear
from qlora_edu.storage import from_stored


def save_quantized(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a transformers model with `NF4Linear` layers into a folder, which is made if it is missing.

    Raises:
        ValueError: if the model has no such layer, or an adapter (save that with `adapters.save_adapter`, or merge it
            first), or its layers differ in codebook, double quantization or compute dtype.
    """
    if lora_layers(model):
        raise ValueError("model: has an adapter; save that with save_adapter, or merge it first")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    kinds = {(m.quantized.codebook, m.quantized.double_quant, m.compute_dtype) for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"model: expected 4-bit layers of one kind; got {sorted(map(str, kinds)) or 'none'}")
    codebook, double_quant, compute_dtype = kinds.pop()
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, NF4Linear)]
    description = quantization_config(codebook, double_quant, compute_dtype, kept)
    config = {**model.config.to_dict(), "quantization_config": description}
    config.pop("_name_or_path", None)
    seen: dict[int, str] = {}  # tied weights are stored once
    tensors = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor.contiguous()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_whole(folder / "config.json", (json.dumps(config, indent=2, default=str) + "\n").encode())
    return folder


def quantization_config(
    codebook: str, double_quant: bool, compute_dtype: torch.dtype, kept: list[str]
) -> dict:
    """What a config.json says of 4-bit layers, in transformers' words. kept: linear layers that are not in 4 bits."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=codebook,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept or None,
    ).to_dict()


def load_quantized(folder: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """A 4-bit model that was saved here or by transformers with bitsandbytes, with `NF4Linear` layers, in train mode.

    Raises:
        FileNotFoundError: if the folder holds no model. ValueError: if it holds one that is not in 4 bits.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} holds no config.json, so it is no model")
    if (
        not json.loads((folder / "config.json").read_text())
        .get("quantization_config", {})
        .get("load_in_4bit")
    ):
        raise ValueError(
            f"folder: the model in {str(folder)!r} is not stored in 4 bits; load it with models.load"
        )
    bnb = reference.bitsandbytes()
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=device, attn_implementation="eager", use_safetensors=True
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            stored = {
                key.removeprefix("weight"): tensor
                for key, tensor in module.state_dict().items()
                if key.startswith("weight")
            }
            compute_dtype = module.compute_dtype or module.weight.quant_state.dtype
            model.set_submodule(name, NF4Linear(from_stored(stored), module.bias, compute_dtype))
    model.requires_grad_(False)
    model.is_quantized = False  # transformers has no say in these layers any more
    return model.train()
