"""What storing the scales in fewer bits costs a real model: its loss per token with NF4 codes and other scales.

The codes of all 210 linear layers are computed once, with exact scales, as bitsandbytes does; then the scales alone
are sent through a way of storing them, and the model reads the beginning of each of the course's twelve passages. As
in `format_losses`, whose base model, texts and `Loss` these are, all is float32.

    python -m qlora_edu.scale_losses     measures all ways on the whole passages: some minutes
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from qlora_edu import blockwise, format_losses, stored
from qlora_edu.blockwise import QuantizedTensor
from qlora_edu.double_quantization import QuantizedScales, quantize_scales
from qlora_edu.format_losses import TOKENS, Loss
from qlora_edu.rounded_weights import linear_layers
from qlora_edu.second_level import store


def double(scales: Tensor) -> Tensor:
    """Scales as QLoRA and bitsandbytes store them, float32 (n,)."""
    return quantize_scales(scales).dequantize()


def triple(scales: Tensor) -> Tensor:
    """The same, with the second-level scales stored in 8 bits as well."""
    second = quantize_scales(scales)
    return QuantizedScales(
        second.codes, quantize_scales(second.absmax).dequantize(), second.offset
    ).dequantize()


def noisy(scales: Tensor, seed: int, size: float = 0.00341) -> Tensor:
    """Nothing is rounded: normal noise is added, `size` of the scales' root mean square (here that of "uniform").

    The numbers are stored ones (`stored.normals`), the same on every machine. The place where they begin is a checksum
    of the seed and the scales, so that each matrix gets others. scales: finite. seed: 0 or more.
    """
    normals = stored.normals()
    start = zlib.crc32(scales.cpu().numpy().tobytes(), seed) % len(normals)
    places = (start + torch.arange(len(scales))) % len(normals)
    return scales + size * scales.double().square().mean().sqrt().float() * normals[places]


#: What is done to the scales of a matrix, by the name under which it stands in tables: (n,) -> (n,), float32.
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "32 bits": lambda scales: scales,
    "dynamic": double,
    "three times": triple,
    "dynamic, no mean": partial(store, offset=False),
    "uniform": partial(store, grid="uniform"),
    "min-max": partial(store, grid="min-max"),
    "dynamic, 6 bits": partial(store, bits=6),
    "dynamic, 5 bits": partial(store, bits=5),
    "dynamic, 4 bits": partial(store, bits=4),
    "min-max, 5 bits": partial(store, grid="min-max", bits=5),
    "min-max, 4 bits": partial(store, grid="min-max", bits=4),
    "e4m3": partial(store, grid="e4m3"),
    **{f"noise, seed {seed}": partial(noisy, seed=seed) for seed in (1, 2, 3)},
}


@cache
def quantized() -> dict[str, QuantizedTensor]:
    """NF4 in blocks of 64, with 32-bit scales, of each linear layer by its name: 60 MB."""
    layers = linear_layers(format_losses.base()[0])
    return {name: blockwise.quantize(layer.weight) for name, layer in layers.items()}


def measure(name: str, tokens: int | None = TOKENS) -> Loss:
    """The loss with NF4 weights whose scales are stored in one of WAYS; `error` is that of the weights.

    It is computed once for each function in WAYS: a name that is given to another function is measured anew.

    Args:
        name: a key of WAYS.
        tokens: read so many of each passage; None for all, which takes four times as long.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in WAYS:
        raise ValueError(f"name: expected one of {', '.join(map(repr, WAYS))}; got {name!r}.")
    return _measure(WAYS[name], tokens)


@cache
def _measure(way: Callable[[Tensor], Tensor], tokens: int | None) -> Loss:
    layers = quantized()

    def change(name: str, weight: Tensor) -> Tensor:
        layer = layers[name]
        return replace(layer, stored_scales=way(layer.stored_scales)).dequantize()

    return format_losses.loss_with(change, tokens)


def main() -> None:
    """Print what each way adds to the loss with 32-bit scales on all tokens of the passages."""
    plain = measure("32 bits", tokens=None)
    print(f"{len(plain.nll):,} tokens; against 32-bit scales, in nats a token, ± its standard error")
    for name in WAYS:
        difference, deviation = measure(name, tokens=None).added_to(plain)
        print(f"{name:<18} {difference:+8.4f} ± {deviation:.4f}", flush=True)


if __name__ == "__main__":
    main()
