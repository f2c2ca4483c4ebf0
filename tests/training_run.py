"""A small training run as a program of its own, so that a test can kill it. Prints each step that is done.

python training_run.py FOLDER STEP: goes on for at most one step after STEP, then waits for its fate.
"""

import sys

import torch

from qlora_edu import models, qlora, tasks, training


def ingredients(dropout: float = 0.0):
    """The tiny twin with a QLoRA adapter, and 40 examples in its tokens."""
    model, tokenizer = models.tiny(dtype=torch.bfloat16)
    torch.manual_seed(0)
    qlora.add_qlora(model, r=4, alpha=8, compute_dtype=None if dropout else torch.bfloat16, dropout=dropout)
    return model, training.encode_all(tasks.tool_calls(n_train=40, n_eval=1).train, tokenizer)


def config(**changes) -> training.TrainConfig:
    return training.TrainConfig(**{"steps": 12, "batch_size": 4, "checkpoint_every": 3, **changes})


def report(step: int, loss: float) -> None:
    print(step, flush=True)
    if step > int(sys.argv[2]):
        sys.stdin.readline()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, rows = ingredients(dropout=0.1)
    training.train(model, rows, config(), folder=sys.argv[1], progress=False, after_step=report)
