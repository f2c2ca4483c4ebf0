"""Memory that is used again and again, because on a CPU fresh memory costs more than the work done in it."""

import math
import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of undefined content; the next call in this thread may hand out the same memory."""
    buffers = _local.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    buffer = buffers.get((dtype, device))
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):
            buffer = buffers[dtype, device] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


def release() -> None:
    """Give this thread's scratch memory back."""
    _local.__dict__.pop("buffers", None)
