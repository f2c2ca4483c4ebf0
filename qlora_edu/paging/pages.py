"""What unified memory is made of: blocks cut into pages, events, and the error when something does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class OutOfMemory(RuntimeError):
    """What must stay on the device does not fit into its budget."""


class Event(NamedTuple):
    """One line of the timeline: what happened to which block, and what then occupied the device, in bytes."""

    step: int
    kind: str  # allocate, free, fault, prefetch or evict
    name: str
    page: int | None
    managed: int
    resident: int


@dataclass(eq=False)
class Block:
    """An allocation of `nbytes`, cut into pages. `host` holds the pages that are not on the device."""

    name: str
    nbytes: int
    page: int
    resident: bool
    host: Tensor | None  # uint8 (pages, page); None for resident blocks
    frames: dict[int, int] = field(default_factory=dict)  # page -> frame, where it is on the device

    @property
    def pages(self) -> int:
        return -(-self.nbytes // self.page)


class Blocks:
    """The part that a simulated memory and a real one share. `allocate` and `free` are their own."""

    _blocks: dict[Block, object]

    @contextmanager
    def holding(self, nbytes: int, name: str = "activations") -> Iterator[None]:
        """Ordinary memory that lives until the end of the `with` block; 0 bytes are allowed."""
        none = nbytes == 0 and not isinstance(nbytes, bool)
        block = None if none else self.allocate(nbytes, name, resident=True)
        try:
            yield
        finally:
            if block is not None:
                self.free(block)

    def _check(self, block: Block, index: int = 0) -> None:
        if not isinstance(block, Block) or block not in self._blocks:
            raise ValueError("block: expected one that this memory has allocated and not freed")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < block.pages:
            raise IndexError(f"page: expected 0 to {block.pages - 1} of {block.name!r}; got {index!r}")
