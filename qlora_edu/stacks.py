"""The same fine-tuning step, done four ways, so that they can be compared like with like.

    course       this package: NF4 with double quantization, LoRA computed in 16 bits, only scored logits, fused blocks
    course16     the same on the 16-bit base: LoRA without the Q
    libraries    transformers + PEFT + bitsandbytes: the same 4-bit base, PEFT's float32 LoRA
    lora16       transformers + PEFT on the 16-bit base

All four start from the same adapter: one seed, one order of draws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_edu import fused, lora, models, qlora, reference
from qlora_edu.training import Batch, answer_loss, library_loss

NAMES = {
    "course": "this course: NF4 + LoRA",
    "course16": "this course: bf16 + LoRA",
    "libraries": "transformers + PEFT + bitsandbytes: NF4 + LoRA",
    "lora16": "transformers + PEFT: bf16 + LoRA",
}


@dataclass
class Stack:
    """A model with an adapter, and the loss that goes with it: loss(model, batch, scored)."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch, int], Tensor]


def build(
    name: str,
    r: int = 8,
    alpha: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device="cpu",
    fuse: bool = True,
) -> Stack:
    """One of NAMES, on SmolLM2-135M, computing in `dtype`.

    Args:
        fuse: let the course's own two use `fused.fuse`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "libraries":
        model = reference.load_4bit(models.fetch(), compute_dtype=dtype, device=str(device))
    else:
        model, _ = models.load(dtype=dtype, device=device)
    torch.manual_seed(seed)
    if name in ("libraries", "lora16"):
        return Stack(name, with_peft(model, r, alpha), library_loss)
    if name == "course":
        qlora.add_qlora(model, r=r, alpha=alpha, compute_dtype=dtype)
        models.own_weights(model)
    else:
        lora.add_lora(model, r=r, alpha=alpha, compute_dtype=dtype)
    return Stack(name, fused.fuse(model) if fuse else model, answer_loss)


def with_peft(model: nn.Module, r: int, alpha: int) -> nn.Module:
    """The model with PEFT's LoRA on the same layers as here."""
    reference.bitsandbytes()  # before PEFT imports it
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(lora.LLAMA_LINEARS), task_type="CAUSAL_LM")
    return get_peft_model(model, config)
