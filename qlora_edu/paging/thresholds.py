"""What bitsandbytes pages: read in its source, and counted on adapters."""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_edu import reference
from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import shape_of
from qlora_edu.memory.parts import adapter_sizes

ATTENTION = LLAMA_LINEARS[:4]


@cache
def threshold() -> float:
    """A state with fewer numbers than this is not paged: the constant in `Optimizer8bit.get_state_buffer`.

    Raises:
        RuntimeError: if this version of bitsandbytes is written in another way.
    """
    source = inspect.getsource(reference.bitsandbytes().optim.optimizer.Optimizer8bit.get_state_buffer)
    found = re.search(r"not self\.is_paged or p\.numel\(\) < ([\d.e]+):", source)
    if not found:
        raise RuntimeError(
            "bitsandbytes: no threshold found in get_state_buffer; this was written for 0.50.2"
        )
    return float(found[1])


@cache
def callers() -> tuple[str, ...]:
    """The files in bitsandbytes' folder that call `get_paged`, the one function that allocates pages."""
    folder = Path(reference.bitsandbytes().__file__).parent
    calls = re.compile(r"(?<!def )\bget_paged\(")
    files = sorted(folder.rglob("*.py"))
    return tuple(
        f.relative_to(folder).as_posix() for f in files if calls.search(f.read_text(encoding="utf-8"))
    )


@dataclass(frozen=True)
class Paged:
    """Of an adapter's tensors, how many have paged states, and the bytes of all states in 32 bits."""

    tensors: int
    paged: int
    nbytes: int
    paged_bytes: int


def paged(model, rank: int, targets=LLAMA_LINEARS) -> Paged:
    """What bitsandbytes' PagedAdamW would page of an adapter. Arguments as in `counts.adapter`.

    >>> paged("llama-7b", 8, ATTENTION)
    Paged(tensors=256, paged=0, nbytes=67108864, paged_bytes=0)
    """
    sizes = adapter_sizes(shape_of(model), rank, targets)
    large = [n for n in sizes if n >= threshold()]
    return Paged(len(sizes), len(large), 8 * sum(sizes), 8 * sum(large))
