"""What unified memory is made of: blocks cut into pages, events, and the error when something does not fit."""

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
