"""Bytes: what a training step needs, predicted and measured.

    memory.predict("llama-65b", "qlora", rank=64, checkpointing=True).peak     before anything is loaded
    memory.in_fresh_process("qlora_edu.memory.steps:peak_of_method", "qlora")  what a process really takes

Read the modules in this order: `shapes` (how many numbers, and where), `parts` (what stands still in a step),
`activations` and `moments` (what comes and goes), `predicted` (all of it together), `trace` (asking autograd and the
allocator), `measured` (asking the operating system), `steps` (the three methods on the real model).
"""

from qlora_edu.memory.measured import (
    FAITHFUL,
    PeakMemory,
    in_fresh_process,
    peak_of_step,
    random_rows,
    resident,
)
from qlora_edu.memory.predicted import METHODS, PARTS, WEIGHTS, Memory, predict
from qlora_edu.memory.shapes import NAMED, Shape, shape_of
from qlora_edu.memory.trace import Timeline, kept_by_forward, kept_on_meta, timeline

__all__ = [
    "FAITHFUL",
    "METHODS",
    "NAMED",
    "PARTS",
    "WEIGHTS",
    "Memory",
    "PeakMemory",
    "Shape",
    "Timeline",
    "in_fresh_process",
    "kept_by_forward",
    "kept_on_meta",
    "peak_of_step",
    "predict",
    "random_rows",
    "resident",
    "shape_of",
    "timeline",
]
