"""Do two gradients agree? An adapter's gradient on one base against that on another, matrix by matrix.

    cosine   g · h / (|g| |h|): 1 for the same direction, 0 for a right angle
    ratio    |h| / |g|

At the start B = 0, so that A has no gradient yet, and all of it is that of B.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn

from qlora_edu.lora import lora_layers
from qlora_edu.training.batches import Batch, Encoded
from qlora_edu.training.loss import answer_loss


def of_b(model: nn.Module, rows: Sequence[Encoded]) -> tuple[float, dict[str, Tensor]]:
    """The loss of some rows, and the gradient of each B (out, r) in float32, by the name of its layer.

    Gradients that the model holds already are dropped before, and its own afterwards.

    Raises:
        ValueError: if the model has no LoRA layers, or the B of one of them gets no gradient.
        RuntimeError: inside torch.no_grad().
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model: has no LoRA layers; call lora.add_lora or qlora.add_qlora first")
    if not torch.is_grad_enabled():
        raise RuntimeError("of_b: expected gradients to be recorded; call it outside torch.no_grad()")
    for name, layer in layers.items():
        if not layer.enabled or layer.merged or not layer.lora_b.requires_grad:
            why = (
                "is switched off" if not layer.enabled else "is merged" if layer.merged else "has a frozen B"
            )
            raise ValueError(
                f"model: expected a gradient for the B of each LoRA layer; {name} {why}. "
                "Set enabled = True, call unmerge(), or lora_b.requires_grad_()."
            )
    model.zero_grad(set_to_none=True)  # a gradient from before would be added to
    device = next(iter(layers.values())).lora_b.device
    batch = Batch.of(rows, pad_id=0).to(device)
    loss = answer_loss(model, batch, batch.scored)
    loss.backward()
    found = {name: layer.lora_b.grad.float().clone() for name, layer in layers.items()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def agreement(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(cosine, ratio) of each matrix, computed in float64.

    Raises:
        ValueError: if the names or shapes differ, or a gradient is zero or not finite.

    >>> agreement({"q": torch.tensor([3.0, 0.0])}, {"q": torch.tensor([3.0, 3.0])})["q"][0].__round__(4)
    0.7071
    """
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError("theirs: expected a gradient for each name in `ours`, and for no other")
    return {name: _pair(name, ours[name], theirs[name]) for name in ours}


def whole(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, float]:
    """(cosine, ratio) of all matrices taken as one long vector. Errors as in `agreement`."""
    agreement(ours, theirs)
    return _pair("all", *(torch.cat([of[name].flatten().double() for name in ours]) for of in (ours, theirs)))


def middle(pairs: Mapping[str, tuple[float, float]], ending: str = "") -> tuple[float, float]:
    """The median cosine and the median ratio of the matrices whose name ends in `ending`."""
    chosen = [pair for name, pair in pairs.items() if name.endswith(ending)]
    if not chosen:
        raise ValueError(f"ending: no name ends in {ending!r}")
    return median(cosine for cosine, _ in chosen), median(ratio for _, ratio in chosen)


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], length: float) -> Iterator[None]:
    """Until the end of the block, all B together are moved by `length` against `direction`.

    Args:
        direction: a tensor (out, r) for each B that moves, by the name of its layer, as `of_b` gives them.

    Raises:
        ValueError: if a name or a shape is not that of a B, or length or direction is not finite, or that is zero.
    """
    layers = lora_layers(model)
    for name, d in direction.items():
        if name not in layers:
            raise ValueError(f"direction: expected names of LoRA layers of this model; got {name!r}")
        if d.shape != layers[name].lora_b.shape:
            raise ValueError(
                f"direction: expected shape {tuple(layers[name].lora_b.shape)} for {name}; got {tuple(d.shape)}"
            )
    size = math.sqrt(sum(d.double().square().sum().item() for d in direction.values()))
    if not 0 < size < math.inf:
        raise ValueError(f"direction: expected a finite direction that is not zero; got length {size}")
    if not math.isfinite(length):
        raise ValueError(f"length: expected a finite number; got {length}")
    before = {name: layers[name].lora_b.detach().clone() for name in direction}
    try:
        for name, d in direction.items():
            layers[name].lora_b.data -= d.to(layers[name].lora_b) * (length / size)
        yield
    finally:
        for name, b in before.items():
            layers[name].lora_b.data.copy_(b)


def _pair(name: str, g: Tensor, h: Tensor) -> tuple[float, float]:
    if g.shape != h.shape:
        raise ValueError(
            f"{name}: expected gradients of one shape; got {tuple(g.shape)} and {tuple(h.shape)}"
        )
    g, h = g.flatten().double(), h.flatten().double()
    sizes = g.norm().item(), h.norm().item()
    if not all(0 < size < float("inf") for size in sizes):
        raise ValueError(f"{name}: expected finite gradients that are not zero; got lengths {sizes}")
    return (g @ h).item() / (sizes[0] * sizes[1]), sizes[1] / sizes[0]
