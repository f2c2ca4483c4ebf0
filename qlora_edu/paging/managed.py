"""CUDA's managed memory, behind the same calls as `UnifiedMemory`: real pages, which the driver moves.

    memory = ManagedMemory()
    block = memory.allocate(8_000_000, name="exp_avg")       cuMemAllocManaged: no room is taken yet
    (view,) = memory.touch((block, 0))                       a CUDA tensor; a kernel that uses it makes the pages come
    memory.prefetch((block, 0))                              cuMemPrefetchAsync: they come before they are touched

What the simulation counts, the driver keeps to itself: there are no faults, hits and evictions to be read here, and no
budget but the card's memory. Pages of the driver have 4 KiB to 2 MiB; `page` is only the size of the pieces in which
an optimizer works.
"""

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor

from qlora_edu.paging.checks import check_bytes, check_data, check_flag, check_page, check_pairs
from qlora_edu.paging.pages import Block, Blocks, OutOfMemory

ATTACH_GLOBAL = 1  # CU_MEM_ATTACH_GLOBAL: every device may use it
HOST = -1  # CU_DEVICE_CPU


class ManagedMemory(Blocks):
    """Managed memory of one CUDA device.

    Args:
        device: "cuda" or "cuda:1", or a torch.device.
        page: bytes of the pieces of a block, a power of two of at least 64.
        limit: bytes that all managed blocks may have together; by default what the card has free now. The driver
            would allow more, which is what paging is for; but some systems hang then, so it has to be asked for.

    Raises:
        ValueError: if the device is no CUDA device of this machine, or the page no power of two.
    """

    def __init__(
        self, device: str | torch.device = "cuda", page: int = 64 * 1024 * 1024, limit: int | None = None
    ):
        check_page(page)
        if limit is not None:
            check_bytes("limit", limit)
        if torch.device(device).type != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                f"device: expected a CUDA device of this machine; got {device!r}, and CUDA is "
                f"{'there' if torch.cuda.is_available() else 'not there'}. UnifiedMemory simulates one."
            )
        self.device = torch.empty(0, device=device).device  # with its number; makes CUDA's context, too
        self.page = page
        self.limit = torch.cuda.mem_get_info(self.device)[0] if limit is None else limit
        self._blocks: dict[Block, Tensor] = {}

    @property
    def allocated(self) -> int:
        """Bytes of all blocks, wherever their pages are."""
        return sum(tensor.nbytes for tensor in self._blocks.values())

    def allocate(self, nbytes: int, name: str = "", resident: bool = False) -> Block:
        """A block of zeros: managed, or, if resident, ordinary memory of the device.

        Raises:
            OutOfMemory: if the device has no room for a resident block, or the managed ones would pass the limit.
        """
        check_bytes("nbytes", nbytes)
        check_flag("resident", resident)
        block = Block(name, nbytes, self.page, resident, None)
        if resident:
            try:
                tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(
                    f"{name or 'a block'}: {nbytes:,} bytes do not fit on {self.device}"
                ) from error
        else:
            managed = sum(b.nbytes for b in self._blocks if not b.resident)
            if managed + nbytes > self.limit:
                raise OutOfMemory(
                    f"{name or 'a block'}: {nbytes:,} bytes would pass the limit of {self.limit:,} for managed "
                    f"memory, of which {managed:,} are taken. A higher limit has to be asked for: ManagedMemory(limit=)"
                )
            tensor = _managed_tensor(nbytes, self.device).zero_()
        self._blocks[block] = tensor
        return block

    def free(self, block: Block) -> None:
        """Give a block back, as soon as no view of it is left."""
        self._check(block)
        del self._blocks[block]

    def touch(self, *pages: tuple[Block, int]) -> list[Tensor]:
        """A uint8 view (page,) of each piece, the last one of a block shorter. Kernels that use it bring the pages."""
        check_pairs(pages, self._check)
        return [self._piece(*pair) for pair in pages]

    def prefetch(self, *pages: tuple[Block, int]) -> None:
        """Ask for managed pieces to be on the device when the kernels that follow need them; returns at once."""
        self._move(pages, self.device.index)

    def evict(self, *pages: tuple[Block, int]) -> None:
        """Ask for managed pieces to go to host RAM; returns at once."""
        self._move(pages, HOST)

    def read(self, block: Block) -> Tensor:
        """A copy of a block's bytes, uint8 (nbytes,), on the device."""
        self._check(block)
        return self._blocks[block].clone()

    def write(self, block: Block, data: Tensor) -> None:
        """Replace a block's bytes, uint8 (nbytes,)."""
        self._check(block)
        check_data(block, data)
        self._blocks[block].copy_(data)

    def _piece(self, block: Block, index: int) -> Tensor:
        return self._blocks[block][index * self.page : (index + 1) * self.page]

    def _move(self, pages: tuple, to: int) -> None:
        check_pairs(pages, self._check)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        for block, index in pages:
            if not block.resident:
                piece = self._piece(block, index)
                with torch.cuda.device(self.device):
                    _call("cuMemPrefetchAsync", piece.data_ptr(), piece.nbytes, to, stream)


class _Allocation:
    """Managed memory in the form that torch.as_tensor shares without a copy, given back with the last tensor on it."""

    def __init__(self, nbytes: int):
        pointer = ctypes.c_uint64()
        _call("cuMemAllocManaged", ctypes.byref(pointer), nbytes, ATTACH_GLOBAL)
        shared = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer.value, False), "version": 3}
        self.__cuda_array_interface__ = shared
        weakref.finalize(self, _free, pointer.value).atexit = False  # the context may be gone before


def _managed_tensor(nbytes: int, device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        return torch.as_tensor(_Allocation(nbytes), device=device)


def _free(pointer: int) -> None:
    torch.cuda.synchronize()  # what still runs may use it: torch's allocator does not watch over this memory
    _call("cuMemFree_v2", pointer)


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    driver.cuMemAllocManaged.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t, ctypes.c_uint]
    driver.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    driver.cuMemPrefetchAsync.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return driver


def _call(name: str, *arguments) -> None:
    """One function of CUDA's driver; RuntimeError with its own words if it fails."""
    if error := getattr(_driver(), name)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'error %d' % error).decode()}")
