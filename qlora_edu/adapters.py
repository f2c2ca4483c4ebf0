"""Adapters on disk, in PEFT's format: what is trained here loads there, and the other way round.

adapter_config.json          rank, alpha, targets, and which base the adapter belongs to
adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in) and .lora_B.weight (out, r)
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qlora_edu.lora import LoRALinear, add_lora, check_options, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight")

#: Options of PEFT that change what an adapter computes, or where, and that `LoRALinear` has not.
UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of each LoRA layer, by the names that PEFT gives them in a file."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().contiguous()
    return tensors


def save_adapter(model: nn.Module, folder: str | os.PathLike, base_name: str | None = None) -> Path:
    """Write a model's adapter into a folder, which is made if it is missing. A file is there whole or not at all.

    Args:
        base_name: the hub id or folder of the base model, for the config.

    Raises:
        ValueError: if the model has no LoRA layer, or its layers differ in rank, alpha or scaling.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model: has no LoRA layer; call add_lora first")
    kinds = {(layer.r, layer.alpha, layer.rank_stabilized, layer.dropout.p) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"model: expected one rank, alpha, scaling and dropout for all layers; got {sorted(kinds)}"
        )
    r, alpha, rank_stabilized, dropout = kinds.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, save(adapter_tensors(model), metadata={"format": "pt"}))
    write_whole(folder / CONFIG, text.encode())
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_config(folder: str | os.PathLike) -> dict:
    """The adapter's config.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ValueError: if it is no LoRA adapter, or uses something that `LoRALinear` has not.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} holds no {CONFIG}, so it is no adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG}: expected peft_type LORA; got {str(config)[:100]}")
    if "r" not in config or "lora_alpha" not in config:
        raise ValueError(f"{CONFIG}: expected r and lora_alpha; got {sorted(config)}")
    for key in UNSUPPORTED:
        if config.get(key) not in (None, False, {}, "none"):
            raise ValueError(
                f"{CONFIG}: {key}={config[key]!r} is not supported here; load this adapter with PEFT"
            )
    return config


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """Load an adapter that was saved here or by PEFT. Returns the model.

    A model without LoRA layers gets them, as the config says; one that has them must have the same. The base stays
    as it is: an adapter that was trained on a 4-bit base belongs on one (`qlora.quantize_model` first). On the 16-bit
    base it works too, and answers a little differently.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ValueError: if the adapter does not fit the model. Nothing is changed then.
    """
    config = read_config(folder)
    try:
        tensors = load_file(Path(folder) / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{WEIGHTS}: cannot be read ({error})") from error
    odd = [name for name in tensors if not (name.startswith(_PREFIX) and name.endswith(_ENDINGS))]
    if odd or not tensors:
        raise ValueError(f"{WEIGHTS}: expected names {_PREFIX}<layer>{_ENDINGS[0]}; got {sorted(odd)[:3]}")
    names = {
        name.removeprefix(_PREFIX).removesuffix(_ENDINGS[0]).removesuffix(_ENDINGS[1]) for name in tensors
    }
    _check_fit(model, config, names, tensors)
    if not lora_layers(model):
        add_lora(
            model,
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=sorted({name.split(".")[-1] for name in names}),
            rank_stabilized=config.get("use_rslora", False),
            compute_dtype=compute_dtype,
        )
    for name, layer in lora_layers(model).items():
        layer.lora_a.data.copy_(tensors[f"{_PREFIX}{name}.lora_A.weight"])
        layer.lora_b.data.copy_(tensors[f"{_PREFIX}{name}.lora_B.weight"])
    return model


def _check_fit(model: nn.Module, config: dict, names: set[str], tensors: dict[str, Tensor]) -> None:
    endings = {name.split(".")[-1] for name in names}
    present = lora_layers(model) or {n: m for n, m in model.named_modules() if n.split(".")[-1] in endings}
    if set(present) != names:
        odd = sorted(set(present) ^ names)[:3]
        raise ValueError(f"adapter: its layers are not those of the model; for example {odd}")
    check_options(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    for name, layer in present.items():
        if isinstance(layer, LoRALinear):
            if layer.merged:
                raise ValueError(f"model: the update of {name} is merged into its base; call unmerge() first")
            wanted = (config["r"], config["lora_alpha"], config.get("use_rslora", False))
            if (layer.r, layer.alpha, layer.rank_stabilized) != wanted:
                raise ValueError(
                    f"adapter: has (r, alpha, rank-stabilized) = {wanted}; "
                    f"the model has {(layer.r, layer.alpha, layer.rank_stabilized)}"
                )
            layer = layer.base
        if not hasattr(layer, "in_features"):
            raise ValueError(f"adapter: {name} is a {type(layer).__name__} in the model, no linear layer")
        shapes = {"lora_A": (config["r"], layer.in_features), "lora_B": (layer.out_features, config["r"])}
        for part, expected in shapes.items():
            tensor = tensors.get(f"{_PREFIX}{name}.{part}.weight")
            if tensor is None or tuple(tensor.shape) != expected:
                got = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(f"adapter: expected {name}.{part} of shape {expected}; got {got}")
