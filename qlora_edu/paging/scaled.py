"""A 33B or 65B model on one card, at a scale of 1 to 1,024: what its optimizer's pages do when a long row comes.

Bytes of weights, adapter, gradients, activations and states are `memory.predict`'s, for QLoRA as the paper trains: rank
64 on all linear layers, an adapter in 16 bits, gradient checkpointing, one row a step. One simulated byte stands for
1,024, and so a page of 16 KiB for one of 16 MiB: larger than a driver's, so that there are few enough to draw.
"""

from dataclasses import dataclass
from functools import cache

import torch

from qlora_edu.memory import Memory, predict
from qlora_edu.paging.checks import check_flag
from qlora_edu.paging.memory import UnifiedMemory
from qlora_edu.paging.pages import OutOfMemory

SCALE = 1024
STEPS, SPIKE = 8, 5  # how many, and which one is long
SHORT = 512  # tokens in the row of the others
GIB = 2**30
#: GB/s at which pages move, an assumption: half of what PCIe 4.0 with 16 lanes carries in one direction. bitsandbytes'
#: documentation gives half of the bus as the best case, measured on PCIe 3.0.
BUS = 16.0


@cache
def step_of(model: str, length: int, adapter_dtype: torch.dtype = torch.bfloat16) -> Memory:
    """The prediction for a step with one row of `length` tokens."""
    return predict(model, "qlora", rank=64, length=length, checkpointing=True, adapter_dtype=adapter_dtype)


@dataclass
class Outcome:
    """The memory after the run, and the step that did not fit, if any."""

    memory: UnifiedMemory
    failed: int | None
    error: str = ""

    def after_first(self) -> tuple[int, float, float]:
        """Faults, GB in and GB out from step 2 on: in step 1 all states come in, whatever the card."""
        kinds = [event.kind for event in self.memory.timeline if event.step > 1]
        faults, out = kinds.count("fault"), kinds.count("evict")
        page = self.memory.page * SCALE / 1e9
        return faults, (faults + kinds.count("prefetch")) * page, out * page


def simulate(
    model: str = "llama-33b",
    card: float = 24,
    spike: int = 2048,
    page: int = 16,
    prefetch: bool = False,
    paged: bool = True,
) -> Outcome:
    """Eight steps on a card of `card` GiB, the fifth with a row of `spike` tokens.

    Args:
        page: MiB, a power of two. prefetch: ask for eight pairs of pages before they are touched.
        paged: whether the states are managed; otherwise they are resident, as an ordinary optimizer's are.
    """
    _check_card(card)
    if isinstance(page, bool) or not isinstance(page, int) or page < 1 or page & (page - 1):
        raise ValueError(f"page: expected a power of two of MiB, at least 1; got {page!r}")
    check_flag("prefetch", prefetch)
    check_flag("paged", paged)
    memory = UnifiedMemory(int(card * GIB) // SCALE, page * 2**20 // SCALE)
    still = step_of(model, SHORT)
    standing = still.weights + still.parts["adapter"]
    step = 0
    try:
        memory.allocate(standing // SCALE, "weights", resident=True)
        states = [
            memory.allocate(still.parts["optimizer"] // 2 // SCALE, name, resident=not paged)
            for name in ("exp_avg", "exp_avg_sq")
        ]
        for step in range(1, STEPS + 1):
            memory.step = step
            found = step_of(model, spike if step == SPIKE else SHORT)
            gradients = found.parts["gradients"]
            with memory.holding((found.peak - standing - found.parts["optimizer"]) // SCALE, "activations"):
                pass
            with memory.holding(gradients // SCALE, "gradients"):
                _update(memory, states, prefetch)
    except OutOfMemory as error:
        return Outcome(memory, step, str(error))
    return Outcome(memory, None)


def _check_card(card: float) -> None:
    if isinstance(card, bool) or not isinstance(card, int | float) or not 0 < card <= 1024:
        raise ValueError(f"card: expected GiB, more than 0 and at most 1,024; got {card!r}")


def _update(memory: UnifiedMemory, states: list, prefetch: bool) -> None:
    """Touch both states, page by page; with `prefetch`, each pair of pages is asked for eight pairs ahead."""
    m, v = states
    for index in range(m.pages):
        if prefetch and index % 8 == 0:
            memory.prefetch(*((s, i) for i in range(index, min(index + 8, m.pages)) for s in states))
        memory.touch((m, index), (v, index))


def longest(model: str, card: float, paged: bool) -> int:
    """Tokens of the longest row, in steps of 32, whose step fits on a card of `card` GiB.

    Without paging the fullest moment must fit; with it, that moment without the states. (The update, where all states
    come back, holds no activations.)
    """
    _check_card(card)
    check_flag("paged", paged)
    length = 0
    while True:
        found = step_of(model, length + 32)
        if found.peak - paged * found.parts["optimizer"] > card * GIB:
            return length
        length += 32
