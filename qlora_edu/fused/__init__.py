"""A LLaMA block in fewer passes through memory, rounded where transformers rounds.

Beside its matrix products, a block rotates, normalises, adds and multiplies. PyTorch does each of these by itself: it
reads a whole tensor, writes a whole tensor, and keeps it for the backward pass. Here what belongs together is done
together, and only what the backward pass cannot do without is kept. `fuse` puts it into a model. Where the CPU
multiplies bfloat16 itself the forward pass stays the same in every bit, for rows of up to 1,024 tokens. In longer ones,
and elsewhere, torch may sum a product of another shape in another order: a few numbers are rounded to a neighbour. On a
GPU all of this is plain torch, and has not been run.

    rms_norm     x / rms(x) * w             keeps x and one number a row
    swiglu       silu(a) * b                keeps a and b
    attention    rotary, softmax(q kᵀ) v    keeps the rotated q and k, v, and the probabilities in the model's dtype
"""

from qlora_edu.fused.causal_attention import attention
from qlora_edu.fused.elementwise import rms_norm, swiglu
from qlora_edu.fused.model import fuse

__all__ = ["attention", "fuse", "rms_norm", "swiglu"]
