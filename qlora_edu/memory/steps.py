"""The same training step of the real model three ways, with the course's own layers, to be measured.

full     all parameters are trained, in one dtype throughout; the loss is transformers'
lora     an adapter beside the 16-bit weights
qlora    an adapter beside NF4 weights with double quantization
"""

from collections.abc import Callable

import torch
from torch import nn

from qlora_edu import lora, models, qlora
from qlora_edu.memory.measured import PeakMemory, random_rows, resident
from qlora_edu.memory.predicted import METHODS
from qlora_edu.training import Batch, answer_loss, library_loss


def convert(model: nn.Module, method: str, rank: int = 8, dtype: torch.dtype = torch.bfloat16) -> Callable:
    """Make a freshly loaded model trainable by one of METHODS, in place. Returns the loss that goes with it."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    torch.manual_seed(0)
    if method == "full":
        model.requires_grad_(True)
        return library_loss
    add = qlora.add_qlora if method == "qlora" else lora.add_lora
    add(model, r=rank, compute_dtype=dtype)
    return answer_loss


def stages(
    model: nn.Module, loss: Callable, rows: int = 4, length: int = 256, checkpointing: bool = False
) -> dict[str, Callable]:
    """A training step on arbitrary tokens in three parts, for `trace.timeline`, AdamW's states already made."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # changes nothing: the gradients and the learning rate are 0
    optimizer.zero_grad()
    batch = Batch.of(random_rows(rows, length, model.config.vocab_size), 0)
    graph = []

    def forward() -> None:
        graph.append(loss(model, batch, batch.scored))

    def backward() -> None:
        graph.pop().backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "backward": backward, "update": update}


def peak_of_method(
    method: str,
    rows: int = 4,
    length: int = 256,
    checkpointing: bool = False,
    mapped: bool = False,
    dtype: str = "bfloat16",
) -> dict:
    """Resident memory of one training step of SmolLM2-135M, AdamW's states already made: meant for `in_fresh_process`.

    Args:
        mapped: leave 16-bit weights where they were loaded from, in a file that is mapped into memory; otherwise what
            is left of them is copied, and the file is let go.
        dtype: of the weights and the computation, by torch's name for it.

    Returns:
        "base": bytes of this process with everything but the model, after a step of a tiny one;
        "peak": the most while the real model's step ran.
    """
    kind = getattr(torch, dtype)
    _, tokenizer = models.load(dtype=kind)  # it stays: only the model comes and goes
    twin, _ = models.tiny(dtype=kind)
    for stage in stages(twin, convert(twin, method, dtype=kind), rows, 8, checkpointing).values():
        stage()
    del twin, stage
    base = resident()
    model, _ = models.load(dtype=kind)
    loss = convert(model, method, dtype=kind)
    if not mapped:
        models.own_weights(model)
    step = stages(model, loss, rows, length, checkpointing)
    with PeakMemory() as peak:
        for stage in step.values():
            stage()
    return {"base": base, "loaded": peak.before, "peak": peak.bytes, "vocabulary": len(tokenizer)}
