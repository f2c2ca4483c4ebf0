"""Plain values as bytes: JSON for the structure, safetensors for the tensors.

No pickle: what comes out of a submission's process is data, never code.
"""

import json

import torch
from safetensors.torch import load, save
from torch import Tensor

LARGEST = 256 * 2**20


class Unreadable(ValueError):
    """Bytes that are no message, or a value that cannot be one."""


def encode(value) -> bytes:
    """Tensors, numbers, texts, None, dtypes, and tuples, lists and dicts of them.

    Raises:
        Unreadable: for anything else, or what is nested too deeply.
    """
    tensors: dict[str, Tensor] = {}
    try:
        structure = json.dumps(_packed(value, tensors)).encode()
        blob = save(tensors) if tensors else b""
    except (TypeError, ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise Unreadable(f"not a plain value: {error}") from None
    return len(structure).to_bytes(8, "little") + structure + blob


def decode(message: bytes):
    """The inverse of `encode`. Raises Unreadable for any other bytes."""
    try:
        length = int.from_bytes(message[:8], "little")
        structure, blob = message[8 : 8 + length], message[8 + length :]
        return _unpacked(json.loads(structure), load(blob) if blob else {})
    except Exception as error:  # whoever sent it may have sent anything
        raise Unreadable(f"not a message: {type(error).__name__}: {error}") from None


def _packed(value, tensors: dict[str, Tensor]):
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_packed(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_packed(v, tensors) for v in value]
    if isinstance(value, dict):
        return {"dict": [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__}")


def _unpacked(value, tensors: dict[str, Tensor]):
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        dtype = getattr(torch, content)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(content)
        return dtype
    if kind == "tuple":
        return tuple(_unpacked(v, tensors) for v in content)
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
