"""One QLoRA step of a model that is too large for this machine in 16 bits, in real memory.

    python -m qlora_edu.bigstep --shape llama-33b

The model has the shape of the real one and random weights, which take the same bytes and the same time. It is built in
4 bits, one matrix at a time, so that no more than one matrix is ever there in 16 bits. Then comes a whole step: rank 16
on all linear layers, gradient checkpointing, AdamW with its states made before. What each part takes is predicted first
(`memory.predict`), and a model that would not fit is refused with the sum.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_edu import limits, memory, models
from qlora_edu.blockwise import quantize
from qlora_edu.kernels import choice
from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory import steps
from qlora_edu.memory.shapes import config_of
from qlora_edu.qlora import NF4Linear, QLoRALinear
from qlora_edu.training import answer_loss

DTYPE = torch.bfloat16
SPREAD = 0.02  # standard deviation of the random weights, LLaMA's own at the start
PROCESS = 700_000_000  # bytes for Python, torch, transformers, and the one matrix that is not yet in 4 bits


class TooLarge(RuntimeError):
    """The step would not fit into this machine's free memory."""


def predicted(shape: str, rank: int, length: int, batch: int) -> memory.Memory:
    """Bytes of the step of a model of this shape, as `step` does it."""
    return memory.predict(shape, "qlora", rank=rank, length=length, batch=batch, checkpointing=True)


def check_room(plan: memory.Memory, available: int) -> None:
    """Raise TooLarge, with the sum, unless the step fits into so many bytes."""
    if plan.peak + PROCESS > available:
        terms = [f"{what} {size / 1e9:.2f}" for what, size in plan.at_peak.items() if size]
        raise TooLarge(
            f"{plan.shape.name}: the step takes {(plan.peak + PROCESS) / 1e9:.1f} GB, and {available / 1e9:.1f} GB are "
            f"free.\nGB: {' + '.join(terms)} + process {PROCESS / 1e9:.2f}\n"
            "A smaller shape, rank or length helps; other programs may be in the way."
        )


def build(shape: str, rank: int = 16, seed: int = 0, said: Callable[[str], None] = print) -> nn.Module:
    """A transformers model of this shape: random weights, every linear layer but the last in NF4 with an adapter.

    Args:
        shape: a name of `memory.NAMED`, or what else `memory.shape_of` takes.
        said: told of every tenth block.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=DTYPE)
    torch.manual_seed(seed)
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    draw = _drawer(max(layer.weight.numel() for layer in layers))
    for number, block in enumerate(model.model.layers, start=1):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                base = NF4Linear(quantize(draw(module.weight.shape), double_quant=True), compute_dtype=DTYPE)
                block.set_submodule(name, QLoRALinear(base, rank, 2 * rank, compute_dtype=DTYPE))
        if number % 10 == 0:
            said(f"{number} of {len(model.model.layers)} blocks, {memory.resident() / 1e9:.2f} GB")
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # embedding, output layer, norms
            owner, _, last = name.rpartition(".")
            norm = parameter.dim() == 1
            data = torch.ones(parameter.shape, dtype=DTYPE) if norm else draw(parameter.shape).clone()
            setattr(model.get_submodule(owner), last, nn.Parameter(data, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table was on the meta device
    return model


def _drawer(largest: int) -> Callable[[torch.Size], Tensor]:
    """A function that gives random matrices. They are windows of one store, since drawing 33 billion takes long:
    to be used before the next one is asked for, and not to be written to."""
    store = torch.empty(largest + 2**20, dtype=DTYPE).normal_(std=SPREAD)

    def draw(shape: torch.Size) -> Tensor:
        if shape.numel() > largest:
            return torch.empty(shape, dtype=DTYPE).normal_(std=SPREAD)
        start = int(torch.randint(2**20, ()))
        return store[start : start + shape.numel()].view(shape)

    return draw


def step(model: nn.Module, length: int = 64, batch: int = 1) -> dict[str, dict]:
    """One training step, and what each part of it took: {part: {"seconds", "peak"}}, peak in bytes of this process."""
    found = {}
    begin = time.perf_counter()
    with memory.PeakMemory() as peak:
        stages = steps.stages(model, answer_loss, batch, length, checkpointing=True)
    found["states"] = {"seconds": time.perf_counter() - begin, "peak": peak.bytes}
    for name, stage in stages.items():
        begin = time.perf_counter()
        with memory.PeakMemory() as peak:
            stage()
        found[name] = {"seconds": time.perf_counter() - begin, "peak": peak.bytes}
    return found


def _warm_up(rank: int) -> None:
    """A step of a tiny model, after which the process has loaded what it needs whatever the model."""
    model, _ = models.tiny(dtype=DTYPE)
    steps.convert(model, "qlora", rank)
    step(model, length=8)


def run(shape: str, rank: int = 16, length: int = 64, batch: int = 1, said=print) -> dict:
    """Predict, build, step. Returns what was found, as JSON can carry it.

    Raises:
        TooLarge: before anything is built.
    """
    plan = predicted(shape, rank, length, batch)
    check_room(plan, limits.memory_available())
    _warm_up(rank)
    process = memory.resident()
    begin = time.perf_counter()
    model = build(shape, rank, said=said)
    built = time.perf_counter() - begin
    loaded = memory.resident()
    parts = step(model, length, batch)
    linears = [m.base.quantized for m in model.modules() if isinstance(m, QLoRALinear)]
    return {
        "shape": shape,
        "parameters": plan.shape.parameters,
        "rank": rank,
        "length": length,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "kernels": choice.chosen(torch.device("cpu"))[0],
        "torch": torch.__version__,
        "predicted": {name: size for name, size in plan.at_peak.items() if size},
        "predicted_peak": plan.peak,
        "process": process,
        "build_seconds": built,
        "loaded": loaded,
        "bytes_a_weight": sum(q.nbytes for q in linears) / sum(q.numel for q in linears),
        "step": parts,
        "peak": max(part["peak"] for part in parts.values()),
    }


def report(found: dict) -> str:
    """What `run` found, to read."""
    lines = [
        f"{found['shape']}: {found['parameters']:,} parameters, random; rank {found['rank']} on "
        f"{', '.join(LLAMA_LINEARS)}; {found['batch']} × {found['length']} tokens; {found['threads']} threads",
        f"built in {found['build_seconds']:.0f} s, {found['bytes_a_weight']:.4f} bytes a quantized weight",
        "",
        "predicted at the fullest moment",
        *(f"  {what:<22} {size / 1e9:8.3f} GB" for what, size in found["predicted"].items()),
        f"  {'together':<22} {found['predicted_peak'] / 1e9:8.3f} GB = {found['predicted_peak'] / 2**30:.2f} GiB",
        "",
        "measured",
        f"  {'process, empty':<22} {found['process'] / 1e9:8.3f} GB",
        f"  {'model built':<22} {found['loaded'] / 1e9:8.3f} GB",
        *(
            f"  {name:<22} {part['peak'] / 1e9:8.3f} GB {part['seconds']:8.1f} s"
            for name, part in found["step"].items()
        ),
        f"  {'peak':<22} {found['peak'] / 1e9:8.3f} GB = {found['peak'] / 2**30:.2f} GiB",
        "",
        f"measured without the process / predicted: {(found['peak'] - found['process']) / found['predicted_peak']:.3f}",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_edu.bigstep", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=list(memory.NAMED))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="on busy cores, 1 is faster"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        found = run(options.shape, options.rank, options.length, options.batch)
    except (TooLarge, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(found))
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
