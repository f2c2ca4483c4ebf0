"""Bytes, predicted: what a training step of a model needs, part by part, before anything is loaded.

    predict("llama-65b", "qlora", rank=64, checkpointing=True).peak / 1e9

Formulas: `parts` (what stands still), `activations` and `moments` (what comes and goes). Shapes: `shapes`.
Modelled: tensors. Not modelled: Python and its libraries, the allocator's waste, CUDA's context (some hundred MB on a
GPU), workspaces of matrix libraries, the batch itself.
"""

from dataclasses import dataclass

import torch

from qlora_edu.blockwise import FLOATS
from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import activations, moments, parts
from qlora_edu.memory.activations import Work
from qlora_edu.memory.shapes import Shape, shape_of

METHODS = ("full", "lora", "qlora")
WEIGHTS = ("codes", "scales", "second-level scales", "unquantized weights")
PARTS = (*WEIGHTS, "adapter", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    Attributes:
        shape, method: of what.
        parts: each part of PARTS at its own largest.
        moments: what is there at each moment at which memory may be fullest, part by part.
        scratch: of the buffers, the one for decoded weights, which stays from step to step.
    """

    shape: Shape
    method: str
    parts: dict[str, int]
    moments: dict[str, dict[str, int]]
    scratch: int = 0

    @property
    def weights(self) -> int:
        """The base's weights: codes and scales, and what is not quantized."""
        return sum(self.parts[name] for name in WEIGHTS)

    @property
    def peak_moment(self) -> str:
        """The fullest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """The parts at the fullest moment."""
        return self.moments[self.peak_moment]

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment: less than the sum of `parts`, which are never all at their largest at once."""
        return sum(self.at_peak.values())

    @property
    def moving(self) -> int:
        """Bytes at the fullest moment that were not there before the step, when the buffer for decoded weights was."""
        return sum(self.at_peak[name] for name in ("gradients", "activations", "buffers")) - self.scratch


def predict(
    model,
    method: str = "qlora",
    *,
    length: int = 512,
    batch: int = 1,
    rank: int = 8,
    targets=LLAMA_LINEARS,
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    optimizer_bits: int = 32,
    master_weights: bool = False,
    checkpointing: bool = False,
    loss: str | None = None,
    scored: int | None = None,
    download: bool = False,
) -> Memory:
    """Bytes of a training step, any but the first, which has no optimizer states yet.

    Args:
        model: as in `shapes.shape_of`.
        method: "full" trains all parameters; "lora" an adapter beside 16-bit weights; "qlora" one beside 4-bit weights.
        length, batch: tokens in a sequence, sequences in a step.
        rank, targets: of the adapter, as in `lora.add_lora`.
        block_size, double_quant: of the 4-bit weights.
        dtype: of the unquantized weights, the computation, and in full fine-tuning the gradients.
        adapter_dtype: of the adapter and its gradients.
        optimizer_bits: of each of AdamW's two states: 32, 16 (torch's AdamW on 16-bit parameters), 8 (bitsandbytes').
        master_weights: keep a float32 copy of the trained 16-bit parameters.
        checkpointing: keep only the blocks' inputs, and compute the rest again.
        loss: "answer", the course's, or "library", which makes all logits; by default the first where it can be used,
            which is not in full fine-tuning.
        scored: tokens that are scored; by default all that can be.
        download: whether a hub id may be looked up.

    Raises:
        TypeError, ValueError: for an argument that is none of these, or a model not made of LLaMA blocks.

    >>> memory = predict("llama-7b", "qlora")
    >>> f"{memory.weights / 1e9:.2f} GB of weights"
    '3.87 GB of weights'
    """
    shape = shape_of(model, download)
    full = method == "full"
    loss = loss or ("library" if full else "answer")
    switches = {
        "double_quant": double_quant,
        "master_weights": master_weights,
        "checkpointing": checkpointing,
    }
    _check(method, length, batch, dtype, adapter_dtype, switches)
    scored = batch * (length - 1) if scored is None else scored
    _check_loss(method, loss, scored, batch * (length - 1))
    activations.check(shape)
    adapter, base = (
        parts.adapter_sizes(shape, rank, targets),
        parts.quantized(shape, block_size, double_quant),
    )

    trained = shape.sizes if full else adapter
    width = dtype.itemsize if full else adapter_dtype.itemsize
    if master_weights and width == 4:
        raise ValueError("master_weights: what is trained has 32 bits already, and needs no copy of 32 bits")
    still = dict.fromkeys(PARTS, 0)
    if method == "qlora":
        still |= base
        still["unquantized weights"] = dtype.itemsize * sum(shape.other)
    else:
        still["unquantized weights"] = dtype.itemsize * shape.parameters
    still["adapter"] = 0 if full else width * sum(trained)
    still["optimizer"] = parts.optimizer(trained, optimizer_bits, master_weights)

    work = Work(batch, length, dtype.itemsize, full, rank, frozenset(targets))
    step = moments.Step(
        shape,
        work,
        checkpointing,
        moments.LOSSES[loss](shape, work, scored),
        moments.scratch(shape, dtype.itemsize) if method == "qlora" else 0,
    )
    fullest = {name: still | changes for name, changes in moments.candidates(step, trained, width).items()}
    most = {name: max(moment[name] for moment in fullest.values()) for name in PARTS}
    return Memory(shape, method, most, fullest, step.scratch)


def _check(method, length, batch, dtype, adapter_dtype, switches: dict[str, bool]) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    for name, value in (("length", length), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")
    for name, value in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
        if value not in FLOATS:
            raise ValueError(f"{name}: expected torch.float32, bfloat16 or float16; got {value!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False; got {value!r}")


def _check_loss(method: str, loss: str, scored: int, most: int) -> None:
    if loss not in moments.LOSSES or (method == "full" and loss == "answer"):
        raise ValueError(f"loss: expected 'library', or 'answer' if the output layer is frozen; got {loss!r}")
    if isinstance(scored, bool) or not isinstance(scored, int) or not 0 <= scored <= most:
        raise ValueError(f"scored: expected 0 to {most} tokens; got {scored!r}")
