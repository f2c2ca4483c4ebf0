"""Where memory comes from: on a CPU, fresh memory costs more than the work done in it.

The system hands it out in pages of 4 KiB, and stops for each of them when it is first written. `scratch` uses memory
again; `fresh` asks Linux for pages of 2 MiB.
"""

import math
import mmap
import threading

import torch
from torch import Tensor

MANY_BYTES = 2**24  # from here on, rounding up to whole pages of 2 MiB wastes little

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


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, and several times as fast to fill where it is large, on a CPU, and Linux has large pages."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < MANY_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, OverflowError):  # a system without them; or there is no such memory, and torch says so
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()  # which keeps the memory
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)
