"""Quantizing, decoding and multiplying on a CPU, against bitsandbytes: throughput at three shapes.

    python benchmarks/cpu_kernels.py [--rounds 9] [--threads 1] [--json]

bfloat16 weights, NF4, blocks of 64. Both sides take turns in one process; a ratio is taken within each round,
and the median of the rounds is printed with the quartiles. "Reused" is the course's way, into a buffer that
exists; bitsandbytes' CPU operators have none and always make theirs. "Layer" is a whole frozen 4-bit layer with double
quantization on some bfloat16 tokens, forward alone and with the gradient of its input. QLORA_EDU_KERNELS=torch
measures plain torch, for which nothing is promised.
"""

import argparse
import json
import os
import statistics
import sys
import time
from itertools import chain

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from qlora_edu import blockwise, models, qlora, reference
from qlora_edu.kernels import choice
from qlora_edu.parity import differing, stored_weights

SHAPES = [(576, 1536), (4096, 4096), (6656, 17920)]
TOKENS = 64
FORWARD, BACKWARD = f"layer, forward, {TOKENS} tokens", "layer, forward and backward"
PROMISED = {  # of the kernels that are chosen where nothing is asked for
    "quantize": 5.0,
    "decode to float32": 1.5,
    "decode to bfloat16, reused": 1.0,
    FORWARD: 1.0,
    BACKWARD: 1.0,
}
SECONDS = 0.25  # of each measurement, at least one call


def throughput(function, count: int) -> float:
    """Million weights a second."""
    calls, begin = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < SECONDS:
        function()
        calls += 1
    return calls * count / (time.perf_counter() - begin) / 1e6


def lines(shape: tuple[int, int]):
    """(what, the course's function, bitsandbytes' function), and a check that both give the same bits."""
    functional = reference.bitsandbytes().functional
    weight = stored_weights(shape[0] * shape[1]).view(shape).bfloat16()
    ours = blockwise.quantize(weight)
    packed, state = reference.quantize(weight)
    assert differing(ours.packed, packed.flatten())[1] == 0
    yield "quantize", lambda: blockwise.quantize(weight), lambda: reference.quantize(weight)
    for dtype in (torch.float32, torch.bfloat16):
        facts = (state.absmax, state.shape, state.code, state.blocksize, state.quant_type, dtype)
        as_dtype, out = functional.QuantState(*facts), torch.empty(shape, dtype=dtype)

        def theirs(as_dtype=as_dtype):
            return functional.dequantize_4bit(packed, as_dtype)

        if dtype == torch.float32:  # AVX512-BF16 rounds the smallest numbers to zero
            assert differing(ours.dequantize(dtype), theirs())[1] == 0
        what = f"decode to {str(dtype).removeprefix('torch.')}"
        yield what, lambda dtype=dtype: ours.dequantize(dtype), theirs
        yield f"{what}, reused", lambda out=out: ours.dequantize(out=out), theirs


def layers(shape: tuple[int, int]):
    """As `lines`, for whole layers."""
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(stored_weights(shape[0] * shape[1]).view(shape))
    ours, theirs = qlora.NF4Linear.of(linear), reference.linear4bit(linear, torch.bfloat16).train()
    x = stored_weights(TOKENS * shape[1]).view(TOKENS, -1).bfloat16().requires_grad_()
    slope = stored_weights(TOKENS * shape[0]).view(TOKENS, -1).bfloat16()
    y, z = ours(x), theirs(x)
    assert torch.equal(y, z)
    assert torch.equal(*(torch.autograd.grad(out, x, slope)[0] for out in (y, z)))
    yield FORWARD, lambda: ours(x), lambda: theirs(x)

    def both(layer):
        return lambda: torch.autograd.grad(layer(x), x, slope)

    yield BACKWARD, both(ours), both(theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import bitsandbytes

    kernels, reason = choice.chosen(torch.device("cpu"))
    features = ", ".join(sorted(models.cpu_features()))
    print(
        f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, Python {sys.version.split()[0]}, "
        f"{options.threads} threads, kernels: {kernels}; {features}"
    )
    print(reason)
    record, good = [], True
    for shape in SHAPES:
        count = shape[0] * shape[1]
        print(f"{shape[0]:,} × {shape[1]:,}, million weights a second, medians of {options.rounds} rounds")
        for what, ours, theirs in chain(lines(shape), layers(shape)):
            rates = [(throughput(ours, count), throughput(theirs, count)) for _ in range(options.rounds + 1)]
            rates = rates[1:]
            low, ratio, high = statistics.quantiles([a / b for a, b in rates], n=4)
            here, there = (statistics.median(side) for side in zip(*rates, strict=True))
            promise = PROMISED.get(what) if os.environ.get(choice.VARIABLE, "auto") == "auto" else None
            fine = promise is None or ratio >= promise
            good &= fine
            said = "" if promise is None else f"   promised {promise:g}   {'ok' if fine else 'MISSED'}"
            shown = (
                f"{here:8,.0f} here {there:8,.0f} bitsandbytes   ratio {ratio:.2f} ({low:.2f} to {high:.2f})"
            )
            print(f"  {what:<28} {shown}{said}", flush=True)
            record.append({"shape": shape, "what": what, "rates": rates})
    if options.json:
        print(json.dumps({"threads": options.threads, "lines": record}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
