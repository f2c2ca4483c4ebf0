"""Unified memory, simulated: pages that live on a small device or in host RAM, and move when they are touched.

    memory = UnifiedMemory(budget=64 * 1024, page=16 * 1024)     a device with room for four pages
    block = memory.allocate(50_000, name="exp_avg")               managed: four pages, in host RAM at first
    (view,) = memory.touch((block, 0))                            a fault: page 0 moves to the device
    with memory.holding(40_000, "activations"): ...               ordinary memory: three pages' room

What moves is real: device and host are different buffers, and what a page leaves behind is overwritten with bytes
that read as NaN in any float. An eviction that lost something would show in the numbers.

As in CUDA's managed memory, a page has one home at a time, so every eviction copies it back, changed or not. Ordinary
allocations are "resident" here: their pages never leave, and must fit as they are. (PyTorch's pinned memory is another
thing, host RAM that stays where it is.) Not modelled: the driver's choice of page sizes (4 KiB to 2 MiB), and that a
GPU goes on with other work while a page is on its way.
"""

from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor

from qlora_edu.paging.checks import check_bytes, check_data, check_device, check_flag, check_pairs
from qlora_edu.paging.pages import Block, Blocks, Event, OutOfMemory

POISON = 0xFF  # float32, bfloat16 and float16 all read NaN where every bit is set


class UnifiedMemory(Blocks):
    """A device with a budget, and as much host RAM as there is.

    Args:
        budget: bytes of the device, at least one page; what is beyond whole pages is not used.
        page: bytes of a page, a power of two of at least 64.
        policy: which managed page makes room: "lru", that not touched for longest, or "mru", that touched last.

    Attributes:
        device: where its tensors are: the simulated device is a buffer in the CPU's memory.
        faults, hits: touches of managed pages that were not on the device, and that were.
        bytes_in, bytes_out: moved to the device (by faults and by prefetching), and evicted from it.
        timeline: list of Event; hits are only counted. step: a label that the user of the memory sets.
    """

    def __init__(self, budget: int, page: int = 64 * 1024, policy: str = "lru"):
        check_device(budget, page, policy)
        self.budget, self.page, self.policy, self.step = budget, page, policy, 0
        self.device = torch.device("cpu")
        self._device = torch.full((budget // page, page), POISON, dtype=torch.uint8)
        # A frame is a row of _device. It is in _free, or `block.frames` says which page of which block it holds.
        self._free = list(range(budget // page))
        # The managed ones of those pages in the order of their last touch: an ordered set, its values are all None.
        self._managed: OrderedDict[tuple[Block, int], None] = OrderedDict()
        self._blocks: dict[Block, None] = {}  # all that are allocated; a set
        self.faults = self.hits = self.bytes_in = self.bytes_out = 0
        self.timeline: list[Event] = []

    @property
    def managed(self) -> int:
        """Bytes of managed pages on the device."""
        return len(self._managed) * self.page

    @property
    def resident(self) -> int:
        """Bytes of ordinary pages, which are on the device as long as they exist."""
        return self.page * sum(block.pages for block in self._blocks if block.resident)

    def allocate(self, nbytes: int, name: str = "", resident: bool = False) -> Block:
        """A block of zeros: managed, in host RAM, or resident, on the device at once.

        Raises:
            OutOfMemory: if a resident block does not fit beside the other resident ones. Nothing has changed then.
        """
        check_bytes("nbytes", nbytes)
        check_flag("resident", resident)
        block = Block(name, nbytes, self.page, resident, None)
        if resident:
            self._must_fit(block.pages, name)
            for index in range(block.pages):
                block.frames[index] = self._frame()
                self._device[block.frames[index]] = 0
        else:
            block.host = torch.zeros(block.pages, self.page, dtype=torch.uint8)
        self._blocks[block] = None
        self._note("allocate", block)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; its room on the device is poisoned."""
        self._check(block)
        del self._blocks[block]
        for index, frame in block.frames.items():
            self._device[frame] = POISON
            self._free.append(frame)
            self._managed.pop((block, index), None)
        block.frames.clear()
        self._note("free", block)

    def touch(self, *pages: tuple[Block, int]) -> list[Tensor]:
        """Use pages together, as one kernel does: none of them is evicted to make room for another of them.

        Returns:
            A uint8 view (page,) of the device for each: read it and write it, but only until the next call.

        Raises:
            OutOfMemory: if they do not all fit at once. Nothing has moved then.
        """
        check_pairs(pages, self._check)
        wanted = dict.fromkeys((block, index) for block, index in pages if not block.resident)
        self._must_fit(len(wanted), f"{len(wanted)} pages used together")
        for block, index in wanted:
            if index in block.frames:
                self.hits += 1
            else:
                self.faults += 1
                self._move_in(block, index, "fault", keep=wanted)
            self._managed.move_to_end((block, index))
        return [self._device[block.frames[index]] for block, index in pages]

    def prefetch(self, *pages: tuple[Block, int]) -> None:
        """Move managed pages in before they are touched, so that there is no fault: the first ones, as many as fit."""
        check_pairs(pages, self._check)
        managed = dict.fromkeys(pair for pair in pages if not pair[0].resident)
        wanted = dict.fromkeys(list(managed)[: self._room()])
        for block, index in wanted:
            if index not in block.frames:
                self._move_in(block, index, "prefetch", keep=wanted)
            self._managed.move_to_end((block, index))

    def read(self, block: Block) -> Tensor:
        """A copy of a block's bytes, uint8 (nbytes,), wherever they are. Moves nothing, as a debugger would."""
        self._check(block)
        device, frames = self._device, block.frames
        rows = [device[frames[i]] if i in frames else block.host[i] for i in range(block.pages)]
        return torch.cat(rows)[: block.nbytes]

    def write(self, block: Block, data: Tensor) -> None:
        """Replace a block's bytes, uint8 (nbytes,), wherever they are. Moves nothing."""
        self._check(block)
        check_data(block, data)
        for index, part in enumerate(data.split(self.page)):
            row = self._device[block.frames[index]] if index in block.frames else block.host[index]
            row[: len(part)] = part

    def _frame(self, keep: Collection = ()) -> int:
        """A free frame, made by evicting a managed page that is not in `keep` if there is none."""
        if not self._free:
            order = self._managed if self.policy == "lru" else reversed(self._managed)
            self._evict(*next(page for page in order if page not in keep))
        return self._free.pop()

    def _move_in(self, block: Block, index: int, kind: str, keep: Collection = ()) -> None:
        frame = self._frame(keep)
        self._device[frame] = block.host[index]
        block.host[index] = POISON
        block.frames[index] = frame
        self._managed[block, index] = None
        self.bytes_in += self.page
        self._note(kind, block, index)

    def _evict(self, block: Block, index: int) -> None:
        frame = block.frames.pop(index)
        block.host[index] = self._device[frame]
        self._device[frame] = POISON
        self._free.append(frame)
        del self._managed[block, index]
        self.bytes_out += self.page
        self._note("evict", block, index)

    def _room(self) -> int:
        """Frames that managed pages have or could have."""
        return len(self._device) - self.resident // self.page

    def _must_fit(self, frames: int, what: str) -> None:
        if frames > self._room():
            raise OutOfMemory(
                f"{what or 'a block'}: {frames * self.page:,} bytes do not fit: of a budget of {self.budget:,}, "
                f"{self.resident:,} are resident, and only the {self.managed:,} bytes of managed pages can be evicted."
            )

    def _note(self, kind: str, block: Block, page: int | None = None) -> None:
        self.timeline.append(Event(self.step, kind, block.name, page, self.managed, self.resident))
