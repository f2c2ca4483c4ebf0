"""A long batch in the real model: the bytes of several training steps, over time.

Adapter and states are there before the first step, so what is drawn is what comes and goes: activations, logits,
gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qlora_edu.memory import predict
from qlora_edu.memory.measured import random_rows
from qlora_edu.training import Batch


def steps(
    model: nn.Module,
    loss: Callable,
    batches: Sequence[tuple[int, int]],
    micro: int | None = None,
    checkpointing: bool = False,
) -> dict[str, Callable[[], None]]:
    """Training steps for `memory.timeline`, by name: "step 1", "step 2", ...

    Args:
        model, loss: as `memory.steps.convert` leaves and returns them.
        batches: (rows, tokens in a row) of each step.
        micro: rows that go through the model together; the gradients of the others are added up.
        checkpointing: keep only the inputs of the blocks, and compute the rest again.
    """
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # changes nothing but makes the states: gradients and learning rate are 0
    optimizer.zero_grad()

    def step(rows: int, length: int) -> None:
        encoded = random_rows(rows, length, model.config.vocab_size)
        size = micro or rows
        parts = [Batch.of(encoded[i : i + size], 0) for i in range(0, rows, size)]
        scored = sum(part.scored for part in parts)
        for part in parts:
            loss(model, part, scored).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {f"step {i}": lambda batch=batch: step(*batch) for i, batch in enumerate(batches, start=1)}


def moving(rows: int, length: int, dtype: torch.dtype = torch.bfloat16, **options) -> int:
    """Predicted bytes of a QLoRA step of SmolLM2-135M (rank 8) that come and go. Options as in `memory.predict`."""
    return predict("smollm2-135m", "qlora", batch=rows, length=length, dtype=dtype, **options).moving
