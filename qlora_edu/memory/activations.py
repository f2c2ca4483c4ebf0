"""What a LLaMA block keeps for the backward pass, tensor by tensor.

Autograd keeps a tensor only if a gradient needs it: y = x Wᵀ keeps x for the gradient of W and W for that of x, so a
frozen layer keeps no x at all, whether its W has 16 bits or 4. LoRA beside it needs x for the gradient of A, and x Aᵀ
for that of B. Products of two activations (attention, gate times up) keep both.

Written for transformers' LLaMA block with eager attention, as this course runs it. Not modelled: dropout in attention
or LoRA; fused attention, which keeps neither of the two T x T matrices. `trace` counts the same on the real code, and
the tests hold both equal to the byte.
"""

from dataclasses import dataclass

from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory.shapes import Shape

FLOAT32 = 4
RANDOM_STATE = 5056


@dataclass(frozen=True)
class Work:
    """What one pass through the model is: how many tokens, what is trained, in which dtype.

    Attributes:
        rows, length: the batch, `rows` sequences of `length` tokens.
        itemsize: bytes of a number in the computation: 2 for bfloat16, 4 for float32.
        full: all parameters are trained. Otherwise LoRA of rank `rank` on `targets`.
    """

    rows: int = 1
    length: int = 512
    itemsize: int = 2
    full: bool = False
    rank: int = 8
    targets: frozenset[str] = frozenset(LLAMA_LINEARS)

    def __post_init__(self):
        for name in ("rows", "length", "rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")
        if self.itemsize not in (2, 4):
            raise ValueError(f"itemsize: expected 2 or 4 bytes; got {self.itemsize!r}")

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def block(shape: Shape, work: Work, reached: bool = True) -> dict[str, int]:
    """Bytes that one block keeps, by tensor, in the order in which the forward pass makes them.

    N tokens, T of them in a row, width d, feed-forward width f, h heads of size e, rank r, s bytes a number:

        norm input (float32) and its 1/rms      4 N d + 4 N, twice
        normalised, for the norm's own weight   s N d, twice, if norms are trained
        input of q, k, v                        s N d, once for the three
        q after rotation, k and v per head      3 s N h e
        softmax in float32, and rounded         (4 + 2) N h T; in float32 only 4 N h T
        input of o                              s N h e
        input of gate, up; gate, up, silu(gate) s N d + 3 s N f
        input of down                           s N f
        x Aᵀ for each LoRA layer                s N r

    Args:
        reached: whether the block's input needs a gradient. That of the first block does not where the embedding is
            frozen, and then what only that gradient would need is not kept.
    """
    n, s = work.tokens, work.itemsize
    trained = {name: work.full or name in work.targets for name in LLAMA_LINEARS}
    wide, square = n * shape.heads * shape.head_dim, n * shape.heads * work.length
    q, k, v = (reached or trained[name] for name in ("q_proj", "k_proj", "v_proj"))
    after = reached or any(trained[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    gate, up = after or trained["gate_proj"], after or trained["up_proj"]
    rows = [
        *_norm("first", shape, work, reached),
        ("input of q, k, v", s * n * shape.d, any(trained[name] for name in ("q_proj", "k_proj", "v_proj"))),
        ("q", s * wide, k),
        ("k", s * wide, q),
        ("softmax, float32", FLOAT32 * square, q or k),
        ("softmax, rounded", s * square, v and s != FLOAT32),
        ("softmax, float32", FLOAT32 * square, v and s == FLOAT32),  # the same tensor: counted once below
        ("v", s * wide, q or k),
        ("input of o", s * wide, trained["o_proj"]),
        *_norm("second", shape, work, after),
        ("input of gate, up", s * n * shape.d, trained["gate_proj"] or trained["up_proj"]),
        ("gate", s * n * shape.f, gate),
        ("silu(gate)", s * n * shape.f, up),
        ("up", s * n * shape.f, gate),
        ("input of down", s * n * shape.f, trained["down_proj"]),
        ("x Aᵀ", s * n * work.rank * sum(trained.values()), not work.full),
    ]
    return {name: size for name, size, kept in rows if kept}


def _norm(which: str, shape: Shape, work: Work, reached: bool) -> list[tuple[str, int, bool]]:
    n = work.tokens
    return [
        (f"input of the {which} norm, float32", FLOAT32 * n * shape.d, reached),
        (f"1/rms of the {which} norm", FLOAT32 * n, reached),
        (f"normalised by the {which} norm", work.itemsize * n * shape.d, work.full),
    ]


def norm(which: str, shape: Shape, work: Work, reached: bool = True) -> dict[str, int]:
    """Bytes that an RMSNorm keeps; see `block`."""
    return {name: size for name, size, kept in _norm(which, shape, work, reached) if kept}


def outside(shape: Shape, work: Work) -> dict[str, int]:
    """Bytes kept outside the blocks: token ids (for a trained embedding), rotation angles, the last norm."""
    ids = {"token ids": 8 * work.tokens} if work.full else {}
    return {
        **ids,
        "cos and sin": 2 * work.itemsize * work.length * shape.head_dim,
        **norm("last", shape, work),
    }


def checkpointed(shape: Shape, work: Work) -> dict[str, int]:
    """Bytes kept with gradient checkpointing, blocks and what they are computed from again, one at a time.

    The L inputs of the blocks, s N d each; the causal mask, s T² for each sequence; the positions, 8 T; and, so that
    dropout would fall on the same numbers, the state of torch's random generator, 5,056 bytes for each block.
    """
    return {
        "inputs of the blocks": shape.layers * work.itemsize * work.tokens * shape.d,
        "mask": work.itemsize * work.tokens * work.length,
        "positions": 8 * work.length,
        "random state": shape.layers * RANDOM_STATE,
    }


def kept(shape: Shape, work: Work, checkpointing: bool = False) -> int:
    """Bytes of all activations at the end of the forward pass, those of the loss aside.

    L blocks as in `block`, the first without a gradient for its input; or what `checkpointed` says.
    """
    if unknown := work.targets - set(LLAMA_LINEARS):
        raise ValueError(
            f"targets: expected some of {', '.join(LLAMA_LINEARS)}; got {', '.join(map(str, unknown))}"
        )
    edge = sum(outside(shape, work).values())
    if checkpointing:
        return edge + sum(checkpointed(shape, work).values())
    first = sum(block(shape, work, reached=work.full).values())
    return edge + first + (shape.layers - 1) * sum(block(shape, work).values())


def check(shape: Shape) -> None:
    """Raise a ValueError unless the model consists of LLaMA blocks."""
    names = {name.split(".")[-1] for name, _, _ in shape.linears}
    if shape.model_type not in ("llama", "mistral", "qwen2") or names != set(LLAMA_LINEARS):
        raise ValueError(
            f"model: activations are derived for LLaMA's block; got {shape.model_type!r}. "
            "memory.kept_on_meta and memory.kept_by_forward count what autograd keeps of any model."
        )
