"""What comes and goes during a step, and the moments at which memory can be fullest.

Activations grow through the forward pass and shrink through the backward pass, gradients do the opposite, and the
temporaries of one operation last as long as it does. So the peak is the largest of a few candidates:

    loss                    all activations, and the logits
    last norm               all activations; the first thing that backward does after the loss
    backward, last block    all activations, and the temporaries of its feed-forward half or its attention
    backward, first block   the same with all gradients, and the activations of this one block
    update                  all gradients, no activations, AdamW's two temporaries of the largest tensor

Not modelled: the temporaries of decoding, 0.75 MiB and with double quantization 8 bytes a block of the matrix, which
come and go at other moments; tensors of a few bytes.
"""

from dataclasses import dataclass

from qlora_edu.memory import activations
from qlora_edu.memory.activations import FLOAT32, Work
from qlora_edu.memory.shapes import Shape
from qlora_edu.training.loss import IN_CACHE, ROWS


@dataclass(frozen=True)
class Loss:
    """Bytes of the loss: at its own peak, kept until backward has gone through it, and then in the output layer."""

    peak: int
    kept: int
    output: int = 0


@dataclass(frozen=True)
class Step:
    """All that temporaries depend on. `scratch`: bytes of the buffer for decoded weights, 0 without 4-bit weights."""

    shape: Shape
    work: Work
    checkpointing: bool
    loss: Loss
    scratch: int = 0


def answer_loss(shape: Shape, work: Work, scored: int) -> Loss:
    """`training.answer_loss` on m scored positions, V tokens in the vocabulary: ROWS positions at a time.

    peak   s · ROWS · V: the logits of these rows; 4 · IN_CACHE · V: some of them in float32, unless s is 4
           s (N + 2 m) d: the last norm's output, its scored rows, and their gradient
    kept   s m d, the gradient, and which positions are scored
    """
    s, grad = work.itemsize, work.itemsize * scored * shape.d
    logits = s * min(ROWS, scored) * shape.vocabulary
    if s != FLOAT32:
        logits += FLOAT32 * min(IN_CACHE, scored) * shape.vocabulary
    return Loss(logits + 2 * grad + s * work.tokens * shape.d, grad + work.tokens)


def library_loss(shape: Shape, work: Work, scored: int) -> Loss:
    """transformers' loss: the logits of all N positions, in float32.

    peak   3 · 4 · N · V: log-softmax, the gradient that comes in, and the one that goes out
    kept   4 · N · V; and s N d, the output layer's input, if it is trained
    output s N V: the gradient of the logits, rounded
    """
    one = FLOAT32 * work.tokens * shape.vocabulary
    head = work.itemsize * work.tokens * shape.d if work.full else 0
    return Loss(3 * one + head, one + head, work.itemsize * work.tokens * shape.vocabulary)


LOSSES = {"answer": answer_loss, "library": library_loss}


def scratch(shape: Shape, itemsize: int) -> int:
    """The one buffer into which every 4-bit weight is decoded: s times the largest matrix. It stays."""
    return itemsize * max(out * inn for _, out, inn in shape.linears)


def last_norm(shape: Shape, work: Work) -> int:
    """Backward through an RMSNorm: four float32 tensors and one of s bytes, (16 + s) N d."""
    return (4 * FLOAT32 + work.itemsize) * work.tokens * shape.d


def feed_forward_backward(shape: Shape, work: Work) -> tuple[int, int]:
    """Bytes that have gone and come when the backward pass of a block is at gate times up.

    Gone: the input of down. Come: the gradients of the product, of silu(gate) and of up, 3 s N f, and that of the
    block's output, s N d.
    """
    n, s = work.tokens, work.itemsize
    return activations.block(shape, work).get("input of down", 0), 3 * s * n * shape.f + s * n * shape.d


def attention_backward(shape: Shape, work: Work) -> tuple[int, int]:
    """Bytes that have gone and come when the backward pass of a block is at the softmax.

    Gone: all that the feed-forward half has kept, the input of o, and what the product with v has kept. Come: the
    gradient of the softmax, in and out, in float32, 2 · 4 N h T, and two gradients of s N d.
    """
    here = ("input of q, k, v", "q", "k", "softmax, float32", "x Aᵀ")
    kept = activations.block(shape, work)
    gone = sum(size for name, size in kept.items() if name not in here and "first" not in name)
    n, s = work.tokens, work.itemsize
    return gone, 2 * FLOAT32 * n * shape.heads * work.length + 2 * s * n * shape.d


def candidates(step: Step, trained: list[int], width: int) -> dict[str, dict[str, int]]:
    """Gradients, activations and buffers at each candidate moment.

    Args:
        trained: sizes of the trained tensors. width: bytes of a number in their gradients.
    """
    shape, work = step.shape, step.work
    kept = activations.kept(shape, work, step.checkpointing)
    norm = sum(activations.norm("last", shape, work).values())
    again = sum(activations.block(shape, work).values()) if step.checkpointing else 0
    first = sum(activations.block(shape, work, reached=work.full).values())
    if step.checkpointing:  # the other blocks' inputs are gone
        stored = activations.checkpointed(shape, work)
        first += sum(stored.values()) - stored["inputs of the blocks"] * (shape.layers - 1) // shape.layers
    everything = width * sum(trained)
    used, forward = feed_forward_backward(shape, work)
    gone, attention = attention_backward(shape, work)

    # Full fine-tuning: which weights have a gradient already? The output layer first, the embedding last.
    output, down, half, before, behind = 0, 0, 0, 0, 0
    if work.full:
        ends = width * shape.vocabulary * shape.d
        sizes = {name.split(".")[-1]: width * out * inn for name, out, inn in shape.linears}
        before = sum(sizes[name] for name in ("q_proj", "k_proj", "v_proj")) + (0 if shape.tied else ends)
        output, down = ends, sizes["down_proj"]
        half = down + sizes["gate_proj"] + sizes["up_proj"] + sizes["o_proj"]
        behind = before + half - down

    def moment(gradients: int, activations: int, buffers: int) -> dict[str, int]:
        return {"gradients": gradients, "activations": activations, "buffers": step.scratch + buffers}

    return {
        "loss": moment(0, kept, step.loss.peak),
        "output layer": moment(output, kept, step.loss.output),
        "last norm": moment(output, kept, last_norm(shape, work)),
        "backward, last block, feed-forward": moment(output + down, kept - norm + again - used, forward),
        "backward, last block, attention": moment(output + half, kept - norm + again - gone, attention),
        "backward, first block, feed-forward": moment(everything - behind, first - used, forward),
        "backward, first block, attention": moment(everything - before, first - gone, attention),
        "update": moment(everything, 0, 2 * width * max(trained)),
    }
