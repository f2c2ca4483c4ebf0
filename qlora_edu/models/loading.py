"""One function loads any causal language model: the default by its short name, others by folder or hub id."""

import contextlib
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlora_edu.models.cache import fetch
from qlora_edu.models.convert import quiet_transformers
from qlora_edu.models.device import find_device, pick_dtype
from qlora_edu.models.source import MINILM, SMOLLM2, ModelError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def load(
    name: str | os.PathLike = SMOLLM2,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to answer (in eval mode, with eager attention).

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: the default model's short name; or a local folder; or a hub id "owner/name".
        dtype: of the weights; `pick_dtype(device)` decides where it is None.
        device: where to put the model.
        progress: show bars while something is downloaded.

    Returns:
        (model, tokenizer), as transformers' `from_pretrained` makes them.

    Raises:
        ModelError: the model is not there, is damaged, or cannot be loaded.
        TypeError: `name` is neither a string nor a path, or `dtype` is no floating dtype.
        ValueError: `device` is not on this machine.
    """
    device = find_device(device)
    dtype = pick_dtype(device)[0] if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype such as torch.float32, or None; not {dtype!r}.")
    place = find(name, progress)
    local = isinstance(place, Path)
    options = {"trust_remote_code": False, "local_files_only": local}
    quiet = quiet_transformers() if local or not progress else contextlib.nullcontext()
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{str(name)!r} cannot be loaded as a causal language model: {error}") from error
    if report["missing_keys"]:
        raise ModelError(
            f"{str(name)!r} lacks {len(report['missing_keys'])} weights of a {type(model).__name__}, such as "
            f"{min(report['missing_keys'])!r}; they would be random. It is damaged, or another kind of model."
        )
    return model.to(device).eval(), tokenizer


def own_weights(model: nn.Module) -> None:
    """Copy a model's weights into memory of their own, and so let go of the file that they were mapped from.

    A file stays mapped, and what was read of it counts as the process's memory, as long as one weight is a view of it.
    For a model that was quantized after it was loaded, that is all 16-bit weights for the sake of its embedding.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def find(name: str | os.PathLike, progress: bool = True) -> Path | str:
    """The folder or the hub id that a name stands for: first the short name, then a folder, then a hub id.

    Raises:
        ModelError: it stands for nothing, or for a folder that plainly holds no model.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a string or a path, not {type(name).__name__}.")
    if name == SMOLLM2:
        return fetch(progress=progress)
    if name == MINILM:
        raise ModelError(f"{MINILM!r} is no causal language model: models.load_minilm() gives its weights.")
    name = os.fspath(name)
    folder = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(folder):
        _check_folder(folder)
        return folder
    if HUB_ID.fullmatch(name):
        return name
    raise ModelError(
        f"There is no model {name!r}. Give {SMOLLM2!r} (the default), a folder that exists, or a hub id of "
        f"the form 'owner/name'."
    )


def _check_folder(folder: Path) -> None:
    files = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in files:
        raise ModelError(
            f"{str(folder)!r} holds an adapter, not a model: load its base model, then call "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    if "config.json" not in files:
        raise ModelError(
            f"{str(folder)!r} holds no model: no config.json. Give a folder that save_pretrained wrote."
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise ModelError(
            f"{str(folder)!r} holds no .safetensors file. Other formats can run code while they are read, so "
            f"they are not loaded: write the model again with save_pretrained."
        )
