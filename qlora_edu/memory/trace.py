"""What really happens to memory in a step: which tensors autograd keeps, and how many bytes live at each moment.

`kept_by_forward` asks autograd; it works on the meta device too, so that a model of any size can be asked.
`timeline` asks torch's allocator, which sees every byte, those of temporaries inside an operation too.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_edu.lora import add_lora
from qlora_edu.memory.activations import Work
from qlora_edu.memory.shapes import on_meta, shape_of


def kept_by_forward(model: nn.Module, forward: Callable[[], object]) -> dict[tuple, int]:
    """The bytes that autograd keeps for the backward pass when `forward` is called, parameters and buffers aside.

    A storage that is kept twice, or through two views, counts once.

    Returns:
        Bytes by (dtype, shape of the view that was kept first, name of the operation that made it).
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages, found = {}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in storages:
            storages[storage._cdata] = storage  # held, so that no other storage gets its address
            made_by = tensor.grad_fn.name() if tensor.grad_fn is not None else "-"
            key = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), made_by)
            found[key] = found.get(key, 0) + storage.nbytes()
        return tensor.detach()  # a result that its own graph holds would never be freed

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return found


def kept_on_meta(model, work: Work) -> dict[tuple, int]:
    """`kept_by_forward` of transformers' own model of this shape, on the meta device, up to its last norm.

    It needs no formula, so it serves any architecture whose linear layers have the names in `work.targets`.
    model: as in `shapes.shape_of`.
    """
    shape = shape_of(model)
    dtype = {2: torch.bfloat16, 4: torch.float32}[work.itemsize]
    model = on_meta(shape.config).train().requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if not work.full:
        with torch.device("meta"):
            add_lora(model, r=work.rank, targets=tuple(work.targets), compute_dtype=dtype)
    ids = torch.zeros(work.rows, work.length, dtype=torch.int64, device="meta")
    mask = torch.zeros(work.rows, 1, work.length, work.length, dtype=dtype, device="meta")
    decoder = model.get_decoder()
    return kept_by_forward(model, lambda: decoder(input_ids=ids, attention_mask=mask, use_cache=False))


@dataclass(frozen=True)
class Timeline:
    """Bytes that live in torch's CPU allocator, over one call, counted from its beginning.

    Attributes:
        seconds, bytes: one entry for each allocation and each release.
        marks: (name, seconds) of the stages of the call.
    """

    seconds: list[float]
    bytes: list[int]
    marks: list[tuple[str, float]]

    @property
    def peak(self) -> int:
        return max(self.bytes, default=0)

    @property
    def peak_stage(self) -> str:
        """The stage in which the peak is reached."""
        at = self.seconds[self.bytes.index(self.peak)]
        return [name for name, start in self.marks if start <= at][-1]


def timeline(stages: dict[str, Callable[[], object]]) -> Timeline:
    """Call each of the functions in turn, and watch torch's allocator.

    Uses torch's profiler, which reports each allocation and release on the CPU with its size and time.
    """
    if not stages:
        raise ValueError("stages: expected at least one function, by name; got none")
    from torch.profiler import ProfilerActivity, profile, record_function

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for name, function in stages.items():
            with record_function(f"stage {name}"):
                function()
    events = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    starts = sorted((e.start_ns(), e.name()[6:]) for e in events if e.name().startswith("stage "))
    begin = starts[0][0]
    seconds, live, total = [], [], 0
    for at, change in changes:
        total += change
        seconds.append((at - begin) / 1e9)
        live.append(total)
    return Timeline(seconds, live, [(name, (at - begin) / 1e9) for at, name in starts])


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that the profiler's C++ code writes to standard error appears, until the end of the block."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
