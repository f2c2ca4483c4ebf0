"""What each 4-bit format costs a real model: the loss per token with all its linear weights rounded to the format.

The model is SmolLM2-135M in float32, so that the numbers are the same on every machine; the text is the beginning of
each of the course's twelve passages. A measurement takes a few seconds and is made once in a process.

    python -m qlora_edu.format_losses     measures all formats on the whole passages: about six minutes
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from qlora_edu import formats, models, perplexity, rounding
from qlora_edu.rounded_weights import linear_layers

TOKENS = 64  # read of each passage, 63 of them scored
BLOCK_SIZE = 64


def int4_zero_point(weight: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """Min-max 4-bit integers whose grid is shifted, by at most half a step, until zero lies on it.

    The step is Δ = (max - min)/15 of the block, with zero between min and max; the zero point z = round(-min/Δ) is
    the code of zero; a weight becomes (clamp(round(w/Δ) + z, 0, 15) - z)·Δ. `rounding.round_trip(weight, 4,
    symmetric=False)` is the same without the shift. weight: whole blocks. Returns float32, in weight's shape.
    """
    if not isinstance(weight, Tensor) or weight.numel() == 0 or weight.numel() % block_size:
        raise ValueError(f"weight: expected a tensor of whole blocks of {block_size}. Cut or pad it first.")
    blocks = weight.detach().float().reshape(-1, block_size)
    low = blocks.amin(dim=1, keepdim=True).clamp(max=0)
    step = (blocks.amax(dim=1, keepdim=True).clamp(min=0) - low) / 15
    step = torch.where(step > 0, step, 1.0)
    zero = (-low / step).round()
    codes = ((blocks / step).round() + zero).clamp(0, 15)
    return ((codes - zero) * step).view(weight.shape)


def nf4_zero_moved(to: float) -> Tensor:
    """NF4 with one level changed: `to` instead of zero."""
    levels = formats.levels("nf4").clone()
    levels[7] = to
    return levels


def _through(levels: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weight: formats.round_trip(weight, levels(), BLOCK_SIZE)


#: What is done to a weight, by the name under which it stands in tables: (out, in) -> (out, in), float32.
ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        label: _through(partial(formats.levels, name))
        for label, name in {
            "NF4": "nf4",
            "AF4": "af4",
            "Lloyd-Max": "lloyd-max",
            "Lloyd-Max with 0": "lloyd-max-zero",
            "E2M1": "e2m1",
            "FP4": "fp4",
            "E3M0": "e3m0",
            "INT4 absmax": "int4",
            "16 steps": "uniform16",
            "16 steps with 0": "uniform16-zero",
        }.items()
    },
    "NF4, zero at 0.02": _through(partial(nf4_zero_moved, 0.02)),
    "NF4, zero at -0.02": _through(partial(nf4_zero_moved, -0.02)),
    "NF4 mirrored": _through(lambda: -formats.levels("nf4").flip(0)),
    "INT4 min-max": lambda weight: rounding.round_trip(weight, 4, symmetric=False, block_size=BLOCK_SIZE),
    "INT4 min-max with 0": int4_zero_point,
}


@dataclass(frozen=True, eq=False)
class Loss:
    """What came out.

    Attributes:
        nll: float64 (scored,), -ln p of each token in nats.
        lengths: how many of them belong to each passage.
        error: ‖w - ŵ‖ / ‖w‖ over the weights that were rounded.
    """

    nll: Tensor
    lengths: tuple[int, ...]
    error: float

    @property
    def perplexity(self) -> float:
        return perplexity.perplexity(self.nll)

    def added_to(self, other: "Loss") -> tuple[float, float]:
        """The mean of this loss minus that of another, and its standard error over passages, in nats per token."""
        difference = (self.nll - other.nll).mean().item()
        return difference, perplexity.paired_standard_error(other.nll, self.nll, self.lengths)


@cache
def base():
    """(model, tokenizer): SmolLM2-135M in float32."""
    return models.load(dtype=torch.float32, progress=False)


def measure(name: str | None = None, only: str = "", tokens: int | None = TOKENS) -> Loss:
    """The loss with the weights of every linear layer sent through a format.

    It is computed once for each function in ROUND_TRIPS: a name that is given to another one is measured anew.

    Args:
        name: a key of ROUND_TRIPS; None leaves the weights as they are.
        only: round the layers whose name contains this, such as "v_proj"; all by default.
        tokens: read so many of each passage; None for all, which takes four times as long.

    Raises:
        ValueError: for an unknown name, or if no layer's name contains `only`.
    """
    if name is not None and (not isinstance(name, str) or name not in ROUND_TRIPS):
        raise ValueError(f"name: expected one of {', '.join(map(repr, ROUND_TRIPS))}; got {name!r}.")
    if not isinstance(only, str) or not any(only in n for n in linear_layers(base()[0])):
        raise ValueError(f"only: expected a part of a layer's name, such as 'v_proj'; got {only!r}.")
    return _measure(None if name is None else ROUND_TRIPS[name], only, tokens)


@cache
def _measure(function: Callable[[Tensor], Tensor] | None, only: str, tokens: int | None) -> Loss:
    if function is None:
        return loss_with(lambda name, weight: None, tokens)
    return loss_with(lambda name, weight: function(weight) if only in name else None, tokens)


def loss_with(change: Callable[[str, Tensor], Tensor | None], tokens: int | None = TOKENS) -> Loss:
    """The loss of the base model with other weights in its linear layers.

    Args:
        change: (name, weight) -> the weight to take instead, float32 (out, in), or None to leave it; called for one
            layer after the other, in the model's order.
        tokens: as in `measure`.
    """
    model, tokenizer = base()
    names = iter(linear_layers(model))
    lost = size = 0.0

    def rounded(weight: Tensor) -> Tensor:
        nonlocal lost, size
        other = change(next(names), weight)
        if other is None:
            return weight
        lost += (other - weight).square().sum(dtype=torch.float64).item()
        size += weight.square().sum(dtype=torch.float64).item()
        return other

    texts = perplexity.passages()
    lengths = tuple(perplexity.scored_lengths(tokenizer, texts, tokens))
    with perplexity.rounded_weights(model, rounded):
        nll = perplexity.token_nll(model, tokenizer, texts, tokens)
    return Loss(nll, lengths, (lost / size) ** 0.5 if size else 0.0)


def main() -> None:
    """Print what every format adds to the loss on all tokens of the passages, and how far it is from NF4."""
    whole, nf4 = measure(tokens=None), measure("NF4", tokens=None)
    print(f"{len(whole.nll):,} tokens; loss added, and against NF4, in nats a token, ± its standard error")
    for name in ROUND_TRIPS:
        found = measure(name, tokens=None)
        added, rival = found.added_to(whole), found.added_to(nf4)
        print(f"{name:<20} {added[0]:6.3f} ± {added[1]:.3f}  {rival[0]:+6.3f} ± {rival[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
