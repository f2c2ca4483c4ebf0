"""What a QLoRA step costs here, against bitsandbytes + PEFT and against LoRA on the 16-bit base.

    python benchmarks/qlora_step.py [--rounds 7] [--threads 1]

All three do the same steps on SmolLM2-135M: 4 rows of 256 tokens, all scored, r = 8 on all linear layers, AdamW.
They take turns in one process, so that a busy machine slows all of them; the ratio is taken within each round. Peak
memory is measured in a fresh process for each. The losses are printed: a fast step that computes something else
would show there.
"""

import argparse
import json
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402

from qlora_edu import memory, stacks  # noqa: E402
from qlora_edu.training import Batch  # noqa: E402

ROWS, LENGTH = 4, 256
LIMITS = {"libraries": 0.80, "lora16": 1.05}  # what the course promises of course / other
TOLERANCE = 0.02  # of the losses: float32 adapters there, 16-bit products here


def one_step(stack: stacks.Stack, optimizer, batch: Batch) -> tuple[float, float]:
    """Forward, backward, clip, update. Returns seconds and the loss."""
    begin = time.perf_counter()
    loss = stack.loss(stack.model, batch, batch.scored)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin, loss.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    batch = Batch.of(memory.random_rows(ROWS, LENGTH), pad_id=0)
    built = {name: stacks.build(name) for name in stacks.NAMES}
    optimizers = {
        name: torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-3)
        for name, stack in built.items()
    }
    seconds = {name: [] for name in built}
    losses = {name: [] for name in built}
    for stack in built.values():
        stack.model.train()
    for _ in range(options.rounds + 1):
        for name, stack in built.items():
            took, loss = one_step(stack, optimizers[name], batch)
            seconds[name].append(took)
            losses[name].append(loss)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["course"], seconds[name], strict=True))
        for name in LIMITS
    }

    print(
        f"one step of {ROWS} x {LENGTH} tokens, {options.threads} threads, median of {options.rounds} rounds"
    )
    for name, title in stacks.NAMES.items():
        median = statistics.median(seconds[name])
        peak = ""
        if not options.no_memory:
            peak = f"{memory.in_fresh_process('qlora_edu.memory:peak_of_step', name)['peak'] / 1e6:8,.0f} MB peak"
        shown = ", ".join(f"{loss:.4f}" for loss in (losses[name][0], losses[name][-1]))
        print(
            f"{title:<48} {median:6.2f} s {ROWS * LENGTH / median:7.0f} tokens/s  loss first, last {shown} {peak}"
        )
    good = True
    for name, limit in LIMITS.items():
        fine = ratios[name] <= limit
        good &= fine
        print(
            f"course / {name:<10} {ratios[name]:.2f}   (promised: at most {limit:.2f})   {'ok' if fine else 'MISSED'}"
        )
    apart = max(abs(a / b - 1) for a, b in zip(losses["course"], losses["libraries"], strict=True))
    print(
        f"losses of course and libraries differ by at most {apart:.2%}   {'ok' if apart <= TOLERANCE else 'MISSED'}"
    )
    if options.json:
        print(
            json.dumps({"ratios": ratios, "seconds": seconds, "losses": losses, "threads": options.threads})
        )
    return 0 if good and apart <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
