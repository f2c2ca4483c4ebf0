"""A little training under a budget: ordinary batches, and one long one. What fits, what moves, and what fails.

The model is two layers, 128 -> 1,024 -> 128, without biases: two matrices of 131,072 numbers, so 2 MiB of states in
float32. The budget is what the states and the activations have to themselves: weights and gradients are in already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_edu.memory import kept_by_forward
from qlora_edu.paging.adamw import PagedAdamW
from qlora_edu.paging.memory import UnifiedMemory
from qlora_edu.paging.pages import OutOfMemory
from qlora_edu.stored import normals

WIDTH, HIDDEN = 128, 1024
STATES = 2 * 2 * WIDTH * HIDDEN * 4  # bytes: two states, two matrices, float32
ROWS = (64, 64, 64, 64, 320, 64, 64, 64)  # of the batch in each step: the fifth is long


def network() -> nn.Module:
    """The model, its weights the first of the stored normal numbers."""
    model = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, bias=False)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(normals()[: weight.numel() // 2].repeat(2).view_as(weight) / weight.shape[1] ** 0.5)
    return model


def batches(rows: Sequence[int] = ROWS) -> list[tuple[Tensor, Tensor]]:
    """(x, y), both float32 (rows, 128), for each step: stored numbers, and the same in another order.

    Raises:
        ValueError: if a batch has no row, or more than there are stored numbers for (in the first step, 512).
    """
    found = []
    for step, count in enumerate(rows):
        most = (normals().numel() - 101 * step) // WIDTH
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(
                f"rows: expected whole numbers from 1 to {most} in step {step + 1}; got {count!r}"
            )
        x = normals()[101 * step : 101 * step + count * WIDTH].view(count, WIDTH).clone()
        found.append((x, x.roll(step + 1, dims=1)))
    return found


def forward_backward(model: nn.Module, x: Tensor, y: Tensor, memory: UnifiedMemory | None = None) -> int:
    """Gradients of the mean squared error. What autograd keeps until then is held in `memory` as ordinary memory.

    Returns:
        Bytes that autograd kept.

    Raises:
        OutOfMemory: if they do not fit. There are no gradients then.
    """
    result = []
    kept = sum(kept_by_forward(model, lambda: result.append(nn.functional.mse_loss(model(x), y))).values())
    if memory is None:
        result.pop().backward()
        return kept
    with memory.holding(kept, "activations"):
        result.pop().backward()
    return kept


@dataclass
class Result:
    """What a run did. `failed`: the step that did not fit, or None; `error`: what the memory said then."""

    memory: UnifiedMemory
    model: nn.Module
    optimizer: PagedAdamW
    failed: int | None = None
    error: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """Every parameter, and copies of its two states."""
        found = []
        for p in self.model.parameters():
            states = self.optimizer.tensors(p)
            found += [p.detach(), *(states[name] for name in ("exp_avg", "exp_avg_sq") if states)]
        return found

    @property
    def moved(self) -> int:
        """Bytes in and bytes out."""
        return self.memory.bytes_in + self.memory.bytes_out


def run(budget: int, page: int = 64 * 1024, rows: Sequence[int] = ROWS, **options) -> Result:
    """Train for len(rows) steps under a budget, or until something does not fit.

    Args:
        options: of PagedAdamW; `min_numel=math.inf` is the optimizer without paging.
    """
    memory = UnifiedMemory(budget, page, options.pop("policy", "lru"))
    model = network()
    optimizer = PagedAdamW(model.parameters(), memory, **options)
    result = Result(memory, model, optimizer)
    for step, (x, y) in enumerate(batches(rows), start=1):
        memory.step = step
        try:
            forward_backward(model, x, y, memory)
            optimizer.step()
        except OutOfMemory as error:
            result.failed, result.error = step, str(error)
            return result
        optimizer.zero_grad()
    return result
