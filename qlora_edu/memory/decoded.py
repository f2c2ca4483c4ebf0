"""What the naive 4-bit layer keeps besides the activations: its decoded weights.

`F.linear(x, decode(packed))` is the layer as one would write it first. The gradient of x is dy W, so autograd keeps W,
which has just been made, in 16 bits. `qlora.NF4Linear` decodes again instead, and keeps none of this.
"""

from qlora_edu.memory import activations
from qlora_edu.memory.activations import Work
from qlora_edu.memory.shapes import Shape, shape_of

PARTS = {
    "decoded weights": "what only the naive layer keeps",
    "inputs of the adapters": "x of each linear layer, for the gradient of A",
    "x Aᵀ": "for the gradient of B",
    "softmax, T × T": "attention, one matrix a head",
    "other": "norms, q, k, v, gate, up; with checkpointing the inputs of the blocks",
}


def decoded(shape: Shape | str, work: Work, checkpointing: bool = False) -> int:
    """Bytes of the decoded weights that the naive layer keeps at the fullest moment. shape: or what `shape_of` takes.

    All of them at the end of the forward pass, s (out · in) each, but for q, k, v of the first block: their input is
    a frozen embedding and needs no gradient. With checkpointing, those of the one block that is computed again.

    Raises:
        ValueError: if all weights are trained, or the model has no LLaMA blocks.
    """
    shape = shape_of(shape)
    activations.check(shape)
    if work.full:
        raise ValueError("work: expected a frozen base; got full=True. A trained weight is a parameter.")
    sizes = {name: work.itemsize * out * inn for name, out, inn in shape.linears}
    if checkpointing:
        return sum(size for name, size in sizes.items() if ".layers.1." in f".{name}")
    first = (".layers.0.self_attn.q_proj", ".layers.0.self_attn.k_proj", ".layers.0.self_attn.v_proj")
    return sum(size for name, size in sizes.items() if not f".{name}".endswith(first))


def kept(shape: Shape | str, work: Work, naive: bool = False, checkpointing: bool = False) -> dict[str, int]:
    """Bytes that are kept for the backward pass at the fullest moment, by PARTS, the loss aside.

    With checkpointing: the inputs of all blocks, and everything of the block that is computed again.
    """
    shape = shape_of(shape)
    found = dict.fromkeys(PARTS, 0)
    found["decoded weights"] = decoded(shape, work, checkpointing) if naive else 0
    tensors = [activations.outside(shape, work)]
    if checkpointing:
        tensors += [activations.checkpointed(shape, work), activations.block(shape, work)]
    else:
        tensors += [activations.block(shape, work, reached=False)]
        tensors += [activations.block(shape, work)] * (shape.layers - 1)
    for name, size in (item for kind in tensors for item in kind.items()):
        if name == "x Aᵀ":
            found[name] += size
        elif name.startswith("softmax"):
            found["softmax, T × T"] += size
        elif name.startswith("input of") and "norm" not in name:
            found["inputs of the adapters"] += size
        else:
            found["other"] += size
    return found
