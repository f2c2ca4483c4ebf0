"""Fine-tuning an adapter: what a step sees, what it minimises, and how a run survives being killed.

Read the modules in this order: `batches` (examples become tokens and steps), `loss` (only answers are scored),
`schedule`, `checkpoint` (a run on disk), `loop` (all of it together).
"""

from qlora_edu.training.batches import Batch, Encoded, encode, encode_all, steps
from qlora_edu.training.checkpoint import CheckpointError
from qlora_edu.training.loop import Run, TrainConfig, train
from qlora_edu.training.loss import answer_loss, library_loss
from qlora_edu.training.schedule import cosine_with_warmup

__all__ = [
    "Batch",
    "CheckpointError",
    "Encoded",
    "Run",
    "TrainConfig",
    "answer_loss",
    "cosine_with_warmup",
    "encode",
    "encode_all",
    "library_loss",
    "steps",
    "train",
]
