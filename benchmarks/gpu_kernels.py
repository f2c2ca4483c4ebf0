"""What the Triton kernels cost on a GPU, beside plain torch and bitsandbytes' CUDA kernels.

    python benchmarks/gpu_kernels.py [--rounds 5] [--json]

The variants of a line take turns; a ratio is taken within each round, and the median of the rounds is printed. A time
is that of the GPU for one call, its cache emptied before. Needs a CUDA device: without one it says so and ends with 2.
"""

import argparse
import json
import statistics
import sys

import torch
from torch.nn import functional as F

SHAPES = [(576, 1536), (4096, 4096), (6656, 17920)]
ROWS = [1, 16, 64, 1024]
OURS, THEIRS, PLAIN = "Triton", "bitsandbytes", "plain torch"


def timed(variants: dict, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, after one that is not counted."""
    from triton.testing import do_bench

    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, function in variants.items():
            times[name].append(do_bench(function, warmup=5, rep=25, return_mode="median"))
    return {name: found[1:] for name, found in times.items()}


def lines(shape: tuple[int, int]):
    """(what, {variant: function}) for a weight of this shape, bfloat16, NF4 in blocks of 64, double quantization."""
    from qlora_edu import blockwise, reference
    from qlora_edu.kernels import decode, triton_decode, triton_product

    functional = reference.bitsandbytes().functional
    rows, columns = shape
    weight = torch.randn(shape, device="cuda").bfloat16()
    q = blockwise.quantize(weight, double_quant=True)
    packed, state = reference.quantize(weight, double_quant=True)
    scales = q.scales()
    yield (
        "quantize",
        {
            PLAIN: lambda: blockwise.quantize(weight),
            THEIRS: lambda: reference.quantize(weight),
        },
    )
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(shape, dtype=dtype, device="cuda")
        single = functional.QuantState(
            reference.scales(state), state.shape, state.code, state.blocksize, state.quant_type, dtype
        )
        yield (
            f"decode to {str(dtype)[6:]}",
            {
                OURS: lambda out=out: triton_decode.decode_into(out.view(-1), q.packed, scales, "nf4", 64),
                PLAIN: lambda out=out: decode.decode_into(out.view(-1), q.packed, scales, "nf4", 64),
                THEIRS: lambda out=out, single=single: functional.dequantize_4bit(packed, single, out=out),
            },
        )
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    def decoded():
        return triton_decode.decode_into(out.view(-1), q.packed, q.scales(), "nf4", 64).view(shape)

    for m in ROWS:
        x = torch.randn(m, columns, device="cuda").bfloat16()
        g = torch.randn(m, rows, device="cuda").bfloat16()
        yield (
            f"x Wᵀ, {m} rows",
            {
                OURS: lambda x=x: triton_product.product(x, q),
                "Triton decode, then torch": lambda x=x: F.linear(x, decoded()),
                THEIRS: lambda x=x: reference.bitsandbytes().matmul_4bit(x, packed.t(), state),
            },
        )
        yield (
            f"g W, {m} rows",
            {
                OURS: lambda g=g: triton_product.product_back(g, q),
                "Triton decode, then torch": lambda g=g: g @ decoded(),
                THEIRS: lambda g=g: g @ functional.dequantize_4bit(packed, state),
            },
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: torch finds no CUDA device on this machine")
        return 2
    import bitsandbytes
    import triton

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}, Python {sys.version.split()[0]}"
    )
    record = []
    for shape in SHAPES:
        print(f"\n{shape[0]:,} × {shape[1]:,}")
        for what, variants in lines(shape):
            times = timed(variants, options.rounds)
            shown = []
            for name, found in times.items():
                ratio = statistics.median(a / b for a, b in zip(found, times[THEIRS], strict=True))
                shown.append(f"{name} {1000 * statistics.median(found):,.1f} µs ({ratio:.2f})")
            print(f"  {what:<36} " + "   ".join(shown), flush=True)
            record.append({"shape": shape, "what": what, "ms": times})
    if options.json:
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
