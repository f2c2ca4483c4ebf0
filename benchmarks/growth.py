"""How cost grows: with the number of weights, the length of a sequence, the batch and the rank.

    python benchmarks/growth.py [--out benchmarks/records] [--threads 1] [--quick]

Each cost is the median of three after one that is not counted. The exponent of a power law is fitted to the
upper half of the points, in logarithms; what lies below is start-up. The last part compares the peak memory of
a step, measured in fresh processes, with chapter 01's prediction. Writes growth.png and growth.json into the
folder.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

from qlora_edu import blockwise, memory, plots, stacks
from qlora_edu.training import Batch

SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16)
RANKS = (1, 4, 16, 64, 256)


def seconds(function) -> float:
    function()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def exponent(x, y) -> float:
    """The slope of log y over log x, by least squares, in the upper half of the points."""
    half = len(x) // 2
    a, b = ([math.log(value) for value in values[half:]] for values in (x, y))
    return statistics.linear_regression(a, b).slope


def by_weights(sizes) -> dict[str, list[float]]:
    """Seconds to quantize bfloat16 weights and to decode them to bfloat16, into a buffer."""
    found = {"quantize": [], "decode": []}
    pool = torch.empty(min(max(sizes), 10**8), dtype=torch.bfloat16).normal_()
    for size in sizes:
        weight = pool[:size] if size <= len(pool) else pool.repeat(size // len(pool))
        found["quantize"].append(seconds(lambda weight=weight: blockwise.quantize(weight, double_quant=True)))
        stored, out = blockwise.quantize(weight, double_quant=True), torch.empty_like(weight)
        del weight
        found["decode"].append(seconds(lambda stored=stored, out=out: stored.dequantize(out=out)))
    return found


def step_of(r: int = 8):
    """A function of (rows, length) that does a whole QLoRA step of SmolLM2-135M."""
    stack = stacks.build("course", r=r)
    stack.model.train()
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(rows: int, length: int) -> None:
        batch = Batch.of(memory.random_rows(rows, length), pad_id=0)
        stack.loss(stack.model, batch, batch.scored).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peaks(lengths) -> dict[str, list[float]]:
    """Bytes of a step beyond the process, predicted and measured."""
    predicted, measured = [], []
    for length in lengths:
        plan = memory.predict("smollm2-135m", "qlora", rank=8, length=length, batch=1)
        found = memory.in_fresh_process("qlora_edu.memory.steps:peak_of_method", "qlora", 1, length)
        predicted.append(plan.peak)
        measured.append(found["peak"] - found["base"])
    return {"predicted": predicted, "measured": measured}


def drawn(parts: dict, folder: Path) -> None:
    plots.use_style()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, (unit, x, lines)) in zip(axes.flat, parts.items(), strict=False):
        for name, y in lines.items():
            slope = exponent(x, y)
            axis.loglog(x, y, "o-", label=f"{name}: exponent {slope:.2f}")
        axis.set(title=title, xlabel=unit, ylabel="bytes" if "peak" in title else "seconds")
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
        if axis.get_ylim()[1] < 100 * axis.get_ylim()[0]:  # few powers of ten: more numbers
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.legend()
    for axis in axes.flat[len(parts) :]:
        axis.axis("off")
    figure.savefig(folder / "growth.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes only, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few = 3 if options.quick else None
    sizes, lengths, batches, ranks = SIZES[:few], LENGTHS[:few], BATCHES[:few], RANKS[:few]

    parts = {"weights": ("weights", sizes, by_weights(sizes))}
    step = step_of()
    parts["a step, one row"] = (
        "tokens", lengths, {"length": [seconds(lambda n=n: step(1, n)) for n in lengths]},
    )  # fmt: skip
    parts["a step, rows of 64 tokens"] = (
        "rows", batches, {"batch": [seconds(lambda n=n: step(n, 64)) for n in batches]},
    )  # fmt: skip
    del step
    by_rank = []
    for rank in ranks:
        step = step_of(rank)
        by_rank.append(seconds(lambda step=step: step(1, 256)))
    parts["a step of 256 tokens"] = ("rank", ranks, {"rank": by_rank})
    parts["peak of a step, one row"] = ("tokens", lengths, peaks(lengths))

    for title, (unit, x, lines) in parts.items():
        for name, y in lines.items():
            shown = "  ".join(f"{a:,}: {b:.3g}" for a, b in zip(x, y, strict=True))
            print(f"{title}, {name} over {unit}: exponent {exponent(x, y):.2f}\n    {shown}")
    apart = parts["peak of a step, one row"][2]
    ratios = [m / p for m, p in zip(apart["measured"], apart["predicted"], strict=True)]
    print(
        "measured / predicted peak:", "  ".join(f"{n}: {r:.2f}" for n, r in zip(lengths, ratios, strict=True))
    )
    options.out.mkdir(parents=True, exist_ok=True)
    drawn(parts, options.out)
    facts = {"threads": options.threads, "torch": torch.__version__, "parts": parts}
    (options.out / "growth.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
