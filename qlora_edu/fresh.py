"""What a new process makes of files that another one saved."""

import torch

from qlora_edu import adapters, answers, models, qlora, tasks


def answers_from_disk(folder: str, count: int, dtype: str = "bfloat16") -> dict:
    """Load the base model and an adapter from a folder, and answer the first `count` requests of `new_both`.

    Meant for `memory.in_fresh_process`: nothing is left of the process that trained.
    """
    compute = getattr(torch, dtype)
    model, tokenizer = models.load(dtype=compute)
    qlora.quantize_model(model, compute_dtype=compute)
    adapters.load_adapter(model, folder, compute_dtype=compute)
    examples = tasks.tool_calls().new_both[:count]
    return {"answers": answers.answer_requests(model, tokenizer, examples)}
