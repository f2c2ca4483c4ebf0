"""What is said about paged and 8-bit optimizers, recomputed. The texts are in `data/claims/paging.toml`."""

import math
from functools import cache

import torch

from qlora_edu import reference
from qlora_edu.claims.ledger import recomputes
from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import shape_of
from qlora_edu.memory.parts import adapter_sizes, optimizer
from qlora_edu.paging import policies, runs, scaled, thresholds
from qlora_edu.training import cosine_with_warmup

GB, MB = 1e9, 1e6
PAGE = 64 * 1024
#: Pages of the five budgets of chapter 07, from all that fits to only the spike.
BUDGETS = {"A": 60, "B": 48, "C": 36, "D": 31, "E": 28}
STEP_TOKENS = 16 * 512  # the paper's batch of 16 rows of 512 tokens
FLOPS = 150e12  # a 48 GB card of that time, at its peak in bfloat16


@cache
def _run(pages: int, paged: bool = True) -> runs.Result:
    return runs.run(pages * PAGE, **({} if paged else {"min_numel": math.inf}))


@cache
def _torch_adamw() -> list[torch.Tensor]:
    """Parameters and states after the same training with torch.optim.AdamW, which knows no budget."""
    model = runs.network()
    adamw = torch.optim.AdamW(model.parameters(), foreach=False)
    for x, y in runs.batches():
        runs.forward_backward(model, x, y)
        adamw.step()
        adamw.zero_grad()
    return [
        tensor
        for p in model.parameters()
        for tensor in (p.detach(), adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"])
    ]


@recomputes("paging-spike")
def a_long_batch() -> dict[str, float]:
    """The little training under budget B, and LLaMA-33B on a card of 24 GiB, with a long row in step 5."""
    paged, plain = _run(BUDGETS["B"]), _run(BUDGETS["B"], paged=False)
    large, large_plain = scaled.simulate(), scaled.simulate(paged=False)
    return {
        "survives": paged.failed is None and large.failed is None,
        "fails": plain.failed,
        "large_fails": large_plain.failed,
        "out": large.memory.bytes_out * scaled.SCALE / GB,
        "peak": scaled.step_of("llama-33b", 2048).peak / GB,
    }


@recomputes("paging-evicted")
def when_pages_move() -> dict[str, float]:
    """In the fifth step of run B: evictions before the activations are freed, and faults after."""
    events = [event for event in _run(BUDGETS["B"]).memory.timeline if event.step == runs.ROWS.index(320) + 1]
    freed = next(i for i, event in enumerate(events) if event.kind == "free")
    early, late = ([event.kind for event in part] for part in (events[:freed], events[freed:]))
    order = "fault" not in early and "evict" not in late
    return {"order": order, "out": early.count("evict"), "back": late.count("fault")}


@recomputes("paging-same-numbers")
def bits_under_five_budgets() -> dict[str, float]:
    """Every parameter and state after eight steps, against torch.optim.AdamW."""
    pairs = [
        pair for pages in BUDGETS.values() for pair in zip(_run(pages).tensors, _torch_adamw(), strict=True)
    ]
    return {
        "compared": sum(mine.numel() for mine, _ in pairs),
        "differ": sum(int((mine != theirs).sum()) for mine, theirs in pairs),
        "moved": _run(BUDGETS["E"]).moved / MB,
    }


@recomputes("paging-free")
def bytes_once_all_is_there() -> dict[str, float]:
    """Bytes moved in run A beyond the first touch; and a sweep that lacks room for one page of 64."""
    memory = _run(BUDGETS["A"]).memory
    touches = policies.sweep(64, 6)
    short = policies.faults(touches, 63)[64:]
    clever = policies.faults(touches, 63, "optimal")[64:]
    return {
        "moved": memory.bytes_in + memory.bytes_out - runs.STATES,
        "room": 100 * 63 / 64,
        "faults": 100 * sum(short) / len(short),
        "optimal": 100 * sum(clever) / len(clever),
    }


@recomputes("paging-125ms")
def a_gigabyte_evicted() -> dict[str, float]:
    """At half of 16 GB/s; and bytes moved for each byte evicted, in the steps of run B after the first."""
    events = [event for event in _run(BUDGETS["B"]).memory.timeline if event.step > 1]
    out = sum(event.kind == "evict" for event in events)
    back = sum(event.kind == "fault" for event in events)
    one = 1 / (16 * 0.5)
    return {"seconds": one * (out + back) / out, "one": one}


@recomputes("paging-same-speed")
def everything_moves_in_every_step() -> dict[str, float]:
    """All states out and in again, beside the arithmetic of a step: 6 operations a weight and token."""
    found = scaled.step_of("llama-65b", 512)
    seconds = 2 * found.parts["optimizer"] / GB / scaled.BUS
    step = 6 * found.shape.parameters * STEP_TOKENS / FLOPS
    return {
        "states": found.parts["optimizer"] / GB,
        "moving": seconds,
        "step": step,
        "share": 100 * seconds / step,
    }


@recomputes("paging-critical")
def without_paging() -> dict[str, float]:
    """The longest row of a step, with the states on the card and without them."""
    found = {}
    for size, card in (("33b", 24), ("65b", 48)):
        found[f"plain{size}"] = scaled.longest(f"llama-{size}", card, False)
        found[f"paged{size}"] = scaled.longest(f"llama-{size}", card, True)
    wide = scaled.step_of("llama-33b", 512, torch.float32).peak
    room = (24 * scaled.GIB - wide) / MB
    return found | {"wide": wide / GB, "room": room, "card": 24 * scaled.GIB / GB}


@recomputes("paging-activations")
def what_calls_get_paged() -> dict[str, float]:
    """bitsandbytes' files that allocate pages; and the little training under a budget below its spike."""
    files = thresholds.callers()
    return {
        "all": any(not file.startswith("optim/") for file in files),
        "files": len(files),
        "fails": _run(BUDGETS["E"] - 1).failed,
    }


@recomputes("paging-all-states")
def states_above_the_threshold() -> dict[str, float]:
    """Tensors of an adapter with at least as many numbers as bitsandbytes' source asks for."""
    small = thresholds.paged("llama-7b", 8, thresholds.ATTENTION)
    large, ours = thresholds.paged("llama-7b", 64), thresholds.paged("smollm2-135m", 8)
    return {
        "small": small.paged,
        "of_small": small.tensors,
        "large": large.paged,
        "of_large": large.tensors,
        "ours": ours.paged,
        "of_ours": ours.tensors,
        "threshold": thresholds.threshold(),
    }


@recomputes("paging-66")
def two_states_of_32_bits() -> dict[str, float]:
    """What was measured, divided; and how many parameters have states of so many bytes."""
    return {"saved": 100 * (2524 - 861) / 2524, "parameters": (2524 - 861) / 8}


@recomputes("paging-8bit")
def eight_bits_and_scales() -> dict[str, float]:
    """A tensor of 2^20 states after a step of bitsandbytes' AdamW8bit; and the adapter of SmolLM2, rank 8."""
    p = torch.nn.Parameter(torch.zeros(2**20))
    p.grad = torch.zeros_like(p)
    adamw = reference.bitsandbytes().optim.AdamW8bit([p])
    adamw.step()
    states = [adamw.state[p][name] for name in ("state1", "state2", "absmax1", "absmax2")]
    sizes = adapter_sizes(shape_of("smollm2-135m"), 8, LLAMA_LINEARS)
    return {
        "large": 100 * (1 - sum(state.nbytes for state in states) / (8 * p.numel())),
        "ours": 100 * (1 - optimizer(sizes, 8) / optimizer(sizes, 32)),
        "small": sum(n < 4096 for n in sizes),
        "tensors": len(sizes),
    }


@recomputes("paging-cosine")
def mean_of_a_schedule() -> dict[str, float]:
    """The mean learning rate as a share of its peak, over the 1,875 steps that Guanaco was trained for."""
    from transformers import get_constant_schedule

    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    constant = get_constant_schedule(adamw)
    shares = []
    for _ in range(1875):
        shares.append(adamw.param_groups[0]["lr"])
        adamw.step()
        constant.step()
    cosine = [cosine_with_warmup(step, 1875, 0) for step in range(1875)]
    return {"mean": sum(shares) / 1875, "cosine": sum(cosine) / 1875}
