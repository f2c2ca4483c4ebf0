"""A long row in the real model: the bytes of several training steps, over time.

Adapter and states are there before the first step, so what is drawn is what comes and goes: activations, logits,
gradients. A batch is as long as its longest row, and the others are filled up: one long row makes four.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qlora_edu.memory import Timeline, predict
from qlora_edu.perplexity import passages
from qlora_edu.tasks import tool_calls
from qlora_edu.training import Batch, Encoded, encode_all
from qlora_edu.training import steps as draw_steps

LONG = 256  # tokens of the long row


def batches(tokenizer, rows: int = 4, count: int = 5, spike: int = 4, seed: int = 0) -> list[list[Encoded]]:
    """The rows of `count` steps on the course's data; in step `spike` a passage of prose takes the last row's place."""
    data = encode_all(tool_calls().train[:200], tokenizer)
    found = draw_steps(data, rows, count, seed)
    longest = max((tokenizer(text)["input_ids"] for text in passages()), key=len)
    found[spike - 1][-1] = Encoded(tuple(longest[:1]), tuple(longest[1:LONG]))
    return found


def steps(
    model: nn.Module,
    loss: Callable,
    batches: Sequence[Sequence[Encoded]],
    micro: int | None = None,
    checkpointing: bool = False,
) -> dict[str, Callable[[], None]]:
    """Training steps for `memory.timeline`, by name: "step 1", "step 2", ... Their learning rate is 0.

    Args:
        model, loss: as `memory.steps.convert` leaves and returns them.
        batches: the rows of each step.
        micro: rows that go through the model together; the gradients of the others are added up.
        checkpointing: keep only the inputs of the blocks, and compute the rest again.
    """
    if not batches:
        raise ValueError("batches: expected at least one step; got none")
    if micro is not None and (isinstance(micro, bool) or not isinstance(micro, int) or micro < 1):
        raise ValueError(f"micro: expected a whole number of rows, at least 1, or None; got {micro!r}")
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

    def step(rows: Sequence[Encoded]) -> None:
        size = micro or len(rows)
        parts = [Batch.of(rows[i : i + size], 0) for i in range(0, len(rows), size)]
        scored = sum(part.scored for part in parts)
        for part in parts:
            loss(model, part, scored).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {f"step {i}": lambda rows=rows: step(rows) for i, rows in enumerate(batches, start=1)}


def peaks(line: Timeline) -> list[int]:
    """The largest number of bytes in each stage of a timeline."""
    ends = [start for _, start in line.marks[1:]] + [float("inf")]
    return [
        max((size for at, size in zip(line.seconds, line.bytes, strict=True) if start <= at < end), default=0)
        for (_, start), end in zip(line.marks, ends, strict=True)
    ]


def moving(rows: int, length: int, dtype: torch.dtype = torch.bfloat16, **options) -> int:
    """Predicted bytes of a QLoRA step of SmolLM2-135M (rank 8) that come and go. Options as in `memory.predict`."""
    return predict("smollm2-135m", "qlora", batch=rows, length=length, dtype=dtype, **options).moving
